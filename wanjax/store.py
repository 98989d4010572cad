"""What lies in a model folder, in either of its forms, and reading it: every array is compared as it is read.

    config.json  tokenizer.json  manifest.json  dit/  vae/  umt5/  clip/                     form "orbax"
    config.json  tokenizer.json  manifest.json  dit.safetensors  vae.safetensors  ...        form "safetensors"

The first is what `python -m convert` writes: an Orbax checkpoint for each model. Every array is a zarr of its own under
its dotted path ("dit/blocks.ffn_in.kernel"); layers lie on the leading axis, one file a layer, cut into chunks with a
checksum each, so that a host reads its shards alone. Orbax restores the subfolders too. The second is for small models:
a file each, with parameter paths as names. The manifest lists all arrays of either with their digests.
"""

import contextlib
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, Sharding
from safetensors import SafetensorError, safe_open

from wanjax import compare, hosts, sharding
from wanjax.manifest import (
    AGAIN,
    ORBAX,
    SAFETENSORS,
    CheckpointError,
    Manifest,
    digest,
    entry_of,
    first_line,
    manifest_of,
    raw,
    read_manifest,
    told,
)
from wanjax.quantise import quantise

if TYPE_CHECKING:
    import tensorstore as ts

SPLITS = 8
"""Into how many chunks a long axis is cut, so that up to as many hosts can each read its own."""
LONG = 1024
OTHER = "not the array of the manifest (its sha256 is another)"
AHEAD = 1 << 30
"""Bytes that may wait to be digested while more is read."""


def _tensorstore() -> Any:
    """The library that reads zarr, imported when it is needed: it and Orbax take long, and `--help` needs neither."""
    import tensorstore

    return tensorstore


def place(folder: Path, name: str) -> Path:
    """Where array "part/a/b" lies: folder/part/a.b, as Orbax names it."""
    part, path = name.split("/", 1)
    return folder / part / path.replace("/", ".")


