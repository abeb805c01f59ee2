"""Trans-LoRA: an adapter and a head for another base model, from a finished run's own answers on public texts.

The teacher is the run's model, which its sites have paid for; the texts are public. So nothing is charged, and no
function here is given a site, a ledger or a record (Wang et al., NeurIPS 2024, whose teacher labels synthetic texts).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedveil.common.adapters.attach import attach
from fedveil.common.adapters.export import write_injected
from fedveil.common.adapters.lora import LoRA
from fedveil.common.bundle import own_digest
from fedveil.common.derived import DerivedFile, derived, sources_in
from fedveil.common.errors import ConfigError
from fedveil.common.files import replace_file
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.model.device import choose_attention, choose_device, choose_precision
from fedveil.common.model.score import half_of_ratio
from fedveil.common.paths import PATHS, check_vacant, is_path, local_name, without_paths
from fedveil.common.run_lines import AdapterFile, Figure
from fedveil.common.starts import STARTS
from fedveil.common.strict_json import to_json
from fedveil.common.tasks import Batch, Finished
from fedveil.common.tasks.finished import Questions
from fedveil.contrib.transfer.student import How, Lesson, answers_of, fit_head, given_by, learn, over
from fedveil.contrib.transfer.texts import Texts, public_texts, voted_texts
from fedveil.experiments.evaluate import Result, about_of, data_of, read_peft_config, result_of
from fedveil.experiments.serving.merge import load_finished
from fedveil.reports.derived import sources_of, write_folder

AGREEMENT = "agreement with the teacher on held-out texts"
HEAD_ALONE = "of them with a fitted head alone"
MOST_FREQUENT = "of them with the teacher's most frequent answer"
TOKENS = "tokens of the teacher's completions that are the likeliest, on held-out texts"
TOKENS_BEFORE = "of them before learning"
SCALE = 2.0
"""In front of a new adapter's product."""


@dataclass(frozen=True)
class Wanted:
    """What is taught to which model, with which texts."""

    to: str
    """The new base model, as ``model.name``."""
    texts: str
    """See ``public_texts``."""
    keep: int = 0
    votes: Path | None = None
    """Folder of a run whose records voted for the texts; None: the first of them are used."""
    how: How = field(default_factory=How)


def transfer(run: Path, target: Path, wanted: Wanted, progress: Callable[[str], object] = print) -> DerivedFile:
    """Teach a finished run's model to another base model, and write adapter, head and ``derived.json``.

    Args:
        run: a run's folder, or that of a derived model.
        target: a new folder.
        wanted: the base model and the texts.
        progress: called with what goes on.

    Raises:
        DataError: there is no saved adapter, the target is not empty, or the texts cannot be read.
        ConfigError: the task has no answers to texts, or they are the run's own.
        ModelError: a base model is missing or none for the task.
    """
    check_vacant(target)
    about = about_of(run / "adapter")
    teacher, sources = load_finished(run), sources_of(run)
    questions = _questions_of(teacher)
    about_texts = (data_of(about), teacher.inputs, wanted.keep)
    if wanted.votes is None:
        texts = public_texts(wanted.texts, *about_texts)
    else:
        texts, sources = voted_texts(wanted.texts, wanted.votes, *about_texts), [*sources, *sources_of(wanted.votes)]
    base = load_base_model(wanted.to, about.task, str(about.settings.get("head.pool", "mean")))
    device = choose_device(str(about.settings.get("device", "auto")))
    for model in (teacher.base.module, base.module):
        choose_attention(model, device)
    progress(f"the teacher answers {len(texts.words)} texts")
    result = Result(teacher.module.to(device), about, teacher.base, teacher.task)
    answered = _answered(result, teacher, questions, texts)
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    own = replace(about, base_model=base.name, precision=precision)
    student, alike = _begin(own, base, run / "adapter", teacher, wanted.how)
    limit = teacher.task.limit(base, about.max_length)
    lesson = Lesson(teacher.task.prepare(base, answered.examples, limit), answered.answers)
    figures = _taught(student, lesson, texts, device, wanted.how, progress, fit=not alike)
    sources = [*sources, *sources_in(base.module.config.to_dict())]  # type: ignore[union-attr,operator]
    made = derived("transfer", local_name(base.name), sources)
    notes = ["The texts were chosen by a private vote of records, which the runs below count."] * bool(wanted.votes)
    notes += [f"The base model has the layers of the teacher's, so it began at the teacher's {alike}."] * bool(alike)
    known = {**about.settings, "model.name": base.name}
    local = {key: str(known[key]) for key in PATHS if is_path(str(known.get(key, "")))}
    made = replace(made, public=[texts.about], figures=figures, notes=notes, local=local)
    write_folder(target, made, lambda folder: _write_adapter(student, folder))
    return made


