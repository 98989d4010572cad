"""A wanjax model folder as a source, in either of its forms: for another dtype."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.families import Family
from convert.keymap import Rule
from convert.tensors import Codes, SourceError, Tensor, Tensors, open_file
from wanjax import checkpoint, store
from wanjax.manifest import MANIFEST, CheckpointError, read_manifest

LAYER = "#"


def parts(path: Path, only: Iterable[str]) -> dict[str, tuple[Family, Any, Tensors]]:
    """Family, configuration and tensors of each part of a wanjax folder.

    Raises:
      SourceError: damaged files.
    """
    _, config = checkpoint.read_config(path, whole=False)
    found = {}
    for slot in only:
        if (path / f"{slot}.safetensors").is_file():
            tensors = open_file(path / f"{slot}.safetensors")
        elif (path / slot).is_dir():
            tensors = _stored(path, slot)
        else:
            continue
        tensors = _by_layer(tensors)
        patterns = dict.fromkeys(map(_stack, tensors.named))
        rules = [Rule(pattern.removesuffix(f"{LAYER}{{i}}"), pattern) for pattern in patterns]
        family = Family(slot, "wanjax", (), lambda config, rules=rules: rules, lambda shapes, stated: config)
        found[slot] = family, getattr(config, slot), tensors
    return found


def _by_layer(tensors: Tensors) -> Tensors:
    """The same with stacked arrays ("blocks/...") as one tensor a layer, so that no stack is read whole; an 8-bit
    kernel and its factor are one tensor."""
    named = {}
    factors = {store.factor_of(name) for name in tensors.named} & tensors.named.keys()
    for name, tensor in tensors.named.items():
        if not name.startswith("blocks/") or not tensor.shape:
            named[name] = tensor
            continue
        if name in factors:
            continue
        factor = tensors.named.get(store.factor_of(name))
        for i in range(tensor.shape[0]):
            one = Tensor(tensor.shape[1:], tensor.dtype, lambda t=tensor, i=i: _row(t, i))
            named[f"{name}{LAYER}{i}"] = one if factor is None else _product(one, lambda f=factor, i=i: _row(f, i))
    return Tensors(tensors.files, named)


def _product(codes: Tensor, factor: Callable[[], np.ndarray]) -> Tensor:
    """An 8-bit kernel of one layer, multiplied out in float32 where its codes are not asked for."""
    read, form = lambda: codes.read().astype(np.float32) * factor(), f"{codes.dtype.name} with a scale"
    own = Codes(codes.dtype, lambda: (codes.read(), factor()))
    return Tensor(codes.shape, np.dtype(ml_dtypes.bfloat16), read, form=form, codes=own)


def _row(tensor: Tensor, i: int) -> np.ndarray:
    return tensor.read()[i] if tensor.rows is None else tensor.rows(i)


def _stack(name: str) -> str:
    """The rule's pattern of a tensor of `_by_layer`."""
    return f"{name.rpartition(LAYER)[0]}{LAYER}{{i}}" if LAYER in name else name


def _stored(path: Path, slot: str) -> Tensors:
    """Arrays of a converted folder, by parameter path."""
    try:
        arrays = read_manifest(path).arrays
    except CheckpointError as error:
        raise SourceError(str(error)) from error
    own = {name: entry for name, entry in arrays.items() if name.startswith(f"{slot}/")}

    def tensor(name: str, entry: Mapping[str, Any]) -> Tensor:
        where = store.place(path, name)
        return Tensor(tuple(entry["shape"]), np.dtype(entry["dtype"]), lambda: store.open_array(where).read().result(),
                      lambda i: store.open_array(where)[i].read().result())  # fmt: skip

    named = {name.split("/", 1)[1]: tensor(name, entry) for name, entry in own.items()}
    return Tensors((path / MANIFEST,), named)
