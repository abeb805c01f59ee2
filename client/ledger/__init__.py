"""A site's ledger: the durable record of what its records have cost, which enforces their budget."""
