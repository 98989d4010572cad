"""The conversion engine: tables of rules, checked as sets before any tensor is read.

A rule says which foreign tensor becomes which parameter, and how its axes change. `{i}` in the foreign name
stands for the layer; its tensors are stacked on a leading axis. Every foreign tensor must be used exactly
once and every parameter filled exactly once; all disagreements are reported together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from wanjax import compare

Shape = tuple[int, ...]


class ConversionError(ValueError):
    """The foreign tensors are not the model that the table describes; the text lists every difference."""


@dataclass(frozen=True)
class Transform:
    """How one foreign tensor is laid out.

    Attributes:
      forward: foreign array -> our array (works on numpy arrays and on JAX tracers).
      backward: its inverse.
      foreign_shape: our shape -> the foreign shape it comes from.
    """

    forward: Callable[[Any], Any]
    backward: Callable[[Any], Any]
    foreign_shape: Callable[[Shape], Shape]


SAME = Transform(lambda x: x, lambda x: x, lambda s: s)
LINEAR = Transform(lambda x: x.T, lambda x: x.T, lambda s: s[::-1])
CONV2D = Transform(
    lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1), lambda s: (s[3], s[2], s[0], s[1])
)
CONV3D = Transform(
    lambda x: x.transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2), lambda s: (s[4], s[3], *s[:3])
)
UNBATCH = Transform(lambda x: x.reshape(x.shape[1:]), lambda x: x[None], lambda s: (1, *s))


def channel(trailing: int) -> Transform:
    """A [C] vector stored as [C, 1, 1, ...] with `trailing` unit axes."""
    ones = (1,) * trailing
    return Transform(lambda x: x.reshape(-1), lambda x: x.reshape(*x.shape, *ones), lambda s: (*s, *ones))


def patch(patch_size: Shape) -> Transform:
    """A patch convolution [O, I, *patch] as the kernel [prod(patch) * I, O] of a linear layer on patches."""
    axes = len(patch_size)

    def forward(x: Any) -> Any:
        return x.transpose(*range(2, 2 + axes), 1, 0).reshape(-1, x.shape[0])

    def backward(x: Any) -> Any:
        return x.reshape(*patch_size, -1, x.shape[-1]).transpose(axes + 1, axes, *range(axes))

    def foreign_shape(shape: Shape) -> Shape:
        return (shape[1], shape[0] // int(np.prod(patch_size)), *patch_size)

    return Transform(forward, backward, foreign_shape)


@dataclass(frozen=True)
class Rule:
    """`theirs` (with `{i}` for the layer) becomes the parameter at path `ours` ("blocks/ffn/in/kernel").

    Attributes:
      part: (k, n) where `theirs` is n tensors of equal size joined on its first axis, and `ours` is the k-th.
    """

    ours: str
    theirs: str
    transform: Transform = SAME
    part: tuple[int, int] = (0, 1)

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs

    def names(self, shape: Sequence[int]) -> list[str]:
        """The foreign names, in order, that fill our array of this shape."""
        layers = range(shape[0]) if self.stacked else range(1)
        return [self.theirs.replace("{i}", str(i)) for i in layers]

    def foreign_shape(self, shape: Shape) -> Shape:
        """Shape of the whole foreign tensor (of one layer) for our shape (of one layer)."""
        first, *rest = self.transform.foreign_shape(shape)
        return (first * self.part[1], *rest)

    def take(self, tensor: Any) -> Any:
        """Our array (of one layer) from the foreign tensor."""
        k, n = self.part
        rows = tensor.shape[0] // n if n > 1 else 0
        return self.transform.forward(tensor[k * rows : (k + 1) * rows] if n > 1 else tensor)


def linear(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """The two rules of a linear layer (one without bias)."""
    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", LINEAR)]
    return rules + ([Rule(f"{ours}/bias", f"{theirs}.bias")] if bias else [])


def norm(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """The rules of a norm's scale and, if it has one, bias."""
    rules = [Rule(f"{ours}/scale", f"{theirs}.weight")]
    return rules + ([Rule(f"{ours}/bias", f"{theirs}.bias")] if bias else [])


