"""Everything that leaves a site, down to the byte, is on the list in this file; anything else fails."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata as ProtoMetadata
from google.protobuf.message import Message as Proto
from transformers import XLMRobertaConfig, XLMRobertaModel

from audits.tiny_models import VOCABULARY, tiny_tokenizer, write_questions
from audits.tiny_site import OneSite, clinic
from fedveil.client import local_training
from fedveil.client.app import train
from fedveil.client.outgoing import TOLD, UNTOLD, own_words, public_reason, without_paths
from fedveil.common.errors import ConfigError, DataError, FedVeilError, MechanismError, ModelError
from fedveil.common.messages import header
from fedveil.common.messages.blocks import layout_of
from fedveil.common.messages.round import (
    KeyReply,
    NoisedCount,
    Refusal,
    Reply,
    ShareReply,
    Spending,
    SurvivorReply,
    TrainResult,
    UnmaskReply,
)
from fedveil.common.messages.wire import decode_reply, encode_reply, encode_task
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import dpsgd, randomness
from fedveil.privacy.accountant import Accountant, Detour
from fedveil.privacy.events import Event
from fedveil.privacy.secure_sum import Agreement, KeyOffer, Sharing

pytestmark = pytest.mark.rough_prices

FIELDS: dict[type, dict[str, str]] = {
    TrainResult: {
        "run": "from the task",
        "round_number": "from the task",
        "site": "named by the steward",
        "public_size": "declared by the steward",
        "contribution": "clipped, noised, and paid for",
        "spending": "see below",
        "noised_correct": "see below",
        "words": "of a secure sum, in the place of the contribution: uniform by its masks, see test_sums.py",
        "offer": "a new key and its signature, of nothing but the run's public names",
        "rank": "declared by the steward, or the configuration's where that is less",
        "precision": "from the configuration",
    },
    Spending: {
        "purpose": "from the task",
        "event": "see below",
        "steps_round": "from the configuration",
        "steps_total": "the ledger's sum of such figures",
        "delta": "from configuration, policy and ledger",
        "epsilon_round": "the accountant's, from such figures",
        "epsilon_total": "the accountant's, from such figures",
        "epsilon_budget": "from configuration, policy and ledger",
        "epsilon_remaining": "their difference",
        "accountant": "see below",
    },
    Event: {"kind": "the mechanism's", "figures": "from configuration, policy and public size"},
    Accountant: {
        "method": "follows from such figures",
        "version": "of an installed package",
        "detour": "see below",
    },
    Detour: {
        "reason": "follows from such figures",
        "figure": "one of such figures",
        "error": "the accountant's, on such figures",
        "grid": "follows from how many such figures there are",
    },
    NoisedCount: {"value": "noised, and paid for", "noise_std": "from the policy"},
    KeyReply: {
        "run": "from the task",
        "round_number": "from the task",
        "site": "named by the steward",
        "offer": "see below",
    },
    KeyOffer: {
        "site": "named by the steward",
        "public": "new, from the operating system's entropy",
        "signature": "of these and of run, round and attempt",
    },
    ShareReply: {
        "run": "from the task",
        "round_number": "from the task",
        "site": "named by the steward",
        "sharing": "see below",
    },
    Sharing: {
        "offer": "see above",
        "sealed": "shares of the masks' secrets, from such entropy, each sealed for its holder",
    },
    SurvivorReply: {
        "run": "from the task",
        "round_number": "from the task",
        "site": "named by the steward",
        "agreement": "see below",
    },
    Agreement: {
        "site": "named by the steward",
        "digest": "of what the server says and the run's figures",
        "signature": "of that and of the survivors' names, from the task",
    },
    UnmaskReply: {
        "run": "from the task",
        "round_number": "from the task",
        "site": "named by the steward",
        "shares": "of the masks' secrets, one of each site's two, see test_drop_outs.py",
    },
    Refusal: {
        "run": "from the task",
        "round_number": "from the task",
        "site": "named by the steward",
        "kind": "one of five words",
        "reason": "words about rules and public figures, or one constant line",
    },
}
"""Every field of every reply, and why it may leave."""
CONTENT = {
    "array adapter/state dtype": "constant",
    "array adapter/state shape": "from the configuration",
    "array adapter/state stype": "constant",
    "array adapter/state data": "the contribution, the nonce before each part",
    "config header/protocol": "constant",
    "config header/nonce": "from the operating system, new in each message",
    "config header/body": "the other fields above, packed",
}
METADATA = {
    "run_id": "Flower's",
    "src_node_id": "Flower's",
    "dst_node_id": "Flower's",
    "message_id": "a hash of the rest",
    "reply_to_message_id": "from the task",
    "group_id": "from the task",
    "message_type": "constant",
    "created_at": "the clock: how long a site takes is a side channel, see docs/concepts/site.md",
    "ttl": "constant",
}
"""What Flower itself adds to a reply."""


def leaves(record: RecordDict) -> Iterator[tuple[str, Any]]:
    """Yield name and value of everything inside an encoded message."""
    for name, arrays in record.array_records.items():
        for key, array in arrays.items():
            for part in ("dtype", "shape", "stype", "data"):
                yield f"array {name}/{key} {part}", getattr(array, part)
    for name, config in record.config_records.items():
        yield from ((f"config {name}/{key}", value) for key, value in config.items())
    for name, metrics in record.metric_records.items():
        yield from ((f"metric {name}/{key}", value) for key, value in metrics.items())


def check_content(record: RecordDict, reply: Reply) -> None:
    """Fail unless ``record`` is made of listed fields, and each byte of it follows from the fields of ``reply``."""
    unknown = {name for name, _ in leaves(record)} - set(CONTENT)
    assert not unknown, f"not on the list: {unknown}"
    layout = layout_of(reply.contribution) if isinstance(reply, TrainResult) else {}
    read = decode_reply(record, layout, reply.run, reply.round_number)
    nonce = record.config_records["header"]["nonce"]
    with patch.object(header.secrets, "token_bytes", lambda _: nonce):
        again = dict(leaves(encode_reply(read)))
    assert again == dict(leaves(record)), "some bytes follow from no field of the reply"


def check_metadata(proto: Proto) -> None:
    """Fail unless what Flower sends beside the content is on the list."""
    assert {field.name for field, _ in proto.ListFields()} <= {"metadata", "content"}
    metadata: Any = proto
    unknown = {field.name for field, _ in metadata.metadata.ListFields()} - set(METADATA)
    assert not unknown, f"not on the list: {unknown}"


def classification(settings: dict[str, Any], generation: dict[str, Any], folder: Path) -> OneSite:
    return clinic(settings, folder)


def with_metrics(settings: dict[str, Any], generation: dict[str, Any], folder: Path) -> OneSite:
    site = clinic(settings, folder)
    site.rule(send_noised_metrics=True, min_noise_multiplier=1.0)
    return site


def completion(settings: dict[str, Any], generation: dict[str, Any], folder: Path) -> OneSite:
    site = clinic(generation, folder)
    site.node["data"] = str(write_questions(folder / "own.csv", 30))
    return site


def initialised(settings: dict[str, Any], generation: dict[str, Any], folder: Path) -> OneSite:
    return clinic({**settings, "strategy": "fed-sb", "adapter.start": "dp-gradient"}, folder)


Make = Callable[[dict[str, Any], dict[str, Any], Path], OneSite]
each_site = pytest.mark.parametrize("make", [classification, with_metrics, completion])


@each_site
def test_a_result_is_made_of_listed_fields_to_the_last_byte(
    make: Make, toy_settings: dict[str, Any], toy_generation: dict[str, Any], tmp_path: Path
) -> None:
    reply = make(toy_settings, toy_generation, tmp_path).train()
    assert (reply.noised_correct is not None) == (make is with_metrics)
    assert reply.spending is not None
    check_content(encode_reply(reply), reply)


def test_an_initial_gradient_is_made_of_listed_fields(
    toy_settings: dict[str, Any], toy_generation: dict[str, Any], tmp_path: Path
) -> None:
    site = initialised(toy_settings, toy_generation, tmp_path)
    reply = site.ask(replace(site.task(0), state={}, basis={}, basis_fingerprint=""))
    assert isinstance(reply, TrainResult), reply
    check_content(encode_reply(reply), reply)


def test_refusals_are_made_of_listed_fields_and_quote_no_record(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, refusals = clinic(toy_settings, tmp_path), dict[str, Refusal]()

    def collect(reply: Reply) -> None:
        assert isinstance(reply, Refusal), "the site took part"
        check_content(encode_reply(reply), reply)
        refusals[reply.kind] = reply

    collect(site.ask(replace(site.task(), base_fingerprint="0" * 64)))
    site.rule(strategies=["fed-sb"])
    collect(site.ask(site.task()))
    site.rule(epsilon=0.01, delta=1e-3)
    collect(site.ask(site.task()))

    def quote(*_: Any) -> None:
        raise ValueError("record 7 says: a lovely film")

    site.node["ledger"] = str(tmp_path / "fresh.sqlite")
    site.rule()
    monkeypatch.setattr(local_training, "_local_steps", quote)
    collect(site.ask(site.task()))
    assert set(refusals) == {"task", "policy", "budget", "failed"}
    assert "fedveil ledger show <ledger>" in refusals["budget"].reason
    assert "lovely" not in refusals["failed"].reason, "a refusal quotes a record"


def counting(kind: type[Exception]) -> Callable[..., None]:
    """Return a training that fails and says how many records it was given."""

    def fail(records: list[Any], *_: Any) -> None:
        raise kind(f"trouble with one of {len(records)} records")

    return fail


@pytest.mark.parametrize("kind", [DataError, MechanismError, FedVeilError, ValueError, RuntimeError, MemoryError])
def test_a_failure_after_the_charge_is_the_same_refusal_whatever_the_records(
    kind: type[Exception], toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_training, "_local_steps", counting(kind))
    refusals = []
    for records in (40, 39):
        site = clinic(toy_settings, tmp_path, records, records)
        refusals.append(site.ask(site.task()))
        assert site.charges(), "the failure came before the charge"
    assert isinstance(refusals[0], Refusal)
    assert refusals[0] == refusals[1], "a refusal depends on the number of records"


def test_data_that_cannot_be_read_are_one_refusal_whatever_is_wrong_with_them(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    site = clinic(toy_settings, tmp_path)
    data, task, replies = Path(str(site.node["data"])), site.task(), []
    for content in ("text\nthe film\n", "label\ngood\n", None):
        data.unlink()
        if content is not None:  # a header without a column of the run; what rows hold refuses nothing (test_rows.py)
            data.write_text(content, encoding="utf-8")
        replies.append(site.ask(task))
    assert isinstance(replies[0], Refusal)
    assert replies[0].reason == UNTOLD, "the refusal tells what is wrong"
    assert replies == replies[:1] * 3


def pooled(parent: Path) -> Path:
    """Write an encoder whose pooler is a layer that mean pooling passes by."""
    folder = parent / "pooled"
    config = XLMRobertaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=60,
    )
    XLMRobertaModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "start",
    [
        {"strategy": "fedavg-lora", "adapter.name": "lora-metric", "adapter.start": "public-metric"},
        {"strategy": "ffa-lora", "adapter.start": "svd-of-weights", "adapter.alpha": 0.0},
    ],
    ids=lambda start: str(start["adapter.start"]),
)
def test_a_start_from_public_text_names_a_layer_that_the_model_does_not_use(
    start: dict[str, Any], toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**toy_settings, "model.name": str(pooled(tmp_path)), "adapter.rank": 2, **start}
    settings |= {"adapter.targets": "query,dense", "training.optimizer": "sgd", "start.records": 8}
    if "adapter.alpha" in start:
        del settings["start.records"]
    with pytest.raises(ModelError, match=r"^the model does not use the layer 'pooler.dense': name others in"):
        run_in_process(settings, 2)


def test_a_layer_that_the_model_does_not_use_is_refused_before_the_charge_and_tells_no_size(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**toy_settings, "model.name": str(pooled(tmp_path)), "training.sample-rate": 1.0}
    refusals = [clinic(settings, tmp_path, records, records).refuse() for records in (40, 39)]
    assert refusals[0] == refusals[1], "a refusal depends on the number of records"
    assert "the model does not use the layer 'pooler.dense'" in refusals[0].reason
    assert clinic({**settings, "adapter.targets": "query"}, tmp_path, 40, 40).train(), "the model itself is refused"


def test_the_words_of_errors_are_told_only_if_they_are_on_the_list() -> None:
    told = {error for error in errors_of(FedVeilError) if public_reason(error("x"), {}, simulated=False) == "x"}
    assert told == set(TOLD)
    assert not {DataError, MechanismError, FedVeilError} & told, "words about records leave the site"


def errors_of(root: type[FedVeilError]) -> Iterator[type[FedVeilError]]:
    """Yield an error of ours and all that are kinds of it."""
    yield root
    for kind in root.__subclasses__():
        yield from errors_of(kind)


@pytest.mark.parametrize("key", ["ledger", "policy", "data"])
def test_no_refusal_holds_a_path_of_the_sites_disks(
    key: str, toy_settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = clinic(toy_settings, tmp_path)
    task = site.task()
    site.node[key] = str(tmp_path / "a folder" / "missing" / "file.toml")
    if key == "ledger":
        Path(str(site.node[key])).mkdir(parents=True)
    reply = site.ask(task)
    assert isinstance(reply, Refusal)
    assert str(tmp_path) not in reply.reason
    assert "missing" not in reply.reason
    if key != "data":  # an error about data may quote a record, so only its place is told
        assert f"<{key}>" in reply.reason
        assert str(site.node[key]) in caplog.text, "the steward's own log hides where to look"


@pytest.mark.parametrize("named", [True, False], ids=["named", "the user's own"])
def test_no_rest_of_a_path_with_blanks_is_told(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "Dr Quincy Secret"
    (home / "kept here").mkdir(parents=True)
    (tmp_path / "link").symlink_to(home / "kept here")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    node: dict[str, Any] = {"ledger": str(tmp_path / "link" / "ledger.sqlite")} if named else {}
    real = home / "kept here" / "ledger.sqlite" if named else home / ".local" / "share" / "fedveil" / "ledger.sqlite"
    for place in (real, home / "other", home):
        told = without_paths(f"the ledger {place} cannot be read; see {place}: twice", node)
        assert not [word for word in ("Quincy", "Secret", "kept", "here", str(tmp_path)) if word in told], told
    assert "<ledger" in without_paths(f"the ledger {real} is damaged", node)


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"ledger": "a link/l.sqlite"}, "a link/l.sqlite"),
        ({"ledger": "~/kept here/l.sqlite"}, "home/kept here/l.sqlite"),
        ({"data": "home/kept here", "ledger": "home/kept here/of us/l.sqlite"}, "home/kept here/of us/l.sqlite"),
    ],
    ids=["through a link", "below the home", "below another"],
)
def test_a_path_of_the_node_is_told_by_its_name_however_it_is_written(
    node: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "a link").symlink_to(home)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    assert without_paths(f"the ledger {tmp_path / told} is damaged", node) == "the ledger <ledger> is damaged"


@pytest.mark.parametrize("key", ["ledger", "policy", "data", "identity"])
def test_every_setting_of_the_node_that_is_a_path_is_told_by_its_name(key: str) -> None:
    assert without_paths("see /srv/our ward/file", {key: "/srv/our ward/file"}) == f"see <{key}>"


def test_the_folder_of_a_user_whom_nobody_here_knows_is_a_path_as_well() -> None:
    place = "~nobody-of-that-name/ward"
    assert without_paths(f"the ledger {place} is damaged", {"ledger": place}) == "the ledger <ledger> is damaged"
    assert without_paths(f"the roster '{place}' is none", {}) == "the roster '<path>' is none"


def test_where_the_home_is_the_root_no_stroke_is_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has none."""
    monkeypatch.setenv("HOME", "/")
    assert without_paths("1 / 50 of it; see https://host/x", {}) == "1 / 50 of it; see https://host/x"


