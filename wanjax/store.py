"""The folder that `python -m convert` writes: an Orbax checkpoint for each model, and a manifest of all arrays.

    config.json  tokenizer.json  manifest.json  dit/  vae/  umt5/  clip/

Every array is a zarr of its own under its dotted path ("dit/blocks.ffn_in.kernel"); layers lie on the leading axis, one
file a layer, cut into chunks with a checksum each, so that a host reads its shards alone and a flipped bit is noticed
as it is read. Orbax restores the subfolders too.
"""

import hashlib
import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from wanjax import sharding

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = 8
"""Into how many chunks a long axis is cut, so that up to as many hosts can each read its own."""
LONG = 1024


class StoreError(ValueError):
    """A folder that cannot be used; the message is one line naming what and the mend."""


@dataclass(frozen=True)
class Manifest:
    """What is in the folder.

    Attributes:
      arrays: "part/path" -> {"shape", "dtype", "sha256"}, the digest of the bytes in C order.
      sources: file -> sha256 of what it was made from.
      tool: who wrote it. dtype: what was asked for. loras: what was merged, "FILE:scale" each.
    """

    arrays: Mapping[str, Mapping[str, Any]]
    sources: Mapping[str, str]
    tool: str
    dtype: str
    loras: tuple[str, ...] = ()

    def dumps(self) -> str:
        """As JSON text."""
        own = {"tool": self.tool, "dtype": self.dtype, "loras": list(self.loras), "sources": dict(self.sources),
               "arrays": dict(self.arrays)}  # fmt: skip
        return json.dumps({"format": FORMAT} | own, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
      StoreError: missing, unreadable, of a newer format, or with names that lead outside the folder.
    """
    file = folder / MANIFEST
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            number = fields["format"]
            raise StoreError(f"{file}: format {number}, this wanjax reads {FORMAT}; update wanjax or convert again")
        arrays = {str(name): _entry(entry) for name, entry in fields["arrays"].items()}
        loras = tuple(map(str, fields["loras"]))
        manifest = Manifest(arrays, dict(fields["sources"]), str(fields["tool"]), str(fields["dtype"]), loras)
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{file}: not a readable manifest ({error}); convert the weights again") from error
    for name in arrays:
        steps = name.split("/")
        if len(steps) < 2 or any(step in ("", ".", "..") or "\\" in step for step in steps):
            raise StoreError(f"{file}: array name {name!r} leads outside the folder")
    return manifest


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One array's entry with its fields in the types they must have. KeyError, TypeError or ValueError else."""
    shape = [operator.index(n) for n in entry["shape"]]
    return {"shape": shape, "dtype": np.dtype(entry["dtype"]).name, "sha256": str(entry["sha256"])}


def place(folder: Path, name: str) -> Path:
    """Where array "part/a/b" lies: folder/part/a.b, as Orbax names it."""
    part, path = name.split("/", 1)
    return folder / part / path.replace("/", ".")


def chunk_shape(shape: tuple[int, ...], stacked: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape of one file, shape of one chunk) of an array; a stacked one has a file a layer."""
    file = (1, *shape[1:]) if stacked else shape
    return file, tuple(n // SPLITS if n >= LONG and n % SPLITS == 0 else n for n in file)


def create(path: Path, shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> ts.TensorStore:
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
    return ts.open(spec, create=True, delete_existing=True).result()


def open_array(path: Path) -> ts.TensorStore:
    """An array on disk for reading.

    Raises:
      StoreError: not there, or damaged.
    """
    try:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        # A file that was lost on the way must not be read as zeros.
        return ts.open(spec | {"fill_missing_data_reads": False}, read=True).result()
    except ValueError as error:
        raise StoreError(f"{path}: missing or damaged ({_first_line(error)}); convert the weights again") from error


def skeleton(folder: Path, tree: Any) -> None:
    """Writes Orbax's own files of a checkpoint with this tree, whose arrays come later.

    Args:
      folder: must not exist.
      tree: nested dict with anything as leaves.
    """
    small = jax.tree.map(lambda leaf: np.zeros(1, np.int8), tree)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(small))


def check(folder: Path, part: str, expected: Any, manifest: Manifest) -> None:
    """Compares the manifest's arrays of one model with the parameters that are expected.

    Raises:
      StoreError: missing, extra or wrongly shaped arrays, all of them; an array that is not on disk.
    """
    wanted = {f"{part}/{path}": tuple(leaf.shape) for path, leaf in flatten_dict(expected, sep="/").items()}
    found = {name: tuple(entry["shape"]) for name, entry in manifest.arrays.items() if name.startswith(f"{part}/")}
    differences = [
        f"{name}: {found.get(name, 'missing')}, config wants {wanted.get(name, 'none')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    lost = [name for name in sorted(found) if not (place(folder, name) / "zarr.json").is_file()]
    differences += [f"{name}: not on disk" for name in lost]
    if differences:
        raise StoreError(f"{folder}: not the model of config.json; convert the weights again\n  "
                         + "\n  ".join(differences))  # fmt: skip


def restore(folder: Path, part: str, expected: Any, mesh: Mesh | None, rules: sharding.Rules = sharding.RULES) -> Any:
    """The parameters of one model, straight into (sharded) arrays, in the dtypes of `expected`.

    Raises:
      StoreError: damaged arrays.
    """
    leaves = flatten_dict(expected, sep="/")
    specs = flatten_dict(sharding.specs(expected, rules, mesh), sep="/")
    alone = SingleDeviceSharding(jax.devices()[0])
    arrays = {}
    for path, leaf in leaves.items():
        name = f"{part}/{path}"
        where = alone if mesh is None else NamedSharding(mesh, specs[path])
        arrays[path] = _read(name, open_array(place(folder, name)), leaf, where)
    return unflatten_dict(arrays, sep="/")


def _read(name: str, array: ts.TensorStore, leaf: jax.ShapeDtypeStruct, where: Sharding) -> jax.Array:
    """One array on its devices; a shard that several of them hold is read once."""
    parts: dict[str, np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)
        if key not in parts:
            try:
                parts[key] = array[index].read().result().astype(leaf.dtype, copy=False)
            except ValueError as error:
                raise StoreError(f"{name}: damaged ({_first_line(error)}); convert the weights again") from error
        return parts[key]

    return jax.make_array_from_callback(tuple(leaf.shape), where, shard)


def verify(
    folder: Path, arrays: Mapping[str, Mapping[str, Any]], told: Callable[[int], Any] = lambda size: None
) -> None:
    """Reads arrays of a manifest and compares their digests, a layer at a time.

    Raises:
      StoreError: an array that is damaged or is not the one of the manifest.
    """
    for name, entry in arrays.items():
        array = open_array(place(folder, name))
        digest = hashlib.sha256()
        for rows in blocks(array.shape, array.chunk_layout.write_chunk.shape[0] if array.shape else 1):
            try:
                data = np.ascontiguousarray(array[rows].read().result())
            except ValueError as error:
                raise StoreError(f"{name}: damaged ({_first_line(error)}); convert the weights again") from error
            digest.update(raw(data))
            told(data.nbytes)
        if digest.hexdigest() != entry["sha256"] or list(array.shape) != list(entry["shape"]):
            raise StoreError(f"{name}: not the array of the manifest; convert the weights again")


def blocks(shape: tuple[int, ...], step: int) -> list[Any]:
    """Slices of the leading axis, `step` rows each: what is read or written at once."""
    if not shape:
        return [...]
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], max(1, step))]


def raw(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, for a digest."""
    return memoryview(np.atleast_1d(array).view(np.uint8).reshape(-1))


def size(manifest: Manifest) -> int:
    """Bytes of all arrays."""
    return sum(math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize for entry in manifest.arrays.values())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
