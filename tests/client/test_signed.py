"""Signatures of tasks and answers: what is not the server's, or not the site's, is found before anything follows."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from signed_tasks import ANSWER, ASKED, SETTINGS, TASK, World, block_with, body_with, data_of, header, result

from fedveil.common.errors import DataError, ProtocolError
from fedveil.common.messages import signed
from fedveil.common.messages.round import KeyTask
from fedveil.common.messages.signed import Asked, SiteKeys, check_task, digest, is_answer, sign_answer, sign_task
from fedveil.common.messages.wire import encode_reply, encode_task
from fedveil.deploy import start
from fedveil.deploy.certificates import Issued, new_authority, new_server_certificate, new_task_certificate
from fedveil.deploy.server_folder import TASKS, check_tasks, make_server, renew_server
from fedveil.deploy.site_folder import make_site
from fedveil.server.own_check import FOLDER
from fedveil.server.signing import CERTIFICATE, read_tasks_key, signing_of


def signed_task(parties: World, asked: Asked = ASKED, folder: Path | None = None) -> RecordDict:
    record = encode_task(TASK)
    sign_task(record, asked, *read_tasks_key(folder or parties.server.path))
    return record


def check(parties: World, record: RecordDict, asked: Asked = ASKED, now: datetime | None = None) -> bytes:
    task = asked.task(record)
    check_task(record, task, parties.keys.authority, now)
    return digest(task)


def added(record: RecordDict, name: str, one: Any) -> RecordDict:
    record[name] = one
    return record


def renamed(record: RecordDict) -> RecordDict:
    record["basis"] = record.array_records["adapter"]
    del record["adapter"]
    return record


ALTERED: dict[str, Callable[[RecordDict], RecordDict]] = {
    "another round": lambda record: body_with(record, 1, 4),
    "another kind": lambda record: body_with(record, 0, 2),
    "another run's name": lambda record: body_with(record, 7, ord("2")),
    "another nonce": lambda record: header(record, nonce=bytes(16)),
    "another protocol": lambda record: header(record, protocol=7),
    "another number": lambda record: block_with(record, data=data_of(record)[:-1] + b"\x01"),
    "a number less": lambda record: block_with(record, data=data_of(record)[:-4]),
    "another shape": lambda record: block_with(record, shape=(2, 2)),
    "another type": lambda record: block_with(record, stype="f64le"),
    "a block renamed": renamed,
    "a block more": lambda record: added(record, "basis", record.array_records["adapter"]),
    "an empty block more": lambda record: added(record, "basis", ArrayRecord({})),
    "a field more": lambda record: header(record, more=1),
    "another type of field": lambda record: header(record, body="text"),
    "a header more": lambda record: added(record, "more", ConfigRecord({"a": 1})),
    "a metric": lambda record: added(record, "more", MetricRecord({"a": 1.0})),
    "no header": lambda record: RecordDict({"adapter": record.array_records["adapter"]}),
}
"""What whoever hands a message on could change in it."""


def test_a_task_as_the_server_signed_it_is_taken_and_one_that_is_encoded_anew_is_another(parties: World) -> None:
    first, second = signed_task(parties), signed_task(parties)
    assert check(parties, first) == check(parties, first) != check(parties, second)


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED)
def test_a_task_that_was_altered_is_refused(change: Callable[[RecordDict], RecordDict], parties: World) -> None:
    with pytest.raises(ProtocolError):
        check(parties, change(signed_task(parties)))


OTHERS = {
    "another run": replace(ASKED, run="18"),
    "another site": replace(ASKED, node=8),
    "another figure": replace(ASKED, settings={**SETTINGS, "privacy.epsilon": 9.0}),
    "another type": replace(ASKED, settings={**SETTINGS, "rounds": 2.0}),
    "a truth value for a number": replace(ASKED, settings={**SETTINGS, "head.train": 1}),
    "a text for a number": replace(ASKED, settings={**SETTINGS, "rounds": "2"}),
    "a setting more": replace(ASKED, settings={**SETTINGS, "seed": 1}),
    "a setting less": replace(ASKED, settings={"rounds": 2}),
    "a value under another name": replace(ASKED, settings={**SETTINGS, "strategy": "x", "y": "fed-sb"}),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_task_for_another_run_site_or_settings_is_refused(other: Asked, parties: World) -> None:
    with pytest.raises(ProtocolError, match="not of this message, run, site and settings"):
        check(parties, signed_task(parties, other))


def test_each_attempt_at_a_sum_is_signed_for_itself(parties: World) -> None:
    record, again = (encode_task(KeyTask("17", 3, attempt)) for attempt in (0, 1))
    sign_task(record, ASKED, *read_tasks_key(parties.server.path))
    fields = record.config_records["header"]
    moved = header(again, nonce=fields["nonce"], signature=fields["signature"], certificate=fields["certificate"])
    check(parties, record)
    with pytest.raises(ProtocolError, match="not of this message"):
        check(parties, moved)


@pytest.mark.parametrize("lost", ["signature", "certificate"])
@pytest.mark.parametrize("wrong", [None, "text", 7, True])
def test_a_task_without_signature_or_certificate_is_refused(lost: str, wrong: Any, parties: World) -> None:
    with pytest.raises(ProtocolError, match="not signed"):
        check(parties, header(signed_task(parties), **{lost: wrong}))
    with pytest.raises(ProtocolError):
        check(parties, header(signed_task(parties), **{lost: b""}))


def test_only_a_certificate_that_signs_tasks_of_this_authority_does(parties: World) -> None:
    """A registered site, another federation, the server's TLS key, and the authority itself sign in vain."""

    def under(issued: Issued) -> RecordDict:
        record = signed_task(parties)
        return header(record, certificate=signed.certificate_der(issued.certificate))

    with pytest.raises(ProtocolError, match="none of this federation's authority"):
        check(parties, signed_task(parties, folder=parties.others.path))
    authority = parties.authority()
    for issued in (new_server_certificate(["127.0.0.1"], authority), new_authority("x"), authority):
        with pytest.raises(ProtocolError, match="certificate"):
            check(parties, under(issued))
    own = new_task_certificate(authority)
    with pytest.raises(ProtocolError, match="not of this message"):
        check(parties, under(own))  # of another key than the one that signed
    # Planted: whoever takes any certificate of the authority takes the TLS server's.
    (folder := parties.site.parent / "tls").mkdir(exist_ok=True)
    server = new_server_certificate(["127.0.0.1"], authority)
    (folder / TASKS).write_bytes(own.key + server.certificate)
    with pytest.raises(ProtocolError, match="not one that signs tasks"):
        check(parties, signed_task(parties, folder=folder))


