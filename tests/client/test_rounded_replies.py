"""``wire.precision``: what rounding does to messages, that it sees nothing but what is released, and the bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from audits.tiny_site import clinic
from fedveil.common.config.wire import WIRE_PRECISIONS
from fedveil.common.errors import ConfigError, ProtocolError
from fedveil.common.messages.blocks import bytes_of, encode_state, layout_of, rounded
from fedveil.common.messages.formats import FORMATS, BFloat16, Format, Int8
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import apply, l2_norm
from fedveil.common.messages.wire import decode_reply, encode_reply
from fedveil.experiments.in_process import run_in_process
from fedveil.server.admission import Admission
from fedveil.server.model import ServerModel
from fedveil.server.sites import Sites
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices
LOW = [name for name in WIRE_PRECISIONS if name != "float32"]
low = pytest.mark.parametrize("precision", LOW)


# --- the formats ------------------------------------------------------------------------------------------------------
def vectors() -> st.SearchStrategy[Tensor]:
    sizes = st.floats(2.0**-100, 2.0**100, width=32) | st.floats(2.0**-20, 2.0**-10, width=32)
    numbers = sizes | sizes.map(lambda number: -number) | st.sampled_from([0.0, 1.0])
    return st.lists(numbers, min_size=1, max_size=150).map(lambda values: torch.tensor(values, dtype=torch.float32))


def test_every_precision_has_a_format() -> None:
    assert tuple(FORMATS) == WIRE_PRECISIONS


@low
@settings(max_examples=60, deadline=None)
@given(numbers=vectors())
def test_rounding_twice_is_rounding_once_and_lengthens_within_the_room(precision: str, numbers: Tensor) -> None:
    form, data = FORMATS[precision], FORMATS[precision].encode(numbers)
    assert len(data) == form.size(len(numbers))
    there = form.decode(data)
    assert form.encode(there) == data
    assert float(there.double().norm()) <= (1 + form.room) * float(numbers.double().norm()) * (1 + 1e-12)
    whole = numbers == 1
    assert bool((there[whole] == 1).all()) or precision == "int8", "a mask is not rounded"


@low
def test_a_mask_of_0_and_1_arrives_as_it_is(precision: str) -> None:
    mask = {"layer": {"mask": (torch.arange(100) % 3 == 0).float()}}
    assert torch.equal(rounded(mask, precision)["layer"]["mask"], mask["layer"]["mask"])


@low
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_not_finite_does_not_arrive(precision: str, wrong: float) -> None:
    with pytest.raises(ProtocolError, match="finite"):
        rounded({"layer": {"B": torch.tensor([1.0, wrong])}}, precision)


def test_bfloat16_halves_and_int8_quarters_a_message() -> None:
    state = {"layer": {"B": torch.ones(128, 64)}}
    sizes = [len(encode_state(state, precision)) for precision in WIRE_PRECISIONS]
    assert sizes == [bytes_of(layout_of(state), precision) for precision in WIRE_PRECISIONS] == [32768, 16384, 8320]


# --- nothing but what is released -------------------------------------------------------------------------------------
SUMS: list[float] = []
"""The largest number of each sum before its noise, which no format may see."""


@pytest.fixture
def known_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Release the same whatever the records are: so must be what travels."""

    def released(total: Tensor, std: float) -> Tensor:
        SUMS.append(float(total.abs().max()))
        return std * torch.linspace(-3.0, 3.0, total.numel(), dtype=torch.float64).view(total.shape)

    monkeypatch.setattr("fedveil.privacy.dpsgd.add_private_noise", released)
    yield
    SUMS.clear()


def check_that_the_message_follows_from_the_release(made: dict[str, Any], folder: Path, precision: str) -> None:
    sent = []
    for records in (0, 1):
        site = clinic({**made, "wire.precision": precision, "training.sample-rate": 1.0}, folder, seed=records)
        reply = site.ask(replace(site.task(), precision=precision))
        assert isinstance(reply, TrainResult), reply
        sent.append(encode_state(reply.contribution, reply.precision))
    assert len(set(SUMS)) > 1, "both sites have the same sums: the test tests nothing"
    assert sent[0] == sent[1], "what travels tells of the sum before its noise"


