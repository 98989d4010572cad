"""A planned source's tensors as our arrays: one layer at a time, or all of them in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from convert.keymap import Rule
from convert.plan import Plan
from convert.sources import Part
from convert.tensors import SourceError, Tensor
from wanjax import store

CHECKED = 8192  # rows looked at for NaN at once, to bound the memory


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
