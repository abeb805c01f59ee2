"""A merged judge (``preference.loss`` 'bradley-terry') whose numbers are a reward, at every site alike.

A judge is public, or what a run with a claim has released: one that knew pairs without a claim would tell of them by
what the policy learns from it. A site opens no file of it before all have the hash that its settings name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fedveil.common.derived import Source
from fedveil.common.errors import ModelNotLoaded
from fedveil.common.model.base import turn_dropout_off
from fedveil.common.model.files import check_no_file_elsewhere, model_folder
from fedveil.common.tasks.classification import Classification
from fedveil.common.tasks.finished import LABELS
from fedveil.common.tasks.sentence_modules import ENCODER
from fedveil.contrib.tasks.judge_export import NUMBER
from fedveil.contrib.tasks.preference import pooled
from fedveil.contrib.tasks.reference import claimed_in_folder

USE = "a reward, rollout.judge"


class Judge:
    """Gives answers numbers; no module, so that nothing of it is trained, sent or saved.

    Args:
        name, sha256: a merged judge's folder and the hash of its files, as in the run's settings.

    Raises:
        ModelNotLoaded: there is none, it has other files, or it is no judge.
        ConfigError: it was made of a run without a claim.
    """

    def __init__(self, name: str, sha256: str) -> None:
        with model_folder(name, sha256) as folder:
            self.earlier: Sequence[Source] = claimed_in_folder(folder / ENCODER, f"the judge {name!r}", USE)
            check_no_file_elsewhere(folder / ENCODER)
            try:
                self._read(folder)
            except (OSError, ValueError, KeyError, StopIteration) as error:
                raise ModelNotLoaded(
                    f"{name!r} is no judge: merge a run of model.task 'preference' with preference.loss 'bradley-terry'"
                ) from error

    def _read(self, folder: Path) -> None:
        if json.loads((folder / LABELS).read_text(encoding="utf-8")) != [NUMBER]:
            raise ValueError("another head")
        paths = [module["path"] for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))]
        if any(Path(path).name != path for path in paths):
            raise ValueError("no hash covers such a module")
        self._normalises = any("Normalize" in path for path in paths)
        limits = (folder / ENCODER / "sentence_bert_config.json").read_text(encoding="utf-8")
        self._limit = int(json.loads(limits)["max_seq_length"])
        self._head = load_file(folder / paths[-1] / "model.safetensors")
        encoder, self._tokenizer = Classification().load(str(folder / ENCODER))
        self._encoder: Any = encoder.float().eval().requires_grad_(False)
        turn_dropout_off(self._encoder)

    @torch.no_grad()
    def numbers(self, pairs: Sequence[tuple[str, str]], device: torch.device) -> list[float]:
        """Return how good each answer to its question is, 0 to 1: a number's share of it and of 0, its sigmoid.

        Each has the shape of the judge's longest text, so that neither time nor rounding tells of another answer.
        """
        texts = [(question, answer) if question else (answer,) for question, answer in pairs]
        rows = [self._tokenizer(*text, truncation=True, max_length=self._limit, padding="max_length") for text in texts]
        batch = {key: torch.tensor([row[key] for row in rows], device=device) for key in rows[0]}
        with torch.autocast(device.type, enabled=False):
            features = pooled(self._encoder.to(device), batch)
            features = F.normalize(features, dim=-1) if self._normalises else features
            weight, bias = (self._head[f"linear.{name}"].to(device) for name in ("weight", "bias"))
            return [float(number) for number in F.linear(features, weight, bias)[:, 0].sigmoid()]
