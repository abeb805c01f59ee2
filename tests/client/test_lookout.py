"""Looks of a worker at a site's records: all that they watch, and none of them in the time of an answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from digits import digits, encoded
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from timed_site import Clock

from fedveil.client import app, deadline, lookout, process, worker
from fedveil.client import site as site_module
from fedveil.client.deadline import Deadline
from fedveil.client.lookout import Lookout
from fedveil.client.process import SiteProcess
from fedveil.common import files
from fedveil.common.bundle import own_digest
from fedveil.common.config.flat import Columns, Scalar
from fedveil.common.config.sections import DataConfig
from fedveil.common.config.text import to_toml
from fedveil.common.data import rows
from fedveil.common.messages.round import Refusal
from fedveil.common.runtime import NODE_TOO, NotOurNode
from fedveil.common.tasks.cell_files import cell_file
from fedveil.common.tasks.cells import names_no_file
from fedveil.common.tasks.image_classification import ImageClassification

PICTURES = DataConfig(labels="0,1", partition="iid", columns=Columns({"image": "image", "label": "label"}))
NAMES = ("a.png", "deep/b.png", "broken.png", "absent.png", "../outside.png")


pytestmark = pytest.mark.usefixtures("fresh_process")


# --- files that cells name --------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table that names two images, one that is broken, one that is not there, and one outside its folder."""
    own = tmp_path / "own"
    (own / "deep").mkdir(parents=True)
    for name, (pixels, _) in zip(NAMES[:2], digits(count=2), strict=True):
        (own / name).write_bytes(encoded(pixels))
    (own / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nhello")
    (own / "beside.png").write_bytes(b"no cell names it")
    (tmp_path / "outside.png").write_bytes(b"nobody's")
    lines = [f"{name},{i % 2}" for i, name in enumerate(NAMES)]
    (own / "table.csv").write_text("\n".join(["image,label", *lines]) + "\n", encoding="utf-8")
    return own / "table.csv"


def read(table: Path) -> int:
    """Return how many records this process holds of a table, read now unless it has been."""
    reading = site_module._own_data(PICTURES, ImageClassification.name, str(table), "clinic", False)
    return len(reading.dataset.examples)


def grown(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encoded(digits(count=3)[2][0]))


def put_in_place(path: Path) -> None:
    """Put another file of as many bytes there that says it was written when this one was, as cp -p or tar would."""
    other, before = path.with_suffix(".new"), path.stat()
    other.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "nothing": (lambda own: None, False),
    "an image is deleted": (lambda own: (own / "a.png").unlink(), True),
    "an image is replaced": (lambda own: grown(own / "deep/b.png"), True),
    "an image is replaced, of one size and time": (lambda own: put_in_place(own / "deep/b.png"), True),
    "a broken one is mended": (lambda own: grown(own / "broken.png"), True),
    "a missing one is there": (lambda own: grown(own / "absent.png"), True),
    "the table": (lambda own: (own / "table.csv").write_text("image,label\na.png,0\n", encoding="utf-8"), True),
    "a file that no cell names": (lambda own: grown(own / "beside.png"), False),
    "a file outside the folder": (lambda own: grown(own.parent / "outside.png"), False),
}


def check_that_changes_are_seen(table: Path, what: str) -> None:
    act, seen = CHANGES[what]
    own = Lookout({"data": str(table), "ledger": str(table.with_name("none.sqlite"))})
    own.look()
    assert read(table) == 2
    assert not own.look()
    act(table.parent)
    assert own.look() is seen, what
    assert own.changed is seen


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_that_a_cell_names_is_watched_as_the_table_is(table: Path, what: str) -> None:
    check_that_changes_are_seen(table, what)


