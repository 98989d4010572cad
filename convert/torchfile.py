"""Reads the tensors of a `torch.save` file without torch and without running code from it.

The zip container of torch 1.6 and later holds a pickle of the structure (`*/data.pkl`) and one uncompressed entry for
each storage (`*/data/<key>`). The pickle is read by an unpickler that knows the constructors of tensors and
dictionaries and no other global, and even those are stand-ins defined here. Tensors are memory-mapped: nothing is
read before it is used.
"""

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

MAX_PICKLE = 256 * 2**20
"""A structure larger than this, in bytes, is no model: the largest published one has a few hundred kB."""

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number that torch wrote before 1.6, pickled
_TAR = b"ustar"

_DTYPES: MappingProxyType[str, np.dtype] = MappingProxyType(
    {
        "DoubleStorage": np.dtype(np.float64),
        "FloatStorage": np.dtype(np.float32),
        "HalfStorage": np.dtype(np.float16),
        "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
        "LongStorage": np.dtype(np.int64),
        "IntStorage": np.dtype(np.int32),
        "ShortStorage": np.dtype(np.int16),
        "CharStorage": np.dtype(np.int8),
        "ByteStorage": np.dtype(np.uint8),
        "BoolStorage": np.dtype(np.bool_),
        "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
        "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
        "UntypedStorage": np.dtype(np.uint8),
    }
)


class TorchFileError(ValueError):
    """A file that is not plain tensors by name; the message is one line naming the file, the reason and the mend."""


class _Dict(dict):
    """Stands for `collections.OrderedDict`; what torch hangs on it (`_metadata`) is dropped."""

    def __setstate__(self, state: Any) -> None:
        del state


