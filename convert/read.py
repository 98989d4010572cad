"""A planned source's tensors as our arrays: one layer at a time, or all of them in memory."""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from convert import eight
from convert.keymap import Rule
from convert.plan import Plan
from convert.sources import Part
from convert.tensors import SourceError, Tensor
from wanjax import store

CHECKED = 8192  # rows looked at for NaN at once, to bound the memory


def read_layers(part: Part, rule: Rule, name: str, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """One layer of each of the arrays that a rule fills (`eight.filled`), contiguous.

    Raises:
      SourceError: NaN or inf in the tensor, or a value that the dtype cannot hold.
    """
    return eight.read(part, rule, name, dtype) if dtype.itemsize == 1 else (read_layer(part, rule, name, dtype),)


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
            own = {path: np.empty(leaves[path].shape, leaves[path].dtype) for path in eight.filled(rule, leaf)}
            for i, foreign in enumerate(rule.names(leaf.shape)):
                for array, layer in zip(own.values(), read_layers(part, rule, foreign, leaf.dtype), strict=True):
                    array[i if rule.stacked else ...] = layer
            arrays |= own
        params[name] = unflatten_dict(arrays, sep="/")
    return params
