"""A worker of a site's process: a program of its own that computes passes on one thread.

    python -P -m fedveil.client.core DESCRIPTOR PARENT

It gets batches over a socket that it was started with, once they are paid for, and sends back what it found. It opens
no file, draws no noise and keeps nothing of a pass. It writes no dump and ends with its parent, however that ends.
"""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from select import POLLHUP, POLLRDHUP, poll
from typing import Any

import torch
from torch import Tensor

from fedveil.client.dumps import write_no_dumps
from fedveil.client.linearised import derivatives, order_of
from fedveil.client.nameless import unpacked
from fedveil.common.log import set_up
from fedveil.common.model.device import denormals_flushed
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.model.sharing import Kind
from fedveil.common.parent import die_with_parent
from fedveil.privacy.plan import rounding_margin


@dataclass
class Passes:
    """What is computed of batches, in a worker or, to compare, in its parent."""

    model: FederatedModel
    kind: Kind
    plan: Any
    """A ``PrivacyPlan``; of features none is needed."""

    def __enter__(self) -> Passes:
        self._stack, self._steps = ExitStack(), None
        self.trained = [p for p in self.model.module.parameters() if p.requires_grad]
        if self.kind != "features":
            optimizer = torch.optim.SGD(self.trained, lr=0.0)
            margin = rounding_margin(self.model.device)
            own = self.plan.stepping()(self.model.module, optimizer, self.plan, noise_margin=margin)
            self._steps = self._stack.enter_context(own)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def set_trained(self, values: Sequence[Tensor]) -> None:
        """Give what is trained these values."""
        with torch.no_grad():
            for parameter, value in zip(self.trained, values, strict=True):
                parameter.copy_(value)

    def found(self, batch: FixedBatch) -> Any:
        """Return what is found of a batch, on the CPU; what fails raises."""
        if self._steps is None:
            return self.model.features(batch)
        if self.kind == "derivatives":
            order = order_of(self.model, self.trained)
            return [derivatives(self.model, self._steps, order, batch, n) for n in range(1, self.model.classes)]
        wanted = self._steps.samples if self.plan.unit.grouped else self._steps.whole_sums
        return wanted(batch, self.model.losses)

    def digest(self, batch: FixedBatch) -> str:
        """Return a digest of every bit that is found of a batch, and of its records' gradients before the clip."""
        digest = hashlib.sha256()
        tensors = list(_tensors(self.found(batch)))
        if self._steps is not None and self.kind == "sums":
            tensors += self._steps.samples(batch, self.model.losses)
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _tensors(found: Any) -> Any:
    if isinstance(found, Tensor):
        yield found
    else:
        for part in found:
            yield from _tensors(part)


def serve(link: Connection) -> None:
    """Do what the parent says until it hangs up."""
    passes: Passes | None = None
    while True:
        try:
            what, content = pickle.loads(link.recv_bytes())  # noqa: S301 (the parent alone has the other end)
        except (EOFError, OSError):
            return
        try:
            passes, answer = _done(link, passes, what, content)
        except Exception:  # the parent makes the pass itself, and its log says what fails there
            answer = None
        content = None
        if passes is None:
            gc.collect()  # a model has cycles, and its memory goes with it
        link.send_bytes(pickle.dumps(answer, protocol=5))
        answer = None


def _done(link: Connection, passes: Passes | None, what: str, content: Any) -> tuple[Passes | None, Any]:
    """Do one thing, and return the passes that are open then and what is answered."""
    if what == "open":
        passes = unpacked(recv_handle(link))
        return passes.__enter__(), True
    if passes is None:
        return None, what == "close" or None
    if what == "close":
        passes.__exit__()
        return None, True
    if what == "trained":
        passes.set_trained(content)
        return passes, True
    return passes, passes.found(content) if what == "pass" else passes.digest(content)


def end_with(descriptor: int) -> None:
    """End this process, also in the middle of a pass, when the other end of a socket is gone."""
    watched = poll()
    watched.register(descriptor, POLLHUP | POLLRDHUP)
    watched.poll()
    os._exit(0)


def main() -> int:
    """Run from ``client.cores``."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent()
    write_no_dumps()
    if os.getppid() != parent:
        return 1
    threading.Thread(target=end_with, args=(descriptor,), daemon=True).start()
    set_up()
    torch.set_num_threads(1)
    with denormals_flushed(), Connection(descriptor) as link:
        link.send_bytes(pickle.dumps("ready"))
        serve(link)
    return 0


if __name__ == "__main__":
    sys.exit(main())
