"""The ledger of a site: what its records have paid, durable, and enforced where they are."""
