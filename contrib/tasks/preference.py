"""Pairs of answers of which one is better: direct preference optimisation, and judges that learn which one that is.

``dpo`` (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) trains a language model to prefer the better answer by more than
the base model does. ``bradley-terry`` (Ouyang et al. 2022, arXiv 2203.02155, eq. 1) trains a number for each answer, by
how much the better one's is above the other's. ``text`` trains a language model to name the better of two answers that
it is shown, in both orders. A record is one pair, and its loss is minus log sigmoid of a difference of two rows', which
is no sum over them: so each row has the derivative of that loss as its weight (``Task.unfold``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from fedveil.common.check import POSITIVE, OneOf
from fedveil.common.config.fields import RATIO, Section
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.later import F, torch
from fedveil.common.tasks.base import IGNORED, WEIGHT, Batch, Coins, Record, Scored, Sums, Wording
from fedveil.common.tasks.causal_lm import CausalLM, DecoderExport, at_least_float32, complete
from fedveil.common.tasks.classification import Classification
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Answer, Export, Finished, Questions
from fedveil.common.tasks.roles import Role
from fedveil.common.tasks.text import TOKENS, TextExample, TextTask, pad_id, padded
from fedveil.contrib.tasks.judge_export import JudgeExport
from fedveil.contrib.tasks.pairs import OTHER, Pair, halves_of, pair_of_text, rows_of_pair
from fedveil.contrib.tasks.reference import adapter_off, claimed_in, costs_of, kept_costs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.config.run import RunConfig
    from fedveil.common.model.base import BaseModel
    from fedveil.common.model.federated import FederatedModel
    from fedveil.common.tasks.module import TaskModule

DPO, BRADLEY_TERRY, TEXT = "dpo", "bradley-terry", "text"
FIRST, SECOND = " A", " B"
"""What a judge in text answers."""
PROMPT = "{question}\nA: {first}\nB: {second}\nThe better answer is"


def _answered(model: Finished, examples: Sequence[Example]) -> list[list[Answer]]:
    if cast(Preference, model.task).loss != DPO:
        raise ConfigError("a judge answers no question: 'fedveil judge' asks it about pairs")
    return complete(model, examples, lambda tokenizer, one: list(tokenizer(cast(Pair, one).question)[TOKENS]))


@dataclass(frozen=True)
class Preference(Section, CausalLM):
    """Pairs of answers of which one is better; the loss is minus log sigmoid of by how much the model says so.

    Options are the fields.
    """

    prefix: ClassVar[str] = "preference."
    name: ClassVar[str] = "preference"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("prompt", "question", "the prompt, or the instruction", optional=True, usual=True),
        Role("chosen", "chosen", "the better of two answers", in_question=False),
        Role("rejected", "rejected", "the other answer", in_question=False),
    )
    example: ClassVar[type[Any]] = Pair
    counted: ClassVar[bool] = True
    scored: ClassVar[Scored] = Scored()
    wording: ClassVar[Wording | None] = Wording(pair_of_text, pair_of_text)
    questions: ClassVar[Questions | None] = Questions(lambda words: Pair(question=words[0]), _answered)

    loss: Annotated[str, OneOf((DPO, BRADLEY_TERRY, TEXT))] = DPO
    """``dpo`` trains the model that answers; ``bradley-terry`` a head that gives each answer a number; ``text`` the
    model to name the better answer."""
    beta: Annotated[float, POSITIVE, RATIO] = 0.1
    """For ``dpo``: β, by which differences of log-likelihoods to the base model's are multiplied."""

    @property
    def too_long(self) -> str:  # type: ignore[override]
        """Why the recipe ``long-steps`` does not suit it; empty: it does."""
        return "a judge in text learns one letter of each record" if self.loss == TEXT else ""

    @property
    def export(self) -> Export:  # type: ignore[override]
        """How stock libraries load its finished model."""
        return JudgeExport() if self.scalar else DecoderExport()

    @property
    def scalar(self) -> bool:
        """Whether a head gives each answer a number."""
        return self.loss == BRADLEY_TERRY

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError, naming the setting, unless a run can have this configuration."""
        if self.scalar and (config.head.policy, config.head.start) not in (("trained", "zeros"), ("trained", "random")):
            raise ConfigError(
                "preference.loss 'bradley-terry' trains a head without labels: set head.policy to 'trained', and "
                "head.start to 'zeros' or 'random'"
            )
        policy = "frozen" if self.scalar else config.head.policy  # the head is none of labels
        super().check(replace(config, head=replace(config.head, policy=policy)))

    # --- the base model ---

    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return the decoder, or below a scalar head an encoder or a decoder without its own."""
        return Classification().load(name) if self.scalar else super().load(name)

    def check_model(self, module: nn.Module, name: str) -> None:
        """Raise ModelNotLoaded where a language model sees what it is to predict."""
        if not self.scalar:
            super().check_model(module, name)

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the decoder as it is, or a scalar head on the mean of an encoder's last hidden states.

        Raises:
            ConfigError: the reference of ``dpo`` has seen records without a claim: its likelihoods would tell of them.
        """
        from fedveil.common.tasks.module import TaskModule

        if self.loss == DPO:  # here, as a site opens no file that the server names before its policy has allowed it
            read = base.module.config.to_dict()  # type: ignore[union-attr,operator]
            claimed_in(read, f"the base model {base.name!r}", "the reference of preference.loss 'dpo'")
        if not self.scalar:
            return super().module(encoder, base, classes, feature_scale)
        return TaskModule(encoder, pooled, base.hidden_size, 1, feature_scale)

    # --- records and batches ---

    def tokenise(self, tokenizer: Any, examples: Sequence[TextExample], max_length: int) -> list[Record]:
        """Return a record of two rows for each pair, the better answer's first; of a judge in text one for each order.

        Raises:
            DataError: an answer is empty.
        """
        records: list[Record] = []
        for i, example in enumerate(cast(Sequence[Pair], examples)):
            if not (example.chosen.strip() and example.rejected.strip()):
                raise DataError(f"record {i + 1} has an empty answer; there is nothing to prefer")
            first, second = self._rows(tokenizer, example, max_length)
            records.append({**first, **{OTHER + key: value for key, value in second.items()}})
        return records

    def _rows(self, tokenizer: Any, pair: Pair, max_length: int) -> list[Record]:
        answers = pair.chosen, pair.rejected
        if self.scalar:
            texts = [(pair.question, answer) if pair.question else (answer,) for answer in answers]
            made = (tokenizer(*text, truncation=True, max_length=max_length) for text in texts)
            return [{key: list(value) for key, value in row.items()} for row in made]
        if self.loss == DPO:
            read = [TextExample(text=pair.question, completion=answer) for answer in answers]
        else:
            orders = ((*answers, FIRST), (*answers[::-1], SECOND))
            read = [
                TextExample(text=PROMPT.format(question=pair.question, first=a, second=b), completion=right)
                for a, b, right in orders
            ]
        return super().tokenise(tokenizer, read, max_length)

    def size(self, record: Record) -> int:
        """Return the number of tokens of the longer row."""
        return max(len(record[TOKENS]), len(record.get(OTHER + TOKENS, ())))

    def fits(self, base: BaseModel, record: Record, limit: int) -> bool:
        """Return whether the model can take both rows."""
        return all(TextTask.fits(self, base, row, limit) for row in rows_of_pair(record))

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return int64 tensors of shape (records, tokens), padded on the right, the second rows' beside the first's."""
        length = size or max(map(self.size, records))
        fill = {TOKENS: pad_id(base), "labels": IGNORED}
        return {
            key: padded([record[key] for record in records], fill.get(key.removeprefix(OTHER), 0), length)
            for key in records[0]
        }

    def made_up(self, like: Record, tokens: Sequence[int], label: int = 0) -> Record:
        """Return a pair, or a row, of these tokens; the second row has them backwards."""
        rows = [CausalLM.made_up(self, like, tokens), CausalLM.made_up(self, like, list(tokens)[::-1])]
        made = {**rows[0], **{OTHER + key: value for key, value in rows[1].items()}}
        return {key: made.get(key, [0] * len(tokens)) for key in like}

    # --- the loss ---

    def unfold(self, model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
        """Return both rows, weighted by the derivative of the pair's loss at the model as it is."""
        del coins
        rows = rows_of_pair(record)
        if self.loss == TEXT:
            return [{**row, WEIGHT: 0.5} for row in rows]
        length = model.shapes.length_of(self.size(record))
        better, worse = costs_of(model, rows, length)
        if self.loss == DPO:
            kept = kept_costs(model, record, rows, length)
            better, worse = better - kept[0], worse - kept[1]
        weight = self._scale * float(torch.sigmoid(torch.tensor(self._scale * (better - worse), dtype=torch.float64)))
        return [{**rows[0], WEIGHT: weight}, {**rows[1], WEIGHT: -weight}]

    @property
    def _scale(self) -> float:
        return self.beta if self.loss == DPO else 1.0

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return of pairs their loss and whether the better answer is preferred, of rows what their weights are of.

        That is the negative log-likelihood of a row's answer, its sum over tokens for ``dpo`` and its mean for
        ``text``, or minus the answer's number.
        """
        if OTHER + TOKENS not in batch:
            costs = self._costs(module, batch)
            return Sums(costs, torch.zeros_like(costs), torch.ones_like(costs))
        first, second = halves_of(batch)
        if self.loss == TEXT:
            return self._sums_of_text(module, first, second)
        better, worse = (self._costs(module, part) for part in (first, second))
        margin, beside = worse - better, {}
        if self.loss == DPO:
            each = [(part["labels"] != IGNORED).sum(1).clamp(min=1) for part in (first, second)]
            beside["likelier"] = (better / each[0] < worse / each[1]).float()
            with torch.no_grad(), adapter_off(module.encoder):  # type: ignore[arg-type]
                margin = margin - (self._costs(module, second) - self._costs(module, first))
        losses = -F.logsigmoid(self._scale * margin)
        return Sums(losses, (margin > 0).float(), torch.ones_like(losses), beside=beside)

    def _costs(self, module: nn.Module, rows: Batch) -> Tensor:
        if self.scalar:
            numbers: Tensor = module(rows)
            return -numbers[:, 0]
        sums = super().sums(module, rows)
        return sums.losses if self.loss == TEXT else sums.loss

    def _sums_of_text(self, module: nn.Module, first: Batch, second: Batch) -> Sums:
        """Return the mean loss of both orders, and whether the right letter leads over both together."""
        costs = [self._costs(module, part) for part in (first, second)]
        leads = [self._lead(module, part, other) for part, other in ((first, second), (second, first))]
        losses = (costs[0] + costs[1]) / 2
        beside = {
            "right, better answer first": (leads[0] > 0).float(),
            "right, better answer second": (leads[1] > 0).float(),
        }
        return Sums(losses, (leads[0] + leads[1] > 0).float(), torch.ones_like(losses), beside=beside)

    @staticmethod
    def _lead(module: nn.Module, rows: Batch, others: Batch) -> Tensor:
        """Return by how much the right letter's logit is above that of the letter that is right in the other order."""
        logits = at_least_float32(module(rows))
        (places, right), (_, wrong) = _letters(rows), _letters(others)
        ahead = logits[torch.arange(len(places)), places - 1]
        return (ahead.gather(1, right) - ahead.gather(1, wrong))[:, 0]


def _letters(rows: Batch) -> tuple[Tensor, Tensor]:
    """Return where each row's answer begins, shape (rows,), and its first token, shape (rows, 1)."""
    places = (rows["labels"] != IGNORED).int().argmax(1)
    return places, rows["labels"].gather(1, places[:, None]).clamp(min=0)


def pooled(encoder: nn.Module, batch: Batch) -> Tensor:
    """Return the mean of the last hidden states over an answer's tokens, shape (rows, hidden), at least float32."""
    hidden = at_least_float32(encoder(**batch).last_hidden_state)
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


PREFERENCE = Preference()
