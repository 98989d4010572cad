"""What a run keeps on the disk while it works, so that the same command goes on where it stopped, to the same bits.

    clip.run/
      run.json              what the run is: settings, keyframes, model, versions
      encoded.safetensors   what the transformer is told
      carry.safetensors     the sampler's carry, every few steps and after the last
      explained.safetensors the latents that enter the step which is to be explained
      chosen.safetensors    which method was chosen by trying

Every file is written beside and renamed, carries the run's token and a digest of its arrays, and is refused where
either is another. The folder is removed when the results are written.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from wanjax import hosts, marks, writing
from wanjax.undo import undone
from wanjax.writing import OutputError

SUFFIX = ".run"
FILE = "run.json"
ENCODED, CARRY, EXPLAINED, CHOSEN = "encoded", "carry", "explained", "chosen"
EVERY = 5
"""Steps between two carries that are kept."""

_LOCK = "lock"
_NAMES = frozenset({FILE, _LOCK, *(f"{name}.safetensors" for name in (ENCODED, CARRY, EXPLAINED, CHOSEN))})


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Only the first of several hosts reads and writes it.

    Attributes:
      path: absolute.
      identity: what decides the clip, as JSON: settings, keyframes, model, versions. Where and how it is computed and
        written is not in it.
      every: steps between two carries.
      anew: whether what an earlier run left is thrown away, once this one begins (`opened`).
    """

    path: Path
    identity: Mapping[str, Any]
    every: int = EVERY
    anew: bool = False

    @classmethod
    def of(cls, output: Path, identity: Mapping[str, Any], every: int = EVERY, anew: bool = False) -> "RunFolder":
        """Beside an output, of its name."""
        name = f"{output.stem if output.suffix else output.name}{SUFFIX}"
        return cls(output.with_name(name), identity, every, anew)

    @cached_property
    def token(self) -> str:
        """Digest of the identity."""
        return digest(self.identity)

    def check(self) -> list[str]:
        """Looks, before any work, at what an earlier run left; changes nothing.

        Returns:
          A line where the run goes on from there.

        Raises:
          OutputError: something else lies there, or the run was another; the line says what differs.
        """
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise OutputError(
                f"run folder {self.path}: exists and is not a folder; move it away or choose another --out"
            )
        there = list(self.path.iterdir()) if self.path.exists() else []
        if all(entry.name == _LOCK or _room(entry) for entry in there):
            return []  # nothing, or of a run that was killed in its first moment
        strange = [entry.name for entry in there if entry.name not in _NAMES and not _room(entry)]
        told = self._told()
        if strange or told is None:
            reason = f"it holds {strange[0]!r}" if strange else f"its {FILE} cannot be read"
            raise OutputError(
                f"run folder {self.path}: not what a run leaves ({reason}); move it away or choose another --out"
            )
        if self.anew:
            return []
        if told != json.loads(_canonical(self.identity)):
            changed = "; ".join(list(differences(told, json.loads(_canonical(self.identity))))[:3])
            raise OutputError(f"run folder {self.path}: of a stopped run that was another ({changed}); run its command "
                              "to finish it, or pass --restart to begin anew")  # fmt: skip
        done = self.steps_done()
        where = f"after step {done}" if done else "from its beginning"
        return [f"{self.path.name}: a run that was stopped goes on {where}; --restart begins anew"]

    def steps_done(self) -> int:
        """Steps after which the kept carry is; 0 without one."""
        file = self.path / f"{CARRY}.safetensors"
        return int(_metadata(file).get("step", 0)) if file.exists() else 0

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the folder; inside, no other process works in it. It goes if nothing is kept in it at the end.

        Raises:
          OutputError: another process works in it. OSError: a full disk.
        """
        self.path.mkdir(exist_ok=True)
        try:
            with self._locked(), undone(self._abandon):
                if self.anew:
                    self.empty()
                if self._told() is None:
                    writing.write_json(self.path / FILE, dict(self.identity), overwrite=True)
                try:
                    yield
                finally:
                    if not self._kept():
                        self.empty()
        finally:
            with contextlib.suppress(OSError):  # it holds something: what is kept, or what somebody put there
                self.path.rmdir()

    def _abandon(self) -> None:
        """What `opened` does at its end, while it is open."""
        if not self._kept():
            self.empty()
            (self.path / _LOCK).unlink(missing_ok=True)
            self.path.rmdir()

    def keep(self, name: str, tree: Any, **told: Any) -> None:
        """Writes a pytree of arrays, on one of several devices or on all of them, as `name`.safetensors.

        Raises:
          OSError: a full disk; what was kept before stays.
        """
        arrays = {path: hosts.fetch(leaf) for path, leaf in _leaves(tree)}
        if hosts.is_first():
            metadata = {marks.KEY: marks.mark(), "token": self.token, "sha256": _digest_of(arrays)}
            metadata |= {key: str(value) for key, value in told.items()}
            writing.write_bytes(self.path / f"{name}.safetensors", save(arrays, metadata), overwrite=True)

    def read(self, name: str, template: Any) -> Any | None:
        """What was kept under a name in the structure of `template`, placed as its leaves are; None for nothing.

        Raises:
          OutputError: damaged, of another run, or of other shapes.
        """
        leaves = _leaves(template)
        file = self.path / f"{name}.safetensors"
        arrays = _arrays(file, self.token) if hosts.is_first() and file.exists() else None
        if arrays is not None and {path: np.shape(leaf) for path, leaf in leaves} != _shapes(arrays):
            raise OutputError(f"{file}: holds other arrays than this run has; pass --restart to begin anew")
        arrays = hosts.from_first(
            f"{self.token}/{name}", arrays, {path: np.zeros(np.shape(leaf), leaf.dtype) for path, leaf in leaves}
        )
        if arrays is None:
            return None
        placed = [_like(arrays[path], leaf) for (path, _), leaf in zip(leaves, jax.tree.leaves(template), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(template), placed)

    def _told(self) -> Any | None:
        try:
            told = json.loads((self.path / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return {key: value for key, value in told.items() if key != marks.KEY} if isinstance(told, dict) else None

    def _kept(self) -> bool:
        return any(self.path.glob("*.safetensors"))

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return writing.locked(self.path / _LOCK, f"run folder {self.path}: another run works in it; wait for it, or "
                              "choose another --out")  # fmt: skip

    def tidy(self) -> None:
        """Removes what a run left that was killed after it had written its results. Leaves alone what is not its."""
        if self.path.is_dir():
            with contextlib.suppress(OSError, OutputError):
                self.check()
                with self.opened():
                    self.empty()

    def empty(self) -> None:
        """Removes what is kept."""
        for entry in list(self.path.iterdir()) if self.path.is_dir() else ():
            if _room(entry):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name in _NAMES - {_LOCK}:
                entry.unlink(missing_ok=True)


def left(kept: RunFolder | None, steps: int) -> str:
    """What a run of so many steps left when it was stopped, in words."""
    if kept is None or not kept.path.is_dir() or not hosts.is_first():
        return "nothing was written under the final name"
    try:
        return f"after step {kept.steps_done()} of {steps} it goes on by the same command ({kept.path.name})"
    except OutputError as error:
        return str(error)


def digest(value: Any) -> str:
    """SHA-256 of what JSON can hold, in hexadecimal digits."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """What differs between two JSON values, leaf by leaf, in words."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other) and _objects(one, other):
        for number, pair in enumerate(zip(one, other, strict=True), 1):
            yield from differences(*pair, f"{name} {number}")
    elif one != other:
        was, now = (text if len(text := json.dumps(value)) < 60 else "another" for value in (one, other))
        yield f"{name} {was} there, {now} now"


