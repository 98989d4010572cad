"""The pickle inside a `torch.save` file, read without running code from it; `torchfile` and `torchlegacy` share this.

The unpickler knows the constructors of tensors and dictionaries and no other global, and even those are stand-ins
defined here.
"""

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES: MappingProxyType[str, np.dtype] = MappingProxyType(
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


class Known:
    """A constructor or dtype that a pickle may name. Made anew for each file, and without state that it could set."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *arguments: Any) -> Any:
        return self.value(*(a.value if isinstance(a, Known) else a for a in arguments))

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a constructor with a state")


@dataclass(frozen=True)
class Storage:
    """The values that tensors are views of.

    Attributes:
      dtype: of the array.
      array: of one dimension, memory-mapped.
    """

    dtype: np.dtype
    array: np.ndarray


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


class Unpickler(pickle.Unpickler):
    """Knows tensors and dictionaries; every other global is refused by name before anything is called.

    Args:
      stream: at the start of a pickle.
      path: of its file, for messages.
      storage: gives a storage by its dtype and key.
    """

    def __init__(self, stream: BinaryIO, path: Path, storage: Callable[[np.dtype, str], Storage]) -> None:
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
            return Known(known[module, name])
        if module in ("torch", "torch.storage") and name in DTYPES:
            return Known(DTYPES[name])
        raise TorchFileError(
            f"{self._path}: holds {module}.{name}, which is not a tensor or dictionary; it was not run. "
            f"Save the state_dict alone, or use a safetensors file"
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, *_ = pid
        dtype = dtype.value if isinstance(dtype, Known) else dtype
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise ValueError(f"unknown reference {kind!r}")
        return self._storage(dtype, key)


DEPTH = 4
"""Dictionaries in dictionaries that training codes wrap tensors into."""


def tensors_by_name(path: Path, tree: Any) -> dict[str, np.ndarray]:
    """The flat dict of tensors of a state dict, or of dicts of them, whose names are then put in front with dots.

    Of {"state_dict": one} the one. Numbers, texts and lists beside a dict of tensors ("epoch") are left out.

    Raises:
      TorchFileError: anything else is in it; it is named.
    """
    if isinstance(tree, Mapping) and set(tree) == {"state_dict"}:
        tree = tree["state_dict"]
    if not isinstance(tree, Mapping):
        raise TorchFileError(f"{path}: holds a {type(tree).__name__}, not tensors by name; save a state_dict")
    return _flat(path, tree, "", DEPTH)


def _flat(path: Path, tree: Mapping[Any, Any], prefix: str, depth: int) -> dict[str, np.ndarray]:
    wraps = depth > 0 and any(isinstance(value, Mapping) for value in tree.values())
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        found: dict[str, np.ndarray] = {}
        if isinstance(name, str) and isinstance(value, np.ndarray):
            found = {prefix + name: value}
        elif isinstance(name, str) and wraps and isinstance(value, Mapping):
            found = _flat(path, value, f"{prefix}{name}.", depth - 1)
        elif not (isinstance(name, str) and wraps and isinstance(value, (int, float, str, list, tuple, type(None)))):
            kind = type(value).__name__
            raise TorchFileError(f"{path}: {str(name)[:80]!r} is a {kind}, not a tensor; save a state_dict")
        if found.keys() & flat.keys():
            raise TorchFileError(f"{path}: two tensors come to the name {min(found.keys() & flat.keys())}")
        flat |= found
    return flat
