"""A site's name is the one that the coordinator registered its key under, whatever its replies say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty_rounds import Faulty, plain

from fedveil.common.errors import DataError
from fedveil.common.messages.round import Refusal, TrainResult, TrainTask
from fedveil.common.messages.wire import decode_reply, encode_reply
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.deploy import start
from fedveil.deploy.commands import superlink_environment
from fedveil.deploy.server_folder import make_server
from fedveil.experiments.in_process import run_in_process
from fedveil.server.members import mark_of
from fedveil.server.registered import NODES, misnamed, names_in, registered_names

pytestmark = pytest.mark.rough_prices

RUN = "named"
NAMES = {0: "site-0", 1: "site-1", 2: "site-2"}


class Impostor(Faulty):
    """Node 0 answers as site-1, whose node has a larger number: without a table the first to answer has the name."""

    names: Mapping[int, str] | None = NAMES
    says: str = "site-1"
    refuses = False

    def registered(self) -> Mapping[int, str] | None:
        return self.names

    def deliver(self, node: int, task: TrainTask, content: Any) -> Any:
        record = super().deliver(node, task, content)
        if node != 0:
            return record
        if self.refuses:
            return encode_reply(Refusal(task.run, task.round_number, self.says, "policy", "never"))
        honest = decode_reply(record, self._layout_of_round(task.round_number), task.run, task.round_number)
        assert isinstance(honest, TrainResult)
        return encode_reply(replace(honest, site=self.says))


def rounds(settings: dict[str, Any], **changes: Any) -> list[RoundLine]:
    kind = type("Kind", (Impostor,), changes)
    return read_lines(RoundLine, run_in_process(plain(settings), 3, RUN, kind))


def test_a_registered_site_that_states_anothers_name_is_dropped_and_the_other_counts(
    toy_settings: dict[str, Any],
) -> None:
    for line in rounds(toy_settings):
        assert line.participants == ["site-1", "site-2"]
        (failure,) = line.failures
        assert (failure.site, failure.kind) == ("site-0", "reply")
        assert failure.reason == "this node's key is registered as site-0, and the reply names site-1"


def test_a_run_that_believes_the_name_in_the_reply_shuts_the_owner_out(toy_settings: dict[str, Any]) -> None:
    """The fault: no table. The impostor has the name from round 1 on; who owns it pays and never counts."""
    lines = rounds(toy_settings, names=None)
    assert [line.participants for line in lines] == [["site-1", "site-2"]] * 2
    assert [line.failures[0].site for line in lines] == [mark_of(1, RUN)] * 2, "the fault is not found"


def test_a_node_that_the_table_lacks_is_dropped(toy_settings: dict[str, Any]) -> None:
    for line in rounds(toy_settings, names={1: "site-1", 2: "site-2"}, says="site-9"):
        assert line.participants == ["site-1", "site-2"]
        assert line.failures[0].site == mark_of(0, RUN)
        assert "fedveil server register" in line.failures[0].reason


def test_a_refusal_is_recorded_under_the_registered_name(toy_settings: dict[str, Any]) -> None:
    for line in rounds(toy_settings, refuses=True):
        assert [(f.site, f.kind) for f in line.failures] == [("site-0", "policy")]


def test_a_site_with_a_new_key_keeps_its_name_although_its_old_node_passes_for_online(
    toy_settings: dict[str, Any],
) -> None:
    """Node 0 counts as site-1 in round 1. Then site-1 is revoked and registered anew, as node 1."""

    class Renewed(Impostor):
        def registered(self) -> Mapping[int, str]:
            return {0: "site-1", 2: "site-2"} if self.sent <= 1 else {1: "site-1", 2: "site-2"}

        def deliver(self, node: int, task: TrainTask, content: Any) -> Any:
            record = super().deliver(node, task, content)
            honest = decode_reply(record, self._layout_of_round(task.round_number), task.run, task.round_number)
            assert isinstance(honest, TrainResult)
            return encode_reply(replace(honest, public_size=60))

    lines = read_lines(RoundLine, run_in_process(plain(toy_settings), 3, "renewed", Renewed))
    assert [line.participants for line in lines] == [["site-1", "site-2"]] * 2
    assert [line.failures[0].site for line in lines] == [mark_of(1, "renewed"), mark_of(0, "renewed")]


def test_names_are_read_anew_and_a_file_without_a_number_names_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NODES, raising=False)
    assert registered_names() is None
    monkeypatch.setenv(NODES, str(tmp_path))
    for name, text in (("ward.id", "18446744073709551615\n"), ("half.id", ""), ("odd.id", "x1"), ("ward.pub", "7")):
        (tmp_path / name).write_text(text)
    assert registered_names() == {2**64 - 1: "ward"}
    (tmp_path / "clinic.id").write_text("5\n")
    assert registered_names() == {2**64 - 1: "ward", 5: "clinic"}


def test_a_table_that_cannot_be_read_stops_the_run_rather_than_that_names_are_believed(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="registered sites cannot be read"):
        rounds(toy_settings, registered=lambda _: names_in(tmp_path / "gone"))


@pytest.mark.usefixtures("programs_may_start")
def test_the_server_is_started_with_the_table_whoever_sends_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NODES, raising=False)
    server, started = make_server(tmp_path / "server", ["127.0.0.1"]), list[dict[str, str]]()
    monkeypatch.setattr(start.os, "execve", lambda _, __, environment: started.append(environment))
    start.start_server(server, lambda line: None)
    assert started[0][NODES] == str(server.nodes)
    monkeypatch.setenv(NODES, "/coordinator/nodes")
    assert superlink_environment(server, tmp_path)[NODES] == "/coordinator/nodes"


def test_a_number_that_is_not_text_names_nobody(tmp_path: Path) -> None:
    (tmp_path / "ward.id").write_bytes(b"\xff\xfe7")
    (tmp_path / "clinic.id").write_text("7\n", encoding="utf-8")
    assert names_in(tmp_path) == {7: "clinic"}


def test_a_table_without_a_name_lets_nobody_answer_and_is_no_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every site may be revoked while a run goes on: then its server believes no name."""
    monkeypatch.setenv(NODES, str(tmp_path))
    assert registered_names() == {}
    assert "fedveil server register" in misnamed(7, "ward", {})
    assert misnamed(7, "ward", None) == ""
    assert misnamed(7, "ward", {7: "ward", 8: "clinic"}) == ""
    assert misnamed(8, "ward", {7: "ward", 8: "clinic"}) == (
        "this node's key is registered as clinic, and the reply names ward"
    )
    monkeypatch.setenv(NODES, "")
    assert registered_names() is None, "a variable that names nothing names no folder"


