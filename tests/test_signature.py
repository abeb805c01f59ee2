"""A signed report says whose it is, and holds for every byte of every form; nothing else passes for one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from made_run import MadeRun
from test_report import audit_file, fedveil, found

from common.privacy.figures import epsilon_text
from reports import report_of, write_reports
from reports.signature import SIGNATURE, STATEMENT, sign


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A finished run of three rounds."""
    return MadeRun(tmp_path / "run", {"rounds": 3}).start().round(1, 0.71).round(2, 0.74).round(3, 0.76).end()


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
    for name in ("report.json", "report.md", "report.html", "audit.json", "report.signed.json"):
        content = (made.folder / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            (made.folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            code, words = signed()
            assert (code, words.startswith("invalid: "), words.count("\n")) == (1, True, 1), name
            assert name in words
        (made.folder / name).write_bytes(content)
    made.audited("audit-2.json", audit_file(found("kills")))
    code, words = signed()
    assert (code, "audit-2.json" in words) == (1, True), "findings that came later pass for signed ones"


def test_verify_says_of_which_run_how_it_ended_at_which_epsilon_and_when(
    made: MadeRun, signed: Callable[..., tuple[int, str]]
) -> None:
    words, data = signed()[1], report_of(made.folder)
    assert data.headline.epsilon is not None
    for part in (
        f"run {data.run} ({data.strategy})",
        data.status,
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
        assert (code, "no statement on a report" in words) == (1, True)


@pytest.mark.parametrize("change", ["round", "audit"])
def test_a_signature_of_another_report_does_not_stay(
    made: MadeRun, signed: Callable[..., tuple[int, str]], change: str
) -> None:
    if change == "round":
        made.round(4, 0.77)
    else:
        made.audited("audit.json", audit_file(found("kills"), found("canaries")))
    write_reports(made.folder)
    assert not (made.folder / SIGNATURE).exists()
    assert not (made.folder / STATEMENT).exists()


def test_openssl_checks_the_signature_as_well(
    made: MadeRun, tmp_path: Path, signed: Callable[..., tuple[int, str]]
) -> None:
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl here")
    words = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(tmp_path / "server.pub.pem"), "-rawin", "-in"]
    words += [str(made.folder / STATEMENT), "-sigfile", str(made.folder / SIGNATURE)]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
