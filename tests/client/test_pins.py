"""A hostile server learns nothing by what it asks: columns, labels, lengths and models are the steward's to name."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from digits import encoded

from audits.faults import SOUND, Fault
from audits.hostile_questions import (
    DIGITS,
    FINGERPRINTS,
    NAMES,
    PINS,
    audit_questions,
    heard,
    learnt,
    looked_at,
    models_unasked,
    pins_unheld,
    places,
    with_codes,
)
from audits.tiny_models import write_questions
from audits.tiny_site import OneSite, clinic, pins
from fedveil.client.outgoing import UNLOADED
from fedveil.client.policy import Policy
from fedveil.client.site import check_job, open_site, own_settings
from fedveil.common.config.flat import Columns, Scalar, to_mapping
from fedveil.common.config.sections import DataConfig, ModelConfig
from fedveil.common.data.sources import load_dataset, public_names
from fedveil.common.errors import FedVeilError, PolicyRefusal
from fedveil.common.messages.round import Refusal
from fedveil.common.model.files import files_of
from fedveil.common.tasks import TASKS, roles_of_all
from fedveil.common.tasks.causal_lm import CausalLM
from fedveil.common.tasks.images import Picture, read_image
from fedveil.common.tasks.roles import TEMPLATE, Role
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices


def test_twelve_questions_of_a_hostile_server_are_refused_unread_in_the_same_words(
    site: OneSite, tmp_path: Path
) -> None:
    assert learnt(site, site.task(), tmp_path) == []
    assert site.charges() == []


def test_a_policy_whose_pins_are_not_held_is_found_out(site: OneSite, tmp_path: Path) -> None:
    task = site.task()
    with pins_unheld():
        found = learnt(site, task, tmp_path)
    assert "the answers tell that there is a file: it was read" in found
    assert len(found) > 12


@pytest.mark.parametrize("fault", [SOUND, PINS, NAMES, FINGERPRINTS], ids=lambda fault: fault.name or "sound")
def test_the_audit_of_questions_passes_on_the_code_as_it_is_and_finds_every_fault(fault: Fault, tmp_path: Path) -> None:
    assert audit_questions(tmp_path, fault).passed


# The table of roles.


WITHOUT_CLIPS = {name: task for name, task in TASKS.items() if "audio" not in {role.setting for role in task.roles}}
"""But for tasks on clips, whose model is in no package of these tests, and whose files are no images."""


def of_task(name: str) -> dict[str, Scalar]:
    """Return settings that a task needs besides its columns."""
    task = TASKS[name]
    labels = next((role.labels.example for role in task.roles if role.labels), "")
    head: dict[str, Scalar] = {"data.labels": labels} if labels else {"head.policy": "frozen"}
    if isinstance(task, CausalLM):
        return {**head, "model.name": "SmolLM2-135M-Instruct"}
    return head if task.wording else {**head, "head.start": "zeros", "model.name": "dinov2-small"}


def node_for(task: str, folder: Path, settings: dict[str, Scalar]) -> dict[str, Scalar]:
    """Return a site whose policy lets it into a run of ``settings``; its records are nowhere."""
    own = OneSite(settings, {"site": "clinic", "data": str(folder / "nowhere.csv"), "ledger": str(folder / "l.db")})
    own.rule()
    return own.node


def test_every_task_has_its_roles_and_every_role_its_pin() -> None:
    for task in TASKS.values():
        assert task.roles
        assert len({role.setting for role in task.roles}) == len({role.field for role in task.roles}) == len(task.roles)
        fields = {item.name for item in dataclasses.fields(task.example)}
        for role in task.roles:
            assert role.setting in to_mapping(Policy()), f"data.{role.setting} names a column that no policy can pin"
            known = role.field in fields or not role.is_column
            assert known, f"{task.name} reads {role.setting} into a field that its records do not have"


@pytest.mark.parametrize(
    ("task", "role"),
    [(name, role) for name, task in WITHOUT_CLIPS.items() for role in task.roles],
    ids=lambda part: getattr(part, "setting", part),
)
def test_another_column_of_any_role_is_refused_unread(task: str, role: Role, tmp_path: Path) -> None:
    settings: dict[str, Scalar] = {"model.task": task, **of_task(task)}
    node = node_for(task, tmp_path, settings)
    check_job(node, configure(settings), simulated=False)
    other = "{prompt} {completion}" if role is TEMPLATE else "other"
    words = rf"has {role.setting} = .*asks for data\.{role.setting} = {re.escape(repr(other))}"
    with pytest.raises(PolicyRefusal, match=words):
        check_job(node, configure({**settings, f"data.{role.setting}": other}), simulated=False)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"data.labels": "good,bad"}, r"labels = 'bad,good'; the run asks for data\.labels = 'good,bad'"),
        ({"data.labels": ""}, r"data\.labels = ''"),
        ({"model.max-length": 129}, r"max-length = 128; the run asks for model\.max-length = 129"),
        ({"model.task": "causal-lm", **of_task("causal-lm")}, r"task = 'classification'"),
    ],
)
def test_what_else_is_pinned_is_refused_unread(asked: dict[str, Scalar], words: str, tmp_path: Path) -> None:
    settings: dict[str, Scalar] = {"data.name": "reviews.csv", "data.labels": "bad,good"}
    node = node_for("classification", tmp_path, settings)
    with pytest.raises(PolicyRefusal, match=words):
        check_job(node, configure({**settings, **asked}), simulated=False)
    check_job(node, configure({**settings, "model.max-length": 64, "data.labels": " bad, good"}), simulated=False)


# Every other setting of data.* and model.*.

PINNED = {"model.task", "model.max-length", "data.labels", *(f"data.{r.setting}" for r in roles_of_all())}
NAMED = {"model.name"}
"""Asked by the policy's ``models``."""
COMPUTED = {"model.feature-scale", "model.checkpointing", "model.quantise"}
"""Changes what is clipped, noised and paid for, or how it is computed, and no more."""


