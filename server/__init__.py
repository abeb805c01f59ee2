"""The coordinator: the round loop, aggregation, evaluation, records. Never imports ``client``."""
