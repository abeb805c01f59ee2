"""Images end to end: fixed squares, features, what couples records, a private federation on digits."""

from __future__ import annotations

import ast
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import PATCH, PROCESSOR, SIDE, TOKENS, digits, encoded, save_vit, write_folder
from made_run import spent
from PIL import Image
from torch import nn

from audits.tiny_site import OneSite
from audits.worlds import Gradient, Recorder, minus, norm, plan
from fedveil.client.own_records import prepared
from fedveil.client.rehearsal import SHOWN, _fewer, _Rehearsal, rehearse
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import DataConfig, HeadConfig
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import ConfigError, DataError, ModelError, ModelNotLoaded
from fedveil.common.messages.round import TrainResult
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.starts import STARTS, Labels, class_means
from fedveil.common.tasks import TASKS, Record, images, patches
from fedveil.common.tasks import image_classification as images_task
from fedveil.common.tasks.image_classification import CHANCE, ImageExample
from fedveil.common.tasks.image_processor import ImageProcessor
from fedveil.common.tasks.images import Picture, read_image
from fedveil.common.tasks.textures import made_up_image
from fedveil.demo import dinov2
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.ask import ask_run
from fedveil.experiments.serving.merge import merge_run
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.together import together
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices]

NAME = "image-classification"
TASK = TASKS[NAME]
TARGETS = {"vit": "query,value", "clip": "q_proj,v_proj"}
KINDS = ("dinov2", "registers", "vit", "clip")
QUOTED = "merged'\"\nraise SystemExit #"
STEP = gaussian_plan(1.0, 1.0, 1.0, 1.0, 1e-5, 1.0)


def example(pixels: np.ndarray, label: int = 0) -> ImageExample:
    return ImageExample(image=read_image(encoded(pixels)), label=label)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def targets_of(folder: str) -> tuple[str, ...]:
    """Return the names of the attention's projections of queries and values, as this kind of model calls them."""
    names = {name.rpartition(".")[2] for name, _ in load_base_model(folder, NAME).module.named_modules()}
    return ("q_proj", "v_proj") if "q_proj" in names else ("query", "value")


def federated(folder: str, max_length: int = TOKENS, targets: tuple[str, ...] = (), **options: Any) -> FederatedModel:
    return FederatedModel(
        load_base_model(folder, NAME),
        ADAPTERS["lora"](2, 2.0, targets or targets_of(folder), STARTS["orthonormal"]()),
        TASK,
        HeadConfig("trained", "random"),
        seed=1,
        label_names=("0", "1"),
        max_length=max_length,
        device="cpu",
        **options,
    )


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def make(kind: str = "dinov2") -> str:
        if kind not in made:
            made[kind] = save_vit(tmp_path_factory.mktemp(f"tiny-{kind}"), kind)
        return made[kind]

    return make


# What the processor's settings say.


@pytest.mark.parametrize(
    ("settings", "side", "edge"),
    [
        (PROCESSOR, SIDE, 0),
        ({**PROCESSOR, "size": 16}, 16, 0),
        ({**PROCESSOR, "size": {"shortest_edge": 16}}, 16, 16),
        ({**PROCESSOR, "size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": 14}, 14, 16),
        (
            {
                **PROCESSOR,
                "size": {"shortest_edge": 16},
                "do_center_crop": True,
                "crop_size": {"height": 14, "width": 14},
            },
            14,
            16,
        ),
        ({**PROCESSOR, "size": {"height": 16, "width": 16}, "do_center_crop": True, "crop_size": 14}, 14, 16),
    ],
)
def test_the_square_is_the_processors(settings: dict[str, Any], side: int, edge: int) -> None:
    processor = ImageProcessor.from_settings(settings)
    assert (processor.side, processor.edge) == (side, edge)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"do_resize": False}, "does not resize"),
        ({"size": {"height": 8, "width": 16}}, "square"),
        ({"size": {"longest_edge": 8}}, "square"),
        ({"size": None}, "square"),
        ({"size": {"shortest_edge": 8}, "do_center_crop": True, "crop_size": 16}, "square"),
    ],
)
def test_a_processor_without_a_fixed_square_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ImageProcessor.from_settings({**PROCESSOR, **change})


