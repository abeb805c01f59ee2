"""How a steward's policy comes to say what its records are for, and that a site without it does not go online."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from deployed import volumes
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.client.policy_file import load_policy
from fedveil.client.site import check_job
from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import parse_settings
from fedveil.common.errors import ConfigError, DataError, ModelNotLoaded, PolicyRefusal
from fedveil.deploy import container
from fedveil.deploy import pin as pinning
from fedveil.deploy.check_results import CheckResult
from fedveil.deploy.doctor import examine_site
from fedveil.deploy.pin import pin
from fedveil.deploy.policy_file import PINS_HEAD, mechanisms_of_job, pins_of, policy_text
from fedveil.deploy.site_folder import SiteFolder, make_site, node_settings, open_site_folder
from fedveil.deploy.start import start_site
from fedveil.privacy import MECHANISMS
from fedveil.privacy.record_level import DPSGD
from fedveil.strategies.job import configure

ROOT = Path(__file__).resolve().parents[2]
DIGITS = "0123456789abcdef0123456789abcdef"
PINS = pins_of("classification", {"text": "note"}, "bad,good", 64)
JOB: dict[str, Scalar] = {
    "data.name": "test.csv",
    "data.text": "note",
    "data.labels": "bad,good",
    "model.max-length": 64,
}


NEW = ["--server", "fl.example.org", "--data", ".", "--public-size", "500"]
"""Of a new site, as 'fedveil site init' takes it."""


def raise_(error: BaseException) -> None:
    raise error


def fedveil(*words: str) -> str:
    """Run a command that must succeed and return what it says."""
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


def site_with(tmp_path: Path, policy: str, node: str = 'data="records.csv" public-size=50') -> SiteFolder:
    return make_site(tmp_path / "clinic", "clinic", "fl.example.org", policy=policy, node=node)


def findings(folder: SiteFolder) -> dict[str, CheckResult]:
    found = examine_site(dataclasses.replace(folder, server="127.0.0.1:1"))
    return {finding.what: finding for finding in found}


# site pin.

STEWARDS = """\
# Ours since May.
"epsilon" = 3.0   # agreed with the board
delta = 1e-4

  'text' = "body"  # was note # before
labels = [
  "no",  # 0
  "yes", # 1 and a "#" of its own
]
models = [
  "mini=0123456789abcdef0123456789abcdef+0123456789abcdef0123456789abcdef", # text = "x"
]
task = "classification"
label = "label" # theirs
max-length = 128
text-pair = "second # column" # since June
# The end."""


def test_pins_are_put_in_and_the_stewards_other_words_stay(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(STEWARDS, encoding="utf-8")
    path.chmod(0o640)
    pin(path, PINS)
    text, policy = path.read_text(encoding="utf-8"), load_policy(path)
    assert (policy.columns["text"], policy.labels, policy.max_length, policy.columns["text-pair"]) == (
        "note",
        "bad,good",
        64,
        "",
    )
    assert (policy.epsilon, policy.delta, policy.models) == (
        3.0,
        1e-4,
        "mini=0123456789abcdef0123456789abcdef+0123456789abcdef0123456789abcdef",
    )
    for kept in (
        *("# Ours since May.", "# agreed with the board", "# was note # before", "# 0\n", '# 1 and a "#" of its own'),
        *(
            '# text = "x"',
            *("# since June\n", "# The end."),
            'label = "label" # theirs',
            'models = [\n  "mini=0123456789abcdef0123456789abcdef+0123456789abcdef0123456789abcdef"',
        ),
    ):
        assert kept in text, f"{kept!r} is gone"
    assert "second" not in text
    assert "column" not in text, "what looks like a comment within a text is taken for one"
    assert path.stat().st_mode & 0o777 == 0o640
    pin(path, PINS)
    assert path.read_text(encoding="utf-8") == text, "the same pins change the file"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("user", "given"), [(0, True), (1000, False)])
def test_a_policy_that_root_pins_stays_its_sites(
    user: int, given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, owners = tmp_path / "policy.toml", list[tuple[int, int]]()
    path.write_text("# Ours.\n", encoding="utf-8")
    own = (path.stat().st_uid, path.stat().st_gid)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "fchown", lambda _, *owner: owners.append(owner))
    pin(path, PINS)
    pin(tmp_path / "new.toml", PINS)
    assert owners == [own] * given, "the site cannot read it, or nobody else may change an owner"
    assert load_policy(path).labels == "bad,good"


