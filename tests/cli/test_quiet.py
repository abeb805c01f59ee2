"""Commands print what a person wants to read: no bars, no lists of unused weights, and every real warning."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_python import Run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.common.foreign_words import BITSANDBYTES_UNLOADED as UNLOADED
from fedveil.common.foreign_words import TORCH_HOOK
from fedveil.common.foreign_words import TRANSFORMERS_REPORT as REPORT
from fedveil.common.model.base import load_base_model
from fedveil.experiments.in_process import run_in_process

ROOT = Path(__file__).resolve().parents[2]
EXTRA, LOST = "pooler.of.another.task", "LayerNorm.weight"


@pytest.fixture
def changed(model_folder: Callable[[str], str], tmp_path: Path) -> Callable[[bool], str]:
    """Make a model's folder with a weight that its kind has not, or without one that it has."""

    def make(lost: bool) -> str:
        folder = tmp_path / f"model-{lost}"
        shutil.copytree(model_folder("bert"), folder)
        weights = load_file(folder / "model.safetensors")
        if lost:
            weights.pop(next(name for name in weights if name.endswith(LOST)))
        else:
            weights[EXTRA] = torch.zeros(2)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return make


def test_weights_that_nobody_uses_are_not_listed_and_no_bar_is_drawn(
    changed: Callable[[bool], str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(False)
    capfd.readouterr()
    load_base_model(folder, "classification")
    out, err = capfd.readouterr()
    assert out + err == ""
    assert not [record for record in caplog.records if REPORT in record.getMessage()]


def test_weights_that_are_missing_are_told(
    changed: Callable[[bool], str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    load_base_model(changed(True), "classification")
    said = "".join(capfd.readouterr()) + caplog.text
    assert "MISSING" in said
    assert LOST in said


@pytest.mark.parametrize(
    ("logger", "text", "told"),
    [
        (
            "bitsandbytes.backends.cpu.ops",
            f"{UNLOADED}: No module named 'kernels'. Please make sure",
            False,
        ),
        ("bitsandbytes.backends.cpu.ops", "the native library could not be loaded", True),
        ("transformers.modeling_utils", f"BertModel{REPORT} from: x\npooler | UNEXPECTED", False),
        (
            "transformers.modeling_utils",
            f"BertModel{REPORT} from: x\npooler | UNEXPECTED\nlayer | MISSING",
            True,
        ),
        ("transformers.modeling_utils", f"BertModel{REPORT} from: x\nlayer | MISMATCH", True),
        ("transformers.modeling_utils", "the attention implementation is another", True),
    ],
)
def test_only_these_words_are_left_out(logger: str, text: str, told: bool) -> None:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    found = logging.getLogger(logger)
    found.addHandler(handler)
    try:
        found.warning(text)
    finally:
        found.removeHandler(handler)
    assert heard == [text] * told


def test_peft_is_imported_in_silence() -> None:
    """In a process of its own, as a command is: bitsandbytes is there and no run of it quantises."""
    done = imported_online("import fedveil.common.adapters, peft; peft.import_utils.is_bnb_4bit_available()")
    assert done.stdout + done.stderr == ""


def test_a_library_that_asks_for_compiled_code_goes_its_way_without(tmp_path: Path) -> None:
    """As bitsandbytes asks on some processors: the same words, and a package that would download."""
    (tmp_path / "kernels.py").write_text("def get_kernel(name): print('downloaded', name)\n", encoding="utf-8")
    asks = "try:\n    from kernels import get_kernel; get_kernel('x/y')\nexcept Exception:\n    print('without')\n"
    assert imported_online(asks, tmp_path).stdout == "downloaded x/y\n"
    assert imported_online(f"import fedveil.common\n{asks}", tmp_path).stdout == "without\n"


def imported_online(code: str, *more: Path) -> subprocess.CompletedProcess[str]:
    """Run code where hubs may be asked, as by default, and asking for an address is an error that nothing catches."""
    guard = "import os, socket\nsocket.getaddrinfo = lambda *_, **__: os.abort()\n"
    variables = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, more))
    return subprocess.run(
        [sys.executable, "-c", guard + code], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )


def test_a_head_on_features_is_trained_in_silence(fresh_python: Run) -> None:
    """In a process of its own: this one's filters are pytest's."""
    code = (
        "import torch; layer = torch.nn.Linear(2, 2); layer.register_full_backward_hook(lambda *_: None); "
        "layer(torch.ones(1, 2)).sum().backward()"
    )
    assert TORCH_HOOK in fresh_python(code).stderr
    done = fresh_python(f"import fedveil.common; {code}")
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("command", ["ask", "merge", "evaluate"])
def test_commands_on_a_finished_run_print_their_answer_alone(
    command: str,
    toy_settings: dict[str, Any],
    changed: Callable[[bool], str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = run_in_process({**toy_settings, "model.name": changed(False), "rounds": 1}, 2)
    capfd.readouterr()
    more = {"ask": ["a warm film"], "merge": [str(tmp_path / "merged")], "evaluate": []}[command]
    done = CliRunner().invoke(app, [command, str(folder), *more])
    assert done.exit_code == 0, done.output
    out, err = capfd.readouterr()
    assert (out, err, done.stderr) == ("", "", "")
    assert {"ask": "%", "merge": "model: ", "evaluate": "accuracy"}[command] in done.stdout
