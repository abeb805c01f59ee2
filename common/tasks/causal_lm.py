"""Causal language modelling: loss on the completion only, averaged inside each record.

Averaging over the tokens of the batch, as the stock ``outputs.loss`` does, would couple records:
one record's gradient would depend on the lengths of its neighbours, and the clip would no longer
bound what one record can change (pitfall 5 in ``docs/concepts/evidence.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fedveil.common.errors import ConfigError, DataError, ModelNotLoaded
from fedveil.common.tasks.base import IGNORED, Batch, Record, Scored, Sums, Wording
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Answer, Export, Finished, Questions, Sampling
from fedveil.common.tasks.loading import OWN_CODE
from fedveil.common.tasks.options import options_of
from fedveil.common.tasks.roles import TEMPLATE, Role
from fedveil.common.tasks.template import check_template, template_of
from fedveil.common.tasks.text import TOKENS, TextExample, TextTask, pad_id, padded

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.config.flat import Scalar
    from fedveil.common.config.run import RunConfig
    from fedveil.common.model.base import BaseModel
    from fedveil.common.tasks.module import TaskModule

LOOKS_AHEAD = 1e-5
"""Part of the largest logit by which another last token may move the ones before it, for rounding. A decoder's is 0, as
both passes have one shape; MiniLM's is 0.25, and that of untrained encoders 5e-4 and more."""
MOST_NEW = 64
"""Tokens of an answer, at most."""


class DecoderExport(Export):
    """A decoder as it is, with its own language-model head."""

    hub_task = "text-generation"
    loader = "AutoModelForCausalLM"

    def adapter_code(self, base: str, settings: Mapping[str, Scalar], *, tuned: bool) -> str:
        """Return code that completes a prompt."""
        del settings
        return self._loads(base, "AutoTokenizer", tuned=tuned) + (
            f"tokenizer = AutoTokenizer.from_pretrained({base!r})\n"
            'prompt = tokenizer("a prompt", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))\n"
        )


def halves(text: str) -> tuple[str, str]:
    """Return the first and the second half of a text's words."""
    words = text.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def _completed(prompt: str, completion: str) -> Example:
    return TextExample(text=prompt, completion=f" {completion}" if prompt else completion)


def prompt_tokens(tokenizer: Any, example: Example) -> list[int]:
    """Return the tokens of an example's prompt; within a template, of what begins its text."""
    record = cast(TextExample, example)
    tokens: list[int] = tokenizer("" if record.template else record.text)[TOKENS]
    if record.template:
        opening = template_of(record.template).opening(record.text)
        tokens = (tokens or [tokenizer.eos_token_id or 0]) + tokenizer(opening, add_special_tokens=False)[TOKENS]
    return tokens


def complete(
    model: Finished, examples: Sequence[Example], prompt_of: Callable[[Any, Example], list[int]] = prompt_tokens
) -> list[list[Answer]]:
    """Return for each example the likeliest next tokens, up to the end mark or ``MOST_NEW`` of them.

    The prompt is read as in training, and loses its beginning where it leaves no room for an answer.
    """
    return [[_completion(model, prompt_of(model.base.processor, example))] for example in examples]


def _completion(model: Finished, prompt: list[int]) -> Answer:
    import torch

    tokenizer, decoder = model.base.processor, cast(Any, model.module.encoder)
    room = min(MOST_NEW, max(1, model.limit // 2))
    prompt = prompt[-(model.limit - room) :] or [tokenizer.eos_token_id or 0]
    tokens = torch.tensor([prompt], device=next(decoder.parameters()).device)
    with torch.no_grad():
        out = decoder.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_id(model.base),
        )
    return Answer(tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True).strip(), None)


def continued(model: Finished, example: Example, count: int, how: Sampling) -> list[str | None]:
    """Return ``count`` texts that go on after an example's prompt, of torch's global generator.

    None stands for each text that has neither an end mark nor its template's end within ``how.new_tokens``.

    Raises:
        ConfigError: the prompt leaves no room.
    """
    import torch

    tokenizer, decoder = model.base.processor, cast(Any, model.module.encoder)
    tokens = torch.tensor([prompt_tokens(tokenizer, example)], device=next(decoder.parameters()).device)
    end = template_of(example.template).end if example.template else ""
    room = model.limit - tokens.shape[1]
    if room < 1:
        raise ConfigError(f"the template's beginning has {tokens.shape[1]} tokens, and model.max-length {model.limit}")
    with torch.no_grad():
        out = decoder.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=min(how.new_tokens or room, room),
            do_sample=True,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=0,
            num_return_sequences=count,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_id(model.base),
            **({"stop_strings": [end], "tokenizer": tokenizer} if end else {}),
        )
    return [_ended(tokenizer, row, end) for row in out[:, tokens.shape[1] :].tolist()]


def _ended(tokenizer: Any, tokens: list[int], end: str) -> str | None:
    mark = tokenizer.eos_token_id
    text = tokenizer.decode(tokens[: tokens.index(mark)] if mark in tokens else tokens, skip_special_tokens=True)
    if end and end in text:
        return str(text[: text.index(end) + len(end)])
    return text if mark in tokens else None


