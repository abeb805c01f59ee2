"""Cores of a site, threads of a process, and their environment before torch is imported."""

from __future__ import annotations

import os
from contextlib import suppress

THREADS = "OMP_NUM_THREADS"
"""Environment variable with the number of threads of one process, which torch and NumPy's libraries read once."""
CORES = "FEDVEIL_CORES"
"""Environment variable with the number of CPU cores that a site computes with; not set: all that it may use."""
OURS = "FEDVEIL_PROCESS"
"""Environment variable of processes that FedVeil starts: their threads are FedVeil's to set."""

DEFAULTS = {
    # Threads that wait for each other would spin: on a machine that is busy otherwise a pass of a small encoder then
    # takes sixty times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # PEFT loads bitsandbytes, which marks optimisers to be compiled that nothing here uses: the compiler's import alone
    # is a fifth of the time that a process needs for its imports.
    "TORCHDYNAMO_DISABLE": "1",
}
"""What a process of FedVeil's has in its environment where its user says nothing else."""


def begin_process() -> None:
    """Set the environment of a process of FedVeil's own, and of all that it starts, before torch is imported."""
    os.environ.update(environment())


def environment() -> dict[str, str]:
    """Return this process's environment as ``begin_process`` would make it, for a process that it starts."""
    return {**DEFAULTS, **os.environ, OURS: "1"}


def is_ours() -> bool:
    """Return whether FedVeil has started this process; a user's own keeps its number of threads and how they count."""
    return OURS in os.environ


def site_cores() -> int:
    """Return how many CPU cores a site may call its own, at least 1, whatever threads one process has.

    That is the process's CPU affinity, capped by a container's CPU quota and by ``FEDVEIL_CORES``.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
        quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    return max(1, min(cores, _number(CORES, cores)))


def own_threads() -> int:
    """Return how many threads this process may compute with: a site's cores, capped by ``OMP_NUM_THREADS``.

    A worker of Ray's has what Ray assigned to it there. Two processes with more threads than cores slow each other down
    fivefold.
    """
    cores = site_cores()
    return max(1, min(cores, _number(THREADS, cores)))


def _number(variable: str, absent: int) -> int:
    """Return the number in an environment variable, of a list its first, as OpenMP allows one."""
    value = os.environ.get(variable, "").split(",")[0]
    return int(value) if value.isdigit() else absent
