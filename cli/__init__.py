"""The ``fedveil`` command line: one module for each group of commands, with their help and their errors."""

import os

# Before torch is imported, and for every process that a command starts. Threads that wait for each other would spin: on
# a machine that is busy otherwise a pass of a small encoder then takes sixty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
