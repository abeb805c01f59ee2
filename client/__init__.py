"""A site: its data, its ledger, and its part of a round. Never imports ``server``."""