def test_a_lookout_by_size_and_time_of_writing_is_found(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(path: str | Path) -> Any:
        found = files.state_of(path)
        return found and (found[0], found[2])

    monkeypatch.setattr(rows, "state_of", written)
    monkeypatch.setattr(lookout, "state_of", written)
    with pytest.raises(AssertionError, match="of one size"):
        check_that_changes_are_seen(table, "an image is replaced, of one size and time")


def plant_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the table alone, as it was."""
    image, label = ImageClassification.roles
    monkeypatch.setattr(ImageClassification, "roles", (replace(image, file=names_no_file), label))


@pytest.mark.parametrize("what", ["an image is deleted", "an image is replaced"])
def test_a_lookout_for_the_table_alone_is_found(table: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_one_file(monkeypatch)
    with pytest.raises(AssertionError, match=what):
        check_that_changes_are_seen(table, what)


def test_a_file_that_changes_while_it_is_read_counts_as_changed(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = rows._record

    def late(*words: Any) -> Any:
        found = record(*words)
        grown(table.with_name("a.png"))
        return found

    own = Lookout({"data": str(table), "ledger": str(table.with_name("none.sqlite"))})
    monkeypatch.setattr(rows, "_record", late)
    read(table)
    assert own.look()


def test_what_a_cell_names_is_what_is_opened(table: Path) -> None:
    own = table.parent
    hub = {"bytes": None, "path": "a.png"}
    assert cell_file(" a.png ", own) == cell_file(hub, own) == own / "a.png"
    for cell in (b"bytes", {"bytes": b"x", "path": "a.png"}, None, "../a.png", "/a.png", "..\\a.png", "C:a.png", 3):
        assert cell_file(cell, own) is None
    assert cell_file("a.png", None) is None
    assert rows.state_of(own / "a\0b.png") is rows.state_of(own) is None


# --- tasks ------------------------------------------------------------------------------------------------------------


def asked(node: dict[str, Scalar]) -> tuple[Message, Context]:
    metadata = Metadata(1, "one", 1, 7, "", "1", time.time(), 600.0, "train")
    return make_message(metadata, RecordDict()), Context(1, 7, dict(node), RecordDict(), {}, series_id=0)


def records_of_two_tasks(table: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return of how many records two tasks are answered, between which a steward deletes one's image."""
    held, node = list[int](), {"data": str(table), "ledger": str(table.with_name("none.sqlite"))}

    def answered(*_: Any) -> Refusal:
        held.append(read(table))
        return Refusal("1", 1, "clinic", "policy", "no")

    monkeypatch.setattr(app, "answer", answered)
    app.process.keep_lookout(Lookout(node))
    for _ in range(2):
        app.train(*asked(node))
        table.with_name("a.png").unlink(missing_ok=True)
    return held


def test_no_task_is_answered_of_an_image_that_was_deleted(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert records_of_two_tasks(table, monkeypatch) == [2, 1]


def test_a_deleted_image_that_is_used_on_is_found(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_one_file(monkeypatch)
    assert records_of_two_tasks(table, monkeypatch) == [2, 2]


# --- time -------------------------------------------------------------------------------------------------------------


class Queue:
    """A node that is given a task at each of these times, and then is somebody else's, which ends the worker."""

    def __init__(self, node: dict[str, Scalar], clock: Clock, arrivals: list[float]) -> None:
        self.node, self.clock, self.arrivals = node, clock, list(arrivals)
        self.answered: list[float] = []

    def acquire(self) -> str:
        self.clock.sleep(0.003)
        if not self.arrivals:
            raise NotOurNode("enough")
        return "token" if self.arrivals[0] <= self.clock.now else ""

    @contextmanager
    def task(self, _: str) -> Iterator[Queue]:
        del self.arrivals[0]
        yield self

    def pull(self) -> tuple[Message, Context, bytes]:
        return *asked(self.node), b""

    def push(self, *_: Any) -> None:
        self.answered.append(self.clock.now)


FILES, REPLY_AFTER, IDLE = 30, 5.0, 20.0
ARRIVALS = [1000.0, 1001.0, 1002.0, *(1016.0 + 7.03 * i for i in range(12)), *(1130.0 + 0.7 * i for i in range(9))]
"""Three at once, some while it is idle, and more than it answers at a time from before it has been idle for long."""


def node_in(folder: Path, reply_after: float) -> dict[str, Scalar]:
    policy = folder / "policy.toml"
    policy.write_text(to_toml({"reply-after": reply_after}), encoding="utf-8")
    return {"data": str(folder / "records"), "ledger": str(folder / "none.sqlite"), "policy": str(policy)}


def times(tmp_path: Path, look: float, free: float, plant: Callable[[pytest.MonkeyPatch], object]) -> list[float]:
    """Return when a site with ``reply-after`` answers.

    Args:
        tmp_path: where its files are.
        look: seconds that it takes to look at one of them.
        free: seconds that it takes to drop what is held of records.
        plant: changes the worker.
    """
    own, clock = tmp_path / "records", Clock()
    for i in range(FILES):
        (own / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (own / str(i % 3) / f"{i}.png").touch()
    node, state_of = node_in(tmp_path, REPLY_AFTER), lookout.state_of

    def slow(path: str | Path) -> Any:
        clock.sleep(look)
        return state_of(path)

    with pytest.MonkeyPatch.context() as patch:
        for module in (worker, process, lookout, deadline):
            patch.setattr(module, "time", clock)
        patch.setattr(worker, "IDLE_SECONDS", IDLE)
        patch.setattr(worker, "bundle_digest", lambda *_, **__: own_digest())
        patch.setattr(lookout, "state_of", slow)
        patch.setattr(SiteProcess, "forget", lambda _: clock.sleep(free))
        patch.setattr(app, "answer", lambda *_: Refusal("1", 1, "clinic", "policy", "no"))
        patch.setattr(process, "Deadline", lambda seconds: Deadline(seconds, began=clock.monotonic()))
        plant(patch)
        queue = Queue(node, clock, ARRIVALS)
        assert worker.work(queue, node) == NODE_TOO  # type: ignore[arg-type]
    assert len(queue.answered) == len(ARRIVALS)
    return queue.answered


def check_that_no_look_shows(tmp_path: Path, plant: Callable[[pytest.MonkeyPatch], object] = lambda _: None) -> None:
    quick, slow = (times(tmp_path, look, free, plant) for look, free in ((0.0, 0.0), (0.04, 1.0)))
    assert quick == pytest.approx(slow, abs=1e-6), "when an answer leaves follows from how many files there are"


def test_an_answer_leaves_at_the_same_time_however_long_a_look_takes(tmp_path: Path) -> None:
    check_that_no_look_shows(tmp_path)


def whole_look_when_idle(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lookout, "go_on", Lookout.look)


def look_before_a_task_is_taken(patch: pytest.MonkeyPatch) -> None:
    acquire = Queue.acquire

    def late(queue: Queue) -> str:
        if app.process.lookout is not None:
            app.process.lookout.look()
        return acquire(queue)

    patch.setattr(Queue, "acquire", late)


def look_before_the_time_runs(patch: pytest.MonkeyPatch) -> None:
    def late(seconds: float) -> Deadline:
        if app.process.lookout is not None:
            app.process.lookout.look()
        return Deadline(seconds, began=lookout.time.monotonic())

    patch.setattr(process, "Deadline", late)


def drop_at_any_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(process, "FORGET_SECONDS", 0.0)


PLANTED = [whole_look_when_idle, look_before_a_task_is_taken, look_before_the_time_runs, drop_at_any_time]


@pytest.mark.parametrize("plant", PLANTED)
def test_a_look_or_a_drop_that_shows_in_the_time_of_an_answer_is_found(
    plant: Callable[[pytest.MonkeyPatch], object], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="how many files"):
        check_that_no_look_shows(tmp_path, plant)


def test_a_look_that_goes_on_in_slices_sees_what_a_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        (tmp_path / f"{i}.csv").touch()
    monkeypatch.setattr(lookout, "LOOK_SECONDS", -1.0)
    monkeypatch.setattr(lookout, "SLICE_SECONDS", 0.0)  # one file at a time
    own = Lookout({"data": str(tmp_path), "ledger": str(tmp_path.with_name("none.sqlite"))})
    for _ in range(6):
        own.go_on()
    (tmp_path / "3.csv").write_text("more")
    went_on = 0
    while not own.changed:
        own.go_on()
        went_on += 1
    assert went_on <= 12
    assert Lookout({}).look() is False, "a site that plays a part of public data has no file"


def test_records_below_the_home_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.csv").touch()
    own = Lookout({"data": "~/own.csv", "ledger": str(tmp_path / "none.sqlite")})
    assert not own.look()
    (tmp_path / "own.csv").write_text("more")
    assert own.look()


def test_a_link_to_a_folder_is_looked_at_and_not_into(tmp_path: Path) -> None:
    """As the records are read: one that leads upwards would have a look go round in a circle."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "1.png").touch()
    (tmp_path / "good" / "round").symlink_to(tmp_path)
    found = sorted(lookout._own_files({"data": str(tmp_path)}))
    assert found == [str(tmp_path / "good" / name) for name in ("1.png", "round")]


def test_a_drop_that_takes_longer_than_it_may_is_said_at_the_site(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times(tmp_path, 0.0, process.FORGET_SECONDS + 0.5, lambda _: None)
    assert "asked for a task 0.50 seconds late" in caplog.text


@pytest.mark.parametrize(("own", "looks"), [(False, 0), (True, 1)], ids=["refused", "answered"])
def test_a_bundle_is_refused_before_any_file_is_looked_at(
    own: bool, looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That answer does not wait."""
    node, looked = node_in(tmp_path, reply_after=0.01), list[str]()
    monkeypatch.setattr(Lookout, "look", lambda _: looked.append("look"))
    monkeypatch.setattr(worker, "bundle_digest", lambda *_, **__: own_digest() if own else "0" * 64)
    app.process.keep_lookout(Lookout(node))
    worker.reply_to(*asked(node), b"", node)
    assert len(looked) == looks
