"""One server writes a run's folder; who asks whether it is written stands in nobody's way."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread

import pytest

from fedveil.common.errors import RunFailed
from fedveil.server.lock import is_written, only_writer


def test_a_second_writer_is_refused_and_the_end_of_the_first_lets_it_in(tmp_path: Path) -> None:
    assert not is_written(tmp_path / "not there")
    with only_writer(tmp_path):
        assert is_written(tmp_path)
        with pytest.raises(RunFailed, match="is under way"), only_writer(tmp_path, patience=0.0):
            pass
        assert is_written(tmp_path), "the refused writer took the lock of the first away"
    assert not is_written(tmp_path)
    with only_writer(tmp_path, patience=0.0):
        pass
    assert not list(tmp_path.iterdir()), "the lock left a file"


def test_a_writer_that_begins_while_somebody_asks_is_not_refused(tmp_path: Path) -> None:
    asked, held = Event(), Event()

    def ask() -> None:
        with only_writer(tmp_path):
            held.set()
            asked.wait(0.2)

    thread = Thread(target=ask)
    thread.start()
    held.wait(5)
    with only_writer(tmp_path):
        pass
    thread.join()