def _questions_of(teacher: Finished) -> Questions:
    task, questions = teacher.task, teacher.task.questions
    plain = {"text", "completion"} <= {one.name for one in fields(task.example)} and not task.by_token
    if questions is None or not plain or teacher.template:
        kind = "with a template" if teacher.template else f"of model.task {task.name!r}"
        raise ConfigError(f"a run {kind} has no answers to plain texts that another base model could learn from")
    return questions


@dataclass(frozen=True)
class _Answered:
    examples: list[Any]
    answers: Tensor | None


def _answered(result: Result, teacher: Finished, questions: Questions, texts: Texts) -> _Answered:
    """Return the texts as examples, with the teacher's probabilities, or in them its completions."""
    task, examples = teacher.task, [questions.example(words) for words in texts.words]
    if not task.labelled:
        pairs = zip(cast("list[Any]", examples), questions.answers(teacher, examples), strict=True)
        # A text without an answer teaches a full stop: an empty completion has nothing to learn from.
        return _Answered([replace(one, completion=f" {best[0].text or '.'}") for one, best in pairs], None)
    records = task.prepare(teacher.base, examples, teacher.limit)
    device = next(result.module.parameters()).device
    return _Answered(examples, answers_of(task, over(result, records, device, result.module)))


def _begin(about: AdapterFile, base: BaseModel, adapter: Path, teacher: Finished, how: How) -> tuple[Result, str]:
    """Return the student, and in words what it has of the teacher's; empty: all of it is new."""
    task, tuned = teacher.task, (adapter / "adapter_config.json").is_file()
    alike = _shapes(base.module) == _shapes(teacher.module.encoder)
    if alike and tuned and read_peft_config(adapter / "adapter_config.json")["peft_type"] == "LORA":
        student = result_of(about, base, adapter, adapter)
        for name, parameter in student.module.encoder.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return student, "adapter and head" if task.labelled else "adapter"
    new = LoRA(how.rank, SCALE * how.rank, ("auto",), STARTS["kaiming"]())
    peft_model = attach(new, base.module, how.seed)
    classes = len(about.label_names) if task.labelled else 0
    student = Result(task.module(peft_model, base, classes, about.feature_scale), about, base, task)
    if not (alike and task.labelled and not tuned):
        return student, ""
    student.module.head = result_of(about, base, adapter, None).module.head
    return student, "head"


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _taught(
    student: Result,
    lesson: Lesson,
    texts: Texts,
    device: torch.device,
    how: How,
    progress: Callable[[str], object],
    *,
    fit: bool,
) -> list[Figure]:
    """Teach the student, and return what was measured on held-out texts."""
    learnt, out = texts.parts()
    own, held = lesson.part(learnt), lesson.part(out)
    student.module.to(device)
    if fit:
        progress("a head is fitted")
        fit_head(student, own, device)
    before = _agreement(student, held, device)
    learn(student, own, how, device, progress)
    after = _agreement(student, held, device)
    if held.answers is None:
        return [Figure(TOKENS, *after), Figure(TOKENS_BEFORE, *before)]
    labels = given_by(student.task, held.answers).reshape(len(out), -1)
    _, counts = labels.unique(dim=0, return_counts=True)
    control = Figure(MOST_FREQUENT, int(counts.max()) / len(out))
    return [Figure(AGREEMENT, *after), *([Figure(HEAD_ALONE, *before)] if fit else []), control]


def _agreement(student: Result, held: Lesson, device: torch.device) -> tuple[float, float]:
    """Return the share of answers that are the teacher's, of completions of their tokens, and half its interval."""
    task, module = student.task, student.module
    if held.answers is None:

        def hits(batch: Batch) -> Tensor:
            sums = task.sums(module, batch)
            return torch.stack([sums.correct, sums.weight], 1)

        right, there = over(student, held.records, device, hits).T.tolist()
    else:
        given = given_by(task, answers_of(task, over(student, held.records, device, module)))
        same = given == given_by(task, held.answers)
        right = same.reshape(len(same), -1).all(1).double().tolist()
        there = [1.0] * len(right)
    return sum(right) / sum(there), half_of_ratio(right, there)


def _write_adapter(student: Result, folder: Path) -> None:
    module, about, base = student.module.cpu(), student.about, student.base
    write_injected(cast(Any, module.encoder), folder, local_name(base.name))
    if module.head is not None:
        head = {name: tensor.detach().float().contiguous() for name, tensor in module.head.named_parameters()}
        save_file(head, str(folder / "head.safetensors"), metadata={"labels": json.dumps(about.label_names)})
    settings = without_paths({**about.settings, "model.name": local_name(base.name), "model.quantise": "none"})
    saved = replace(
        about,
        base_model=local_name(base.name),
        base_fingerprint=base.fingerprint,
        base_files=base.files,
        bundle=own_digest(),
        settings=settings,
    )
    content = json.dumps(to_json(saved), indent=2, ensure_ascii=False) + "\n"
    replace_file(folder / AdapterFile.NAME, content.encode())
