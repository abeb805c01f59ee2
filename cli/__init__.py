"""The ``fedveil`` command line: one module for each group of commands, with their help and their errors."""

from fedveil.common.threads import begin_process

begin_process()