def asked_of_own_records(settings: dict[str, Scalar], node: dict[str, Scalar]) -> Any:
    """Return which records a site with ``node`` reads for a run of ``settings``."""
    return open_site(node, configure(settings).config, "1", simulated=False).data.examples


def others(source: str) -> Iterator[tuple[str, dict[str, Scalar]]]:
    """Yield every ``data.*`` setting that no policy pins, with another value that a hostile server would choose."""
    worst: dict[str, Scalar] = {"name": source, "test": "/no/such.csv", "partition": "natural", "key": "postcode"}
    worst["invalid-rows"] = "skip"
    for key, value in to_mapping(DataConfig(partition="iid"), "data.").items():
        if key not in PINNED:
            other = worst.get(key.removeprefix("data."), value + 1 if isinstance(value, int | float) else "postcode")
            key_too = {"data.key": "postcode", "data.name": source, "data.partition": "natural", "data.test": "/no.csv"}
            yield key, {**(key_too if isinstance(value, str) else {}), key: other}


def unpinned_questions(site: OneSite, folder: Path) -> list[str]:
    """Return the settings of data.* that no policy pins and that change what is read of a site's own records."""
    source = with_codes(folder / "own.csv", "")  # a blank cell in a column that nobody named
    site.node["data"] = str(source)
    settings = {**site.settings, "data.name": "rotten-tomatoes"}
    before, found = asked_of_own_records(settings, site.node), []
    for key, asked in others(str(source)):
        try:
            same = asked_of_own_records({**settings, **asked}, site.node) == before
        except FedVeilError:
            same = False
        found += [] if same else [key]
    return found


def test_no_other_setting_of_the_data_changes_what_is_read_of_a_sites_own_records(
    site: OneSite, tmp_path: Path
) -> None:
    assert unpinned_questions(site, tmp_path) == []
    with patch("fedveil.client.site.own_settings", lambda config, policy: config.data):
        assert "data.key" in unpinned_questions(site, tmp_path), "a column that is read and not pinned is missed"


def test_every_setting_of_the_model_is_pinned_or_named_or_only_computed_with() -> None:
    assert set(to_mapping(ModelConfig(), "model.")) == {key for key in PINNED if key[0] == "m"} | NAMED | COMPUTED


def test_own_settings_are_the_columns_of_the_task_and_no_more() -> None:
    config = configure({"data.key": "postcode", "data.text": "note", "data.prompt": "q", "data.labels": "a,b"}).config
    own = DataConfig(columns=Columns({"text": "note"}), labels="a,b", partition="iid")
    assert own_settings(config, Policy()) == own


# Who needs a policy.


def test_a_site_with_data_and_no_policy_takes_part_in_nothing_and_is_told_how_to_write_one(site: OneSite) -> None:
    task = site.task()
    site.node["data"] = "nowhere.csv"
    del site.node["policy"]
    for mode in ("dp-sgd", "none"):
        site.settings["privacy.mode"] = mode
        reply = site.ask(task)
        assert isinstance(reply, Refusal)
        assert "a node with 'data' needs a 'policy'" in reply.reason
        assert "fedveil site pin policy.toml --task classification --text text" in reply.reason