def test_a_home_that_is_a_link_is_told_by_its_name_where_it_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Dr Quincy").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "Dr Quincy")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert without_paths(f"see {tmp_path / 'Dr Quincy'}", {}) == "see <home>"


def test_a_folder_whose_name_begins_as_the_home_s_does_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/ann")
    assert without_paths("see /srv/annex/x and /srv/ann", {}) == "see <path> and <home>"


def test_the_sites_own_log_has_no_words_about_data() -> None:
    assert own_words(ConfigError("rounds is 0")) == "rounds is 0"
    for error in (DataError("row 7 says: a lovely film"), ValueError("a lovely film")):
        assert "lovely" not in own_words(error)


def test_the_list_has_every_field_of_every_reply_and_no_other() -> None:
    for kind, known in FIELDS.items():
        assert {item.name for item in dataclasses.fields(kind)} == set(known), f"{kind.__name__} is not as listed"


def through_flower(site: OneSite) -> Message:
    """Return the message that leaves the site's Flower app."""
    content = recorddict_to_proto(encode_task(site.task(run="77")))
    metadata = ProtoMetadata(run_id=77, src_node_id=1, dst_node_id=5, message_id="m", group_id="1")
    metadata.message_type, metadata.created_at, metadata.ttl = "train", time.time(), 60.0
    context = Context(77, 5, dict(site.node), RecordDict(), dict(site.settings))
    reply = train(message_from_proto(ProtoMessage(metadata=metadata, content=content)), context)
    assert "kept" in context.state, "the site keeps no reply"
    return reply


