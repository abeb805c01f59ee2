"""Bytes on the wire, counted from encoded messages, against the formula of each strategy, and rounding beside noise.

    .venv/bin/python benchmarks/traffic.py                   # half a minute

A RoBERTa-large-shaped adapter (24 layers, query and value, d = 1024) at rank 8 and 64, no head. A message is counted
whole: payload, header and Flower's own framing, as protobuf. Then, by ``wire.precision``, the error of a change that is
all noise on its grid, beside that noise, and the default job's payload for its four sites together. Ends with an error
where a message is more than 2 % off, or the job above what it may be.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from fedveil.common.messages.blocks import encode_state, rounded
from fedveil.common.messages.columns import narrowed
from fedveil.common.messages.formats import FORMATS
from fedveil.common.messages.round import Spending, TrainResult, TrainTask
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.wire import encode_reply, encode_task, message_bytes
from fedveil.experiments.planner.traffic import traffic
from fedveil.privacy.accountant import TRAINING, Accountant
from fedveil.privacy.events import sampled_gaussian
from fedveil.privacy.randomness import add_private_noise
from fedveil.server.model import ServerModel
from fedveil.strategies import STRATEGIES
from fedveil.strategies.job import configure, with_recipe
from fedveil.strategies.payload import payload, preset_adapter

SHAPES = ((1024, 1024),) * 48
ROOM = 0.02
MOST = {"float32": 9_000_000, "bfloat16": 5_000_000}
"""Bytes of the default job."""
SPENDING = Spending(TRAINING, sampled_gaussian(0.8, 0.1), 5, 5, 1e-5, 1.0, 1.0, 8.0, 7.0, Accountant("pld", "0.6.0"))


def layers_of(factors: Mapping[str, tuple[int, ...]]) -> AdapterState:
    """Return factors of these shapes in every layer, with names as long as a model's."""
    return {
        f"encoder.layer.{i // 2}.attention.self.{('query', 'value')[i % 2]}": {
            factor: torch.ones(shape) for factor, shape in factors.items()
        }
        for i in range(len(SHAPES))
    }


def measured(name: str, rank: int) -> tuple[int, int]:
    """Return the bytes of one encoded task and one encoded result."""
    strategy = STRATEGIES[name]()
    adapter = preset_adapter(STRATEGIES[name], rank)
    shapes = adapter.shapes(*SHAPES[0])
    down = strategy.downlink(strategy.start(layers_of(shapes), adapter.trained))
    trained = layers_of({factor: shapes[factor] for factor in adapter.trained})
    trained = narrowed(trained, strategy.trained_columns(down, 1, 0))
    task = TrainTask("12345678901234567890", 3, down, {}, "", "f" * 64, "f" * 64)
    result = TrainResult(task.run, 3, "site-0", 1800, trained, SPENDING)
    return message_bytes(encode_task(task)), message_bytes(encode_reply(result))


def rounding(precision: str) -> tuple[float, float]:
    """Return bytes a number of a change, and the rounding error's standard deviation over that of its noise."""
    noise = {"layer": {"B": add_private_noise(torch.zeros(2**18), 1.0).float()}}
    error = rounded(noise, precision)["layer"]["B"] - noise["layer"]["B"]
    return len(encode_state(noise, precision)) / 2**18, float(error.std())


def default_job(precision: str) -> int:
    """Return the payload of the default job, all rounds and its four sites together."""
    settings, _ = with_recipe({"wire.precision": precision}, sites=4)
    job = configure(settings)
    return sum(traffic(job, ServerModel(job), [job.plan(job.config.total_steps, 2000)]).run(4))


def main() -> None:
    total: dict[tuple[str, int], int] = {}
    most = 0.0
    print("strategy      rank        down     formula     off          up     formula     off")
    for rank in (8, 64):
        for name, strategy in STRATEGIES.items():
            down, up = measured(name, rank)
            want_down, want_up = payload(strategy(), preset_adapter(strategy, rank), SHAPES)
            total[name, rank] = down + up
            most = max(most, abs(down / want_down - 1), abs(up / want_up - 1))
            print(
                f"{name:13} {rank:4} {down:11,} {want_down:11,} {down / want_down - 1:7.2%} "
                f"{up:11,} {want_up:11,} {up / want_up - 1:7.2%}"
            )
    for rank in (8, 64):
        ratio = total["fedavg-lora", rank] / total["fed-sb", rank]
        print(f"rank {rank}: FedAvg-LoRA sends {ratio:.0f} times the bytes of Fed-SB")
    above = []
    print("precision  bytes a number  error / noise  default job")
    for precision in FORMATS:
        (size, error), job = rounding(precision), default_job(precision)
        print(f"{precision:10} {size:14.3f} {error:14.5f} {job:12,}")
        above += [precision] * (job > MOST.get(precision, job))
    if most > ROOM:
        sys.exit(f"a message is {most:.2%} off its formula, more than {ROOM:.0%}")
    if above:
        sys.exit(f"the default job sends more than {MOST} in {', '.join(above)}")


if __name__ == "__main__":
    main()
