"""The result of a run as a plain model: the adapter merged into the base model, as stock libraries load it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedveil.common.adapters.low_bits import in_full
from fedveil.common.check import OneOf
from fedveil.common.derived import IN_MODEL, DerivedFile, marks_of
from fedveil.common.errors import DataError, ModelError
from fedveil.common.files import sha256_of, with_usual_mode
from fedveil.common.paths import check_vacant
from fedveil.common.run_lines import read_if_there
from fedveil.common.tasks import Finished
from fedveil.common.tasks.roles import columns_of
from fedveil.experiments.evaluate import data_of, load_result
from fedveil.reports import report_of, to_json
from fedveil.reports.card import NAME as CARD
from fedveil.reports.card import Form, card_of
from fedveil.reports.declared import read_declared
from fedveil.reports.derived import derived_card, sources_of

FORMS = ("merged", "seq-cls")
"""One plain model; or the adapter for a stock classifier, the head in it, where a stock class computes that."""


def merge_run(run: Path, target: Path, form: str = "merged") -> str:
    """Write a run's model into a new folder, float32, with its processor; whole or not at all.

    ``W0 + delta`` is formed once for each adapted layer, by stock PEFT (``merge_and_unload``), so answers differ from
    those of base model and adapter by rounding alone. A base model in low bits (``model.quantise``) is written in
    float32 as the numbers that its bits stand for, because the adapter was trained beside these. Its ``config.json``
    says which runs it was made from and what they claim, for a run that begins with it.

    Returns:
        Python code that loads what was written, without FedVeil.

    Raises:
        DataError: there is no saved adapter, or ``target`` is not empty or cannot be written.
        ModelError: the base model on this machine is not the run's, or a merged weight is not finite.
        ConfigError: the run's model has no such form.
    """
    OneOf(FORMS).check("--form", form)
    check_vacant(target)
    finished = load_finished(run)
    partial = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        if form == "merged":
            setattr(finished.module.encoder.config, IN_MODEL, marks_of(sources_of(run)))
            finished.task.export.write(finished, partial)
            export = finished.task.export
            relation, library, pipeline = "finetune", export.library, export.pipeline(finished)
        else:
            finished.task.export.write_head_adapter(finished, run / "adapter", partial)
            relation, library, pipeline = "adapter", "peft", ""  # which would name the labels by their numbers
        _write_card(run, Form(relation, library, _code(finished, form, target.name), {}, pipeline), partial)
        with_usual_mode(partial)
        os.replace(partial, target)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror}): check permissions and space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _code(finished, form, str(target))


def _code(finished: Finished, form: str, folder: str) -> str:
    """Return Python code that loads what was written into ``folder``, whatever characters its name has."""
    if form == "merged":
        return finished.task.export.code(finished, folder)
    words = ["a text", "its pair"][: len(finished.inputs)]
    return _PEFT_CODE.format(folder=folder, labels=list(finished.labels), words=", ".join(map(repr, words)))


_PEFT_CODE = """\
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

labels = {labels!r}
model = AutoPeftModelForSequenceClassification.from_pretrained({folder!r}, num_labels=len(labels))
tokenizer = AutoTokenizer.from_pretrained({folder!r})
logits = model(**tokenizer({words}, return_tensors="pt")).logits
print(dict(zip(labels, logits[0].softmax(-1).tolist())))
"""


def _write_card(run: Path, form: Form, written: Path) -> None:
    files = {
        path.relative_to(written).as_posix(): sha256_of(path) for path in sorted(written.rglob("*")) if path.is_file()
    }
    weights = {name: digest for name, digest in files.items() if name.endswith((".safetensors", ".json"))}
    form = replace(form, files=weights)
    if made := read_if_there(DerivedFile, run):
        text = derived_card(made, form)
    else:
        data = report_of(run)
        text = card_of(data, read_declared(run), form, to_json(data))
    (written / CARD).write_text(text, encoding="utf-8")


def load_finished(run: Path) -> Finished:
    """Return a run's final model in eval mode, with the adapter merged; raises as ``merge_run``."""
    result = load_result(run / "adapter")
    module, task, base = result.module, result.task, result.base
    # PEFT would merge into numbers that a layer of low bits makes again, and lose them.
    in_full(module)
    encoder: Any = module.encoder
    if hasattr(encoder, "merge_and_unload"):
        try:
            module.encoder = encoder.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"the adapter of {run} cannot be merged ({error}): its numbers are not finite") from error
    labels, limit = tuple(result.about.label_names), task.limit(base, result.about.max_length)
    data = data_of(result.about)
    columns = columns_of(task.roles, data)
    inputs = tuple(column.role.setting for column in columns if column.role.in_question)
    return Finished(task, module.eval(), base, labels, limit, data.columns["template"], inputs)
