"""The cache of a node between the messages of a run: the tensors that it has acknowledged, and its last reply.

It lives in the memory of Flower's node and may be lost; then the tensors are requested again, and a
repeated round is trained and charged again. Nothing in here has not been released already. A simulation's last reply
is also in a file, written before it is released, so that a resumed run has it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

from fedveil.common.errors import ProtocolError
from fedveil.common.files import replace_file
from fedveil.common.log import about as about_run
from fedveil.common.messages.blocks import decode_state, encode_state, layout_of, numbers_in
from fedveil.common.messages.named import Parts
from fedveil.common.messages.round import TrainResult, TrainTask
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

    def tensors(self, run: str) -> Parts:
        """Return the tensors of a run that this node has acknowledged, by part of a task; damaged ones are none."""
        about = json.loads(self._kept.get("tensors-of", b"{}"))
        if about.get("run") != run:
            return {}
        found, data = {}, self._kept.get("tensors", b"")
        for part, held in about["layouts"].items():
            layout = {layer: {n: tuple(shape) for n, shape in f.items()} for layer, f in held.items()}
            size = 4 * numbers_in(layout)
            try:
                found[part] = decode_state(data[:size], layout)
            except ProtocolError:
                return {}
            data = data[size:]
        return found

    def recall(self, task: TrainTask, lasting: Parts) -> TrainResult | None:
        """Return what was sent in answer to this very task, and keep what that acknowledges; None if it is new here.

        Args:
            task: the task.
            lasting: the tensors of it that an answer acknowledges.

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
        self._acknowledge(task.run, lasting)
        return result_from_bytes(self._kept["reply"], layout, task)

    def keep(self, task: TrainTask, result: TrainResult, lasting: Parts) -> None:
        """Keep what is sent in answer to ``task``, and the tensors that it acknowledges, in place of what was kept."""
        self._acknowledge(task.run, lasting)
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

    def _acknowledge(self, run: str, lasting: Parts) -> None:
        about = {"run": run, "layouts": {part: layout_of(state) for part, state in lasting.items()}}
        self._kept["tensors-of"] = json.dumps(about).encode()
        self._kept["tensors"] = b"".join(encode_state(state) for state in lasting.values())


def _digest(task: TrainTask) -> str:
    """Return a hash of what a task asks for; which tensors were sent and which named makes no difference."""
    marks = [task.run, task.round_number, task.base_fingerprint, task.start_fingerprint, task.basis_fingerprint]
    marks += [task.attempt, *((o.site, o.public.hex(), o.signature.hex()) for o in task.offers)] if task.offers else []
    return hashlib.sha256(json.dumps(marks).encode() + encode_state(task.state)).hexdigest()
