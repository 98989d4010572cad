"""Matrices as 8-bit kernels: the file's own numbers where they are of the form that is wanted, else quantised."""

import math
from collections import Counter
from collections.abc import Mapping

import jax
import numpy as np

from convert.keymap import Rule
from convert.sources import Part
from convert.tensors import Codes, SourceError, Tensor
from wanjax.quantise import quantise
from wanjax.store import factor_of


def filled(rule: Rule, leaf: jax.ShapeDtypeStruct) -> tuple[str, ...]:
    """Our arrays that a rule fills: one, or an 8-bit kernel and its factor."""
    return (rule.ours, factor_of(rule.ours)) if leaf.dtype.itemsize == 1 else (rule.ours,)


def kept(tensor: Tensor, dtype: np.dtype) -> Codes | None:
    """The file's own 8-bit numbers and factors; None where they are of another dtype or it has none."""
    if tensor.codes is not None:
        return tensor.codes if tensor.codes.dtype == dtype else None
    if tensor.dtype != dtype:
        return None
    return Codes(dtype, lambda: (tensor.read(), np.ones((tensor.shape[0], 1), np.float32)))  # float8 without a scale


def read(part: Part, rule: Rule, name: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes [I, O] and factors [1, O] float32 of one layer of a kernel, contiguous.

    Raises:
      SourceError: NaN or inf in them.
    """
    tensor = part.tensors.named[name]
    own = kept(tensor, dtype)
    files = part.tensors.files
    damaged = f"{files[0] if len(files) == 1 else files[0].parent}: {name} holds NaN or inf; its file is damaged"
    if own is None:
        kernel = rule.take(tensor.read())
        try:
            return quantise(kernel, dtype)
        except ValueError as error:
            raise SourceError(damaged) from error
    codes, factors = (np.ascontiguousarray(rule.take(array)) for array in own.read())
    if not (np.isfinite(codes).all() and np.isfinite(factors).all()):
        raise SourceError(damaged)
    return codes, factors.astype(np.float32)


def notes(part: Part, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """What becomes of the matrices of a part's 8-bit kernels, in a line; reads none.

    Args:
      leaves: our arrays by path.
    """
    told: Counter[str] = Counter()
    for rule in part.family.rules(part.config):
        dtype = leaves[rule.ours].dtype
        if dtype.itemsize == 1:
            for name in rule.names(leaves[rule.ours].shape):
                tensor = part.tensors.named[name]
                told[f"kept as {dtype.name}" if kept(tensor, dtype) else f"quantised from {tensor.stored}"] += 1
    ways = ", ".join(f"{count} {way}" for way, count in told.most_common())
    return [f"{part.family.part}: of {math.fsum(told.values()):.0f} matrices in its blocks {ways}"] if told else []
