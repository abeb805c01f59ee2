"""The noise law: what steps on no record put on a model is independent Gaussian noise of the size that was paid for.

And it lies on the public grid, so that no number tells by its lowest bits what the noise was added to.

Every band raises a false alarm about once in a million runs.
"""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from audits.bands import out_of_band, related
from audits.faults import SOUND, Fault, same_seeds
from audits.finding import judged
from audits.worlds import Gradient, Recorder, World, flat, plan
from fedveil.common.findings import Finding
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.grid import noise_grid
from fedveil.privacy.plan import PrivacyPlan

STEPS = 40
"""Steps on no record, at each of two sites."""
NOISY = plan(clip=0.5, noise=3.0, divisor=7.0)


def noise_faults(given: list[Gradient], std: float) -> set[str]:
    """Return what is wrong with noise that should be independent N(0, std²); each check errs once in 1e6 runs.

    At 100 000 values the band of the standard deviation is about ±1.1 %.
    """
    table = torch.stack([flat(gradient) for gradient in given]) / std
    faults = set()

    def wrong_size(values: Tensor, chance: float) -> bool:
        return out_of_band(float(values.pow(2).sum()), values.numel(), chance)

    if wrong_size(table, 1e-6):
        faults.add("standard deviation")
    if any(wrong_size(row, 1e-6 / len(table)) for row in table):
        faults.add("standard deviation of a step")
    if abs(float(table.mean())) * table.numel() ** 0.5 > 5:  # 6e-7
        faults.add("mean")
    if stats.kstest(table.flatten().numpy(), "norm").pvalue < 1e-6:
        faults.add("shape")
    if related(table[:-1], table[1:]):
        faults.add("steps")
    for i in range(len(given[0])):
        for j in range(i):
            if given[0][i].numel() == given[0][j].numel() and related(
                torch.stack([g[i].flatten() for g in given]), torch.stack([g[j].flatten() for g in given])
            ):
                faults.add("tensors")
    return faults


def noise_only(world: World, figures: PrivacyPlan, steps_taken: int) -> list[Gradient]:
    """Return what ``steps_taken`` steps on empty batches hand to the optimiser."""
    optimizer = Recorder(world.trained)
    with PrivateSteps(world.model.module, optimizer, figures) as steps:
        for _ in range(steps_taken):
            steps.step([], world.model.losses)
    return optimizer.given


def beside_the_grid(given: list[Gradient], figures: PrivacyPlan) -> float:
    """Return the share of numbers that are no multiples of the noise's grid over the divisor, or zeros with a sign."""
    sent = torch.stack([flat(gradient) for gradient in given])
    cells = sent * figures.expected_batch_size / noise_grid(figures.event.noise_multiplier * figures.event.clip_norm)
    # Float32 after the divisor errs by 2⁻²⁴ of the value: 2⁻⁹ of a step at 16 standard deviations.
    beside = ((cells - cells.round()).abs() > 2.0**-8) | ((cells == 0) & cells.signbit())
    return float(beside.double().mean())


def audit_noise(world: World, fault: Fault = SOUND) -> Finding:
    """Look at the noise of two sites whose every seed is equal, with ``fault`` built in."""
    with fault.plant():
        same_seeds()
        first = noise_only(world, NOISY, STEPS)
        same_seeds()
        second = noise_only(world, NOISY, STEPS)
    wrong = noise_faults(first, NOISY.gradient_noise_std)
    here, there = (torch.stack([flat(gradient) for gradient in site]) for site in (first, second))
    if related(here, there):
        wrong.add("two sites")
    beside = beside_the_grid([*first, *second], NOISY)
    if beside:
        wrong.add("grid")
    return judged(
        "noise law",
        fault.name,
        bool(wrong),
        {
            "numbers drawn": here.numel(),
            "noise over what was paid for": float(here.std()) / NOISY.gradient_noise_std,
            "beside the grid": beside,
            "wrong": ", ".join(sorted(wrong)) or "nothing",
        },
    )
