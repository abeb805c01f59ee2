"""Learning from a teacher's soft answers: a head that is fitted to them, then adapter and head together.

Of a record x with the teacher's probabilities q and the student's p, a step lowers the mean of ``-Σ_c q_c log p_c``;
where a record has several labels, the mean over them of the same for each label's yes and no; of a language model the
task's own loss on the teacher's completion (Hinton et al. 2015; Wang et al., NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.model.batching import epoch_batches, length_batches
from fedveil.common.model.device import autocast, choose_batch_tokens
from fedveil.common.model.lowered import lowered
from fedveil.common.tasks import Batch, Record, Task
from fedveil.experiments.evaluate import PRECISIONS, Result
from fedveil.privacy.randomness import stream

RIDGE = 1e-6
"""Of the fitted head: half the square of its rows is added to the mean loss with this factor."""
MOST_STEPS = 300
"""Of the optimiser that fits it."""


@dataclass(frozen=True)
class How:
    """How a student learns; tried on MiniLM-L3 and MPNet."""

    rank: int = 8
    passes: int = 2
    """Over the texts."""
    batch: int = 32
    rate: float = 2e-3
    """Of Adam on the adapter, from which it falls in a line to 0."""
    head_rate: float = 2e-2
    seed: int = 1


@dataclass(frozen=True)
class Lesson:
    """Records with the teacher's answer to each."""

    records: list[Record]
    answers: Tensor | None
    """Probabilities, shape (records, labels), float32; None: they are in the records, as completions."""

    def part(self, chosen: Sequence[int]) -> Lesson:
        """Return some of the records."""
        answers = None if self.answers is None else self.answers[list(chosen)]
        return Lesson([self.records[i] for i in chosen], answers)


def answers_of(task: Task, logits: Tensor) -> Tensor:
    """Return a teacher's probabilities, shape (records, labels), float32."""
    return logits.float().sigmoid() if task.scored.several else logits.float().softmax(-1)


def given_by(task: Task, answers: Tensor) -> Tensor:
    """Return the labels that probabilities give each record: its number, or for each label whether it is given."""
    return answers >= 0.5 if task.scored.several else answers.argmax(-1)


def distances(task: Task, module: nn.Module, batch: Batch, answers: Tensor | None) -> Tensor:
    """Return how far a student is from the teacher on each record, in nats, shape (records,)."""
    return task.sums(module, batch).losses if answers is None else apart(task, module(batch), answers)


def apart(task: Task, logits: Tensor, answers: Tensor) -> Tensor:
    """Return the cross-entropy of each record's logits against the teacher's probabilities, shape (records,)."""
    if task.scored.several:
        return F.binary_cross_entropy_with_logits(logits, answers, reduction="none").mean(-1)
    return F.cross_entropy(logits, answers, reduction="none")


def passes(student: Result, records: Sequence[Record], device: torch.device) -> Iterator[tuple[list[int], Batch]]:
    """Yield all records in batches of like length, each with its records' positions."""
    task = student.task
    for group in length_batches([task.size(record) for record in records], choose_batch_tokens(0, device)):
        batch = task.collate(student.base, [records[i] for i in group])
        yield group, {name: values.to(device) for name, values in batch.items()}


@torch.no_grad()
def over(student: Result, records: Sequence[Record], device: torch.device, of: Callable[[Batch], Tensor]) -> Tensor:
    """Return what ``of`` makes of each record in a pass of the model, one row a record, float32, on the CPU."""
    student.module.eval()
    found: dict[int, Tensor] = {}
    precision = PRECISIONS[student.about.precision]
    with lowered(student.module.encoder, precision):
        for group, batch in passes(student, records, device):
            with autocast(device, precision):
                rows = of(batch)
            found |= zip(group, rows.float().cpu(), strict=True)
    return torch.stack([found[i] for i in range(len(records))])


def fit_head(student: Result, lesson: Lesson, device: torch.device) -> None:
    """Fit the head to the teacher's answers on the features that the student has now, in float64."""
    head, answers = student.module.head, lesson.answers
    if head is None or answers is None:
        return
    features = over(student, lesson.records, device, student.module.features).double()
    fitted = nn.Linear(features.shape[1], answers.shape[1], dtype=torch.float64)
    nn.init.zeros_(fitted.weight)
    nn.init.zeros_(fitted.bias)
    centre = features.mean(0)  # the offsets take it up, so no minimum moves
    optimizer = torch.optim.LBFGS(fitted.parameters(), max_iter=MOST_STEPS, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = apart(student.task, fitted(features - centre), answers.double()).mean()
        value = value + RIDGE / 2 * fitted.weight.pow(2).sum()
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    with torch.no_grad():
        head.weight.copy_(fitted.weight)
        head.bias.copy_(fitted.bias - fitted.weight @ centre)


def learn(student: Result, lesson: Lesson, how: How, device: torch.device, progress: Callable[[str], object]) -> None:
    """Train adapter and head on the teacher's answers; the base model stays as it is."""
    module, task = student.module.to(device).eval(), student.task  # eval: nothing is dropped, everything has a gradient
    head = list(module.head.parameters()) if module.head is not None else []
    own = {id(parameter) for parameter in head}
    below = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
    rates = {"adapter": how.rate, "head": how.head_rate}
    groups = [{"params": parameters, "lr": rates[name]} for name, parameters in (("adapter", below), ("head", head))]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    sizes = [task.size(record) for record in lesson.records]
    steps = how.passes * max(1, len(sizes) // how.batch)
    batches = epoch_batches(sizes, min(1.0, how.batch / len(sizes)), stream(how.seed, "transfer"))
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, steps))
    with lowered(module.encoder, PRECISIONS[student.about.precision]):
        for step in range(steps):
            _step(student, lesson.part(next(batches)), device)
            optimizer.step()
            falling.step()
            optimizer.zero_grad(set_to_none=True)
            if not step % max(1, steps // 20):
                progress(f"step {step} of {steps}")


def _step(student: Result, lesson: Lesson, device: torch.device) -> None:
    """Add the gradient of the mean over a batch."""
    for group, batch in passes(student, lesson.records, device):
        answers = None if lesson.answers is None else lesson.answers[group].to(device)
        with autocast(device, PRECISIONS[student.about.precision]):
            loss = distances(student.task, student.module, batch, answers)
        (loss.sum() / len(lesson.records)).backward()
