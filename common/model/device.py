"""The choice of device, precision and number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from fedveil.common.errors import ConfigError
from fedveil.common.threads import is_ours, own_threads, site_cores

THREAD_NUMBERS = 1 << 16
"""Numbers for each thread that torch does not leave to fewer threads."""


def choose_device(wanted: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: a GPU is named, and this machine has none.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device {wanted!r} is not a device: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {wanted!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {wanted!r} is asked for but this machine has {torch.cuda.device_count()} GPUs")
    return device


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass: bfloat16 only where the hardware computes in it."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def choose_batch_tokens(wanted: int, device: torch.device) -> int:
    """Return the tokens of one forward pass: ``wanted``, or for 0 what suits the device.

    Small batches stay in a CPU's cache and pad less, and every batch costs each layer's hooks a call
    (``experiments/log``, 2026-11-24). A GPU wants large ones.
    """
    return wanted or (16384 if device.type == "cuda" else 1536)


def choose_private_tokens(device: torch.device) -> int:
    """Return the tokens of a pass of fixed shape (``common.model.shapes``); no setting of a server's changes it.

    Fewer waste less on filler, more spend less on calls: 320 to 512 are equally good at the plain job's lengths and
    batch (``experiments/log``, 2026-11-25), and 384 makes most numbers of rows multiples of 4.
    """
    return 4096 if device.type == "cuda" else 384


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Return the context of a forward pass; parameters, losses and gradients stay float32."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision)


def choose_attention(model: Any, device: torch.device) -> None:
    """Let a transformers model attend in plain matrix products on a CPU, where the fused kernel is slower.

    By how much: ``experiments/log``, 2026-11-24.
    """
    if device.type == "cpu":
        model.set_attn_implementation("eager")


def worker_count(sites: int, workers: int, *, keeps: bool) -> int:
    """Return how many processes train at once.

    Args:
        sites: of the federation.
        workers: the setting. 0: one for each GPU, else for each core; a single one, with all cores, where sites keep.
        keeps: whether sites keep from round to round what a pass over their records costs. Which process plays a site
            changes, and another one would have to make it again.
    """
    cores = site_cores()
    return min(workers or (1 if keeps else torch.cuda.device_count() or cores), sites, cores)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Take numbers below float32's normal ones for zero within, in this thread, where the CPU can.

    It computes with them at less than half its speed, so that a state of such numbers would make a pass take longer
    than the rehearsed one. No price is computed within: that a tail is nothing must not be the CPU's word. In a user's
    own process nothing is set: threads of theirs count otherwise, and a record's bits would follow from its place.
    """
    if not is_ours():
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def set_process_threads() -> None:
    """Give torch this process's threads, and make them flush denormal numbers for good, as their maker does just then.

    Threads that torch has made before do not. In a user's own process nothing is set.
    """
    if not is_ours():
        return
    if (threads := own_threads()) != torch.get_num_threads():
        torch.set_num_threads(threads)
    with denormals_flushed():
        torch.ones(threads * THREAD_NUMBERS).exp_()
