"""Cases of cross-attention for its tests: inputs, calls of ours, and the comparison with the float64 oracle."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from reference import relative_error

from wanjax import cross
from wanjax.precision import FLOAT32
from wanjax.types import Branches, CrossBias, CrossControl

SIZES = (11, 6, 6)
BOTH = pytest.mark.parametrize("isolated", [False, True], ids=["joint", "isolated"])


def both(q, keys, values=None, bias=None, control=None, precision=FLOAT32, inspect=False):
    values = keys if values is None else values
    control, strength = control or (None, None)
    return cross.cross_attention(q, keys, values, bias, control, strength, precision, inspect=inspect)


@partial(jax.jit, static_argnames="precision")
def attend(q, keys, values, bias=None, control=None, precision=FLOAT32):
    return both(q, keys, values, bias, control, precision)[0]


# At LLVM's zeroth level, which tests run at, what is computed twice need not be the same to the last bit.
@partial(jax.jit, static_argnames="precision", compiler_options={"xla_backend_optimization_level": 3})
def report_of(q, keys, bias, control, precision=FLOAT32):
    return both(q, keys, None, bias, control, precision, inspect=True)[1]


def bias_of(q, keys, control, precision=FLOAT32):
    return report_of(q, keys, None, control, precision).bias


def joined(kind, parts, axis):
    """[text, image 1, ...] as Branches or CrossBias; an image's None is zero where another has something."""
    text, *images = parts
    if all(x is None for x in images):
        return kind(text)
    shape = next(x.shape for x in images if x is not None)
    return kind(text, np.stack([np.zeros(shape, np.float32) if x is None else x for x in images], axis))


branches_of = partial(joined, Branches, axis=1)


bias_from = partial(joined, CrossBias, axis=2)


@dataclasses.dataclass
class Case:
    """Random queries, keys and values; logits have a standard deviation of 3, so that attention is peaked."""

    frames: int
    queries: int = 4
    heads: int = 3
    sizes: tuple[int, ...] = SIZES
    batch: int = 2

    def __post_init__(self):
        rng = np.random.default_rng(self.frames)

        def draw(length, std=1.0):
            return std * rng.standard_normal((self.batch, length, self.heads, 8), np.float32)

        self.q = draw(self.frames * self.queries, 2.0)
        self.k = [draw(n, 1.5) for n in self.sizes]
        self.v = [draw(n) for n in self.sizes]
        self.added = [rng.standard_normal((self.batch, self.frames, n), np.float32) for n in self.sizes]

    @property
    def branches(self):
        return self.q, branches_of(self.k), branches_of(self.v)

    @property
    def total(self):
        """Elements of all probabilities of the text branch."""
        return self.batch * self.heads * self.frames * self.queries * self.sizes[0]

    def strength(self, *rows):
        """The schedule's strength, times a number for each batch row."""
        schedule = oracle.strength(50, 40, self.frames, (5, 12))[10, 8]
        return np.float32(np.multiply.outer(rows or (1.0,) * self.batch, schedule))


def control(strength, isolated, weights=None, curve=None, floor=5e-4, anchors=None, images=2):
    """A control as wanted and its strength; anchors are the ends unless given, the curve is the following's part."""
    frames = strength.shape[-1]
    anchors = (0, frames - 1) if anchors is None else anchors
    curve = np.float32(oracle.anchor_curve(frames, anchors, curve))
    weights = np.float32(np.ones(1 + images) if weights is None else weights)
    return CrossControl(np.int32(anchors), curve, np.float32(floor), np.bool_(isolated), weights), strength


def leaves(branches):
    return [branches.text, *([] if branches.images is None else jnp.unstack(branches.images, axis=2))]


def check(case, isolated, strength, added=None, weights=None, tolerance=1e-4, **target):
    """What KAB changes of the output, and its bias, are the oracle's."""
    bias = None if added is None else bias_from(added)
    strengths, images = (strength, 0 * strength), len(case.k) - 1
    ours = [
        np.float64(attend(*case.branches, bias, control(s, isolated, weights, images=images, **target)))
        for s in strengths
    ]
    exact = [oracle.cross_attention(case.q, case.k, case.v, s, isolated, weights, added, **target) for s in strengths]
    assert relative_error(ours[1], exact[1]) <= 1e-6
    change = exact[0] - exact[1]
    assert np.linalg.norm(change) > 0.03 * np.linalg.norm(exact[1])
    assert relative_error(ours[0] - ours[1], change) <= tolerance
    made = leaves(bias_of(case.q, branches_of(case.k), control(strength, isolated, images=images, **target)))
    for a, b in zip(made, oracle.bias(case.q, case.k, strength, isolated, **target), strict=True):
        assert relative_error(a, b) <= 1e-5