def test_an_image_is_prepared_as_the_models_authors_do_it() -> None:
    """Bicubic to 256, the middle 224 cut out, ImageNet's constants: step by step with Pillow and numpy."""
    pixels = noise(512, 512)
    scaled = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = ((np.asarray(scaled) / 255 - mean) / std).transpose(2, 0, 1)
    processor = ImageProcessor.from_settings(dinov2.PROCESSOR)
    found = processor.normalised(processor.pixels(read_image(encoded(pixels)), 224)[None])[0]
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - wanted).max() < 0.02  # Pillow rounds to whole tones once more, or less


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (7, 9), (500, 300)])
@pytest.mark.parametrize("edge", [0, SIDE + 2])
def test_every_image_becomes_the_same_square(shape: tuple[int, int], edge: int) -> None:
    size = {"shortest_edge": edge} if edge else PROCESSOR["size"]
    processor = ImageProcessor.from_settings(
        {**PROCESSOR, "size": size, "do_center_crop": bool(edge), "crop_size": SIDE}
    )
    pixels = processor.pixels(read_image(encoded(noise(*shape))), 6)
    assert pixels.shape == (3, 6, 6)
    assert pixels.dtype == torch.uint8


def test_what_is_scaled_is_only_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of one row, brought to an edge of 256 first, would have as many pixels as its length times 256²."""
    made: list[int] = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda image, size, *rest, **more: made.append(math.prod(size)) or resize(image, size, *rest, **more),
    )
    processor = ImageProcessor(16, 18, 3, 1 / 255, (0.0,) * 3, (1.0,) * 3)
    assert processor.pixels(read_image(encoded(noise(1, 60_000))), 16).shape == (3, 16, 16)
    assert made == [256]


# What is read of a model.


@pytest.mark.parametrize("kind", KINDS)
def test_a_records_tokens_are_those_that_the_model_has(kind: str, vit: Callable[[str], str]) -> None:
    model = federated(vit(kind))
    special = model.max_length - (SIDE // PATCH if kind != "registers" else 3) ** 2
    assert special == (4 if kind == "registers" else 1)
    (record,) = model.prepare([example(digits(count=1)[0][0])])
    batch = model.batch([record])
    options = {"interpolate_pos_encoding": True} if kind in ("vit", "clip") else {}
    hidden = model.base.module(pixel_values=batch["pixel_values"], **options).last_hidden_state
    assert hidden.shape[1] == model.task.size(record) == model.max_length
    features = model.module.features(batch)
    wanted = torch.cat([hidden[:, 0], hidden[:, special:].mean(1)], dim=-1)
    assert torch.allclose(features, wanted, atol=1e-6)
    assert features.shape == (1, 32)


@pytest.mark.parametrize(
    ("max_length", "side"), [(TOKENS, SIDE), (10_000, SIDE), (TOKENS - 1, 6), (10, 6), (9, 4), (5, 4), (4, 2), (2, 2)]
)
def test_the_size_of_images_follows_from_the_longest_length(
    max_length: int, side: int, vit: Callable[[str], str]
) -> None:
    model = federated(vit("dinov2"), max_length)
    assert model.max_length == (side // PATCH) ** 2 + 1 <= max_length
    record = model.prepare([example(noise(50, 70))])[0]
    assert tuple(record["pixel_values"].shape) == (3, side, side)
    assert model.task.fits(model.base, record, model.max_length)
    assert not model.task.fits(model.base, {**record, "pixel_values": record["pixel_values"][:, 1:]}, model.max_length)
    assert model.shapes.uniform
    assert model.shapes.lengths == (model.max_length,)


def test_a_length_without_room_for_a_patch_is_refused(vit: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match=r"model.max-length is 1: set it to 2 or more"):
        federated(vit("dinov2"), 1)


def test_a_model_of_one_size_says_so(vit: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "position_options", lambda _: {})
    assert federated(vit("vit"), TOKENS, ("q_proj",)).max_length == TOKENS
    with pytest.raises(ConfigError, match=rf"takes images of {SIDE} pixels alone: set it to {TOKENS}"):
        federated(vit("vit"), TOKENS - 1, ("q_proj",))


def test_size_and_constants_do_not_follow_from_other_images(vit: Callable[[str], str]) -> None:
    model = federated(vit("dinov2"))
    few = [example(noise(20, 30)), example(np.zeros((64, 9, 3), np.uint8)), example(np.full((5, 5, 3), 255, np.uint8))]
    alone = [model.batch(model.prepare([one]))["pixel_values"] for one in few]
    together = model.batch(model.prepare(few))["pixel_values"]
    assert all(torch.equal(together[i : i + 1], one) for i, one in enumerate(alone))


def test_what_a_model_leaves_out_by_chance_is_off(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "dropping", drop_path_rate=0.5, hidden_dropout_prob=0.3)
    assert json.loads((tmp_path / "dropping" / "config.json").read_text())["drop_path_rate"] == 0.5
    model = federated(folder)
    model.module.train()
    batch = model.batch(model.prepare([example(noise(9, 9))] * 2))
    with torch.no_grad():
        found = [model.module(batch) for _ in range(3)]
    assert all(torch.equal(one, found[0]) for one in found)
    rehearse(model)


def test_layers_that_are_dropped_by_chance_do_not_pass_the_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: the model's own settings are taken as they come."""
    monkeypatch.setattr(images_task, "CHANCE", ())
    torch.manual_seed(1)  # which layers are dropped, and by chance it is the same ones twice
    with pytest.raises(ModelError, match="cannot be trained privately"):
        rehearse(federated(save_vit(tmp_path / "dropping", drop_path_rate=0.9)))
    assert "drop_path_rate" in CHANCE


