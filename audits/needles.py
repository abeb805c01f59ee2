"""Search a byte stream for pieces of given texts or tensors: every place, at any offset, in seconds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

WIDTH = 24
"""Bytes of one needle: six float32 numbers, or four words of a sentence."""
KEY = 8
FEWEST_WORDS = 4
"""A needle has at least this many different words of four bytes: runs of zeros and ones say nothing."""

Needles = npt.NDArray[np.uint64]
"""Sorted by their first column; a row is WIDTH bytes as three little-endian numbers."""


def needles_of_texts(texts: Iterable[str]) -> Needles:
    """Return needles that find every passage of at least 31 bytes of any text, of UTF-8."""
    return _needles([_cut(text.encode(), KEY) for text in texts])


def needles_of_tensors(tensors: Iterable[torch.Tensor]) -> Needles:
    """Return needles that find a run of weights, as float32, bfloat16 or float16; twelve of float32 are enough."""
    blocks = []
    for tensor in tensors:
        if tensor.is_floating_point():
            for kind in (torch.float32, torch.bfloat16, torch.float16):
                flat = tensor.detach().cpu().to(kind).contiguous().view(-1).view(torch.uint8)
                blocks.append(_cut(flat.numpy().tobytes(), WIDTH))
    return _needles(blocks)


def find(stream: bytes, needles: Needles) -> list[int]:
    """Return the offsets at which any needle stands in the stream, ascending."""
    found: list[int] = []
    for shift in range(KEY):
        count = (len(stream) - shift) // KEY
        if count < 1:
            break
        words = np.frombuffer(stream, "<u8", count=count, offset=shift)
        low = np.searchsorted(needles[:, 0], words, side="left")
        high = np.searchsorted(needles[:, 0], words, side="right")
        for index in np.flatnonzero(high > low):
            at = shift + int(index) * KEY
            here = np.frombuffer(stream[at : at + WIDTH].ljust(WIDTH, b"\0"), "<u8")
            if at + WIDTH <= len(stream) and (needles[low[index] : high[index]] == here).all(axis=1).any():
                found.append(at)
    return sorted(found)


def _cut(data: bytes, step: int) -> npt.NDArray[np.uint8]:
    """Return the windows of WIDTH bytes at every ``step`` bytes."""
    if len(data) < WIDTH:
        return np.empty((0, WIDTH), np.uint8)
    return np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), WIDTH)[::step]


def _needles(blocks: list[npt.NDArray[np.uint8]]) -> Needles:
    rows = np.ascontiguousarray(np.concatenate([*blocks, np.empty((0, WIDTH), np.uint8)]))
    words = np.sort(rows.view("<u4"), axis=1)
    telling = (np.diff(words, axis=1) != 0).sum(axis=1) + 1 >= FEWEST_WORDS
    table = rows[telling].view("<u8")
    return table[np.argsort(table[:, 0], kind="stable")]
