"""Completions of a record's prompt: their law, their coins, and that no other record moves them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from audits.tiny_models import tiny_model
from fedveil.contrib.tasks.rollouts import advantages, decode, drawn, likeliest, on_the_left, until_end
from fedveil.privacy.randomness import private_uniform

PROMPTS = ([5, 6, 7, 8, 9], [10, 11], [12, 13, 14])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def decoder(request: pytest.FixtureRequest) -> Any:
    model = tiny_model(request.param).eval()
    drawn_by = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform laws
            parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape, generator=drawn_by))
    return model


def batch(*prompts: list[int]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    rows = [prompt + [0] * (width - len(prompt)) for prompt in prompts]
    mask = [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
    return on_the_left(torch.tensor(rows), torch.tensor(mask))


def slowly(decoder: Any, prompt: list[int], steps: int) -> list[int]:
    """The likeliest tokens, by a whole pass for each."""
    tokens = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            tokens.append(int(decoder(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_decoding_with_kept_keys_is_that_by_whole_passes(decoder: Any) -> None:
    found = decode(decoder, *batch(*PROMPTS), 6, likeliest)
    assert found.tolist() == [slowly(decoder, prompt, 6) for prompt in PROMPTS]


def test_copies_of_a_prompt_are_neighbours(decoder: Any) -> None:
    found = decode(decoder, *batch(*PROMPTS), 4, likeliest, copies=2)
    assert found.tolist() == [slowly(decoder, prompt, 4) for prompt in PROMPTS for _ in range(2)]


def test_tokens_have_the_law_of_the_logits() -> None:
    logits = torch.tensor([[1.0, 0.0, -torch.inf, 2.0]]).repeat(40_000, 1)
    counts = torch.bincount(drawn(logits, 0.5, private_uniform), minlength=4).double() / len(logits)
    law = (logits[0].double() / 0.5).softmax(-1)
    assert counts[2] == 0, "a token of no probability was drawn"
    assert (counts - law).abs().max() < 6 * (0.25 / len(logits)) ** 0.5


def test_the_ends_of_the_coins_are_tokens_too() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    ends = torch.tensor([0, 1 - 2.0**-53], dtype=torch.float64)
    assert drawn(logits, 1.0, lambda count: ends[:count]).tolist() == [1, 2]


def test_a_model_without_a_law_is_no_law() -> None:
    with pytest.raises(ArithmeticError):
        drawn(torch.full((1, 3), torch.nan), 1.0, private_uniform)


def test_each_row_takes_one_number_a_step_wherever_it_ends(decoder: Any) -> None:
    taken: list[int] = []

    def coins(count: int) -> Tensor:
        taken.append(count)
        return private_uniform(count)

    found = decode(decoder, *batch(PROMPTS[0]), 5, lambda logits: drawn(logits, 1.0, coins), copies=3)
    assert (found.shape, taken) == ((3, 5), [3] * 5)


def test_decoding_leaves_the_model_as_it_was(decoder: Any) -> None:
    before = copy.deepcopy(decoder.state_dict())
    decode(decoder, *batch(PROMPTS[0]), 3, likeliest, copies=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_advantages_are_those_of_the_published_equation() -> None:
    rewards = torch.tensor([1.75, 0.25, 0.0, 0.75], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert advantages(rewards.tolist()) == pytest.approx(expected.tolist(), abs=1e-14)


def test_a_group_without_spread_has_none_also_where_its_mean_rounds() -> None:
    assert advantages([0.1] * 3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    with pytest.raises(ArithmeticError):
        advantages([0.0, reward])


def test_a_completion_is_cut_behind_its_first_end_mark() -> None:
    assert until_end([4, 3, 5, 3], 3) == ([4, 3], True)
    assert until_end([4, 5], 3) == ([4, 5], False)
    assert until_end([4, 5], None) == ([4, 5], False)
