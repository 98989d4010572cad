"""From a source to a wanjax folder (`wanjax.store`), a layer at a time, safely.

Everything is written into a hidden folder beside the target and renamed at the end, so that nothing half-written ever
stands under the target's name. Arrays that were finished before an interruption are kept if the sources are the same
to the last bit.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from convert.families import SLOTS, describe
from convert.keymap import Rule
from convert.sources import Part, Source
from convert.tensors import SourceError, Tensor, sha256
from wanjax import checkpoint, store
from wanjax import config as configs
from wanjax.config import BFLOAT16, FLOAT32, PRESETS, DiTConfig, ModelConfig, Precision, preset

DTYPES = ("bf16", "f32", "keep")
PROGRESS, JOB = "progress.jsonl", "job.json"
CHECKED = 8192  # rows looked at for NaN at once, to bound the memory
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(ValueError):
    """A target that cannot be written; the message is one line naming it and the mend."""


@dataclass(frozen=True)
class Plan:
    """A conversion with everything about it checked that needs no tensor.

    Attributes:
      source: where from.
      config: of the whole model; parts that the source lacks are the published ones.
      shapes: of every parameter, by part of the source.
    """

    source: Source
    config: ModelConfig
    shapes: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of the source's tensors."""
        return sum(part.tensors.size for part in self.source.parts.values())

    @property
    def files(self) -> list[Path]:
        """Every file that is read."""
        files = [file for part in self.source.parts.values() for file in part.tensors.files]
        return [*files, *([self.source.tokenizer] if self.source.tokenizer else [])]


def plan(source: Source, dtype: str = "keep", model: str = "auto") -> Plan:
    """Checks that a source is one whole model.

    Args:
      dtype: "bf16" or "f32" for transformer and encoders, or "keep"; the VAE stays float32 unless "bf16" files say so.
      model: a preset that it must be, or "auto".

    Raises:
      SourceError: parts that do not belong together, tensors missing, extra or of another shape, another model.
    """
    config = _with_dtype(_whole(source, model), source, dtype)
    shapes = checkpoint.param_shapes(config)
    own = {name: shapes[name] for name in source.parts}
    for name, part in source.parts.items():
        part.check(own[name])
    return Plan(source, config, own)


def _whole(source: Source, model: str) -> ModelConfig:
    """The model that the parts make, named after a preset where its transformer is that preset's."""
    parts = {name: part.config for name, part in source.parts.items()}
    dit = parts.get("dit")
    base = preset(model if model != "auto" else _nearest(dit))
    if checkpoint.is_folder(source.path) and model == "auto":
        return checkpoint.read_config(source.path, whole=False)[1]
    if model != "auto" and dit is not None and _size(dit) != _size(base.dit):
        raise SourceError(f"{source.path}: holds a {describe(dit)}, not {model}; leave --model away")
    same = dit is None or _size(dit) == _size(base.dit)
    sampling = base.sampling if source.shift is None else dataclasses.replace(base.sampling, shift=source.shift)
    name = base.name if same else "custom"
    try:
        return dataclasses.replace(base, name=name, sampling=sampling, **_fitting(base, parts) | parts)
    except ValueError as error:
        raise SourceError(f"{source.path}: its parts do not belong together: {error}") from error


