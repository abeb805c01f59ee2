"""Ends that come from outside: a signal to a command takes the way of Ctrl-C, so that what it started ends with it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_as_by_ctrl_c() -> None:
    """Let SIGTERM, and the SIGHUP of a terminal that closes, end this process as Ctrl-C does.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _end)


def _end(number: int, _: object) -> None:
    raise KeyboardInterrupt(f"Ended by {signal.Signals(number).name}. Privacy already spent stays spent.")


@contextmanager
def ends_wait() -> Iterator[None]:
    """Let what would end this process wait until the block ends: a site that has paid for a round answers it.

    Who asks a second time is not kept waiting. Outside the main thread, which alone hears of signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    usual: dict[int, Any] = {each: signal.getsignal(each) for each in ENDS if callable(signal.getsignal(each))}

    def hear(number: int, frame: FrameType | None) -> None:
        if heard:
            usual[number](number, frame)
        heard.append((number, frame))

    for each in usual:
        signal.signal(each, hear)
    try:
        yield
    finally:
        for each, handler in usual.items():
            signal.signal(each, handler)
    if heard:
        usual[heard[0][0]](*heard[0])
