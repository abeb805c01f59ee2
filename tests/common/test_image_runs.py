"""Runs on images: a private federation on digits, a merged model, a site's ledger."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digits import digits, encoded, write_folder
from forked_python import Run
from image_worlds import NAME, example, targets_of, toy_digits
from made_run import spent

from audits.tiny_site import OneSite
from fedveil.client.own_records import prepared
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import DataError
from fedveil.common.messages.round import TrainResult
from fedveil.common.model.base import load_base_model
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.starts import class_means
from fedveil.common.tasks import images
from fedveil.common.tasks.image_classification import ImageExample
from fedveil.common.tasks.image_processor import ImageProcessor
from fedveil.common.tasks.images import Picture
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.ask import ask_run
from fedveil.experiments.serving.merge import merge_run
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices]


QUOTED = "merged'\"\nraise SystemExit #"


@pytest.mark.parametrize(
    ("strategy", "least"), [("fedavg-lora", 0.8), ("ffa-lora", 0.8), ("fed-sb", 0.65), ("fed-svd", 0.8)]
)
def test_a_private_federation_on_digits_learns_and_its_adapter_scores_as_the_run_says(
    strategy: str, least: float, toy_images: dict[str, Any]
) -> None:
    folder = run_in_process({**toy_images, "strategy": strategy}, 2)
    lines = read_lines(RoundLine, folder)
    assert not any(line.refusals or line.failures for line in lines)
    assert [len(line.participants) for line in lines] == [2, 2, 2]
    assert all(spent(line).epsilon_total > 0 for line in read_lines(PrivacyLine, folder))
    scored = evaluate_run(folder)
    assert (scored.accuracy, scored.loss) == (lines[-1].accuracy, lines[-1].loss)
    assert scored.accuracy > least, "nothing was learned"


OWN = ("strategy", "adapter.rank", "adapter.targets", "head.start", "rounds", "server.optimizer")
"""What ``toy_images`` says of its method, beside ``training.*``."""


@pytest.mark.parametrize(
    ("privacy", "paid"),
    [({}, 3), ({"privacy.mode": "secure-sum", "privacy.honest-sites": 2, "start.records": 64}, 0)],
    ids=["dp-sgd", "secure-sum"],
)
def test_a_private_run_that_says_nothing_of_its_method_learns(
    privacy: dict[str, Any], paid: int, toy_images: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_means, "MADE", 64)
    said = {key: value for key, value in toy_images.items() if key not in OWN and not key.startswith("training.")}
    folder = run_in_process({**said, "privacy.noise-multiplier": 0.5, **privacy}, 3)
    lines = read_lines(RoundLine, folder)
    assert not any(line.refusals or line.failures for line in lines)
    assert [line.round_number for line in lines] == list(range(17))
    assert len(lines[0].participants) == paid, "the sites' mean is a release of its own, and a sum has none"
    scored = evaluate_run(folder)
    assert (scored.accuracy, scored.loss) == pytest.approx((lines[-1].accuracy, lines[-1].loss), abs=1e-5)
    assert scored.accuracy > 0.8, "nothing was learned"


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
    vit: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory, fresh_python: Run
) -> dict[str, tuple[Path, Path, list[float]]]:
    """Return of each kind the folder of its merged model, its run, and the shares that the printed code tells.

    It runs in another process, which has no FedVeil.
    """
    runs, codes = dict[str, Path](), dict[str, str]()
    for kind in MERGED:
        folder = tmp_path_factory.mktemp(kind)
        own = {"model.name": vit(kind), "adapter.targets": ",".join(targets_of(vit(kind))), "model.feature-scale": 2.0}
        runs[kind] = run_in_process({**toy_digits(vit, folder), **own, "rounds": 1}, 2)
        (folder / "image.png").write_bytes(encoded(digits(count=1)[0][0]))
        codes[str(folder)] = merge_run(runs[kind], folder / QUOTED)
    done = fresh_python(ASK, given=json.dumps(codes))
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


def test_the_head_alone_trains_on_images_whose_features_are_wider_than_the_model(toy_images: dict[str, Any]) -> None:
    folder = run_in_process({**toy_images, "strategy": "fedavg-lora", "adapter.name": "none"}, 2)
    lines = read_lines(RoundLine, folder)
    assert not any(line.refusals or line.failures for line in lines)
    assert [len(line.participants) for line in lines] == [2, 2, 2]
    assert evaluate_run(folder).loss == pytest.approx(lines[-1].loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_other_vision_transformers_train_too(kind: str, toy_images: dict[str, Any], vit: Callable[[str], str]) -> None:
    settings = {**toy_images, "model.name": vit(kind), "adapter.targets": ",".join(targets_of(vit(kind))), "rounds": 1}
    folder = run_in_process(settings, 2)
    (line,) = read_lines(RoundLine, folder)
    assert not [*line.refusals, *line.failures]
    assert evaluate_run(folder).loss == line.loss


@pytest.fixture
def site(toy_images: dict[str, Any], tmp_path: Path) -> OneSite:
    """A site with forty digits of its own."""
    own = write_folder(tmp_path / "own", digits(start=240, count=40))
    node = {"site": "clinic", "data": str(own), "public-size": 40, "ledger": str(tmp_path / "clinic.sqlite")}
    clinic = OneSite(toy_images, dict(node))
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


def test_images_that_are_alike_are_on_one_side_of_the_split(toy_images: dict[str, Any], tmp_path: Path) -> None:
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