def _fitting(base: ModelConfig, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Transformer and encoders as published, but for the sizes in which they must agree with `parts`."""
    dit, umt5, clip = parts.get("dit"), parts.get("umt5"), parts.get("clip")
    if dit is None:
        dit = base.dit if umt5 is None else dataclasses.replace(base.dit, text_dim=umt5.dim)
        dit = dit if clip is None else dataclasses.replace(dit, image_dim=clip.dim, image_tokens=clip.num_tokens)
    found = {"dit": dit, "umt5": dataclasses.replace(base.umt5, dim=dit.text_dim)}
    if base.clip is not None:
        side = base.clip.patch_size * math.isqrt(dit.image_tokens - 1)
        heads = math.gcd(dit.image_dim, base.clip.num_heads)
        found["clip"] = dataclasses.replace(base.clip, dim=dit.image_dim, num_heads=heads, image_size=side)
    return found


def _size(config: DiTConfig) -> DiTConfig:
    return dataclasses.replace(config, precision=FLOAT32, remat=False)


def _nearest(dit: DiTConfig | None) -> str:
    """The preset with this transformer, else one that takes as many keyframes."""
    published = {name: make().dit for name, make in PRESETS.items() if name != "tiny"}
    if dit is None:
        return "flf2v_14b"
    exact = [name for name, own in published.items() if _size(own) == _size(dit)]
    return (exact or [name for name, own in published.items() if own.num_images == dit.num_images])[0]


def _with_dtype(config: ModelConfig, source: Source, dtype: str) -> ModelConfig:
    if dtype not in DTYPES:
        raise SourceError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
    if dtype != "keep":
        return config.with_precision(BFLOAT16 if dtype == "bf16" else FLOAT32)
    kept = {
        name: dataclasses.replace(part.config, precision=_own_precision(part)) for name, part in source.parts.items()
    }
    return dataclasses.replace(config, **kept)


def _own_precision(part: Part) -> Precision:
    """float32 where most numbers are stored so, else half precision: a few matrices are float32 in every file."""
    if part.family.layout == "wanjax":
        return part.config.precision
    numbers: Counter[np.dtype] = Counter()
    for tensor in part.tensors.named.values():
        numbers[tensor.dtype] += math.prod(tensor.shape)
    most = numbers.most_common(1)[0][0]
    if part.family.part == "vae" or most.itemsize >= 4:
        return FLOAT32
    return dataclasses.replace(BFLOAT16, param="float16") if most == np.float16 else BFLOAT16


def lacking(planned: Plan, only: Sequence[str] | None = None) -> list[str]:
    """Lines on what a folder made of this will not have.

    Args:
      only: the parts that were asked for; None for a whole model.

    Raises:
      SourceError: a part that was asked for is not there.
    """
    wanted = only or [name for name in SLOTS if getattr(planned.config, name) is not None]
    absent = [name for name in wanted if name not in planned.source.parts]
    if absent:
        have = " ".join(name for name in SLOTS if name in planned.source.parts)
        raise SourceError(f"{planned.source.path}: no {', '.join(absent)} in it; add them, or convert --only {have}")
    notes = [f"the folder will hold {', '.join(only)} alone and cannot be run by itself"] if only else []
    if planned.source.tokenizer is None and "umt5" in wanted:
        notes.append(f"no tokenizer in the source; put umt5-xxl's {checkpoint.TOKENIZER} into the folder")
    return notes


def work(planned: Plan) -> int:
    """Bytes that `write` tells of: hashed ones, then written ones."""
    hashed = sum(file.stat().st_size for file in planned.files)
    leaves = [leaf for shapes in planned.shapes.values() for leaf in jax.tree.leaves(shapes)]
    return hashed + sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def layers_of(part: Part, rule: Rule, shape: Sequence[int]) -> list[str]:
    """Foreign names that fill one of our arrays, in order."""
    if not rule.stacked:
        return [rule.theirs]
    return [rule.theirs.replace("{i}", str(i)) for i in range(shape[0])]


def read_layer(part: Part, rule: Rule, name: str, dtype: np.dtype) -> np.ndarray:
    """One layer of one of our arrays, contiguous.

    Raises:
      SourceError: NaN or inf in the tensor, or a value that the dtype cannot hold.
    """
    tensor: Tensor = part.tensors.named[name]
    with np.errstate(over="ignore"):
        layer = np.ascontiguousarray(rule.take(tensor.read()).astype(dtype, copy=False))
    if not all(np.isfinite(layer[rows]).all() for rows in store.blocks(layer.shape, CHECKED)):
        files = part.tensors.files
        where = files[0] if len(files) == 1 else files[0].parent
        raise SourceError(f"{where}: {name} holds NaN or inf (as {dtype.name}); its file is damaged")
    return layer


def load(planned: Plan) -> dict[str, Any]:
    """All parameters in memory, as nested dicts of numpy arrays by part; for use without a folder.

    Raises:
      SourceError: NaN or inf in a tensor.
    """
    params = {}
    for name, part in planned.source.parts.items():
        leaves = flatten_dict(planned.shapes[name], sep="/")
        arrays = {}
        for rule in part.family.rules(part.config):
            leaf = leaves[rule.ours]
            names = layers_of(part, rule, leaf.shape)
            out = np.empty(leaf.shape, leaf.dtype)
            for i, foreign in enumerate(names):
                out[i if rule.stacked else ...] = read_layer(part, rule, foreign, leaf.dtype)
            arrays[rule.ours] = out
        params[name] = unflatten_dict(arrays, sep="/")
    return params


def write(planned: Plan, target: Path, dtype: str, told: Callable[[int], Any] = lambda size: None) -> store.Manifest:
    """Writes the folder.

    Args:
      target: must not exist.
      dtype: as given to `plan`, for the manifest.
      told: hears of bytes as they are hashed, then as they are written.

    Returns:
      The manifest.

    Raises:
      WriteError: the target exists, cannot be written, or another conversion is writing it.
      SourceError: damaged tensors, or files that change meanwhile.
    """
    check_target(target)
    with _locked(target):
        part_folder = check_target(target)  # another run may have ended meanwhile
        source, files = planned.source, planned.files
        before = _stats(files)
        digests = {os.path.relpath(name, source.path.parent): digest for name, digest in sha256(files, told).items()}
        tool = f"wanjax {metadata.version('wanjax')}"
        job = {
            "tool": tool,
            "format": store.FORMAT,
            "sources": digests,
            "config": json.loads(configs.to_json(planned.config)),
            "dtype": dtype,
            "parts": sorted(source.parts),
            "loras": list(source.loras),
        }
        try:
            done = _resume(part_folder, job, planned)
            arrays = _write_arrays(planned, part_folder, done, told)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise WriteError(f"{target}: {error.strerror}; free some space and run it again") from error
        if _stats(files) != before:
            shutil.rmtree(part_folder)
            raise SourceError(f"{source.path}: its files changed during the conversion; run it again")
        manifest = store.Manifest(arrays, digests, tool, dtype, source.loras)
        _finish(planned, part_folder, target, manifest)
    return manifest


def check_target(target: Path) -> Path:
    """The hidden folder that a target is prepared in.

    Raises:
      WriteError: the target exists, or the folder it lies in does not or cannot be written to.
    """
    if target.name in ("", ".."):
        raise WriteError(f"{target}: names no folder to make")
    if os.path.lexists(target):
        raise WriteError(f"{target}: exists; choose another name or remove it")
    if not target.parent.is_dir():
        raise WriteError(f"{target}: no folder {target.parent}; create it with mkdir -p {target.parent}")
    hidden = target.parent / f".{target.name}.part"
    try:
        with tempfile.TemporaryFile(dir=target.parent) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise WriteError(f"{target}: cannot write in {target.parent} ({error.strerror}); choose another") from error
    return hidden


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Held by the one process that writes the target; the system lets go of it when the process ends in any way."""
    path = target.parent / f".{target.name}.lock"
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise WriteError(f"{target}: another conversion is writing it; wait or choose another name") from error
        # The holder before may have removed this very file between our opening and locking it.
        if path.exists() and os.stat(path).st_ino == os.fstat(file).st_ino:
            break
        os.close(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _stats(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(stat.st_size, stat.st_mtime_ns) for stat in (os.stat(file) for file in files)]


def _resume(folder: Path, job: Mapping[str, Any], planned: Plan) -> dict[str, dict[str, Any]]:
    """Entries of arrays that an earlier run of the same job finished; starts the folder anew for another job."""
    try:
        same = json.loads((folder / JOB).read_text(encoding="utf-8")) == job
    except (OSError, ValueError):
        same = False
    if same:
        done = {}
        progress = folder / PROGRESS
        lines = progress.read_text(encoding="utf-8").splitlines() if progress.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # a line cut off by the interruption
                entry = json.loads(line)
                done[entry.pop("name")] = entry
        return done
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, shapes in planned.shapes.items():
        store.skeleton(folder / name, shapes)
    (folder / PROGRESS).touch()
    _write_synced(folder / JOB, json.dumps(job))  # last: only a folder with all of this is gone on with
    return {}


def _write_arrays(
    planned: Plan, folder: Path, done: dict[str, dict[str, Any]], told: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
    arrays = {}
    with open(folder / PROGRESS, "a", encoding="utf-8") as progress:
        for name, part in planned.source.parts.items():
            leaves = flatten_dict(planned.shapes[name], sep="/")
            for rule in part.family.rules(part.config):
                path, leaf = f"{name}/{rule.ours}", leaves[rule.ours]
                if path not in done:
                    done[path] = _write_array(part, rule, leaf, store.place(folder, path), told)
                    progress.write(json.dumps({"name": path} | done[path]) + "\n")
                    progress.flush()
                    os.fsync(progress.fileno())
                else:
                    told(int(np.prod(leaf.shape)) * leaf.dtype.itemsize)
                arrays[path] = done[path]
    return arrays


def _write_array(
    part: Part, rule: Rule, leaf: jax.ShapeDtypeStruct, path: Path, told: Callable[[int], Any]
) -> dict[str, Any]:
    """One array, a layer at a time; its entry in the manifest."""
    shutil.rmtree(path, ignore_errors=True)  # the skeleton's, or what an interruption left
    array = store.create(path, leaf.shape, leaf.dtype, rule.stacked)
    digest = hashlib.sha256()
    for i, name in enumerate(layers_of(part, rule, leaf.shape)):
        layer = read_layer(part, rule, name, leaf.dtype)
        try:
            array[i if rule.stacked else ...].write(layer).result()
        except ValueError as error:  # tensorstore's way to say that the disk is full
            raise OSError(errno.ENOSPC, str(error).splitlines()[0][:200]) from error
        digest.update(store.raw(layer))
        told(layer.nbytes)
    return {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "sha256": digest.hexdigest()}


def _finish(planned: Plan, folder: Path, target: Path, manifest: store.Manifest) -> None:
    """Adds what makes the folder a model, and gives it its name."""
    _write_synced(folder / checkpoint.CONFIG, configs.to_json(planned.config) + "\n")
    if planned.source.tokenizer is not None:
        shutil.copyfile(planned.source.tokenizer, folder / checkpoint.TOKENIZER)
    _write_synced(folder / store.MANIFEST, manifest.dumps())
    os.rename(folder, target)  # what an interruption after this leaves is whole, and two small files too many
    (target / JOB).unlink()
    (target / PROGRESS).unlink()


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
