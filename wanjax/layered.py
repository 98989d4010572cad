"""Stacked arrays of a model folder, read a layer at a time."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from wanjax import store
from wanjax.manifest import AGAIN, SAFETENSORS, CheckpointError, manifest_of, raw


class Layers:
    """Layers of some arrays of one model.

    Args:
      folder: that `store.check` has found whole.
      expected: {path: shape and dtype} of arrays with the layer axis in front. Where they are of 8 bits and what is
        stored is not, it is quantised as it is read.
    """

    def __init__(self, folder: Path, part: str, expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        self.folder, self.part, self.expected = folder, part, dict(expected)
        self.manifest = manifest_of(folder)
        self.count = min(leaf.shape[0] for leaf in self.expected.values())
        if self.manifest is None:
            with store.tensors_of(folder, part) as tensors:
                stored = {f"{part}/{path}" for path in tensors.keys()}  # noqa: SIM118
        else:
            stored = self.manifest.arrays.keys()
        self._stored = [path for path in self.expected if f"{part}/{path}" in stored]

    def read(self, layer: int) -> dict[str, np.ndarray]:
        """One layer of each array, {path: array}, as expected. CheckpointError for damaged ones."""
        return self._fitted(self._read(layer))

    def all(self, fast: bool = False) -> Iterator[dict[str, np.ndarray]]:
        """The layers in turn, and after the last the comparison with the digests, unless `fast`.

        Raises:
          CheckpointError: damaged arrays, or others than those of the manifest.
        """
        hashes = {} if fast or self.manifest is None else {path: hashlib.sha256() for path in self._stored}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for layer in range(self.count):
                stored = self._read(layer)
                hashed = [pool.submit(one.update, raw(np.ascontiguousarray(stored[path])))
                          for path, one in hashes.items()]  # fmt: skip
                yield self._fitted(stored)
                for future in hashed:
                    future.result()
        for path, one in hashes.items():
            name = f"{self.part}/{path}"
            if one.hexdigest() != self.manifest.arrays[name]["sha256"]:
                raise CheckpointError(f"{self.folder}: {name}: {store.OTHER}; {AGAIN[self.manifest.form]}")

    def check(self) -> None:
        """Reads all layers for their digests' sake. CheckpointError as `all`."""
        for _ in self.all():
            pass

    def _read(self, layer: int) -> dict[str, np.ndarray]:
        rows, found = slice(layer, layer + 1), {}
        with contextlib.ExitStack() as stack:
            tensors = None
            if self.manifest is None or self.manifest.form == SAFETENSORS:
                tensors = stack.enter_context(store.tensors_of(self.folder, self.part))
            for path in self._stored:
                if tensors is None:  # all of them at once
                    found[path] = store.open_array(store.place(self.folder, f"{self.part}/{path}"))[rows].read()
                else:
                    found[path] = tensors.get_slice(path)[rows]
            return {path: store.numbers(self.folder, f"{self.part}/{path}", data)[0] for path, data in found.items()}

    def _fitted(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts = (store.fitted(self.folder, self.part, path, data, self.expected) for path, data in stored.items())
        return {path: array for one in parts for path, array in one.items()}
