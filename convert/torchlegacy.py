"""Reads the tensors of a `torch.save` file from before torch 1.6, without torch and without running code from it.

Such a file is four pickles in a row (a magic number, a protocol number, facts about the machine, the structure), a
fifth with the keys of the storages, and then, for each key, a count and the bare values. The structure is read by the
same unpickler as in a zip file, which knows tensors and dictionaries only.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert.torchpickle import Known, Storage, TorchFileError, Unpickler

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first pickle, the magic number that torch wrote."""
PROTOCOL = 1001


class _Plain(pickle.Unpickler):
    """Numbers, strings and containers; no constructor at all."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"{module}.{name} where plain values belong")


class _Keys(Unpickler):
    """The structure, told the length and the dtype of each storage; also torch's first way to write a tensor."""

    def __init__(self, stream: BinaryIO, path: Path, storage: Callable[[np.dtype, str, int], Any]) -> None:
        super().__init__(stream, path, lambda dtype, key: None)
        self._sized = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor"):
            name = "_rebuild_tensor_v2"  # the same without what follows the strides
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, length, view = pid
        dtype = dtype.value if isinstance(dtype, Known) else dtype
        if kind != "storage" or not isinstance(dtype, np.dtype) or view is not None or type(length) is not int:
            raise ValueError(f"unknown reference {kind!r}")
        return self._sized(dtype, str(key), length)


def structure(path: Path, file: BinaryIO) -> Any:
    """What the pickles describe: nested dicts with read-only memory maps as leaves.

    Args:
      path: of the file, for messages.
      file: begins with `MAGIC`.

    Raises:
      TorchFileError: damaged, or holding anything but tensors and dictionaries.
      OSError: it cannot be read.
    """
    try:
        return _structure(path, file)
    except (TorchFileError, OSError):
        raise
    except Exception as error:  # a hostile pickle can raise anything: stack underflow, bad opcodes, types
        reason = f"{type(error).__name__}: {error}"
        raise TorchFileError(f"{path}: damaged or truncated ({reason}); get it again") from error


def _structure(path: Path, file: BinaryIO) -> Any:
    file.seek(len(MAGIC))
    protocol, machine = _Plain(file).load(), _Plain(file).load()
    if protocol != PROTOCOL or machine.get("little_endian") is not True:
        raise TorchFileError(f"{path}: of protocol {protocol} or big-endian; load and save it again with a newer torch")
    start = file.tell()
    # Where the values lie is told behind the structure, so that is passed over first, by its opcodes alone.
    for _ in pickletools.genops(file):
        pass
    keys = [str(key) for key in _Plain(file).load()]
    places = file.tell()
    sizes: dict[str, tuple[np.dtype, int]] = {}

    def note(dtype: np.dtype, key: str, length: int) -> Storage:
        if sizes.setdefault(key, (dtype, length)) != (dtype, length):
            raise ValueError(f"storage {key} is used in two ways")
        if not 0 <= length * dtype.itemsize <= os.fstat(file.fileno()).st_size:
            raise ValueError(f"storage {key} is longer than the file")
        return Storage(dtype, np.broadcast_to(np.zeros((), dtype), (length,)))

    file.seek(start)
    _Keys(file, path, note).load()
    if set(keys) != set(sizes) or len(keys) != len(sizes):
        raise ValueError("its storages are not those of its tensors")
    storages = {}
    for key in keys:
        dtype, length = sizes[key]
        storages[key] = Storage(dtype, _mapped(path, file, places, dtype, length))
        places += 8 + length * dtype.itemsize
    file.seek(start)
    return _Keys(file, path, lambda dtype, key, length: storages[key]).load()


def _mapped(path: Path, file: BinaryIO, place: int, dtype: np.dtype, length: int) -> np.ndarray:
    file.seek(place)
    (count,) = struct.unpack("<q", file.read(8))
    size = length * dtype.itemsize
    if count != length or place + 8 + size > os.fstat(file.fileno()).st_size:
        raise ValueError("values are missing")
    return np.memmap(path, np.uint8, "r", place + 8, (size,)).view(dtype) if size else np.zeros(0, dtype)
