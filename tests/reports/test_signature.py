"""A signed run says whose it is, and holds for every byte that is given to others; nothing else passes for one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from carded_runs import with_adapter
from made_run import MadeRun
from report_forms import audit_file, fedveil, found

from fedveil.common.errors import DataError
from fedveil.common.files import replace_file
from fedveil.privacy.figures import epsilon_text
from fedveil.reports import ReportData, report_of, write_reports
from fedveil.reports.declared import declare
from fedveil.reports.signature import EVIDENCE, SIGNATURE, STATEMENT, members, sign

pytestmark = pytest.mark.rough_prices


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A finished run of three rounds, with an adapter."""
    run = MadeRun(tmp_path / "run", {"rounds": 3}).start().round(1, 0.71).round(2, 0.74).round(3, 0.76).end()
    return with_adapter(run)


@pytest.fixture
def signed(made: MadeRun, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Sign the run's report with a new key and return what says whether a folder's report is genuine."""
    made.audited("audit.json", audit_file(found("kills")))
    assert fedveil("keygen", tmp_path / "server.pem")[0] == 0
    assert fedveil("report", made.folder, "--sign", tmp_path / "server.pem")[0] == 0
    return lambda folder=made.folder, key="server": fedveil("verify", folder, "--key", tmp_path / f"{key}.pub.pem")


def test_a_signed_report_is_valid_until_a_byte_of_any_form_changes(
    made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    key = tmp_path / "server.pem"
    assert key.stat().st_mode & 0o077 == 0, "others can read the private key"
    assert fedveil("keygen", key)[0] == 1, "a key was overwritten"
    assert fedveil("keygen", tmp_path / "other.pem")[0] == 0
    code, words = signed()
    assert (code, words.startswith("valid: "), words.count("\n")) == (0, True, 1)
    assert signed(made.folder / "report.json")[0] == 0
    code, words = signed(key="other")
    assert (code, "not the signer's key" in words) == (1, True)
    assert fedveil("report", made.folder)[0] == 0
    assert signed()[0] == 0, "the same report needs no new key"
    adapter = ("README.md", "adapter_config.json", "adapter_model.safetensors", "fedveil.json", "head.safetensors")
    forms = ("report.json", "report.md", "report.html", "audit.json")
    assert members(made.folder) == sorted([*forms, *(f"adapter/{name}" for name in adapter)])
    for name in (*members(made.folder), "report.signed.json"):
        content = (made.folder / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            (made.folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            code, words = signed()
            assert (code, words.startswith("invalid: "), words.count("\n")) == (1, True, 1), name
            assert name in words
        (made.folder / name).write_bytes(content)


def test_a_private_key_in_the_place_of_the_public_one_is_told_apart(
    made: MadeRun, signed: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    private, public = tmp_path / "server.pem", tmp_path / "server.pub.pem"
    code, said = fedveil("verify", made.folder, "--key", private)
    assert (code, f"is a private key, and a signature is verified with the public one: name {public}" in said) == (
        1,
        True,
    )
    public.rename(tmp_path / "elsewhere.pem")
    assert "public one: ask the server's owner for it" in fedveil("verify", made.folder, "--key", private)[1]
    private.write_text("no key")
    assert "holds no public key in PEM" in fedveil("verify", made.folder, "--key", private)[1]
    assert signed("elsewhere")[0] == 1, "there is no such file"


def test_a_file_that_is_missing_or_came_later_is_found(made: MadeRun, signed: Callable[..., tuple[int, str]]) -> None:
    for name in members(made.folder):
        content = (made.folder / name).read_bytes()
        (made.folder / name).unlink()
        code, words = signed()
        assert (code, f"{name} was signed, and is missing" in words, words.count("\n")) == (1, True, 1)
        (made.folder / name).write_bytes(content)
    assert signed()[0] == 0
    for name in ("audit-2.json", "adapter/adapter_model.bin", "adapter/deep/down.safetensors"):
        (made.folder / name).parent.mkdir(exist_ok=True)
        (made.folder / name).write_bytes(b"{}")
        code, words = signed()
        assert (code, f"{name} in" in words, "came after" in words) == (1, True, True), f"{name} passes for signed"
        (made.folder / name).unlink()
    (made.folder / "adapter" / "elsewhere").symlink_to(made.folder.parent)
    assert signed()[0] == 1, "a folder behind a link passes for signed"


@pytest.mark.parametrize("age", [0.0, 3600.0], ids=["of a process that is gone", "old"])
def test_what_a_killed_report_left_is_neither_signed_nor_kept(
    age: float, made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    """And what another process writes at the moment stays."""
    with subprocess.Popen(["sleep", "30"]) as other:
        gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
        owner = other.pid if age else int(gone.stdout)
        left = [made.folder / name for name in (f".report.md.{owner}.tmp", f"adapter/.README.md.{owner}.tmp")]
        for path in left:
            path.write_bytes(b"half")
            os.utime(path, (time.time() - age,) * 2)
        (made.folder / f".progress.json.{other.pid}.tmp").write_bytes(b"half")
        (made.folder / ".notes.tmp").write_bytes(b"a person's")
        fedveil("report", made.folder, "--sign", tmp_path / "server.pem")
        assert not [path for path in left if path.exists()]
        assert {path.name for path in made.folder.glob(".*.tmp")} == {f".progress.json.{other.pid}.tmp", ".notes.tmp"}
        other.kill()
    assert not [name for name in members(made.folder) if name.endswith(".tmp")]
    assert signed()[0] == 0


def test_ctrl_c_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "report.md", b"half")
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_an_adapter_is_refused_whatever_it_leads_to(
    made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    """What it leads to is the signed content today; whoever may write there changes it after everybody has looked."""
    adapter = made.folder / "adapter"
    shutil.copytree(adapter, tmp_path / "elsewhere")
    (adapter / "head.safetensors").unlink()
    (adapter / "head.safetensors").symlink_to(tmp_path / "elsewhere" / "head.safetensors")
    code, words = signed()
    assert (code, "adapter/head.safetensors is a link" in words) == (1, True), words
    shutil.rmtree(adapter)
    adapter.symlink_to(tmp_path / "elsewhere")
    code, words = signed()
    assert (code, "adapter is a link" in words) == (1, True), words
    adapter.unlink()
    shutil.copytree(tmp_path / "elsewhere", adapter)
    assert signed()[0] == 0


def test_an_adapter_of_a_lower_rank_is_signed_as_the_whole_one_is(
    made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    """A strategy whose adapter may be cut exports every rank, and who is given one loads it as any other."""
    cut = made.folder / "ranks" / "1" / "adapter_model.safetensors"
    cut.parent.mkdir(parents=True)
    cut.write_bytes(b"cut")
    code, words = signed()
    assert (code, "ranks/1/adapter_model.safetensors in" in words, "came after" in words) == (1, True, True), words
    assert fedveil("report", made.folder, "--sign", tmp_path / "server.pem")[0] == 0
    assert signed()[0] == 0
    cut.write_bytes(b"put")
    assert signed()[0] == 1, "an adapter of a lower rank that was changed passes for signed"
    cut.unlink()
    cut.symlink_to(made.folder / "adapter" / "adapter_model.safetensors")
    code, words = signed()
    assert (code, "is a link" in words) == (1, True), words


def test_what_was_laid_beside_a_run_is_signed_as_the_report_has_it(
    made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    """A report that is made anew of other declarations, or other runs' figures, is no longer the signed one."""
    declare(made.folder, {"license": "mit"})
    assert signed()[0] == 0, "the file itself is not under the signature"
    assert fedveil("report", made.folder)[0] == 0
    assert not (made.folder / SIGNATURE).exists()


def test_an_adapter_that_changes_while_it_is_signed_is_refused(
    made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then_changed(folder: Path) -> ReportData:
        data = report_of(folder)
        (folder / "adapter" / "head.safetensors").write_bytes(b"another")
        return data

    fedveil("keygen", tmp_path / "server.pem")
    monkeypatch.setattr("fedveil.reports.files.report_of", then_changed)
    with pytest.raises(DataError, match=r"adapter/head\.safetensors changed while"):
        write_reports(made.folder, tmp_path / "server.pem")
    assert not (made.folder / STATEMENT).exists()


def test_a_statement_of_another_form_is_refused(
    made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    value = json.loads((made.folder / STATEMENT).read_bytes())
    content = json.dumps({**value, "context": "FedVeil signed report, 1"}).encode() + b"\n"
    (made.folder / STATEMENT).write_bytes(content)
    (made.folder / SIGNATURE).write_bytes(sign(content, tmp_path / "server.pem"))
    code, words = signed()
    assert (code, "no statement of this FedVeil on a run: sign the run again" in words) == (1, True), words


def test_verify_says_of_which_run_how_it_ended_at_which_epsilon_and_when(
    made: MadeRun, signed: Callable[..., tuple[int, str]]
) -> None:
    words, data = signed()[1], report_of(made.folder)
    assert data.headline.epsilon is not None
    for part in (
        f"run {data.run} ({data.method})",
        f"{data.status} after 3 of 3 rounds",
        f"ε {epsilon_text(data.headline.epsilon)} at δ 1e-05",
    ):
        assert part in words
    (time,) = re.findall(r"signed (\S+) by", words)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()) < 600


def test_a_run_without_privacy_is_signed_without_a_claim(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", {"privacy.mode": "none"}).start().round(1, 0.7).end()
    fedveil("keygen", tmp_path / "server.pem")
    fedveil("report", run.folder, "--sign", tmp_path / "server.pem")
    assert "no privacy claim; signed" in fedveil("verify", run.folder, "--key", tmp_path / "server.pub.pem")[1]


def test_a_signature_of_something_else_by_the_same_key_is_none_of_a_report(
    made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    """The fault: a key that signs other things as well, such as the JSON itself as it once did."""
    for content in ((made.folder / "report.json").read_bytes(), b'{"context":"another use","files":{}}\n'):
        (made.folder / STATEMENT).write_bytes(content)
        (made.folder / SIGNATURE).write_bytes(sign(content, tmp_path / "server.pem"))
        code, words = signed()
        assert (code, "no statement of this FedVeil on a run" in words) == (1, True)


def test_what_a_report_was_computed_from_is_compared_where_it_is_there(
    made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    there = [name for name in EVIDENCE if (made.folder / name).is_file()]
    assert {"config.json", "rounds.jsonl", "privacy.jsonl", "result.json"} <= set(there)
    assert f"computed from {', '.join(sorted(there))}" in signed()[1]
    for name in there:
        content = (made.folder / name).read_bytes()
        for changed in (content + b"\n", content[:-2], b""):
            (made.folder / name).write_bytes(changed)
            code, words = signed()
            assert (code, f"{name} was changed after it was signed" in words) == (1, True), words
        (made.folder / name).unlink()
        assert signed() == (0, signed()[1])
        assert f"not here, so not compared: {name}" in signed()[1]
        (tmp_path / name).write_bytes(content)
        (made.folder / name).symlink_to(tmp_path / name)
        assert signed()[0] == 1, "a link passes for the signed file"
        (made.folder / name).unlink()
        (made.folder / name).write_bytes(content)
    for name in set(EVIDENCE) - set(there):
        (made.folder / name).write_text("{}")
        code, words = signed()
        assert (code, f"{name} in" in words, "came after" in words) == (1, True, True)
        (made.folder / name).unlink()
    assert signed()[0] == 0


def test_a_run_that_went_on_must_be_signed_again(
    made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    """Its lines are appended to: the old statement does not pass for one on them, with the report as it was."""
    made.round(4, 0.77)
    code, words = signed()
    assert (code, "privacy.jsonl was changed" in words or "rounds.jsonl was changed" in words) == (1, True)
    assert fedveil("report", made.folder, "--sign", tmp_path / "server.pem")[0] == 0
    assert "after 4 of 3 rounds" in signed()[1]


def test_a_line_that_comes_while_the_report_is_made_and_signed_is_found(
    made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then_a_round(folder: Path) -> ReportData:
        data = report_of(folder)
        made.round(4, 0.77)
        return data

    fedveil("keygen", tmp_path / "server.pem")
    monkeypatch.setattr("fedveil.reports.files.report_of", then_a_round)
    with pytest.raises(DataError, match=r"privacy\.jsonl changed while"):
        write_reports(made.folder, tmp_path / "server.pem")
    assert not (made.folder / STATEMENT).exists()


@pytest.mark.parametrize("change", ["round", "audit", "card"])
def test_a_signature_of_another_report_does_not_stay(
    made: MadeRun, signed: Callable[..., tuple[int, str]], change: str
) -> None:
    if change == "round":
        made.round(4, 0.77)
    elif change == "card":
        declare(made.folder, {"license": "mit"})
    else:
        made.audited("audit.json", audit_file(found("kills"), found("canaries")))
    write_reports(made.folder)
    assert not (made.folder / SIGNATURE).exists()
    assert not (made.folder / STATEMENT).exists()


def test_openssl_checks_the_signature_as_well(
    made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    if not shutil.which("openssl"):
        assert not os.environ.get("FEDVEIL_CI"), "there is no openssl where nothing may be skipped: install it"
        pytest.skip("there is no openssl here")
    words = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(tmp_path / "server.pub.pem"), "-rawin", "-in"]
    words += [str(made.folder / STATEMENT), "-sigfile", str(made.folder / SIGNATURE)]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