def test_a_policy_without_pins_lets_nobody_at_records_that_are_not_public(site: OneSite, tmp_path: Path) -> None:
    policy = tmp_path / "bare.toml"
    policy.write_text("epsilon = 1.0\ndelta = 1e-3\n")
    job = configure({**site.settings, "model.name": "all-MiniLM-L6-v2"})
    part: dict[str, Scalar] = {"partition-id": 0, "num-partitions": 2, "policy": str(policy)}
    own: dict[str, Scalar] = {"data": "nowhere.csv", "policy": str(policy)}
    with pytest.raises(PolicyRefusal, match=f"pin your own: fedveil site pin {policy} --task classification"):
        check_job(own, job, simulated=False)
    with pytest.raises(PolicyRefusal, match="give each site its own file as 'data'"):
        check_job(part, job, simulated=False)
    check_job(part, configure({}), simulated=False)


def test_a_deployed_site_without_a_policy_plays_parts_of_named_data_sets_and_named_models_alone(
    site: OneSite,
) -> None:
    part: dict[str, Scalar] = {"partition-id": 0, "num-partitions": 2}
    check_job(part, configure({}), simulated=False)
    for asked in ({"data.name": "/etc/passwd"}, {"data.name": "hub:clinic/notes"}, {"data.name": "sst2"}):
        with pytest.raises(PolicyRefusal, match=f"plays parts of {', '.join(public_names())} alone"):
            check_job(part, configure(asked), simulated=False)
        check_job(part, configure(asked), simulated=True)
    with pytest.raises(PolicyRefusal, match="models = all-MiniLM-L6-v2"):
        check_job(part, configure({"model.name": "/srv/model"}), simulated=False)


def test_a_site_of_its_own_records_joins_a_named_data_sets_job_which_leaves_its_labels_empty(
    site: OneSite, tmp_path: Path
) -> None:
    data = tmp_path / "own.csv"
    rows = "".join(f"a film {i},{'negative' if i % 2 else 'positive'}\n" for i in range(40))
    data.write_text(f"text,label\n{rows}", encoding="utf-8")
    site.node["data"] = str(data)
    site.settings |= {"data.name": "rotten-tomatoes", "data.labels": ""}
    site.rule()
    job = configure(site.settings)
    check_job(site.node, job, simulated=False)
    opened = open_site(site.node, job.config, "1", simulated=False).data
    named = load_dataset(job.config.data, job.config.model.task)
    assert (opened.label_names, opened.label_phrases) == (named.label_names, named.label_phrases)
    assert len(opened.examples) == 40


def test_a_deployed_part_of_a_public_data_set_does_not_open_the_servers_test_file() -> None:
    part: dict[str, Scalar] = {"partition-id": 0, "num-partitions": 2}
    config = configure({"data.partition": "iid", "data.test": "/no/such.csv"}).config
    assert len(open_site(part, config, "1", simulated=False).data.examples) > 4000
    with pytest.raises(FedVeilError, match=r"no file or folder /no/such\.csv"):
        open_site(part, config, "1", simulated=True)


# Models.


@pytest.fixture
def names(tmp_path: Path, model_folder: Callable[[str], str]) -> list[str]:
    """Return what a server might look for, and a model's folder whose weights are none."""
    half = tmp_path / "half"
    shutil.copytree(model_folder("bert"), half)
    (half / "model.safetensors").write_bytes(b"\x00" * 64)
    return [*places(tmp_path), str(half)]


def test_a_model_that_the_policy_does_not_name_is_not_looked_at(site: OneSite, names: list[str]) -> None:
    site.rule(models=None)
    task, here = site.task(), [*names, "nobody/hub-model"]
    assert looked_at(site, task, here) == []
    said = heard(site, task, here[:-1])
    assert {reply.kind for reply in said if reply} == {"policy"}
    assert len({reply.reason for reply in said if reply}) == 1, "the words tell which paths exist"
    with models_unasked():
        assert looked_at(site, task, here) == here, "a site that does not ask before it loads is missed"


