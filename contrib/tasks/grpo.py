"""Group-relative policy optimisation (GRPO; Shao et al. 2024, arXiv 2402.03300) with rewards that words decide.

A record is a prompt with its answer and all that hangs on it. In every step that draws it, the model as it is then
writes G completions o_g that are worth r_g, and the record's loss is

    L = -1 / (G L_max) Σ_g A_g Σ_t log π(o_gt | prompt, o_g,<t),    A_g = (r_g - mean r) / (std r + 1e-4).

L_max is ``rollout.new-tokens``, as in Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): a division by the tokens of a batch
would let records weigh on each other. A sample serves one step (μ = 1), so that the published ratio π / π_old is 1 and
its clip does nothing: several steps on one Poisson sample are not several samples, and cost more than the account of
these says. There is no KL term (β = 0). What was written, what it was worth and how long it was never leaves a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from fedveil.common.check import POSITIVE, Digits, Interval
from fedveil.common.config.fields import RATIO, Section, Unit
from fedveil.common.errors import ConfigError, DataError, MechanismError
from fedveil.common.tasks.base import IGNORED, WEIGHT, Batch, Coins, Record, Scored, Sums
from fedveil.common.tasks.causal_lm import CausalLM, at_least_float32, complete
from fedveil.common.tasks.finished import Questions
from fedveil.common.tasks.roles import Role
from fedveil.common.tasks.text import TOKENS, TextExample, pad_id, padded
from fedveil.contrib.rewards import JUDGE, REWARDS, Completion, weights_of

if TYPE_CHECKING:
    from torch import nn

    from fedveil.common.model.base import BaseModel
    from fedveil.common.model.federated import FederatedModel
    from fedveil.common.tasks.module import TaskModule
    from fedveil.contrib.tasks.rollouts import Policy

MASK, LABELS, ANSWER, POLICY = "attention_mask", "labels", "answer", "policy"
NO_POLICY = 0
"""Policy of a record: no model wrote it."""
REWARD = "reward"
"""What a score calls the mean worth of completions, 0 to 1."""


@dataclass(frozen=True)
class GRPO(CausalLM, Section):
    """Prompts, and rewards for what the model writes to them; answers are for rewards alone."""

    name: ClassVar[str] = "grpo"
    prefix: ClassVar[str] = "rollout."
    roles: ClassVar[tuple[Role, ...]] = (
        Role("prompt", "text", "the prompt, or the instruction", optional=True, usual=True),
        Role("completion", "completion", "the completion, or the answer", in_question=False),
    )
    questions: ClassVar[Questions | None] = Questions(lambda words: TextExample(*words), complete)
    too_long: ClassVar[str] = "rewards were learnt by shorter steps alone"
    scored: ClassVar[Scored] = Scored(
        headline=REWARD,
        record="a prompt with its answer, all that the model writes to it, and what that is worth",
        stays="each step's one noised sum of gradients: no completion, reward or length leaves a site",
    )

    completions: Annotated[int, Interval(2, 64, low_too=True), Unit("completions")] = 4
    """Completions of each prompt that a step draws."""
    new_tokens: Annotated[int, POSITIVE, Unit("tokens")] = 16
    """Tokens of a completion at most. So many are computed of each, also behind its end, so that time tells nothing."""
    temperature: Annotated[float, POSITIVE, RATIO] = 1.0
    """Of the law that completions are drawn from, and whose logarithm is learnt. A score takes the likeliest tokens."""
    rewards: str = "number:1,format:0.5,end:0.25"
    """What a completion is worth: rewards by name, each with its weight. ``exact``, ``number`` and ``option-letter``
    compare it with the answer; ``format`` wants an answer of that kind and nothing else, ``end`` an end mark,
    ``length`` few tokens, and ``judge`` is what ``rollout.judge`` says."""
    judge: str = ""
    """Folder of a merged judge, of a run with ``preference.loss`` 'bradley-terry' and a claim, at the server and at
    every site."""
    judge_sha256: Annotated[str, Digits(64, "fedveil merge")] = ""
    """Hash of its files, which ``fedveil merge`` prints; a judge with other files is not opened."""

    def __post_init__(self) -> None:
        super().__post_init__()
        judged = JUDGE in weights_of(self.rewards)
        if judged != bool(self.judge) or judged != bool(self.judge_sha256):
            raise ConfigError(
                "rollout.judge and rollout.judge-sha256 belong to the reward 'judge' of rollout.rewards: set all "
                "three, or none"
            )

    def limit(self, base: BaseModel, max_length: int) -> int:
        """Return the tokens of a prompt and its completion together; ConfigError: a prompt has no room in it."""
        limit = super().limit(base, max_length)
        if limit <= self.new_tokens:
            raise ConfigError(
                f"model.max-length is {limit}, and rollout.new-tokens {self.new_tokens}: a prompt needs room beside "
                "its completion"
            )
        return limit

    def tokenise(self, tokenizer: Any, examples: Sequence[TextExample], max_length: int) -> list[Record]:
        """Return prompts with room for a completion, and the answer's UTF-8; a long prompt loses its beginning."""
        records: list[Record] = []
        for i, example in enumerate(examples):
            answer = (example.completion or "").strip()
            if not answer:
                raise DataError(f"record {i + 1} has an empty answer; there is nothing to compare a completion with")
            prompt = tokenizer(example.text)[TOKENS][-(max_length - self.new_tokens) :]
            prompt = prompt or [tokenizer.eos_token_id or 0]
            room = [prompt[-1]] * self.new_tokens
            records.append(_record(prompt, [], room) | {ANSWER: list(answer.encode())})
        return records

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return int64 tensors, shape (records, tokens), and of answers (records, bytes), of policies (records,)."""
        import torch

        fill = {TOKENS: pad_id(base), MASK: 0, LABELS: IGNORED}
        batch = {key: padded([record[key] for record in records], value, size) for key, value in fill.items()}
        if ANSWER in records[0]:
            batch[ANSWER] = padded([record[ANSWER] for record in records], IGNORED)
        return {**batch, POLICY: torch.tensor([record[POLICY] for record in records])}

    def made_up(self, like: Record, tokens: Sequence[int], label: int = 0) -> Record:
        """Return a prompt that is no one's and a completion that no model wrote, with the fields of ``like``."""
        prompt = max(1, len(tokens) - self.new_tokens)
        made = _record(tokens[:prompt], tokens[prompt:], []) | {ANSWER: [ord("0")]}
        return {key: made[key] for key in like if key in made}

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the decoder as it is."""
        from fedveil.contrib.tasks.rollouts import Policy

        module = Policy(encoder, super().module(encoder, base, classes, feature_scale).reading)
        module.tokenizer = base.processor
        if self.judge:
            from fedveil.contrib.tasks.judging import Judge

            module.judge = Judge(self.judge, self.judge_sha256)
            module.earlier = module.judge.earlier
        return module

    def unfold(self, model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
        """Return what the model writes to a record's prompt, each completion a row of the record's size.

        Raises:
            ArithmeticError: the model has no law.
        """
        import torch

        from fedveil.common.model.device import autocast
        from fedveil.contrib.tasks.rollouts import advantages, decode, drawn, evaluated, until_end

        policy = cast("Policy", model.module)
        length = next((i for i, label in enumerate(record[LABELS]) if label != IGNORED), 0)
        made_up, length = length > 0, length or sum(record[MASK])
        prompt, room = record[TOKENS][:length], len(record[TOKENS]) - length
        tokens = torch.tensor([prompt], device=model.device)
        with evaluated(policy), model.many_passes(), autocast(model.device, model.precision):
            written = decode(
                *(policy.encoder, tokens, torch.ones_like(tokens), self.new_tokens),
                lambda logits: drawn(logits, self.temperature, coins),
                self.completions,
            ).tolist()
        end, count = policy.tokenizer.eos_token_id, len(written)
        worth = list(map(self._worth, self._parts(policy, [prompt] * count, written, [record[ANSWER]] * count)))
        share, stamp = 1 / (self.completions * self.new_tokens), policy.stamp()
        rows = []
        for row, advantage in zip(written, advantages(worth), strict=True):
            completion = (row if made_up else until_end(row, end)[0])[:room]
            rest = record[TOKENS][len(prompt) + len(completion) :]
            rows.append(_record(prompt, completion, rest) | {POLICY: stamp, WEIGHT: share * advantage})
        return rows

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return -Σ log π of each row's completion; of prompts with answers, what the likeliest completion is worth."""
        policy = cast("Policy", module)
        return self._scored(policy, batch) if ANSWER in batch else self._learnt(policy, batch)

    def _learnt(self, policy: Policy, batch: Batch) -> Sums:
        """Return the loss of each row, before its weight.

        Raises:
            MechanismError: another policy wrote a row: no account covers a second step on one sample.
        """
        import torch
        import torch.nn.functional as F

        if not bool(((batch[POLICY] == NO_POLICY) | (batch[POLICY] == policy.stamp())).all()):
            raise MechanismError("completions were to serve a second step, which is not paid for: draw others")
        logits = at_least_float32(policy(batch)[:, :-1]) / self.temperature
        targets = batch[LABELS][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED).sum(1)
        return Sums(losses, torch.zeros_like(losses), torch.ones_like(losses))

    def _scored(self, policy: Policy, batch: Batch) -> Sums:
        """Return what the likeliest completion of each prompt is worth, and as the loss what it lacks of 1."""
        import torch

        from fedveil.contrib.tasks.rollouts import decode, evaluated, likeliest, on_the_left

        with evaluated(policy):
            written = decode(policy.encoder, *on_the_left(batch[TOKENS], batch[MASK]), self.new_tokens, likeliest)
        both = zip(batch[TOKENS].tolist(), batch[MASK].tolist(), strict=True)
        prompts = [[token for token, seen in zip(*row, strict=True) if seen] for row in both]
        parts = self._parts(policy, prompts, written.tolist(), batch[ANSWER].tolist())
        worth = torch.tensor(list(map(self._worth, parts)), device=written.device)
        beside = {name: torch.tensor([part[name] for part in parts]) for name in parts[0]}
        return Sums(1 - worth, worth, torch.ones_like(worth), beside={REWARD: worth, **beside})

    def _parts(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        written: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
    ) -> list[dict[str, float]]:
        """Return what each completion of its prompt is worth by each reward of the run."""
        from fedveil.contrib.tasks.rollouts import until_end

        def words(tokens: Sequence[int]) -> str:
            return str(policy.tokenizer.decode(tokens, skip_special_tokens=True))

        cut = [until_end(row, policy.tokenizer.eos_token_id) for row in written]
        texts = [words(tokens) for tokens, _ in cut]
        judged = [0.0] * len(texts)
        if policy.judge is not None:
            device = next(policy.parameters()).device
            judged = policy.judge.numbers(list(zip(map(words, prompts), texts, strict=True)), device)
        said = [
            Completion(text, _decoded(answer), len(tokens), self.new_tokens, ended, number)
            for text, answer, (tokens, ended), number in zip(texts, answers, cut, judged, strict=True)
        ]
        return [{name: REWARDS[name](one) for name in weights_of(self.rewards)} for one in said]

    def _worth(self, parts: dict[str, float]) -> float:
        """Return what all parts of a completion's worth are together, by their weights: 0 to 1."""
        weights = weights_of(self.rewards)
        return sum(weights[name] * part for name, part in parts.items()) / sum(weights.values())


def _record(prompt: Sequence[int], completion: Sequence[int], room: Sequence[int]) -> Record:
    """Return a record of these tokens, of which the room behind the completion is masked."""
    known, tokens = len(prompt) + len(completion), [*prompt, *completion, *room]
    return {
        TOKENS: tokens,
        MASK: [1] * known + [0] * len(room),
        LABELS: [IGNORED] * len(prompt) + list(completion) + [IGNORED] * len(room),
        POLICY: NO_POLICY,
    }


def _decoded(answer: Sequence[int]) -> str:
    return bytes(number for number in answer if number != IGNORED).decode()


TASK = GRPO()
"""With its options as they are by default."""