def _objects(*lists: list[Any]) -> bool:
    return all(isinstance(item, dict) for one in lists for item in one)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__}: not JSON")


def _room(entry: Path) -> bool:
    """Whether an entry is what a writer left that was killed, see `wanjax.rooms`."""
    return entry.name.startswith(".wanjax-") and entry.is_dir() and not entry.is_symlink()


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """Paths and leaves; random keys as the numbers that they are."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), _numbers(leaf) if _is_key(leaf) else leaf) for path, leaf in flat]


def _numbers(key: Any) -> Any:
    if isinstance(key, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, key)
    return jax.random.key_data(key)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _like(array: np.ndarray, leaf: Any) -> Any:
    """An array as a leaf of the template is: random keys, or numbers that lie where it lies."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(array)
    if isinstance(leaf, jax.Array) and leaf.committed:
        return hosts.put(array, leaf.sharding)
    # What is not committed goes wherever the other arguments of a program lie.
    return jnp.asarray(array) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else array


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {path: array.shape for path, array in arrays.items()}


def _digest_of(arrays: Mapping[str, np.ndarray]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        hashed.update(f"{name} {array.dtype} {array.shape}".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "np") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{file}: damaged ({error}); pass --restart to begin anew") from error


def _arrays(file: Path, token: str) -> dict[str, np.ndarray]:
    told = _metadata(file)
    if told.get("token") != token:
        raise OutputError(f"{file}: of another run; pass --restart to begin anew")
    from safetensors.flax import load_file

    try:
        arrays = {name: np.asarray(array) for name, array in load_file(file).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise OutputError(f"{file}: damaged ({error}); pass --restart to begin anew") from error
    if _digest_of(arrays) != told.get("sha256"):
        raise OutputError(f"{file}: damaged (its digest is another); pass --restart to begin anew")
    return arrays