def test_flower_adds_nothing_that_is_not_listed(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    site = clinic(toy_settings, tmp_path)
    message = through_flower(site)
    reply = decode_reply(message.content, layout_of(site.train(2).contribution), "77", 1)
    assert isinstance(reply, TrainResult)
    check_content(message.content, reply)
    check_metadata(message_to_proto(message))


def planted() -> Iterator[tuple[str, Callable[[RecordDict], None]]]:
    """Yield what a careless change could add to a reply."""

    def more_bytes(record: RecordDict) -> None:
        header: dict[str, Any] = dict(record.config_records["header"])
        record["header"] = ConfigRecord({**header, "body": header["body"] + b"\x07"})

    def more_array(record: RecordDict) -> None:
        record["adapter"] = ArrayRecord({**record.array_records["adapter"], "loss": Array(torch.ones(1).numpy())})

    def more_shape(record: RecordDict) -> None:
        state = record.array_records["adapter"]["state"]
        record["adapter"] = ArrayRecord({"state": Array(state.dtype, (17, *state.shape), state.stype, state.data)})

    yield "a metric", lambda record: record.update({"metrics": MetricRecord({"train_loss": 0.7})})
    yield "a count in the header", lambda record: record.config_records["header"].update({"num-examples": 40})
    yield "a record of its own", lambda record: record.update({"more": ConfigRecord({"note": "x"})})
    yield "bytes after the header", more_bytes
    yield "another array", more_array
    yield "a figure in the shape", more_shape


def test_a_planted_field_is_found(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    reply = clinic(toy_settings, tmp_path).train()
    check_content(encode_reply(reply), reply)
    for what, plant in planted():
        print(what)  # pytest shows the last one where it is not found
        record = encode_reply(reply)
        plant(record)
        with pytest.raises(Exception, match=r"list|follow|bytes|block"):
            check_content(record, reply)


def test_a_planted_field_of_the_message_is_found(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    proto: Any = message_to_proto(through_flower(clinic(toy_settings, tmp_path)))
    check_metadata(proto)
    proto.error.reason = "batch of 40 records"
    with pytest.raises(AssertionError):
        check_metadata(proto)


def shape_of(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Any]:
    """Return all that a site sends beside its contribution, and the contribution, under fixed noise."""
    generator = torch.Generator().manual_seed(5)

    def noised(total: torch.Tensor, std: float) -> torch.Tensor:
        return total + torch.randn(total.shape, generator=generator, dtype=torch.float64) * std

    with monkeypatch.context() as patch:
        patch.setattr(dpsgd, "add_private_noise", noised)
        patch.setattr(randomness, "private_poisson_sample", lambda size, rate: torch.arange(0, size, 4))
        patch.setattr(header.secrets, "token_bytes", bytes)  # the nonce's, which follow from nothing
        found = dict(leaves(encode_reply(site.train())))
    return found, found.pop("array adapter/state data")


def test_other_records_change_nothing_but_the_contribution(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, first = shape_of(clinic(toy_settings, tmp_path, 40, 1), monkeypatch)
    few, second = shape_of(clinic(toy_settings, tmp_path, 23, 2), monkeypatch)
    assert many == few, "something beside the contribution depends on the records"
    assert first != second, "the contribution does not depend on the records: the test tests nothing"

    # Planted fault: a site that declares what it counts.
    leaky = clinic(toy_settings, tmp_path, 30, 3)
    leaky.node["public-size"] = 30
    assert shape_of(leaky, monkeypatch)[0] != many