def test_a_certificate_that_signs_tasks_serves_no_tls(parties: World, tmp_path: Path) -> None:
    made = new_task_certificate(parties.authority())
    (tmp_path / "tasks.crt").write_bytes(made.certificate)
    words = ["openssl", "verify", "-CAfile", str(parties.server.path / "ca.crt")]
    for purpose, fits in (("sslserver", False), ("sslclient", False), ("any", True)):
        done = subprocess.run(
            [*words, "-purpose", purpose, str(tmp_path / "tasks.crt")], capture_output=True, check=False
        )
        assert (done.returncode == 0) is fits, (purpose, done.stdout, done.stderr)


def test_a_certificate_holds_from_its_first_to_its_last_day(parties: World) -> None:
    record = signed_task(parties)
    for days, holds in ((-1, False), (0, True), (396, True), (398, False)):
        now = datetime.now(UTC) + timedelta(days=days)
        if holds:
            check(parties, record, now=now)
        else:
            with pytest.raises(ProtocolError, match="fedveil server renew"):
                check(parties, record, now=now)


# Answers.
def answered(parties: World, task: bytes = b"\7" * 32, **changes: Any) -> RecordDict:
    record = encode_reply(replace(ANSWER, **changes))
    sign_answer(record, task, parties.keys)
    return record


def test_an_answer_is_taken_as_it_was_signed_over_its_task(parties: World) -> None:
    for record in (answered(parties), result(parties)):
        assert is_answer(record, b"\7" * 32, parties.public)
        assert not is_answer(record, b"\x08" * 32, parties.public), "an answer to another task, or an earlier one"


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED)
def test_an_answer_that_was_altered_is_not_taken(change: Callable[[RecordDict], RecordDict], parties: World) -> None:
    assert not is_answer(change(result(parties)), b"\7" * 32, parties.public)


def test_an_answer_by_another_key_without_a_signature_or_with_the_tasks_own_is_not_taken(parties: World) -> None:
    stranger = make_site(parties.site.parent / "ward", "ward", "127.0.0.1", policy="").path
    keys = SiteKeys.read(parties.server.path / "ca.crt", stranger / "node.key")
    forged = encode_reply(ANSWER)
    sign_answer(forged, b"\7" * 32, keys)
    assert is_answer(forged, b"\7" * 32, (stranger / "node.pub").read_bytes())
    assert not is_answer(forged, b"\7" * 32, parties.public)
    for wrong in (None, b"", "text", 1, bytes(104)):
        assert not is_answer(header(answered(parties), signature=wrong), b"\7" * 32, parties.public)
    for public in (b"", b"ecdsa-sha2-nistp384 AAAA clinic", b"no key"):
        assert not is_answer(answered(parties), b"\7" * 32, public)
    task = signed_task(parties)
    assert not is_answer(task, digest(ASKED.task(task)), parties.public)


@pytest.mark.parametrize("odd", [{"shape": (1 << 70,)}, {"shape": "x"}, {"stype": "\ud800"}, {"dtype": None}])
def test_whatever_a_peer_writes_into_a_message_is_no_answer_and_no_error(odd: dict[str, Any], parties: World) -> None:
    record = result(parties)
    for name, value in odd.items():
        record.array_records["adapter"]["state"].__dict__[name] = value
    assert not is_answer(record, b"\7" * 32, parties.public)
    assert not is_answer(header(result(parties), protocol=1 << 63), b"\7" * 32, parties.public)


# The server's folder.
def test_a_server_does_not_start_with_a_key_that_sites_refuse(
    parties: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start.os, "execve", lambda *_: pytest.fail("it starts"))
    monkeypatch.setattr(start, "require_system_entropy", lambda: None)
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    own, path = (server.path / TASKS).read_bytes(), server.path / TASKS
    assert path.stat().st_mode & 0o777 == 0o600
    key, mark, certificate = own.partition(CERTIFICATE)
    others = (parties.others.path / TASKS).read_bytes().partition(CERTIFICATE)
    for content in (b"", key, mark + certificate, others[0] + mark + certificate, b"".join(others)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="fedveil server renew"):
            start.start_server(server, lambda line: None)
    path.unlink()
    with pytest.raises(DataError, match="fedveil server renew"):
        start.start_server(server, lambda line: None)
    renew_server(server)
    check_tasks(server.path)
    assert path.read_bytes() != own, "the renewal leaves the key that signs tasks to expire"


def test_what_signs_is_found_by_the_folder_that_the_superlink_names(
    parties: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    assert signing_of("17", SETTINGS) is None
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(DataError, match="the key that signs tasks cannot be read"):
        signing_of("17", SETTINGS)
    monkeypatch.setenv(FOLDER, str(parties.server.path))
    signing = signing_of("17", SETTINGS)
    assert signing is not None
    record = encode_task(TASK)
    assert signing.sign(record, 7) == check(parties, record)
