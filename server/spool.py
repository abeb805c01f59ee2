"""Tensors of a round's replies on the disk, in files without a name that end with the process.

So the server's memory holds a running sum and few replies, however many sites answer. A file is opened in the run's
folder, beside the state, and has no name there: no other user can open it, and nothing of it is left in the folder
after any end of the process, also by force. What is read of it lies in pages that the system drops when it needs them.
"""

from __future__ import annotations

import logging
import mmap
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from fedveil.common.log import place_of
from fedveil.common.messages.round import Reply, SumReply, TrainResult
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import entries

LEAST = 1 << 16
"""Bytes of tensors that stay in memory: a file costs pages and a map of its own."""
log = logging.getLogger("fedveil.server")


def reply_on_disk(reply: Reply | SumReply, folder: Path | None) -> Reply | SumReply:
    """Return the reply with its tensors on the disk, as ``on_disk``; None: no folder, so it stays as it is."""
    if folder is None or not isinstance(reply, TrainResult):
        return reply
    return replace(reply, contribution=on_disk(reply.contribution, folder))


def on_disk(state: AdapterState, folder: Path) -> AdapterState:
    """Return the same numbers as tensors over a nameless file of the folder; to write to one changes no other reader.

    States of less than ``LEAST`` bytes, of another dtype than float32, and those that the disk has no room for, stay
    in memory.
    """
    tensors = [(layer, name, tensor.detach().cpu().contiguous()) for layer, name, tensor in entries(state)]
    numbers = sum(tensor.numel() for _, _, tensor in tensors)
    if 4 * numbers < LEAST or any(tensor.dtype != torch.float32 for _, _, tensor in tensors):
        return state
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _, _, tensor in tensors:
                file.write(tensor.numpy().tobytes())
            file.flush()
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        log.warning("a reply stays in memory: %s", place_of(error))
        return state
    values = torch.frombuffer(pages, dtype=torch.float32).split([tensor.numel() for _, _, tensor in tensors])
    kept: AdapterState = {layer: {} for layer in state}
    for (layer, name, tensor), part in zip(tensors, values, strict=True):
        kept[layer][name] = part.view(tensor.shape)
    return kept
