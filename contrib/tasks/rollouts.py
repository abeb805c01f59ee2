"""Completions that a language model draws of one record's prompt, and what they are worth beside each other.

A record's completions pass with each other alone: another record in the batch would move the law of their tokens (by
1.4 % in bfloat16), and one more record would then change what the others contribute. The shape of every pass follows
from the prompt's length and public numbers: a completion that has ended goes on to the last step, and is cut there.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedveil.common.tasks.base import Coins
from fedveil.common.tasks.module import TaskModule

if TYPE_CHECKING:
    from fedveil.contrib.tasks.judging import Judge

LEAST_SPREAD = 1e-4
"""What is added to a group's standard deviation, as in the released code of GRPO."""


class Policy(TaskModule):
    """A decoder, with the tokenizer that makes words of what it writes."""

    tokenizer: Any
    judge: Judge | None = None
    """What gives the reward of that name."""

    def stamp(self) -> int:
        """Return a number above 0 that follows from the trained tensors; what was written says by which it was."""
        digest = hashlib.blake2b(digest_size=7)
        for parameter in self.parameters():
            if parameter.requires_grad:
                digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        return 1 + int.from_bytes(digest.digest(), "big")


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Let a module compute as in a score: in training, a layer that is computed again keeps no keys and values."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@torch.no_grad()
def decode(
    decoder: Any, tokens: Tensor, mask: Tensor, steps: int, choose: Callable[[Tensor], Tensor], copies: int = 1
) -> Tensor:
    """Return what follows each prompt, shape (prompts · copies, steps), int64; copies of a prompt are neighbours.

    Args:
        decoder: a causal language model that keeps keys and values.
        tokens: prompts, padded on the left, shape (prompts, tokens), int64.
        mask: 1 for each of their tokens, else 0.
        steps: tokens of each answer; none ends before.
        choose: takes logits of shape (rows, vocabulary), and returns a token for each row, int64.
        copies: answers to each prompt.
    """
    kept, places = _keyword(decoder), (mask.cumsum(1) - 1).clamp(min=0)
    out = decoder(input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=True)
    if copies > 1:
        getattr(out, kept).batch_repeat_interleave(copies)
    logits, mask, place = (x.repeat_interleave(copies, 0) for x in (out.logits[:, -1], mask, places[:, -1:]))
    found = [choose(logits)]
    while len(found) < steps:
        mask, place = torch.cat([mask, mask.new_ones((len(mask), 1))], 1), place + 1
        out = decoder(
            input_ids=found[-1][:, None],
            attention_mask=mask,
            position_ids=place,
            use_cache=True,
            **{kept: getattr(out, kept)},
        )
        found.append(choose(out.logits[:, -1]))
    return torch.stack(found, 1)


def _keyword(decoder: Any) -> str:
    """Return what a model calls the keys and values that are kept; newer versions of transformers say ``cache``."""
    stock = decoder.get_base_model() if hasattr(decoder, "get_base_model") else decoder
    return "cache" if "cache" in inspect.signature(stock.forward).parameters else "past_key_values"


def drawn(logits: Tensor, temperature: float, coins: Coins) -> Tensor:
    """Return a token for each row by a coin of its own, shape (rows,), int64; in float64, whatever the logits are.

    Raises:
        ArithmeticError: a row has no law.
    """
    shares = (logits.detach().cpu().double() / temperature).softmax(-1).cumsum(-1)
    if not bool(shares.isfinite().all()):
        raise ArithmeticError("the model gives no next token a probability")
    # Below the last sum also where the product rounds up to it: no token without a probability is drawn.
    places = torch.minimum(coins(len(shares)) * shares[:, -1], torch.nextafter(shares[:, -1], shares.new_zeros(())))
    return torch.searchsorted(shares, places[:, None], right=True)[:, 0].to(logits.device)


def likeliest(logits: Tensor) -> Tensor:
    """Return the likeliest token of each row, shape (rows,), int64."""
    return logits.argmax(-1)


def until_end(tokens: Sequence[int], end: int | None) -> tuple[list[int], bool]:
    """Return the tokens up to the first end mark, that included, and whether there is one.

    >>> until_end([5, 6, 0, 7], 0), until_end([5, 6], 0)
    (([5, 6, 0], True), ([5, 6], False))
    """
    tokens = list(tokens)
    return (tokens[: tokens.index(end) + 1], True) if end in tokens else (tokens, False)


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return by how many standard deviations (of n - 1) each reward of a group exceeds their mean.

    A group without spread has zeros: it teaches nothing, and is not drawn again, which would tell of the records.

    >>> advantages([0.5, 0.5]), [round(a, 3) for a in advantages([0, 1])]
    ([0.0, 0.0], [-0.707, 0.707])

    Raises:
        ArithmeticError: a reward is no finite number.
    """
    if not all(map(math.isfinite, rewards)):
        raise ArithmeticError("a reward is no finite number")
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean, spread = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (spread + LEAST_SPREAD) for reward in rewards]


def on_the_left(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return prompts and mask, both shape (prompts, tokens), with the padding moved from the right to the left."""
    width = mask.shape[1]
    source = torch.arange(width, device=mask.device) - (width - mask.sum(1, keepdim=True))
    return tokens.gather(1, source.clamp(min=0)), (source >= 0).to(mask.dtype)
