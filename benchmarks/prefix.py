"""Gain of what is kept below an adapter in the last layers, as processor seconds of private steps in one run.

    .venv/bin/python benchmarks/prefix.py            # about a minute and a half on one core

Three ways take turns over the same records, all of them in every step: every layer computed; computed, and what leaves
the layers below the adapter put by; and kept. It prints how far the sums before the noise are apart, too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

from fedveil.common.threads import begin_process

begin_process()

import torch  # noqa: E402 (the environment comes first)
from local_training import build  # noqa: E402
from torch import Tensor  # noqa: E402

from fedveil.client.prefixes import Prefixes  # noqa: E402
from fedveil.client.rehearsal import rehearse  # noqa: E402
from fedveil.common.data.sources import train_and_test  # noqa: E402
from fedveil.common.model.device import denormals_flushed  # noqa: E402
from fedveil.common.model.federated import FederatedModel  # noqa: E402
from fedveil.common.tasks import Record  # noqa: E402
from fedveil.privacy.dpsgd import PrivateSteps  # noqa: E402
from fedveil.privacy.plan import gaussian_plan  # noqa: E402
from fedveil.strategies.job import configure  # noqa: E402


def summed(model: FederatedModel, records: list[Record]) -> Tensor:
    """Return the sum of a private step before its noise."""
    plan = gaussian_plan(1.0, 0.8, 0.1, float(len(records)), 1e-5, 8.0)
    trained = [p for p in model.module.parameters() if p.requires_grad]
    steps = PrivateSteps(model.module, torch.optim.SGD(trained, lr=0.0), plan)
    with denormals_flushed(), model.many_passes(), steps:
        sums = [steps.whole_sums(batch, model.losses) for batch in model.fixed_batches(records)]
    return torch.cat([torch.stack(parts).sum(0).flatten() for parts in zip(*sums, strict=True)])


def main() -> None:
    """Print the seconds of each way, their ratio, and the greatest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200, help="of a step")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each way, after one to warm up")
    parser.add_argument("--last", type=int, default=2, help="how many of the last layers are adapted")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    blocks = int(build(configure({"recipe": "plain"}), precision="auto").base.module.config.num_hidden_layers)
    targets = [f"layer.{n}.attention.self.{p}" for n in range(blocks)[-arguments.last :] for p in ("query", "value")]
    job = configure({"recipe": "plain", "adapter.targets": ",".join(targets)})
    model = build(job, precision="auto")
    train, _ = train_and_test(job.config.data, job.config.model.task)
    records = model.prepare(train.examples[: arguments.records])
    with denormals_flushed():
        rehearse(model)
    store, seconds, sums = Prefixes(), dict[str, list[float]](), dict[str, Tensor]()
    for number in range(arguments.repeats + 1):
        for way in ("computed", "put by", "kept"):
            if way == "put by":
                store = Prefixes()
            with store.opened(model, "site", "run") if way != "computed" else nullcontext():
                began = time.process_time()
                sums[way] = summed(model, records)
            if number:
                seconds.setdefault(way, []).append(time.process_time() - began)
    middle = {way: statistics.median(each) for way, each in seconds.items()}
    kept_bytes = sum(size for _, size in store._places["site"].values())
    print(f"{model.base.name}, {blocks} layers, the last {arguments.last} adapted, {model.precision}")
    print(", ".join(f"{way} {value:.2f} s" for way, value in middle.items()), f"for {len(records)} records")
    ratio, put_by = middle["computed"] / middle["kept"], middle["put by"] / middle["computed"]
    print(f"computed / kept {ratio:.2f}, put by / computed {put_by:.2f}")
    print(f"below the adapter: {1 - 1 / ratio:.0%} of a private pass")
    error = max(float((sums[way] - sums["computed"]).abs().max()) for way in sums)
    print(f"kept: {kept_bytes / 2**20:.1f} MiB; greatest error of a sum {error}")


if __name__ == "__main__":
    main()