class CausalLM(TextTask):
    """Prompt and completion; the loss is the mean negative log-likelihood of the completion's tokens.

    Within ``data.template`` a record is one text, and all of its tokens count.
    """

    name: ClassVar[str] = "causal-lm"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("prompt", "text", "the prompt, or the instruction", optional=True, usual=True),
        Role("completion", "completion", "the completion, or the answer", in_question=False),
        TEMPLATE,
    )

    wording: ClassVar[Wording | None] = Wording(
        phrase=lambda phrase: TextExample(completion=phrase.strip()), text=lambda text: _completed(*halves(text))
    )
    questions: ClassVar[Questions | None] = Questions(lambda words: TextExample(*words), complete, continued)
    export: ClassVar[Export] = DecoderExport()
    scored: ClassVar[Scored] = Scored(options=options_of)
    too_long: ClassVar[str] = ""

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError, naming the setting, unless a run can have this configuration, its template included."""
        super().check(config)
        check_template(config.data.columns[TEMPLATE.setting], config.data.columns["prompt"])

    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return the decoder with its own language-model head."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(name, **OWN_CODE), AutoTokenizer.from_pretrained(name, **OWN_CODE)

    def check_model(self, module: nn.Module, name: str) -> None:
        """Raise ModelNotLoaded if a token's prediction depends on the tokens after it, as it does in an encoder.

        transformers loads BERT as a language model too. It would see each answer that it is scored on.
        """
        import torch

        with torch.no_grad():
            one, other = (module(input_ids=torch.tensor([[1, 0, 1, last]])).logits[:, :-1].float() for last in (0, 1))
        if (one - other).abs().max() > LOOKS_AHEAD * one.abs().max():
            raise ModelNotLoaded(
                f"the base model {name!r} sees the tokens that it should predict, so it is none that model.task "
                f"{self.name!r} takes: set model.name to a decoder, such as 'SmolLM2-135M-Instruct'"
            )

    def tokenise(self, tokenizer: Any, examples: Sequence[TextExample], max_length: int) -> list[Record]:
        """Return ``input_ids`` of prompt, completion and end mark, and ``labels`` that ignore the prompt.

        A record that is too long loses the beginning of its prompt, never its whole completion.
        """
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        records: list[Record] = []
        for i, example in enumerate(examples):
            if not example.completion:
                raise DataError(f"record {i + 1} has an empty completion; there is nothing to learn from it")
            read, learnt = _learnt(example)
            prompt = tokenizer(read)[TOKENS]
            completion = (tokenizer(learnt, add_special_tokens=False)[TOKENS] + end)[: max_length - 1]
            prompt = prompt[-(max_length - len(completion)) :] or [tokenizer.eos_token_id or 0]
            records.append(
                {
                    TOKENS: prompt + completion,
                    "attention_mask": [1] * (len(prompt) + len(completion)),
                    "labels": [IGNORED] * len(prompt) + completion,
                }
            )
        return records

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return int64 tensors of shape (records, tokens), padded on the right; padding is never a target."""
        fill = {TOKENS: pad_id(base), "attention_mask": 0, "labels": IGNORED}
        return {key: padded([record[key] for record in records], fill[key], size) for key in records[0]}

    def made_up(self, like: Record, tokens: Sequence[int], label: int = 0) -> Record:
        """Return a record whose last third is the completion; of one token, it has no target and its loss is 0."""
        prompt = len(tokens) - len(tokens) // 3
        labels = [IGNORED] * prompt + list(tokens[prompt:])
        return {TOKENS: list(tokens), "attention_mask": [1] * len(tokens), "labels": labels}

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the decoder as it is: it has a language-model head of its own."""
        from fedveil.common.tasks.module import TaskModule

        return TaskModule(encoder, _logits)

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return negative log-likelihood and hits, summed over the completion's tokens."""
        import torch.nn.functional as F

        logits = at_least_float32(module(batch)[:, :-1])
        targets = batch["labels"][:, 1:]
        mask = (targets != IGNORED).float()
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
        correct = (logits.argmax(-1) == targets).float() * mask
        return Sums((loss * mask).sum(1), correct.sum(1), mask.sum(1).clamp(min=1))


def at_least_float32(logits: Tensor) -> Tensor:
    """Return logits of fewer bits in float32, and others as they are."""
    import torch

    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _learnt(example: TextExample) -> tuple[str, str]:
    """Return the words that are read before the loss begins, and those that it is on."""
    completion = example.completion or ""
    return (
        ("", template_of(example.template).filled(example.text, completion))
        if example.template
        else (example.text, completion)
    )


def _logits(decoder: nn.Module, batch: Batch) -> Tensor:
    """Return logits, shape (records, tokens, vocabulary)."""
    output = decoder(input_ids=batch[TOKENS], attention_mask=batch["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits
