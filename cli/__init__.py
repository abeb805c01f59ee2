"""The ``fedveil`` command: every subcommand, its words and its errors."""