def test_a_model_that_does_not_load_is_one_refusal_whatever_is_there(
    site: OneSite, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    files = [files_of(name) if Path(name).is_dir() and name != "/etc" else DIGITS for name in names]
    site.rule(models=[f"{name}={DIGITS}+{digest}" for name, digest in zip(names, files, strict=True)])
    said = heard(site, site.task(), names)
    assert {(reply.kind, reply.reason) for reply in said if reply} == {("failed", UNLOADED)}
    assert None not in said
    assert "patients-of-ward-7" in caplog.text, "the site's own log does not say why"


def test_another_model_under_an_allowed_name_is_refused_before_a_record_is_tokenised(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.client.cache.RecordCache.prepare", lambda *_: pytest.fail("a record was tokenised"))
    task = site.task()
    name = str(site.settings["model.name"])
    site.rule(models=[f"{name}={DIGITS}+{files_of(name)}"])
    reply = site.ask(task)
    assert isinstance(reply, Refusal)
    assert reply.kind == "policy"
    assert "models = <path>; the run asks for the base model" in reply.reason


def test_no_loader_runs_code_that_comes_with_a_model(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from fedveil.common.model.base import load_base_model

    said = []
    for loader in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer):
        whole = loader.from_pretrained

        def spied(*arguments: Any, whole: Any = whole, **options: Any) -> Any:
            said.append(options.get("trust_remote_code"))
            return whole(*arguments, **options)

        monkeypatch.setattr(loader, "from_pretrained", spied)
    load_base_model(model_folder("bert"), "classification")
    load_base_model(model_folder("llama"), "causal-lm")
    load_base_model("all-MiniLM-L6-v2", "classification")
    load_base_model("all-MiniLM-L6-v2", "classification", "stock")
    assert len(said) >= 10
    assert set(said) == {False}


def test_a_site_with_questions_is_pinned_to_its_columns(toy_generation: dict[str, Any], tmp_path: Path) -> None:
    site = clinic(toy_generation, tmp_path)
    site.node["data"] = str(write_questions(tmp_path / "own.csv", 30))
    site.rule()
    assert set(pins(site.settings)) >= {"task", "prompt", "completion", "max-length"}
    site.train()
    site.settings["data.completion"] = "prompt"
    reply = site.ask(site.task(2))
    assert isinstance(reply, Refusal)
    assert "completion = 'completion'; the run asks for data.completion = 'prompt'" in reply.reason


def test_runs_of_other_names_leave_one_copy_of_the_records_in_memory(site: OneSite) -> None:
    from fedveil.client import app

    for number, name in enumerate(("a.csv", "b.csv", "c.csv"), start=1):
        site.settings["data.name"] = name
        site.train(number)
    assert list(app.process.cache.records) == ["clinic"]


def test_no_setting_of_a_server_gets_the_records_tokenised_anew_nor_before_its_task_is_checked(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedveil.client import app, cache
    from fedveil.client.process import SiteProcess

    passed, tokenised = [0], cache.prepared

    def counted(*arguments: Any) -> Any:
        passed[0] += 1
        return tokenised(*arguments)

    monkeypatch.setattr(cache, "prepared", counted)
    monkeypatch.setattr(app, "process", SiteProcess())
    labels = str(site.settings["data.labels"])
    wrong = dataclasses.replace(site.task(1), start_fingerprint="0" * 64)
    for seed in range(3):
        site.settings.update({"data.seed": seed, "data.labels": labels.replace(",", " ," + " " * seed)})
        reply = site.ask(wrong)
        assert isinstance(reply, Refusal)
        assert reply.kind == "task", reply
    assert passed == [0], "a task that fits nothing had the records tokenised"
    for number in (1, 2, 3):
        site.settings["data.seed"] = 50 + number
        site.train(number)
    assert passed == [1]


def test_the_loader_reads_the_columns_of_the_table(tmp_path: Path) -> None:
    """Not one beside it: each cell tells its column; of an image, by a file of that name and width."""
    names = [f"{role.setting}-column" for role in roles_of_all()]
    pictures = dict[str, str]()
    for width, name in enumerate((name for column in names for name in (column, f"{column}-2")), start=1):
        (tmp_path / name).write_bytes(encoded(np.zeros((1, width), np.uint8)))
        pictures[name] = read_image(name, tmp_path).pixels
    for task, roles in ((name, task.roles) for name, task in WITHOUT_CLIPS.items()):
        fields = {f"{role.setting}-column": role.field for role in roles}

        def cell(name: str, fields: dict[str, str] = fields) -> str:
            field = fields.get(name.removesuffix("-2"))
            turns = [{"role": who, "content": name} for who in ("user", "assistant")]
            span = {"start": 0, "end": 4, "label": name}
            kinds = {"history": [[name, name]], "turns": turns, "before": turns, "marks": [span]}
            return json.dumps(kinds[field]) if field in kinds else name

        path = tmp_path / f"{task}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([names, map(cell, names), [cell(f"{name}-2") for name in names]])
        config = DataConfig(columns=Columns({role.setting: f"{role.setting}-column" for role in roles}))
        data = load_dataset(config, task, str(path))
        for role in (role for role in roles if role.is_column):
            value = getattr(data.examples[0], role.field)
            if role.field == "labels":
                value = data.label_names[value.index(1)]
            if isinstance(value, Picture):
                assert value.pixels == pictures[f"{role.setting}-column"]
            elif role.field == "marks":
                assert [data.label_names[label] for _, _, label in value] == [f"B-{role.setting}-column"]
            elif role.field in ("history", "turns", "before"):
                assert value == tuple((who, f"{role.setting}-column") for who in ("user", "assistant"))
            else:
                assert (data.label_names[value] if role.field == "label" else value) == f"{role.setting}-column"