@pytest.mark.parametrize("clip", [0.05, 1.0, 100.0])
def test_two_flips_of_an_image_are_one_record_of_the_unit_record(vit: Callable[[str], str], clip: float) -> None:
    """Their gradients are summed before norm and clip, as the slow way does it."""
    model, figures = federated(vit()), plan(clip)
    assert not figures.unit.grouped
    trained = [p for p in model.module.parameters() if p.requires_grad]
    pixels = [noise(SIDE, SIDE, seed) for seed in range(3)]
    flips = [(own, np.ascontiguousarray(own[:, ::-1])) for own in pixels]
    records = prepared(model, [example(view, i % 2) for i, both in enumerate(flips) for view in both])
    pairs = [[0, 1], [2, 3], [4, 5]]

    def step(parts: Iterable[Any]) -> Gradient:
        optimizer = Recorder(trained)
        with model.many_passes(), PrivateSteps(model.module, optimizer, figures) as steps:
            steps.step(parts, model.losses)
        return optimizer.given[0]

    def slow(rows: Sequence[int]) -> Gradient:
        each = [torch.autograd.grad(model.losses(model.batch([records[row]])).sum(), trained) for row in rows]
        whole = [torch.stack(parts).double().sum(0) for parts in zip(*each, strict=True)]
        return [g * min(1.0, clip / norm(whole)) for g in whole]

    def added(groups: Sequence[Sequence[int]]) -> Gradient:
        return [torch.stack(parts).sum(0) for parts in zip(*map(slow, groups), strict=True)]

    def far(left: Gradient, right: Gradient) -> bool:
        return norm(minus(left, right)) > 1e-4 * norm(right)

    got = step(together(model, records, pairs))
    assert not far(got, added(pairs))
    # The planted fault: each row is clipped by itself, as rows of a plain batch are.
    apart = step(model.fixed_batches(records))
    assert not far(apart, added([[row] for row in range(6)]))
    assert far(apart, got) == (clip < 100), "the check is blind"


