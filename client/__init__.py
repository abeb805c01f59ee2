"""A site: its records, ledger and policy, and its part of a round. Never imports ``server``."""
