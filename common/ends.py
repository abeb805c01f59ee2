"""Ends that come from outside: a signal to a command takes the way of Ctrl-C, so that what it started ends with it."""

from __future__ import annotations

import signal


def end_as_by_ctrl_c() -> None:
    """Let SIGTERM, and the SIGHUP of a terminal that closes, end this process as Ctrl-C does.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _end)


def _end(number: int, _: object) -> None:
    raise KeyboardInterrupt(f"Ended by {signal.Signals(number).name}. Privacy already spent stays spent.")
