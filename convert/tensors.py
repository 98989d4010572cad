"""Named tensors of weight files, looked at without being read: shapes and dtypes first, bytes when asked for."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert import torchfile, torchlegacy
from convert.keymap import Shape
from convert.torchpickle import TorchFileError
from wanjax import compare

DTYPES: MappingProxyType[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U64": np.dtype(np.uint64),
        "U32": np.dtype(np.uint32),
        "U16": np.dtype(np.uint16),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".sft", ".gguf", *TORCH_SUFFIXES)
"""Of files that hold weights."""

FORMATS = "_quantization_metadata"
"""Where ComfyUI's files tell in their metadata how layers are stored; others tell it in tensors (`comfy_quant`)."""


LONGEST = 300
"""Letters in a tensor's name; published ones have less than a hundred."""


class SourceError(ValueError):
    """A source that cannot be used; the message is one line naming it and the mend."""


def some(names: Iterable[str], limit: int, between: str = ", ") -> str:
    """The first of some names inside a message's line, cut with "and N more"."""
    return between.join(compare.listed(names, limit).split("\n  ")[1:])


@dataclass(frozen=True)
class Codes:
    """A matrix as 8-bit numbers and a factor for each of its outputs.

    Attributes:
      dtype: of the numbers.
      read: gives the numbers [O, I] and factors [O, 1] float32, or the other way round where the matrix lies so.
    """

    dtype: np.dtype
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      shape, dtype: as stored; of a product, what it is worth keeping in.
      read: gives it as an array (a product in float32); memory-mapped where the format allows, so that pages come as
        they are used.
      rows: gives one entry of the leading axis, where that is less work than reading all.
      form: how it is stored, where the dtype does not say ("Q8_0", "float8_e4m3fn with a scale").
      codes: what it is the product of, where that is 8-bit numbers with a factor for each output.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    rows: Callable[[int], np.ndarray] | None = None
    form: str | None = None
    codes: Codes | None = None

    @property
    def stored(self) -> str:
        """How it is stored, in a word or a few."""
        return self.form or self.dtype.name


@dataclass(frozen=True)
class Tensors:
    """All tensors of one model.

    Attributes:
      files: where they lie.
      named: by name.
      formats: what the file's metadata say of layers, by name without ".weight" (ComfyUI's `_quantization_metadata`).
    """

    files: tuple[Path, ...]
    named: Mapping[str, Tensor]
    formats: Mapping[str, Any] = field(default_factory=dict)

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
            names = [name for name, _ in pairs]
            twice = next(name for name in kept if names.count(name) > 1)
            raise SourceError(f"{self.files[0]}: two tensors come to the same name, {twice}; save one of them alone")
        formats = {
            (rename(f"{layer}.weight") or "").removesuffix(".weight"): told for layer, told in self.formats.items()
        }
        return Tensors(self.files, kept, {layer: told for layer, told in formats.items() if layer})


def read_json(path: Path, what: str = "JSON file") -> dict[str, Any]:
    """The object in a JSON file; `what` it should be, for messages.

    Raises:
      SourceError: unreadable, not JSON, nested too deeply, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise SourceError(f"{path}: not a readable {what} ({error}); get it again") from error
    except RecursionError as error:
        raise SourceError(f"{path}: not a readable {what} (nested too deeply); get it again") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path}: not a readable {what} (a {type(found).__name__}, not an object); get it again")
    return found


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors, torch or GGUF file, told apart by their first bytes.

    Raises:
      SourceError: missing, unreadable, damaged, or not weights at all.
    """
    return _resolved(_open(path))


def _open(path: Path) -> Tensors:
    head = _head(path)
    if head.startswith(b"GGUF"):
        from convert import ggufs  # here: it gives the types of this module

        return ggufs.read(path)
    torch = path.suffix.lower() in TORCH_SUFFIXES and head[8:9] != b"{"  # a safetensors file under a torch name
    if not torch and not head.startswith((b"PK\x03\x04", torchlegacy.MAGIC)):
        return _open_safetensors(path)
    try:
        arrays = torchfile.read(path)
    except TorchFileError as error:
        raise SourceError(str(error)) from error
    named = {name: Tensor(array.shape, array.dtype, lambda a=array: a) for name, array in arrays.items()}
    return Tensors((path,), named)


