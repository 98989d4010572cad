"""Named tensors of weight files, looked at without being read: shapes and dtypes first, bytes when asked for."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert import torchfile
from convert.keymap import Shape
from convert.torchpickle import TorchFileError

DTYPES: MappingProxyType[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


class SourceError(ValueError):
    """A source that cannot be used; the message is one line naming it and the mend."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      shape, dtype: as stored; of a product, what it is worth keeping in.
      read: gives it as an array (a product in float32); memory-mapped where the format allows, so that pages come as
        they are used.
      rows: gives one entry of the leading axis, where that is less work than reading all.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    rows: Callable[[int], np.ndarray] | None = None


@dataclass(frozen=True)
class Tensors:
    """All tensors of one model.

    Attributes:
      files: where they lie.
      named: by name.
    """

    files: tuple[Path, ...]
    named: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self.named.items()}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in self.named.values())

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """The same tensors under other names; None leaves one out."""
        pairs = [(rename(name), tensor) for name, tensor in self.named.items()]
        kept = {name: tensor for name, tensor in pairs if name is not None}
        if len(kept) != sum(name is not None for name, _ in pairs):
            raise SourceError(f"{self.files[0]}: two tensors come to the same name")
        return Tensors(self.files, kept)


def unscaled(tensors: Tensors) -> Tensors:
    """The same tensors with ComfyUI's scaled 8-bit weights multiplied out, in float32.

    `X.scale_weight` (or `X.weight_scale`) holds the factor of `X.weight`; `X.scale_input` (`X.input_scale`) and
    `scaled_fp8` serve 8-bit products and are dropped.

    Raises:
      SourceError: a factor that is not one number, or whose weight is not there.
    """
    named = dict(tensors.named)
    for name in [name for name in named if name.endswith((".scale_weight", ".weight_scale"))]:
        weight, factor = f"{name.rpartition('.')[0]}.weight", named.pop(name)
        if weight not in named or int(np.prod(factor.shape)) != 1:
            raise SourceError(f"{tensors.files[0]}: {name} {list(factor.shape)} is not the factor of a weight")
        named[weight] = _multiplied(named[weight], factor)
    extra = ("scaled_fp8", ".scale_input", ".input_scale")
    return Tensors(tensors.files, {name: tensor for name, tensor in named.items() if not name.endswith(extra)})


def _multiplied(weight: Tensor, factor: Tensor) -> Tensor:
    def read() -> np.ndarray:
        return weight.read().astype(np.float32) * factor.read().astype(np.float32).reshape(())

    return Tensor(weight.shape, DTYPES["BF16"], read)


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors or torch file.

    Raises:
      SourceError: missing, unreadable, damaged, or not weights at all.
    """
    if path.suffix in TORCH_SUFFIXES:
        try:
            arrays = torchfile.read(path)
        except TorchFileError as error:
            raise SourceError(str(error)) from error
        return Tensors((path,), {name: _of_array(array) for name, array in arrays.items()})
    return _open_safetensors(path)


def open_index(path: Path) -> Tensors:
    """The tensors of a sharded checkpoint, from its `*.index.json`.

    Raises:
      SourceError: a shard is missing or damaged, or holds other tensors than the index says.
    """
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(where.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: not a readable index ({error}); get it again") from error
    for shard in shards:
        if Path(shard).name != shard:
            raise SourceError(f"{path}: names {shard!r}, which is not a file beside it")
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise SourceError(f"{path}: shard {', '.join(missing)} missing; download it too")
    named: dict[str, Tensor] = {}
    for shard in shards:
        found = open_file(path.parent / shard).named
        wanted = {name for name, file in where.items() if file == shard}
        if wanted != set(found):
            odd = ", ".join(sorted(wanted ^ set(found))[:5])
            raise SourceError(f"{path.parent / shard}: does not hold what the index says ({odd}); get both again")
        named |= found
    return Tensors(tuple(path.parent / shard for shard in shards), named)


def _of_array(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda: array)


def _open_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="np"):  # the library checks the header and that the file is whole
            pass
    except (SafetensorError, OSError) as error:
        _check_looks(path)
        raise SourceError(f"{path}: damaged or truncated safetensors file ({error}); get it again") from error
    # Read by hand from here on: the library's numpy side knows no 8-bit floats.
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    named = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise SourceError(f"{path}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        named[name] = _mapped(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return Tensors((path,), named)


def _mapped(path: Path, dtype: np.dtype, shape: Shape, start: int, size: int) -> Tensor:
    def read() -> np.ndarray:
        if not size:
            return np.zeros(shape, dtype)
        return np.memmap(path, np.uint8, "r", start, (size,)).view(dtype).reshape(shape)

    return Tensor(shape, dtype, read)


def _check_looks(path: Path) -> None:
    """Says what a file is that is often found in the place of weights."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise SourceError(f"{path}: empty; get it again")
    if head.startswith(b"version https://git-lfs"):
        raise SourceError(f"{path}: a Git LFS pointer, not the weights; run git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise SourceError(f"{path}: a web page, not weights; download the file itself")


def sha256(paths: Iterable[Path], told: Callable[[int], Any] = lambda size: None) -> dict[str, str]:
    """Digest of each file by its name; `told` hears of the bytes as they are read."""
    digests = {}
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
                told(len(block))
        digests[os.fspath(path)] = digest.hexdigest()
    return digests