@low
@pytest.mark.usefixtures("known_noise")
def test_what_travels_follows_from_what_is_released_alone(
    precision: str, toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    check_that_the_message_follows_from_the_release(toy_settings, tmp_path, precision)


@pytest.mark.usefixtures("known_noise")
def test_a_scale_that_is_taken_from_the_sum_before_its_noise_is_found(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    real = Int8.encode

    def by_the_sum(form: Format, numbers: Tensor) -> bytes:
        step = SUMS[-1] / 127 if SUMS else 1.0
        return real(form, (numbers / step).round() * step)  # type: ignore[arg-type]

    with patch.object(Int8, "encode", by_the_sum), pytest.raises(AssertionError, match="before its noise"):
        check_that_the_message_follows_from_the_release(toy_settings, tmp_path, "int8")


# --- the server -------------------------------------------------------------------------------------------------------
def reasons_against(change: Callable[[Tensor], Tensor], made: dict[str, Any], most: float) -> dict[int, str]:
    """Return why the server does not take an honest change that is as long as ``max-update-norm``."""
    own = {"privacy.mode": "none", "wire.precision": "bfloat16", "max-update-norm": most}
    job = configure({**made, **own})
    model = ServerModel(job)
    state, admission = job.start(model.start), Admission(job, {})
    sent = TrainResult("1", 1, "north", 60, apply(change, model.trained_start()), None, precision="bfloat16")
    layout = model.reply_layout(1, state)
    arrived = decode_reply(encode_reply(sent), layout, "1", 1, "bfloat16")
    whole = Sites(job, "1", None, model, admission)._whole(arrived, state)  # type: ignore[arg-type]
    assert isinstance(whole, TrainResult)
    return admission.judge({0: whole}, state, {0})


def just_above_half(tensor: Tensor) -> Tensor:
    """Return numbers that bfloat16 makes longer by nearly as much as it makes any."""
    return torch.full_like(tensor, 2.0**-6 * (1 + 2.0**-8 + 2.0**-12))


def test_an_honest_change_that_rounding_makes_longer_is_within_the_servers_bounds(
    toy_settings: dict[str, Any],
) -> None:
    trained: AdapterState = ServerModel(configure(toy_settings)).trained_start()
    most = l2_norm(apply(just_above_half, trained)) * (1 + 1e-4)
    assert reasons_against(just_above_half, toy_settings, most) == {}
    assert reasons_against(lambda tensor: 1.01 * just_above_half(tensor), toy_settings, most)
    with patch.object(BFloat16, "room", 0.0):
        assert reasons_against(just_above_half, toy_settings, most), "a bound without room is not found"


@low
def test_a_strategy_that_combines_what_each_site_sent_is_refused(precision: str, toy_settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"wire\.precision.*choose a strategy that averages"):
        configure({**toy_settings, "strategy": "flora", "wire.precision": precision})


@low
def test_a_run_of_rounded_messages_ends_near_one_of_float32(precision: str, toy_settings: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    open_run = {**toy_settings, "privacy.mode": "none", "strategy": "fedavg-lora", "rounds": 2}
    ends = []
    for own in ("float32", precision):
        folder = run_in_process({**open_run, "wire.precision": own}, 2, own)
        ends.append(load_file(str(folder / "adapter" / "adapter_model.safetensors")))
    gap = sum(float((ends[0][name] - ends[1][name]).double().square().sum()) for name in ends[0]) ** 0.5
    whole = sum(float(tensor.double().square().sum()) for tensor in ends[0].values()) ** 0.5
    assert 0 < gap < {"bfloat16": 0.02, "int8": 0.1}[precision] * whole
