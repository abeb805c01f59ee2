"""Hand a model to workers: its tensors lie once in memory that has no name.

A descriptor of that memory goes over a socket. It is in no folder and no list of shared memory, and ends with the last
process that has it. A worker's pages are its own once it writes to them: no pass in one moves what another reads.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Of every storage, in bytes: kernels round by how numbers are aligned, and torch's own allocator aligns them so."""
_Place = tuple[int, int, int, torch.dtype, int, tuple[int, ...], tuple[int, ...], bool, bool]
"""Which tensor it is, its storage's first byte and length, and what torch needs to make it of that."""


class _Packer(pickle.Pickler):
    """Pickles all but tensors, of which it notes where their storages are to lie."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self.size = 0

    def persistent_id(self, obj: Any) -> _Place | None:
        if not isinstance(obj, Tensor):
            return None
        if type(obj) not in (Tensor, nn.Parameter) or obj.device.type != "cpu" or obj.layout != torch.strided:
            raise pickle.PicklingError(f"a {type(obj).__name__} on {obj.device} is not shared")
        storage = obj.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = (self.size, storage)
            self.size += -(-max(1, storage.nbytes()) // ALIGNMENT) * ALIGNMENT
        where = self.storages[storage.data_ptr()][0]
        form = obj.dtype, int(obj.storage_offset()), tuple(obj.shape), obj.stride()
        return (id(obj), where, storage.nbytes(), *form, isinstance(obj, nn.Parameter), obj.requires_grad)


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(file)
        self.memory, self.made = memory, dict[int, Tensor]()

    def persistent_load(self, pid: _Place) -> Tensor:
        which, where, size, dtype, offset, shape, stride, parameter, wanted = pid
        if which not in self.made:
            tensor = torch.empty(0, dtype=dtype)
            if size:
                raw = torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=ALIGNMENT + where)
                tensor.set_(raw.untyped_storage(), raw.storage_offset() // dtype.itemsize + offset, shape, stride)
            else:
                tensor = tensor.reshape(shape)
            self.made[which] = nn.Parameter(tensor, wanted) if parameter else tensor.requires_grad_(wanted)
        return self.made[which]


def packed(content: object) -> int:
    """Return a descriptor of new memory without a name that holds ``content``; the caller closes it.

    Raises:
        Exception: of pickle's own kinds, where something in it cannot be handed to another program.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(content)
    descriptor = os.memfd_create("", os.MFD_CLOEXEC)
    try:
        _write(descriptor, packer.size.to_bytes(ALIGNMENT, "little"), 0)
        for where, storage in packer.storages.values():
            if storage.nbytes():
                _write(descriptor, torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data, ALIGNMENT + where)
        _write(descriptor, file.getvalue(), ALIGNMENT + packer.size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unpacked(descriptor: int) -> Any:
    """Return what ``packed`` was given, as this program's own objects; the descriptor is closed."""
    try:
        memory = mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
    size = int.from_bytes(memory[:ALIGNMENT], "little")
    return _Unpacker(io.BytesIO(memory[ALIGNMENT + size :]), memory).load()


def _write(descriptor: int, content: bytes | memoryview, where: int) -> None:
    left = memoryview(content).cast("B")
    while left:
        written = os.pwrite(descriptor, left, where)
        left, where = left[written:], where + written
