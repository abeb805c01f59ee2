"""The coordinator: the round loop, aggregation, evaluation, records. Never imports ``client``."""

from fedveil.server.submission import refuse_wrong_settings

refuse_wrong_settings()