def rows_alike(model: FederatedModel) -> int:
    """Return the most rows with which this machine gives records one gradient each, to the last bit, in every row.

    One record may be rounded alike by chance where the next is not, so several are tried.
    """
    length, trained = model.shapes.longest, [p for p in model.module.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    many = model.shapes.rows_of(length)
    others = model.prepare([example(noise(SIDE, SIDE, seed)) for seed in range(1, many)])
    tried = model.prepare([example(noise(SIDE, SIDE, 1000 + seed)) for seed in range(SHOWN)])
    with model.many_passes(), PrivateSteps(model.module, torch.optim.SGD(trained, lr=0.0), STEP) as steps:

        def gradient(record: Record, row: int, rows: int) -> list[torch.Tensor]:
            batch = model.fixed_batch([*others[:row], record, *others[row : rows - 1]], length, rows)
            return [sample[row] for sample in steps.samples(batch, model.losses)]

        def shown(rows: int) -> int:
            return SHOWN if rows % 4 else 1

        def alike(record: Record, rows: int) -> bool:
            first = gradient(record, 0, rows)
            return all(all(map(torch.equal, gradient(record, row, rows), first)) for row in range(1, rows))

        return next(rows for rows in _fewer(many) if all(alike(record, rows) for record in tried[: shown(rows)]))


def save_with_heads(folder: Path, kind: str, heads: int) -> str:
    width = 8 * heads
    size = {"hidden_size": width, "num_attention_heads": heads, "initializer_range": 1.2 / math.sqrt(width)}
    return save_vit(folder / kind, kind, **size)


def check_the_rows_that_are_left(folder: str, precision: str) -> None:
    """Let a model rehearse, and hold the rows that it keeps to those that this machine computes alike."""
    model, other = (federated(folder, precision=precision) for _ in range(2))
    rehearse(model)
    assert model.shapes.rows_of(model.shapes.longest) == rows_alike(other), "other rows than are computed alike"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [2, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_honest_models_pass_the_rehearsal_with_all_rows_that_the_machine_computes_alike(
    kind: str, heads: int, precision: str, tmp_path: Path
) -> None:
    """Images have no mask to pad by, so with 17 tokens and two heads rows begin at odd places, which kernels may round.

    With 16 heads they begin at multiples of 64 bytes.
    """
    check_the_rows_that_are_left(save_with_heads(tmp_path, kind, heads), precision)


def test_a_rehearsal_that_gives_rows_up_without_a_cause_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_with_heads(tmp_path, "vit", 16)
    monkeypatch.setattr("fedveil.client.rehearsal._fewer", lambda rows: iter((1,)))
    with pytest.raises(AssertionError, match="other rows"):
        check_the_rows_that_are_left(folder, "float32")


def test_a_rehearsal_that_keeps_rows_which_the_machine_computes_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = PrivateSteps.samples

    def uneven(steps: PrivateSteps, batch: Any, losses: Any) -> list[torch.Tensor]:
        """Round the second row otherwise, as a kernel does that goes by where a row begins."""
        found = samples(steps, batch, losses)
        for sample in found:
            sample[1:2] *= 1 + 1e-6
        return found

    folder = save_with_heads(tmp_path, "vit", 16)
    monkeypatch.setattr(PrivateSteps, "samples", uneven)
    check_the_rows_that_are_left(folder, "float32")

    def no_rows_compared(self: _Rehearsal, steps: Any, length: int, rows: int) -> list[torch.Tensor]:
        return self._among_others(steps, length, rows, self._shown(rows))

    monkeypatch.setattr("fedveil.client.rehearsal._Rehearsal._equal_rows", no_rows_compared)
    with pytest.raises(AssertionError, match="other rows"):
        check_the_rows_that_are_left(folder, "float32")


class ByTheBatch(nn.Module):
    """A layer that takes its mean from the batch."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden - hidden.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("layer", "words"), [(ByTheBatch(), "depends on the records beside it"), (nn.BatchNorm1d(TOKENS), "BatchNorm1d")]
)
def test_a_model_that_normalises_by_the_batch_is_refused(
    layer: nn.Module, words: str, vit: Callable[[str], str]
) -> None:
    model = federated(vit("dinov2"))
    model.base.module.layernorm = nn.Sequential(model.base.module.layernorm, layer)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=words):
        rehearse(model)


def test_what_is_no_vision_transformer_is_refused_in_one_line(
    tmp_path: Path, model_folder: Callable[[str], str]
) -> None:
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1])).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    with pytest.raises(ConfigError, match="no vision transformer"):
        federated(str(tmp_path), targets=("convolution",))
    with pytest.raises(ModelNotLoaded, match="image processor"):
        load_base_model(model_folder("bert"), NAME)
    with pytest.raises(
        ModelNotLoaded, match=r"'all-MiniLM-L6-v2': it is none that model\.task 'image-classification' takes"
    ):
        load_base_model("all-MiniLM-L6-v2", NAME)
    with pytest.raises(ModelNotLoaded, match=r"'dinov2-small': it is none that model\.task 'classification' takes"):
        load_base_model("dinov2-small", "classification")


def test_the_processors_settings_are_part_of_the_fingerprint(tmp_path: Path, vit: Callable[[str], str]) -> None:
    other = save_vit(tmp_path / "other", processor={**PROCESSOR, "image_mean": [0.4, 0.5, 0.5]})
    same = save_vit(tmp_path / "same")
    assert load_base_model(same, NAME).fingerprint == load_base_model(vit("dinov2"), NAME).fingerprint
    assert load_base_model(other, NAME).fingerprint != load_base_model(same, NAME).fingerprint


def test_a_head_cannot_start_from_words(toy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"hold no words: set head\.start to 'random' or 'zeros'"):
        configure({**toy, "head.start": "label-words"})


def test_without_pillow_a_job_is_refused_before_a_record_is_read(
    toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_task, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the library Pillow: pip install 'fedveil\[vision\]'"):
        configure(toy)


# A federation.


@pytest.fixture
def toy(vit: Callable[[str], str], tmp_path: Path) -> dict[str, Any]:
    """Return settings of a private run on 240 digits, noughts and ones."""
    return toy_digits(vit, tmp_path)


def toy_digits(vit: Callable[..., str], folder: Path) -> dict[str, Any]:
    return {
        "strategy": "ffa-lora",
        "model.name": vit("dinov2"),
        "model.task": NAME,
        "model.max-length": TOKENS,
        "model.feature-scale": 8.0,
        "data.name": str(write_folder(folder / "digits", digits(count=240))),
        "data.labels": "0,1",
        "data.test-size": 40,
        "data.partition": "iid",
        "adapter.rank": 3,
        "adapter.targets": "q_proj,v_proj,fc1",
        "head.start": "zeros",
        "rounds": 3,
        "server.optimizer": "none",
        "training.optimizer": "adam",
        "training.learning-rate": 0.03,
        "training.local-steps": 8,
        "training.sample-rate": 0.5,
        "privacy.delta": 1e-3,
        "privacy.noise-multiplier": 0.2,
        "privacy.epsilon": 1000.0,
        "precision": "float32",
        "device": "cpu",
        "output": str(folder / "runs"),
    }


@pytest.mark.parametrize(
    ("strategy", "least"), [("fedavg-lora", 0.8), ("ffa-lora", 0.8), ("fed-sb", 0.65), ("fed-svd", 0.8)]
)
def test_a_private_federation_on_digits_learns_and_its_adapter_scores_as_the_run_says(
    strategy: str, least: float, toy: dict[str, Any]
) -> None:
    folder = run_in_process({**toy, "strategy": strategy}, 2)
    lines = read_lines(RoundLine, folder)
    assert not any(line.refusals or line.failures for line in lines)
    assert [len(line.participants) for line in lines] == [2, 2, 2]
    assert all(spent(line).epsilon_total > 0 for line in read_lines(PrivacyLine, folder))
    scored = evaluate_run(folder)
    assert (scored.accuracy, scored.loss) == (lines[-1].accuracy, lines[-1].loss)
    assert scored.accuracy > least, "nothing was learned"


OWN = ("strategy", "adapter.rank", "adapter.targets", "head.start", "rounds", "server.optimizer")
"""What ``toy`` says of its method, beside ``training.*``."""


@pytest.mark.parametrize(
    ("privacy", "paid"),
    [({}, 3), ({"privacy.mode": "secure-sum", "privacy.honest-sites": 2, "start.records": 64}, 0)],
    ids=["dp-sgd", "secure-sum"],
)
def test_a_private_run_that_says_nothing_of_its_method_learns(
    privacy: dict[str, Any], paid: int, toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_means, "MADE", 64)
    said = {key: value for key, value in toy.items() if key not in OWN and not key.startswith("training.")}
    folder = run_in_process({**said, "privacy.noise-multiplier": 0.5, **privacy}, 3)
    lines = read_lines(RoundLine, folder)
    assert not any(line.refusals or line.failures for line in lines)
    assert [line.round_number for line in lines] == list(range(17))
    assert len(lines[0].participants) == paid, "the sites' mean is a release of its own, and a sum has none"
    scored = evaluate_run(folder)
    assert (scored.accuracy, scored.loss) == pytest.approx((lines[-1].accuracy, lines[-1].loss), abs=1e-5)
    assert scored.accuracy > 0.8, "nothing was learned"


def test_made_up_images_are_the_same_by_their_number_unlike_each_other_and_spread(vit: Callable[[str], str]) -> None:
    images = torch.stack([made_up_image(number, 28) for number in range(30)])
    assert images.dtype == torch.uint8
    assert images.shape == (30, 3, 28, 28)
    assert torch.equal(images, torch.stack([made_up_image(number, 28) for number in range(30)]))
    flat = images.flatten(1).float()
    assert torch.cdist(flat, flat)[~torch.eye(30, dtype=torch.bool)].min() > 100, "two are nearly one"
    assert flat.std(1).min() > 3, "an image of one colour says nothing"
    # What they are for: neighbouring pixels go together, as in no image whose pixels are drawn one by one.
    steps = (images[:, :, :, 1:].float() - images[:, :, :, :-1].float()).flatten(1).std(1)
    assert (steps / flat.std(1)).median() < 0.9


def test_a_start_from_text_takes_made_up_images_and_no_other(toy: dict[str, Any]) -> None:
    own: dict[str, Any] = {"strategy": "ffa-lora", "adapter.start": "eva", "start.records": 8}
    job = configure({**toy, **own, "start.text": "made-up"})
    model = job.model(("0", "1"))
    made = job.origin.from_public(model, job.config, Labels(("0", "1"), (("0",), ("1",))))
    assert all(
        bool(tensor.isfinite().all()) and bool(tensor.any()) for held in made.values() for tensor in held.values()
    )
    for text in ("auto", "prose"):
        with pytest.raises(ConfigError, match=r"hold no words: set start\.text to 'made-up'"):
            configure({**toy, **own, "start.text": text})


MERGED = ("dinov2", "vit")
ASK = """
import json, os, sys
sys.modules.update(common=None)
for folder, code in json.load(sys.stdin).items():
    os.chdir(folder)
    exec(code, {})
"""


@pytest.fixture(scope="module")
def merged(
    vit: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path, list[float]]]:
    """Return of each kind the folder of its merged model, its run, and the shares that the printed code tells.

    It runs in another process: one for all kinds, as libraries load slowly.
    """
    runs, codes = dict[str, Path](), dict[str, str]()
    for kind in MERGED:
        folder = tmp_path_factory.mktemp(kind)
        own = {"model.name": vit(kind), "adapter.targets": ",".join(targets_of(vit(kind))), "model.feature-scale": 2.0}
        runs[kind] = run_in_process({**toy_digits(vit, folder), **own, "rounds": 1}, 2)
        (folder / "image.png").write_bytes(encoded(digits(count=1)[0][0]))
        codes[str(folder)] = merge_run(runs[kind], folder / QUOTED)
    words = [sys.executable, "-P", "-c", ASK]
    done = subprocess.run(words, input=json.dumps(codes), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [list(ast.literal_eval(line).values()) for line in done.stdout.splitlines()]
    return {kind: (Path(folder), runs[kind], shares) for kind, folder, shares in zip(MERGED, codes, said, strict=True)}


@pytest.mark.parametrize("kind", MERGED)
def test_a_merged_model_of_images_answers_as_the_run_by_the_code_that_merge_prints(
    merged: dict[str, tuple[Path, Path, list[float]]], vit: Callable[[str], str], tmp_path: Path, kind: str
) -> None:
    folder, run, shares = merged[kind]
    answers = {answer.text: answer.probability for answer in ask_run(run, [str(folder / "image.png")])}
    assert [answers["0"], answers["1"]] == pytest.approx(shares, abs=1e-5)
    assert max(shares) < 0.999, "an answer that is as good as sure is the same of other features"
    made = ImageProcessor.from_settings(
        json.loads((folder / QUOTED / "encoder" / "preprocessor_config.json").read_text())
    )
    assert made == load_base_model(vit(kind), NAME).processor
    with pytest.raises(DataError, match="check the path"):
        ask_run(run, [str(tmp_path / "none.png")])
    (tmp_path / "image.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"image\.png"):
        ask_run(run, [str(tmp_path / "image.png")])


def test_the_head_alone_trains_on_images_whose_features_are_wider_than_the_model(toy: dict[str, Any]) -> None:
    folder = run_in_process({**toy, "strategy": "fedavg-lora", "adapter.name": "none"}, 2)
    lines = read_lines(RoundLine, folder)
    assert not any(line.refusals or line.failures for line in lines)
    assert [len(line.participants) for line in lines] == [2, 2, 2]
    assert evaluate_run(folder).loss == pytest.approx(lines[-1].loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_other_vision_transformers_train_too(kind: str, toy: dict[str, Any], vit: Callable[[str], str]) -> None:
    settings = {**toy, "model.name": vit(kind), "adapter.targets": ",".join(targets_of(vit(kind))), "rounds": 1}
    folder = run_in_process(settings, 2)
    (line,) = read_lines(RoundLine, folder)
    assert not [*line.refusals, *line.failures]
    assert evaluate_run(folder).loss == line.loss


@pytest.fixture
def site(toy: dict[str, Any], tmp_path: Path) -> OneSite:
    """A site with forty digits of its own."""
    own = write_folder(tmp_path / "own", digits(start=240, count=40))
    node = {"site": "clinic", "data": str(own), "public-size": 40, "ledger": str(tmp_path / "clinic.sqlite")}
    clinic = OneSite(toy, dict(node))
    clinic.rule(send_noised_metrics=True, metrics_noise=5.0)
    return clinic


def test_a_round_at_a_site_with_a_folder_is_charged_trained_and_counted(site: OneSite) -> None:
    result = site.train()
    assert result.noised_correct is not None
    assert site.charges() == [("1", 1, "training"), ("1", 1, "evaluation")]


def test_a_file_that_is_no_record_changes_no_bit_of_what_a_site_prepares(site: OneSite) -> None:
    folder, config, model = Path(str(site.node["data"])), configure(site.settings).config, site.model()
    before = load_dataset(config.data, NAME, str(folder))
    task = site.task()
    (folder / "0" / "a-broken.png").write_bytes(b"\x89PNG\r\n\x1a\nhello")
    (folder / "7").mkdir()
    (folder / "7" / "seven.png").write_bytes(encoded(digits((7,), count=1)[0][0]))
    assert isinstance(site.ask(task), TrainResult)
    from fedveil.common.data.sources import load_protected

    after = load_protected(config.data, NAME, str(folder))
    assert len(after.unfit) == 2
    assert after.dataset.examples == before.examples
    assert len(prepared(model, after.dataset.examples)) == 40


def test_an_image_that_no_longer_decodes_contributes_zero_and_the_rest_stay(site: OneSite) -> None:
    model = site.model()
    good = example(digits(count=1)[0][0])
    bad = ImageExample(image=Picture("0" * 64, b"gone"), label=0)
    assert len(prepared(model, [good, bad, good])) == 2


def test_the_ledger_knows_images_again_however_they_are_encoded(site: OneSite, tmp_path: Path) -> None:
    first = site.train().spending
    assert first is not None
    again, others = tmp_path / "again", write_folder(tmp_path / "others", digits(start=280, count=40))
    for i, (pixels, label) in enumerate(digits(start=240, count=40)):
        (again / str(label)).mkdir(parents=True, exist_ok=True)
        (again / str(label) / f"scan-{90 - i}.png").write_bytes(encoded(np.dstack([pixels] * 3), compress_level=0))
    for name, folder, known in (("again", again, True), ("others", others, False)):
        site.node |= {"data": str(folder), "dataset-id": name}
        spent = site.train(run=name).spending
        assert spent is not None
        assert (spent.epsilon_total > first.epsilon_total + 0.1) is known, f"the records of {name} are taken for others"


def test_a_ledger_that_hashes_files_is_found_out(
    site: OneSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: an image is told by its file and not by its pixels."""
    import hashlib

    for method in ("canonical", "likeness"):
        monkeypatch.setattr(ImageExample, method, lambda self, *_: hashlib.sha256(self.image.content).hexdigest())
    with pytest.raises(AssertionError, match="records of again"):
        test_the_ledger_knows_images_again_however_they_are_encoded(site, tmp_path)


def test_the_ledger_knows_a_file_again_that_another_decoder_reads(
    site: OneSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions of Pillow may round a JPEG otherwise; the file with its label is hashed beside the pixels."""
    first = site.train().spending
    assert first is not None
    decoded = images.decoded
    monkeypatch.setattr(images, "decoded", lambda content: decoded(content).point(lambda tone: max(tone, 1)))
    copy = Path(shutil.copytree(str(site.node["data"]), tmp_path / "copy"))
    pixels = {e.likeness() for e in load_dataset(configure(site.settings).config.data, NAME, str(copy)).examples}
    monkeypatch.undo()
    assert not pixels & {
        e.likeness() for e in load_dataset(configure(site.settings).config.data, NAME, str(copy)).examples
    }
    monkeypatch.setattr(images, "decoded", lambda content: decoded(content).point(lambda tone: max(tone, 1)))
    site.node |= {"data": str(copy), "dataset-id": "copy"}
    spent = site.train(run="copy").spending
    assert spent is not None
    assert spent.epsilon_total > first.epsilon_total + 0.1, "the same files are taken for others"


def test_images_that_are_alike_are_on_one_side_of_the_split(toy: dict[str, Any], tmp_path: Path) -> None:
    from fedveil.common.data.sources import train_and_test

    folder = tmp_path / "twice"
    for name in ("first", "second"):
        for i, (pixels, label) in enumerate(digits(count=30)):
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            level = 0 if name == "first" else 9
            (folder / str(label) / f"{name}-{i}.png").write_bytes(encoded(pixels, compress_level=level))
    train, test = train_and_test(DataConfig(name=str(folder), labels="0,1", test_size=20), NAME)
    assert len(test.examples) == 20
    assert not {e.likeness() for e in train.examples} & {e.likeness() for e in test.examples}
