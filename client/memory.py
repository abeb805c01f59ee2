"""The cache of a node between the messages of a run: the factors that travel once, and its last reply.

It lives in the memory of Flower's node and may be lost; then the factors are requested again, and a
repeated round is trained and charged again. Nothing in here has not been released already. A simulation's last reply
is also in a file, written before it is released, so that a resumed run has it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fedveil.common.errors import ProtocolError
from fedveil.common.files import replace_file
from fedveil.common.log import about as about_run
from fedveil.common.messages.blocks import Layout, decode_state, encode_state, layout_of
from fedveil.common.messages.round import TrainResult, TrainTask, same_fingerprint
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import fingerprint, merge
from fedveil.common.messages.wire import result_from_bytes, result_to_bytes

log = logging.getLogger("fedveil.site")
HASH = hashlib.sha256().digest_size


class Memory:
    """A view on what one node keeps; only the latest of everything."""

    def __init__(self, kept: MutableMapping[str, bytes], file: Path | None = None) -> None:
        """View ``kept``; ``file`` has the last reply, too, if that may be on disk: a hash, what it answers, itself."""
        self._kept, self._file = kept, file
        if file is None or "reply-to" in kept:
            return
        with suppress(OSError):  # none was kept: the round is trained and charged again
            content = file.read_bytes()
            if hashlib.sha256(content[HASH:]).digest() == content[:HASH]:
                kept["reply-to"], _, kept["reply"] = content[HASH:].partition(b"\n")

    def with_basis(self, task: TrainTask, layout: Layout) -> TrainTask | None:
        """Return the task with all that is sent once, just received or kept; None if this node does not have it.

        Args:
            task: as received, with all of it, a part, or none.
            layout: of all of it.
        """
        if not task.basis_fingerprint or layout_of(task.basis) == layout:
            return task
        layers = json.loads(self._kept.get("basis-layers", b"[]"))
        if not layout.keys() >= set(layers):
            return None
        try:
            held = decode_state(self._kept["basis"], {k: layout[k] for k in layout if k in layers}) if layers else {}
        except ProtocolError:
            return None  # of another run, whose layers have the same names
        whole = merge(held, task.basis)
        if layout_of(whole) != layout:
            return None
        # What is kept has its mark beside it; a part that came later has to fit it.
        known = self._kept.get("basis-of", b"").decode() if not task.basis else fingerprint(whole)
        if not same_fingerprint(task.basis_fingerprint, known):
            return None
        return replace(task, basis=whole)

    def recall(self, task: TrainTask) -> TrainResult | None:
        """Return what was sent in answer to this very task; None if it is new here.

        Raises:
            ProtocolError: the task is of an earlier round of the run than the last one answered.
        """
        if "reply-to" not in self._kept:
            return None
        about = json.loads(self._kept["reply-to"])
        if about["run"] != task.run:
            return None
        if task.round_number < about["round"]:
            raise ProtocolError(
                f"the task is of round {task.round_number}, this site has answered round {about['round']} already"
            )
        if about["task"] != _digest(task):
            if about["round"] == task.round_number:
                line = "this round was answered, and is asked once more with other content"
                log.warning(line, extra=about_run(task.run, task.round_number))
            return None
        layout = {layer: {n: tuple(shape) for n, shape in f.items()} for layer, f in about["layout"].items()}
        return result_from_bytes(self._kept["reply"], layout, task.run, task.round_number)

    def keep(self, task: TrainTask, result: TrainResult, basis: AdapterState) -> None:
        """Keep what is sent in answer to ``task``, and with what came once all of that, in place of what was kept.

        A task that was answered has been checked: factors that are not those of their fingerprint would stand in
        the way of every later round.
        """
        if task.basis:
            self._kept["basis-of"] = task.basis_fingerprint.encode()
            self._kept["basis-layers"] = json.dumps(list(basis)).encode()
            self._kept["basis"] = encode_state(basis)
        about = {"run": task.run, "round": task.round_number, "task": _digest(task)}
        summed = {"sum": {"words": [len(result.words) // 4]}}
        layout = summed if result.words else layout_of(result.contribution)
        self._kept["reply-to"] = json.dumps({**about, "layout": layout}).encode()
        self._kept["reply"] = result_to_bytes(result)
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(mode=0o700, exist_ok=True)
            content = self._kept["reply-to"] + b"\n" + self._kept["reply"]
            replace_file(self._file, hashlib.sha256(content).digest() + content, 0o600)
        except OSError as error:  # it is paid for, and a resumed run that asks for it again pays again
            log.warning("the reply is not kept (%s)", error.strerror, extra=about_run(task.run, task.round_number))


def _digest(task: TrainTask) -> str:
    """Return a hash of what a task asks for; whether the factors sent once came along makes no difference."""
    marks = [task.run, task.round_number, task.base_fingerprint, task.start_fingerprint, task.basis_fingerprint]
    marks += [task.attempt, *((o.site, o.public.hex(), o.signature.hex()) for o in task.offers)] if task.offers else []
    return hashlib.sha256(json.dumps(marks).encode() + encode_state(task.state)).hexdigest()