def test_a_file_names_its_node_by_one_number_in_plain_digits_under_its_whole_name(tmp_path: Path) -> None:
    (tmp_path / "st.mary.id").write_text("5\n")
    (tmp_path / "did.id").write_text("6")
    others = {"raised": "²", "arabic": "٣", "signed": "-7", "many": "8 9", "grouped": "1_0", "long": "9" * 5000}
    for name, text in others.items():
        (tmp_path / f"{name}.id").write_text(text, encoding="utf-8")
    assert names_in(tmp_path) == {5: "st.mary", 6: "did"}


def test_a_file_that_is_gone_names_nobody_and_one_that_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "clinic.id").write_text("5\n")
    (tmp_path / "ward.id").symlink_to(tmp_path / "revoked")
    assert names_in(tmp_path) == {5: "clinic"}, "a site that is shut out as the folder is read stops a run"
    (tmp_path / "lab.id").mkdir()
    with pytest.raises(DataError, match="registered sites cannot be read"):
        names_in(tmp_path)


def test_of_two_names_for_one_node_the_last_in_order_holds_however_the_folder_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("clinic", "ward"):
        (tmp_path / f"{name}.id").write_text("5\n")
    listed = sorted(tmp_path.iterdir())
    for order in (listed, listed[::-1]):
        monkeypatch.setattr(Path, "iterdir", lambda _, order=order: iter(order))
        assert names_in(tmp_path) == {5: "ward"}
