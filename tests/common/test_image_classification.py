"""Images end to end: fixed squares, features, what couples records, a private federation on digits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import PATCH, PROCESSOR, SIDE, TOKENS, digits, encoded, save_vit
from image_worlds import NAME, example, noise, targets_of
from PIL import Image
from torch import nn

from audits.worlds import Gradient, Recorder, minus, norm, plan
from fedveil.client.exact_shapes import _fewer
from fedveil.client.own_records import prepared
from fedveil.client.rehearsal import SHOWN, _Rehearsal, rehearse
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError, ModelError, ModelNotLoaded
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import STARTS, Labels
from fedveil.common.tasks import TASKS, Record, patches
from fedveil.common.tasks import image_classification as images_task
from fedveil.common.tasks.image_classification import CHANCE
from fedveil.common.tasks.image_processor import ImageProcessor
from fedveil.common.tasks.images import read_image
from fedveil.common.tasks.textures import made_up_image
from fedveil.demo import dinov2
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.together import together
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices]


TASK = TASKS[NAME]


TARGETS = {"vit": "query,value", "clip": "q_proj,v_proj"}


KINDS = ("dinov2", "registers", "vit", "clip")


STEP = gaussian_plan(1.0, 1.0, 1.0, 1.0, 1e-5, 1.0)


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


@pytest.mark.parametrize(
    ("kind", "heads", "precision"),
    [(kind, (2, 16)[i % 2], ("float32", "bfloat16")[i // 2]) for i, kind in enumerate(KINDS)],
)
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
    monkeypatch.setattr("fedveil.client.exact_shapes._fewer", lambda rows: iter((1,)))
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
        return self.among_others(steps, length, rows, self.shown(rows))

    monkeypatch.setattr("fedveil.client.rehearsal._Rehearsal.equal_rows", no_rows_compared)
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


def test_a_head_cannot_start_from_words(toy_images: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"hold no words: set head\.start to 'random' or 'zeros'"):
        configure({**toy_images, "head.start": "label-words"})


def test_without_pillow_a_job_is_refused_before_a_record_is_read(
    toy_images: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_task, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the library Pillow: pip install 'fedveil\[vision\]'"):
        configure(toy_images)


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


def test_a_start_from_text_takes_made_up_images_and_no_other(toy_images: dict[str, Any]) -> None:
    own: dict[str, Any] = {"strategy": "ffa-lora", "adapter.start": "eva", "start.records": 8}
    job = configure({**toy_images, **own, "start.text": "made-up"})
    model = job.model(("0", "1"))
    made = job.origin.from_public(model, job.config, Labels(("0", "1"), (("0",), ("1",))))
    assert all(
        bool(tensor.isfinite().all()) and bool(tensor.any()) for held in made.values() for tensor in held.values()
    )
    for text in ("auto", "prose"):
        with pytest.raises(ConfigError, match=r"hold no words: set start\.text to 'made-up'"):
            configure({**toy_images, **own, "start.text": text})