def test_pins_of_another_task_take_the_place_of_the_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text("clinic", 2000, 4.0, 1e-5, PINS), encoding="utf-8")
    pin(path, pins_of("causal-lm", {"completion": "reply"}, "", 32))
    assert path.read_text(encoding="utf-8").count(PINS_HEAD) == 1
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    assert values == {
        "dataset-id": "clinic",
        "epsilon": 4.0,
        "delta": 1e-5,
        "public-size": 2000,
        "mechanisms": ["dp-sgd"],
        "task": "causal-lm",
        "prompt": "prompt",
        "completion": "reply",
        "template": "",
        "max-length": 32,
    }


def test_pins_added_to_an_old_policy_are_said_to_be_pins(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("epsilon = 4.0\ndelta = 1e-5", encoding="utf-8")  # no line end
    fedveil("site", "pin", str(path), "--text", "note", "--labels", "bad,good", "--max-length", "64")
    assert load_policy(path).columns["text"] == "note"
    assert "1e-5\n# What the records are for." in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epsilon = ", "cannot change"),
        ("epsilom = 1.0\n", "did you mean 'epsilon'"),
        ('models = ["0123456789ab"]\n', "write NAME=FINGERPRINT.FILES"),
        ("[site]\nepsilon = 1\n", "text, a number"),
    ],
)
def test_a_file_that_would_be_no_policy_is_left_as_it_is(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises((ConfigError, DataError), match=words):
        pin(path, PINS)
    assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_fault_that_drops_a_key_of_the_stewards_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(STEWARDS, encoding="utf-8")
    monkeypatch.setattr("fedveil.deploy.pin._pin_at", lambda lines, keys: ("text", 4))
    with pytest.raises((ConfigError, DataError, ValueError, KeyError)):
        pin(path, PINS)
    assert path.read_text(encoding="utf-8") == STEWARDS


@pytest.mark.parametrize(
    "change",
    [lambda text: text.replace("max-rounds = 3", ""), lambda text: text.replace("max-rounds = 3", "max-rounds = 4")],
)
def test_a_change_of_any_other_rule_is_not_written(
    change: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this command does not understand: a rule that is gone lets a server do what the steward forbade."""
    path, honest = tmp_path / "policy.toml", pinning._with_pins
    path.write_text("max-rounds = 3\n", encoding="utf-8")
    monkeypatch.setattr(pinning, "_with_pins", lambda *words: change(honest(*words)))
    with pytest.raises(ConfigError, match="in a way that this command does not understand: add the pins by hand"):
        pin(path, PINS)
    assert path.read_text(encoding="utf-8") == "max-rounds = 3\n"


def test_a_policy_of_any_name_is_changed_beside_its_place_and_its_name_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, beside, synced = tmp_path / "rules", list[int](), list[Path]()
    path.write_text("max-rounds = 3\n", encoding="utf-8")
    monkeypatch.setattr("fedveil.deploy.pin.os.fsync", lambda _: beside.append(len(list(tmp_path.iterdir()))))
    monkeypatch.setattr(pinning, "sync_folder", synced.append)
    pin(path, PINS)
    assert load_policy(path).columns["text"] == "note"
    assert (beside, synced) == ([2], [tmp_path]), "a policy is half written, elsewhere, or gone after a loss of power"


def test_pins_that_a_call_does_not_name_stay_and_all_are_said(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    said = fedveil("site", "pin", str(path), "--text", "note", "--text-pair", "title", "--labels", "bad,good")
    assert f"made a new policy, with a budget of ε ≤ 8 at δ = 1e-05: {path}" in said.replace("\n", "")
    assert tomllib.loads(path.read_text(encoding="utf-8"))["max-length"] == 128
    said = fedveil("site", "pin", str(path), "--max-length", "64", "--label", "verdict")
    assert "made" not in said
    policy = load_policy(path)
    assert tuple(policy.columns[role] for role in ("text", "text-pair", "label")) == ("note", "title", "verdict")
    assert (policy.labels, policy.max_length, policy.task) == ("bad,good", 64, "classification")
    assert "text 'note', text-pair 'title', label 'verdict', labels 'bad', 'good', max-length 64" in said
    fedveil("site", "pin", str(path), "--task", "causal-lm", "--prompt", "question")
    policy = load_policy(path)
    assert (policy.columns["prompt"], policy.columns["completion"], policy.labels, policy.max_length) == (
        "question",
        "completion",
        "",
        64,
    )


def test_pin_puts_a_model_in_place_of_those_of_its_name_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    words = ("site", "pin", str(path), "--labels", "bad,good")
    fedveil(*words, "--model", "/srv/a=b", "--fingerprint", f"{DIGITS}+{DIGITS}")
    fedveil(*words, "--model", "org/mini", "--fingerprint", f"{DIGITS}+{DIGITS}")
    fedveil(*words)
    assert load_policy(path).models == f"/srv/a=b={DIGITS}+{DIGITS},org/mini={DIGITS}+{DIGITS}"
    other = DIGITS[::-1]
    fedveil(*words, "--model", "/srv/a=b", "--fingerprint", f"{DIGITS}+{other}", "--epsilon", "3")
    policy = load_policy(path)
    assert (policy.models, policy.epsilon) == (f"org/mini={DIGITS}+{DIGITS},/srv/a=b={DIGITS}+{other}", 3.0)
    policy.check_files("/srv/a=b", other * 2)
    policy.check_model("/srv/a=b", DIGITS * 2, other * 2)
    for name, files in (("/srv/a=b", DIGITS * 2), ("org/mini", other * 2), ("/srv/a", other * 2)):
        with pytest.raises(ModelNotLoaded, match="none of them was opened"):
            policy.check_files(name, files)
    with pytest.raises(PolicyRefusal, match="with the fingerprint"):
        policy.check_model("/srv/a=b", other * 2, other * 2)
    before = path.read_bytes()
    for more in (["--model", "m"], ["--fingerprint", DIGITS], ["--model", "m", "--fingerprint", DIGITS]):
        assert CliRunner().invoke(app, [*words, *more]).exit_code == 1
    assert path.read_bytes() == before


def test_a_policy_that_begins_with_a_byte_order_mark_is_pinned_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    fedveil("site", "pin", str(path), "--labels", "bad,good")
    text = path.read_text(encoding="utf-8")
    rest = text.replace('task = "classification"', "")
    path.write_text(f'\ufefftask = "classification"\n{rest}', encoding="utf-8")
    fedveil("site", "pin", str(path), "--text", "note", "--epsilon", "3")
    policy = load_policy(path)
    assert (policy.columns["text"], policy.labels, policy.epsilon) == ("note", "bad,good", 3.0)
    assert path.read_text(encoding="utf-8").count("task =") == 1


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("labels = 5", "labels must be a list of texts, not 5"),
        ('labels = "bad"', "labels must be a list of texts, not 'bad'"),
        ("labels = [1, 2]", "each of labels must be text, not 1"),
        ('text = ["a"]', "text must be text, not ['a']"),
        ('max-length = "9"', "max-length must be a whole number, not '9'"),
        ("max-length = true", "max-length must be a whole number, not True"),
        ("task = 3", "task must be text, not 3"),
        (f"epsilon = 1{'0' * 5000}", "a whole number has more than 64 bits"),
    ],
)
def test_a_pin_of_another_type_is_one_line_and_nothing_is_made_of_it(held: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    rest = {"task": 'task = "classification"', "labels": 'labels = ["bad", "good"]'}
    path.write_text("\n".join([held, *(line for key, line in rest.items() if not held.startswith(key))]), "utf-8")
    before = path.read_text(encoding="utf-8")
    done = CliRunner().invoke(app, ["site", "pin", str(path), "--label", "verdict"])
    assert (done.exit_code, said in done.output.replace("\n", "")) == (1, True), done.output
    assert path.read_text(encoding="utf-8") == before
    with pytest.raises(ConfigError) as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


def test_a_text_that_is_no_utf_8_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """What a terminal of another encoding gives: Python keeps such bytes as halves of pairs, which no file takes."""
    for words in (["site", "pin", str(tmp_path / "policy.toml")], ["site", "init", str(tmp_path / "clinic"), *NEW]):
        done = CliRunner().invoke(app, [*words, "--text", "n\udcff", "--labels", "bad,good"])
        assert (done.exit_code, done.output.count("\n")) == (1, 1), done.exception
        assert "is not UTF-8" in done.output
        assert not list(tmp_path.iterdir())


def test_a_pin_that_is_the_same_number_of_another_type_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    fedveil("site", "pin", str(path), "--labels", "bad,good", "--max-length", "1")
    text = path.read_text(encoding="utf-8")
    for odd in ("true", "1.0"):
        path.write_text(text.replace("max-length = 1", f"max-length = {odd}"), encoding="utf-8")
        fedveil("site", "pin", str(path), "--max-length", "1")
        assert path.read_text(encoding="utf-8") == text
    path.write_text(text.replace('text = "text"', "text = 5"), encoding="utf-8")
    fedveil("site", "pin", str(path), "--text", "text")
    assert path.read_text(encoding="utf-8") == text


def test_a_policy_that_a_link_names_is_changed_where_it_lies(tmp_path: Path) -> None:
    """A file in the link's place would leave the steward's own one as it was, and rule instead of it."""
    own, link = tmp_path / "stewards" / "policy.toml", tmp_path / "policy.toml"
    own.parent.mkdir()
    own.write_text("epsilon = 3.0\ndelta = 1e-05\n", encoding="utf-8")
    link.symlink_to(own)
    pin(link, PINS)
    assert link.is_symlink()
    assert load_policy(own).columns["text"] == "note"
    assert [path.name for path in own.parent.iterdir()] == ["policy.toml"]


def test_whoever_is_stopped_as_a_policy_is_written_leaves_the_old_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(STEWARDS, encoding="utf-8")
    for stop in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        monkeypatch.setattr("fedveil.deploy.pin.os.fsync", lambda _, stop=stop: raise_(stop))
        with pytest.raises((DataError, KeyboardInterrupt)):
            pin(path, PINS)
        assert path.read_text(encoding="utf-8") == STEWARDS
        assert list(tmp_path.iterdir()) == [path], "a draft is left in the steward's folder"


def test_a_mistyped_folder_makes_no_policy(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["site", "pin", str(tmp_path / "clinc"), "--labels", "bad,good"])
    assert done.exit_code != 0
    assert "a new policy's name ends in .toml" in done.output.replace("\n", " ")
    assert not list(tmp_path.iterdir())


# A site without pins.


def test_a_site_whose_policy_pins_nothing_does_not_start_and_the_command_in_the_message_mends_it(
    tmp_path: Path,
) -> None:
    folder = site_with(tmp_path, "epsilon = 4.0\ndelta = 1e-3\n")
    with pytest.raises(ConfigError, match=r"does not pin .* pin your own: fedveil site pin") as refusal:
        start_site(folder, pytest.fail)
    assert "\n" not in str(refusal.value)
    before = findings(folder)
    assert (before["policy"].ok, before["pins"].ok) == (True, False)
    assert before["pins"].found == str(refusal.value)
    job = configure({"data.labels": "bad,good", "data.name": "test.csv"})
    with pytest.raises(PolicyRefusal, match="fedveil site pin"):
        check_job(node_settings(folder), job, simulated=False)

    command = str(refusal.value).partition("pin your own: ")[2]
    assert command.startswith(f"fedveil site pin {folder.path} ")
    fedveil(*shlex.split(command)[1:])
    check_job(node_settings(folder), job, simulated=False)
    pins = findings(folder)["pins"]
    assert pins.ok
    assert "task 'classification', text 'text', text-pair '', label 'label', labels 'bad', 'good'" in pins.found


def test_a_site_that_plays_a_part_of_a_public_data_set_needs_no_pins(tmp_path: Path) -> None:
    folder = site_with(tmp_path, "", "partition-id=0 num-partitions=2")
    found = findings(folder)
    assert found["pins"].ok
    assert "parts of FedVeil's own data sets alone" in found["pins"].found
    check_job(node_settings(folder), configure({}), simulated=False)


def test_the_doctor_says_which_models_are_allowed_and_fails_if_the_sites_own_is_not(tmp_path: Path) -> None:
    folder = site_with(
        tmp_path,
        policy_text(
            "clinic",
            0,
            4.0,
            1e-3,
            PINS,
            [f"/srv/mini={DIGITS}+{DIGITS}"],
        ),
    )
    found = findings(folder)["models"]
    assert not found.ok
    assert f"site.toml names all-MiniLM-L6-v2, the policy allows /srv/mini={DIGITS}+{DIGITS}" in found.found
    assert findings(dataclasses.replace(folder, model="/srv/mini"))["models"].ok


def test_the_doctor_says_which_mechanisms_are_allowed(tmp_path: Path) -> None:
    found = findings(site_with(tmp_path, policy_text("clinic", 0, 4.0, 1e-3, PINS)))["mechanisms"]
    assert (found.ok, found.found) == (True, "runs of dp-sgd")
    (tmp_path / "clinic" / "policy.toml").write_text("allow-no-privacy = true\n", encoding="utf-8")
    found = findings(open_site_folder(tmp_path / "clinic"))["mechanisms"]
    assert found.found == "runs of dp-sgd; and runs without privacy"


def test_a_policy_made_for_a_job_allows_its_mechanism_and_nothing_that_promises_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(DPSGD):
        name: ClassVar[str] = "other"

    monkeypatch.setitem(MECHANISMS, "other", Other())
    for mode, allowed in (("other", ["other"]), ("dp-sgd", ["dp-sgd"]), ("none", ["dp-sgd"])):
        config = configure({"privacy.mode": mode}).config
        assert mechanisms_of_job(config) == allowed
        text = policy_text("clinic", 2000, 4.0, 1e-5, mechanisms=mechanisms_of_job(config))
        assert tomllib.loads(text)["mechanisms"] == allowed


# site init.


def made(tmp_path: Path, *words: str) -> dict[str, Any]:
    (tmp_path / "records.csv").write_text("note,label\n")
    own = ("--data", str(tmp_path / "records.csv"), "--public-size", "500", "--delta", "1e-3")
    fedveil("site", "init", str(tmp_path / "clinic"), "--server", "fl.example.org", *own, *words)
    return tomllib.loads((tmp_path / "clinic" / "policy.toml").read_text(encoding="utf-8"))


def test_a_new_site_pins_what_its_records_are_for(tmp_path: Path) -> None:
    policy = made(tmp_path, "--text", "note", "--labels", "bad,good", "--max-length", "64")
    pins = {"task": "classification", "text": "note", "text-pair": "", "label": "label", "labels": ["bad", "good"]}
    assert policy == {
        "dataset-id": "clinic",
        "epsilon": 8.0,
        "delta": 1e-3,
        "public-size": 500,
        "mechanisms": ["dp-sgd"],
        **pins,
        "max-length": 64,
    }
    check_job(node_settings(open_site_folder(tmp_path / "clinic")), configure(JOB), simulated=False)


def test_a_new_site_names_the_model_of_its_coordinator(tmp_path: Path) -> None:
    digits = "+".join(["0123456789abcdef" * 4] * 2)
    policy = made(tmp_path, "--task", "causal-lm", "--model", "/srv/small", "--fingerprint", digits)
    assert policy["models"] == [f"/srv/small={digits}"]
    assert (policy["prompt"], policy["completion"]) == ("prompt", "completion")


# Containers.


def test_containers_pin_what_the_job_asks_for_and_say_which_later_job_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volumes(tmp_path)
    asked = 'data.name="/data/test.csv" data.text="note" data.labels="bad,good" model.max-length=64'
    container.make_keys(1, 8.0, 1e-5, tmp_path, settings=asked)
    node = node_settings(open_site_folder(tmp_path / "site-1"))
    check_job({**node, "data": "/data"}, configure(parse_settings([asked])), simulated=False)
    with pytest.raises(PolicyRefusal, match="give each site its own file as 'data'"):
        check_job(node, configure(parse_settings([asked])), simulated=False)
    capsys.readouterr()
    container.make_keys(2, 8.0, 1e-5, tmp_path)
    said = capsys.readouterr().out
    assert (
        "site-1 will refuse this job: the site's policy has text = 'note'; the run asks for data.text = 'text'" in said
    )
    assert "site-2 will refuse" not in said
    assert load_policy(tmp_path / "site-2" / "policy.toml").labels == "negative,positive"
    check_job(node_settings(open_site_folder(tmp_path / "site-2")), configure({}), simulated=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            'data.name="/data/test.csv"',
            "the labels of '/data/test.csv' are not known to a policy: name all in data.labels",
        ),
        ('data.labels="a,b" model.name="/data/model"', "the fingerprint of the base model '/data/model' is needed"),
        ("roundz=3", "unknown setting 'roundz'"),
    ],
)
def test_containers_make_no_site_for_a_job_that_no_policy_can_pin(
    settings: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    volumes(tmp_path)
    make = container.make_keys
    monkeypatch.setattr(container, "make_keys", lambda *figures, **job: make(*figures, tmp_path, **job))
    monkeypatch.setenv("SITES", "1")
    monkeypatch.setenv("FEDVEIL_SETTINGS", settings)
    assert container.main("keys") == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "site-1" / "site.toml").exists()


# By hand.


def test_the_pages_trial_by_hand_has_a_policy_that_lets_it_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "guides" / "operate.md").read_text(encoding="utf-8")
    block = next(found for found in re.findall(r"```sh\n(.*?)```", page, re.S) if "site pin" in found)
    pinning, node = (shlex.split(line) for line in block.strip().splitlines())
    fedveil(*pinning[pinning.index("site") :])
    assert (tmp_path / "policy.toml").stat().st_mode & 0o777 == 0o600
    settings = parse_settings([node[node.index("--node-config") + 1]])
    check_job(settings, configure({"data.name": "test.csv", "data.labels": "bad,good"}), simulated=False)