def check(rules: Sequence[Rule], expected: Any, shapes: Mapping[str, Shape], ignore: Iterable[str] = ()) -> None:
    """Compares foreign names and shapes with the table; reads no tensor.

    Args:
      rules: the table.
      expected: our parameters as a nested dict of arrays or `jax.ShapeDtypeStruct`s.
      shapes: shape of every foreign tensor by name.
      ignore: foreign names that may be present and are not used.

    Raises:
      ConversionError: missing, extra and wrongly shaped tensors, grouped, of each the first and how many more.
    """
    ours = {path: tuple(leaf.shape) for path, leaf in flatten_dict(expected, sep="/").items()}
    table = [rule.ours for rule in rules]
    if sorted(table) != sorted(ours):
        odd = sorted(set(table) ^ set(ours)) or sorted({p for p in table if table.count(p) > 1})
        raise ConversionError(f"table and model disagree on {', '.join(odd)}")
    _check_parts(rules)
    wanted = {}
    for rule in rules:
        shape = ours[rule.ours]
        wanted |= dict.fromkeys(rule.names(shape), rule.foreign_shape(shape[1:] if rule.stacked else shape))
    ignored = set(ignore) - wanted.keys()
    groups: dict[str, list[str]] = {"missing": [], "extra": [], "wrong shape": []}
    found = {name: tuple(shape) for name, shape in shapes.items() if name not in ignored}
    for name, (own, asked) in compare.differences(found, wanted).items():
        if own is None or asked is None:
            groups["missing" if own is None else "extra"].append(name)
        else:
            groups["wrong shape"].append(f"{name}: file has {list(own)}, model wants {list(asked)}")
    text = [f"{label} ({len(names)}):{compare.listed(names)}" for label, names in groups.items() if names]
    if text:
        raise ConversionError("the file does not hold this model\n" + "\n".join(text))


def _check_parts(rules: Sequence[Rule]) -> None:
    """Every foreign name stands in one rule, or in one rule for each of its parts."""
    parts: dict[str, list[tuple[int, int]]] = {}
    for rule in rules:
        parts.setdefault(rule.theirs, []).append(rule.part)
    odd = [name for name, found in parts.items() if sorted(found) != [(k, found[0][1]) for k in range(found[0][1])]]
    if odd:
        raise ConversionError(f"table does not use every part of {', '.join(odd)} exactly once")


def convert(
    rules: Sequence[Rule],
    expected: Any,
    tensors: Mapping[str, np.ndarray],
    ignore: Iterable[str] = (),
) -> dict[str, Any]:
    """Foreign tensors to a parameter tree.

    Args:
      rules, expected, ignore: as in `check`.
      tensors: foreign arrays by name; looked up one at a time, so it may read lazily.

    Returns:
      Nested dict of numpy arrays with the shapes and dtypes of `expected`.

    Raises:
      ConversionError: as in `check`.
    """
    check(rules, expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, ignore)
    leaves = flatten_dict(expected, sep="/")
    arrays = {rule.ours: fill(rule, leaves[rule.ours], lambda n, r=rule: r.take(tensors[n])) for rule in rules}
    return unflatten_dict(arrays, sep="/")


def fill(rule: Rule, leaf: jax.ShapeDtypeStruct, layer: Callable[[str], np.ndarray]) -> np.ndarray:
    """Our whole array from its layers; `layer` gives one in our layout by its foreign name."""
    out = np.empty(leaf.shape, leaf.dtype)
    for i, name in enumerate(rule.names(leaf.shape)):
        out[i if rule.stacked else ...] = layer(name)
    return out


def invert(rules: Sequence[Rule], params: Any) -> dict[str, np.ndarray]:
    """A parameter tree as foreign tensors: what `convert` undoes. Contiguous arrays, dtypes as in `params`."""
    leaves = flatten_dict(params, sep="/")
    parts: dict[str, list[np.ndarray]] = {}
    for rule in sorted(rules, key=lambda rule: rule.part):
        leaf = np.asarray(leaves[rule.ours])
        for i, layer in enumerate(leaf if rule.stacked else leaf[None]):
            parts.setdefault(rule.theirs.replace("{i}", str(i)), []).append(rule.transform.backward(layer))
    return {name: np.ascontiguousarray(np.concatenate(p) if len(p) > 1 else p[0]) for name, p in parts.items()}