def chunk_shape(shape: tuple[int, ...], stacked: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape of one file, shape of one chunk) of an array; a stacked one has a file a layer."""
    file = (1, *shape[1:]) if stacked else shape
    return file, tuple(n // SPLITS if n >= LONG and n % SPLITS == 0 else n for n in file)


def create(path: Path, shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> "ts.TensorStore":
    """A new array on disk; what was there under its name is replaced."""
    file, chunk = chunk_shape(shape, stacked)
    little, check = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    if dtype.itemsize == 1:
        little = {"name": "bytes"}
    inner = {"chunk_shape": chunk, "codecs": [little, check],
             "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, check]}  # fmt: skip
    metadata = {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata,
            "store_data_equal_to_fill_value": True}  # fmt: skip
    return _tensorstore().open(spec, create=True, delete_existing=True).result()


def open_array(path: Path) -> "ts.TensorStore":
    """An array on disk for reading.

    Raises:
      CheckpointError: not there, or damaged.
    """
    with told(f"{path}: missing or damaged", AGAIN[ORBAX], ValueError):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        # A file that was lost on the way must not be read as zeros.
        return _tensorstore().open(spec | {"fill_missing_data_reads": False}, read=True).result()


def skeleton(folder: Path, tree: Any) -> None:
    """Writes Orbax's own files of a checkpoint with this tree, whose arrays come later.

    Args:
      folder: must not exist.
      tree: nested dict with anything as leaves.
    """
    import orbax.checkpoint as ocp  # here: see `_tensorstore`

    small = jax.tree.map(lambda leaf: np.zeros(1, np.int8), tree)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(small))


def check(folder: Path, part: str, expected: Any, manifest: Manifest | None) -> None:
    """Compares what the folder has of one model with the parameters that are expected; reads none of them.

    Args:
      manifest: of the folder; None where `manifest_of` is None.

    Raises:
      CheckpointError: missing, extra or wrongly shaped arrays, all of them; an array that is not on disk, or whose
        files can be seen to be damaged.
    """
    wanted = {f"{part}/{path}": tuple(leaf.shape) for path, leaf in flatten_dict(expected, sep="/").items()}
    form = SAFETENSORS if manifest is None else manifest.form
    told = {} if manifest is None else {name: e for name, e in manifest.arrays.items() if name.startswith(f"{part}/")}
    found = [{name: tuple(entry["shape"]) for name, entry in told.items()}] if manifest is not None else []
    if form == SAFETENSORS:
        found.insert(0, _stored_shapes(folder, part))
    for shapes in found:
        if unlike := compare.lines(shapes, wanted):
            raise CheckpointError(f"{folder}: {part} is not the model of config.json; {AGAIN[form]}"
                                  + compare.listed(unlike))  # fmt: skip
    lost = {} if form == SAFETENSORS else {name: _lost(folder, name, entry) for name, entry in told.items()}
    lost = [f"{name}: {reason}" for name, reason in lost.items() if reason]
    if lost:
        others = f" (and {len(lost) - 1} more arrays)" if len(lost) > 1 else ""
        raise CheckpointError(f"{folder}: {lost[0]}{others}; {AGAIN[form]}")


def _stored_shapes(folder: Path, part: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a model's safetensors file, from its header."""
    with tensors_of(folder, part) as tensors:
        return {f"{part}/{name}": tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _lost(folder: Path, name: str, entry: Mapping[str, Any]) -> str:
    """What is wrong with the files of a zarr, seen without reading the chunks; empty if nothing."""
    where = place(folder, name)
    try:
        fields = json.loads((where / "zarr.json").read_text(encoding="utf-8"))
        shape, dtype = fields["shape"], fields["data_type"]
        grid = fields["chunk_grid"]["configuration"]["chunk_shape"]
    except (FileNotFoundError, NotADirectoryError):
        return "not on disk"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"damaged (zarr.json: {first_line(error)})"
    if (shape, dtype) != (entry["shape"], entry["dtype"]) or grid not in (shape, [1, *shape[1:]]):
        return "damaged (zarr.json is not of this array)"
    least = math.prod(grid) * np.dtype(dtype).itemsize
    for index in np.ndindex(*(-(-n // max(1, step)) for n, step in zip(shape, grid, strict=True))):
        chunk = "/".join(("c", *map(str, index)))
        try:
            size = (where / chunk).stat().st_size
        except OSError:
            return f"damaged ({chunk} is missing)"
        if size < least:
            return f"damaged ({chunk} is cut off)"
    return ""


def restore(
    folder: Path,
    part: str,
    expected: Any,
    mesh: Mesh | None,
    rules: sharding.Rules = sharding.RULES,
    fast: bool = False,
    space: jax.memory.Space | None = None,
) -> Any:
    """The parameters of one model, straight into (sharded) arrays, in the dtypes of `expected`.

    Where an 8-bit kernel is expected of one stored in more bits, it is quantised as it is read, a layer at a time. What
    is stored is compared; each host reads all of it, for the factors are of all inputs.

    Arrays of which this process reads all are compared with the manifest's digests, in threads beside the reading. Of
    an array that several hosts share out each reads its shards alone, and the chunks' own checksums serve; in the
    safetensors form there are none.

    Args:
      expected: of the arrays that are wanted; others in the folder are left alone.
      fast: leave the digests be. In the Orbax form a flipped bit is noticed still, by the checksums; files that were
        exchanged for others of the same shape are not.
      space: without a mesh, in which memory of the device's; None for its own.

    Raises:
      CheckpointError: damaged arrays, others than those of the manifest, NaN in what is quantised, other 8 bits.
    """
    leaves = flatten_dict(expected, sep="/")
    specs = flatten_dict(sharding.specs(expected, rules, mesh), sep="/")
    manifest = manifest_of(folder)
    entries = None if manifest is None else manifest.arrays
    arrays = {}
    with contextlib.ExitStack() as stack:
        tensors = None
        if manifest is None or manifest.form == SAFETENSORS:
            tensors = stack.enter_context(tensors_of(folder, part))
        digested = stack.enter_context(_digests(folder, manifest, fast))
        for path in sorted(leaves, key=lambda path: math.prod(leaves[path].shape), reverse=True):
            if path in arrays:  # a factor, made with its kernel
                continue
            name, leaf = f"{part}/{path}", leaves[path]
            # Without a mesh not tied to a device either: a program compiled from shapes alone is then the same one.
            where = None if mesh is None else NamedSharding(mesh, specs[path])
            shared = where is not None and not (where.is_fully_addressable or where.is_fully_replicated)
            if tensors is None:
                data = open_array(place(folder, name))
            else:
                sliced = shared and leaf.dtype.itemsize > 1
                data = _Slices(tensors.get_slice(path)) if sliced else tensors.get_tensor(path)
            if entries is not None and not _alike(data, entries.get(name)):
                raise CheckpointError(f"{folder}: {name}: not the array of the manifest; {AGAIN[manifest.form]}")
            eight = _to_quantise(folder, name, np.dtype(data.dtype.name), leaf.dtype)
            if shared and not eight:
                arrays[path] = _shards(folder, name, data, leaf, where)
                continue
            data = numbers(folder, name, data)
            digested(name, data)
            for own, found in fitted(folder, part, path, data, leaves).items():
                where = None if mesh is None else NamedSharding(mesh, specs[own])
                arrays[own] = jax.device_put(found, space) if where is None else hosts.put(found, where)
    return unflatten_dict(arrays, sep="/")


def fitted(
    folder: Path, part: str, path: str, data: np.ndarray, expected: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """What was read of an array in the dtype that is expected, {path: array}; of a kernel that is to be in 8 bits its
    codes and their factor. CheckpointError: NaN or inf in what is quantised, or codes of another kind."""
    name, leaf = f"{part}/{path}", expected[path]
    if not _to_quantise(folder, name, data.dtype, leaf.dtype):
        return {path: data.astype(leaf.dtype, copy=False)}
    try:
        codes, factor = quantise(data, leaf.dtype)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {name}: {error}") from error
    return {path: codes, factor_of(path): factor}


def factor_of(kernel: str) -> str:
    """The name of an 8-bit kernel's factor."""
    return f"{kernel.removesuffix('kernel')}factor"


def _to_quantise(folder: Path, name: str, stored: np.dtype, wanted: np.dtype) -> bool:
    """Whether an array becomes an 8-bit one as it is read; CheckpointError for codes that are read as anything else."""
    if stored.itemsize == 1 and stored != wanted:
        raise CheckpointError(f"{folder}: {name} is {stored.name}, not {wanted.name}; convert the weights again")
    return wanted.itemsize == 1 and stored.itemsize > 1


def read_ahead(folder: Path, part: str) -> None:
    """Has the operating system read a part's files into its cache, from which `restore` then takes them.

    Nothing is held, and nothing is lost where memory is short; a system without such a call reads when it is asked.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    file = folder / f"{part}.safetensors"
    for path in [file] if file.is_file() else sorted(one for one in (folder / part).rglob("*") if one.is_file()):
        # A file that went away, or may not be read, is told of by `restore`, which names it.
        with contextlib.suppress(OSError), open(path, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class _Slices:
    """An array in a safetensors file, of which only what is asked for is read."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self.shape = tuple(data.get_shape())

    @cached_property
    def dtype(self) -> np.dtype:
        return self[tuple(slice(0, 0) for _ in self.shape)].dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._data[index]


def _alike(data: Any, entry: Mapping[str, Any] | None) -> bool:
    """Whether an array (of either library) has shape and dtype of its entry in the manifest."""
    return entry is not None and (list(data.shape), data.dtype.name) == (entry["shape"], entry["dtype"])


def numbers(folder: Path, name: str, data: Any) -> np.ndarray:
    """What is read of an array: numbers as they are, or those of a zarr or a part of it, or of its reading."""
    if isinstance(data, np.ndarray):
        return data
    with told(f"{folder}: {name}: damaged", AGAIN[ORBAX], ValueError):
        return (data if hasattr(data, "result") else data.read()).result()


def _shards(folder: Path, name: str, data: Any, leaf: jax.ShapeDtypeStruct, where: Sharding) -> jax.Array:
    """One array on its devices, of which this process has some; a shard that several of them hold is read once."""
    parts: dict[str, np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)
        if key not in parts:
            parts[key] = numbers(folder, name, data[index]).astype(leaf.dtype, copy=False)
        return parts[key]

    return jax.make_array_from_callback(tuple(leaf.shape), where, shard)


@contextlib.contextmanager
def tensors_of(folder: Path, part: str) -> Iterator[Any]:
    """A model's safetensors file, open for reading."""
    file = folder / f"{part}.safetensors"
    damaged = told(f"{file}: damaged or not a safetensors file", AGAIN[SAFETENSORS], SafetensorError, OSError)
    with damaged, safe_open(file, framework="np") as tensors:
        yield tensors


@contextlib.contextmanager
def _digests(folder: Path, manifest: Manifest | None, fast: bool) -> Iterator[Callable[[str, np.ndarray], None]]:
    """A function that takes arrays as they are read, and compares their digests in threads until all are done.

    At most `AHEAD` bytes wait, or one array.
    """
    if manifest is None or fast:
        yield lambda name, data: None
        return
    waiting: deque[tuple[Future[str], str, int]] = deque()

    def settle(room: int) -> None:
        while waiting and sum(size for *_, size in waiting) > room:
            future, name, _ = waiting.popleft()
            if future.result() != manifest.arrays[name]["sha256"]:
                raise CheckpointError(f"{folder}: {name}: {OTHER}; {AGAIN[manifest.form]}")

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def take(name: str, data: np.ndarray) -> None:
            settle(AHEAD - data.nbytes)
            waiting.append((pool.submit(digest, data), name, data.nbytes))

        yield take
        settle(-1)


def verify(
    folder: Path, arrays: Mapping[str, Mapping[str, Any]], told: Callable[[int], Any] = lambda size: None
) -> None:
    """Reads arrays of a manifest and compares their digests, a layer at a time.

    Raises:
      CheckpointError: an array that is damaged or is not the one of the manifest.
    """
    form = read_manifest(folder).form
    for name, entry in arrays.items():
        hashed = hashlib.sha256()
        for layer in _layers(folder, name, entry, form):
            hashed.update(raw(layer))
            told(layer.nbytes)
        if hashed.hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{folder}: {name}: not the array of the manifest; {AGAIN[form]}")


def entries(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    """Manifest entries of all arrays in a model's safetensors file, "part/path" -> entry; reads them."""
    with tensors_of(folder, part) as tensors:
        return {f"{part}/{name}": entry_of(tensors.get_tensor(name)) for name in sorted(tensors.keys())}


def _layers(folder: Path, name: str, entry: Mapping[str, Any], form: str) -> Iterator[np.ndarray]:
    """An array a file at a time, contiguous."""
    part, path = name.split("/", 1)
    with contextlib.ExitStack() as stack:
        if form == SAFETENSORS:
            data, step = stack.enter_context(tensors_of(folder, part)).get_tensor(path), None
        else:
            data = open_array(place(folder, name))
            step = data.chunk_layout.write_chunk.shape[0] if data.shape else 1
        if not _alike(data, entry):
            raise CheckpointError(f"{folder}: {name}: not the array of the manifest; {AGAIN[form]}")
        for rows in [...] if step is None else blocks(data.shape, step):
            yield np.ascontiguousarray(numbers(folder, name, data[rows]))


def blocks(shape: tuple[int, ...], step: int) -> list[Any]:
    """Slices of the leading axis, `step` rows each: what is read or written at once."""
    if not shape:
        return [...]
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], max(1, step))]