def _head(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise SourceError(f"{path}: not a file; give a file of weights")
        with open(path, "rb") as file:
            return file.read(64)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error


def open_index(path: Path) -> Tensors:
    """The tensors of a sharded checkpoint, from its `*.index.json`.

    Raises:
      SourceError: a shard is missing or damaged, or holds other tensors than the index says.
    """
    where = read_index(path)
    shards = sorted(set(where.values()))
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise SourceError(f"{path}: shard {some(missing, 5)} missing; download it too")
    named: dict[str, Tensor] = {}
    formats: dict[str, Any] = {}
    for shard in shards:
        found = _open(path.parent / shard)
        wanted = {name for name, file in where.items() if file == shard}
        if wanted != set(found.named):
            odd = some(sorted(wanted ^ set(found.named)), 5)
            raise SourceError(f"{path.parent / shard}: does not hold what the index says ({odd}); get both again")
        named |= found.named
        formats |= found.formats
    return _resolved(Tensors(tuple(path.parent / shard for shard in shards), named, formats))


def _resolved(tensors: Tensors) -> Tensors:
    """The same with its formats under the names that the layers have; metadata may leave a prefix away.

    Raises:
      SourceError: names that cannot be written in a line, formats of no layer.
    """
    odd = [name for name in (*tensors.named, *tensors.formats) if not name.isprintable() or len(name) > LONGEST]
    if odd:
        raise SourceError(f"{tensors.files[0]}: {odd[0][:80]!r} is no name of a tensor; damaged, get it again")
    weights = [name.removesuffix(".weight") for name in tensors.named if name.endswith(".weight")]
    formats = {}
    for layer, told in tensors.formats.items():
        found = [name for name in weights if name == layer] or [name for name in weights if name.endswith(f".{layer}")]
        if len(found) != 1:
            raise SourceError(
                f"{tensors.files[0]}: its {FORMATS} tells of {layer}, of {len(found)} weights; get it again"
            )
        formats[found[0]] = told
    return dataclasses.replace(tensors, formats=formats)


def read_index(path: Path) -> dict[str, str]:
    """Which shard beside an index holds which tensor.

    Raises:
      SourceError: not a readable index, or one that leads out of its folder.
    """
    where = read_json(path, "index").get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        raise SourceError(f"{path}: not a readable index (no weight_map of files by tensor); get it again")
    for shard in set(where.values()):
        if Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise SourceError(f"{path}: names {shard!r}, which is not a file beside it")
    return where


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
    metadata = header.pop("__metadata__", None) or {}
    named = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise SourceError(f"{path}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        named[name] = _mapped(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return Tensors((path,), named, _formats(path, metadata.get(FORMATS)))


def _formats(path: Path, text: str | None) -> dict[str, Any]:
    """ComfyUI's formats by layer in the metadata of a safetensors file."""
    try:
        layers = {} if text is None else json.loads(text)["layers"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(f"{path}: its {FORMATS} is not readable ({type(error).__name__})") from error
    if not isinstance(layers, dict):
        raise SourceError(f"{path}: its {FORMATS} has a {type(layers).__name__} where layers by name belong")
    return layers


def _mapped(path: Path, dtype: np.dtype, shape: Shape, start: int, size: int) -> Tensor:
    def read() -> np.ndarray:
        if not size:
            return np.zeros(shape, dtype)
        return np.memmap(path, np.uint8, "r", start, (size,)).view(dtype).reshape(shape)

    return Tensor(shape, dtype, read)


def _check_looks(path: Path) -> None:
    """Says what a file is that is often found in the place of weights."""
    head = _head(path)
    if not head:
        raise SourceError(f"{path}: empty; get it again")
    if what := torchfile.mistaken(head):
        raise SourceError(f"{path}: {what}")


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