class _Known:
    """A constructor or dtype that a pickle may name. Made anew for each file, and without state that it could set."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *arguments: Any) -> Any:
        return self.value(*(a.value if isinstance(a, _Known) else a for a in arguments))

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a constructor with a state")


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    array: np.ndarray  # one dimension, memory-mapped


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file by name, as read-only memory maps in the dtypes they have.

    Args:
      path: written by `torch.save` of a state dict, or of {"state_dict": one}.

    Raises:
      TorchFileError: not such a file, damaged, or holding anything but tensors and dictionaries.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            _check_magic(path, file.read(512))
            with zipfile.ZipFile(file) as archive:
                tree = _structure(path, file, archive)
    except OSError as error:
        raise TorchFileError(f"{path}: cannot be read ({error.strerror})") from error
    except (zipfile.BadZipFile, struct.error, RuntimeError, NotImplementedError) as error:  # encrypted, odd packing
        raise TorchFileError(f"{path}: damaged or truncated ({error}); get it again") from error
    return _named(path, tree)


def _check_magic(path: Path, head: bytes) -> None:
    if head.startswith(b"PK"):
        return
    if head.startswith(_LEGACY) or head[257:262] == _TAR:
        raise TorchFileError(f"{path}: written by torch before 1.6; load and save it again with a newer torch")
    if head.startswith(b"version https://git-lfs"):
        raise TorchFileError(f"{path}: a Git LFS pointer, not the weights; run git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise TorchFileError(f"{path}: a web page, not weights; download the file itself")
    raise TorchFileError(f"{path}: not a torch file")


def _structure(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> Any:
    """What the pickle describes: nested dicts with arrays as leaves."""
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise TorchFileError(f"{path}: a zip file without torch's data.pkl")
    root = roots[0]
    if any(name.startswith(f"{root}code/") for name in names):
        raise TorchFileError(f"{path}: a TorchScript program, not weights; save its state_dict")
    order = b"little"
    if f"{root}byteorder" in names:
        with archive.open(f"{root}byteorder") as stream:
            order = stream.read(16).strip()
    if order != b"little":
        raise TorchFileError(f"{path}: byte order {order.decode(errors='replace')}; only little-endian files are read")
    info = archive.getinfo(f"{root}data.pkl")
    if info.file_size > MAX_PICKLE:
        raise TorchFileError(f"{path}: its structure has {info.file_size} bytes, more than any model's")
    storages: dict[str, _Storage] = {}

    def storage(kind: Any, key: str) -> _Storage:
        if key not in storages:
            storages[key] = _Storage(kind, _mapped(path, file, archive, f"{root}data/{key}", kind))
        if storages[key].dtype != kind:
            raise TorchFileError(f"{path}: storage {key} is used in two dtypes")
        return storages[key]

    with archive.open(info) as stream:
        reader = _Unpickler(stream, path, storage)
        try:
            return reader.load()
        except TorchFileError:
            raise
        except Exception as error:  # a hostile pickle can raise anything: stack underflow, bad opcodes, types
            raise TorchFileError(f"{path}: damaged structure ({type(error).__name__}: {error})") from error


def _mapped(path: Path, file: BinaryIO, archive: zipfile.ZipFile, name: str, dtype: np.dtype) -> np.ndarray:
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise TorchFileError(f"{path}: no entry {name}; the file is incomplete, get it again") from error
    if info.compress_type != zipfile.ZIP_STORED:
        raise TorchFileError(f"{path}: {name} is compressed; load and save the file with torch")
    if info.file_size % dtype.itemsize:
        raise TorchFileError(f"{path}: {name} is not a whole number of {dtype} values")
    # The data begin after the entry's own header, whose extra field differs from the directory's.
    file.seek(info.header_offset)
    header = file.read(30)
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if header[:4] != b"PK\x03\x04" or start + info.file_size > os.fstat(file.fileno()).st_size:
        raise TorchFileError(f"{path}: {name} lies outside the file; it is truncated, get it again")
    if not info.file_size:
        return np.zeros(0, dtype)
    return np.memmap(path, np.uint8, "r", start, (info.file_size,)).view(dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any, dtype: np.dtype | None = None) -> np.ndarray:
    """Stands for `torch._utils._rebuild_tensor_v2`: a view of a storage, inside its bounds."""
    array = storage.array if dtype is None else storage.array.view(dtype)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError(f"tensor of offset {offset}, size {size}, stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= array.size:
        raise ValueError(f"tensor of size {size} does not fit its storage of {array.size}")
    if not math.prod(size):
        return np.zeros(size, array.dtype)
    steps = [step * array.itemsize for step in stride]
    # As plain bits: numpy loses 8-bit floats on the way through its array interface.
    bits = array[offset:].view(f"u{array.itemsize}")
    return np.lib.stride_tricks.as_strided(bits, size, steps, writeable=False).view(array.dtype)


def _tensor_with_dtype(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any,
                       *_: Any) -> np.ndarray:  # fmt: skip
    """Stands for `torch._utils._rebuild_tensor_v3`, used for the 8-bit floats."""
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _parameter(data: Any, *_: Any) -> Any:
    """Stands for `torch._utils._rebuild_parameter`."""
    return data


class _Unpickler(pickle.Unpickler):
    """Knows tensors and dictionaries; every other global is refused by name before anything is called."""

    def __init__(self, stream: BinaryIO, path: Path, storage: Callable[[np.dtype, str], _Storage]) -> None:
        super().__init__(stream)
        self._path, self._storage = path, storage

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): _Dict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) in known:
            return _Known(known[module, name])
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _Known(_DTYPES[name])
        raise TorchFileError(
            f"{self._path}: holds {module}.{name}, which is not a tensor or dictionary; it was not run. "
            f"Save the state_dict alone, or use a safetensors file"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        dtype = dtype.value if isinstance(dtype, _Known) else dtype
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise ValueError(f"unknown reference {kind!r}")
        return self._storage(dtype, key)


def _named(path: Path, tree: Any) -> dict[str, np.ndarray]:
    """The flat dict of tensors; anything else is named."""
    if isinstance(tree, Mapping) and set(tree) == {"state_dict"}:
        tree = tree["state_dict"]
    if not isinstance(tree, Mapping):
        raise TorchFileError(f"{path}: holds a {type(tree).__name__}, not tensors by name; save a state_dict")
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise TorchFileError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor; save a state_dict")
    return dict(tree)
