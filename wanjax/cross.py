"""Cross-attention of Wan2.1 to text and keyframes: joint or isolated branches, with or without a bias.

Axis letters: B batch, S video tokens, F latent frames, Q queries of one frame, K keys of a branch, N heads,
D head width.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax import lax

from wanjax import kab
from wanjax.attention import attention
from wanjax.config import FLOAT32, Precision
from wanjax.layers import constrain
from wanjax.types import Branches, CrossBias, CrossControl


@struct.dataclass
class CrossReport:
    """Where the frames of one layer look: attention [B, F, K] a branch, mean over heads and queries.

    Attributes:
      plain: without any bias.
      biased: with KAB's bias and the caller's.
      bias: their sum.
    Where the keyframes are not isolated, first and last are parts of one distribution.
    """

    plain: Branches
    biased: Branches
    bias: CrossBias


def cross_attention(
    q: jax.Array,
    keys: Branches,
    values: Branches,
    bias: CrossBias | None = None,
    control: CrossControl | None = None,
    precision: Precision = FLOAT32,
) -> jax.Array:
    """One softmax over the text and one over both keyframes together, summed; or as `control` says.

    Args:
      q: [B, S, N, D].
      keys, values: [B, K, N, D] a branch.
      bias: a caller's, leaves [B, F, K] of one layer; S is a multiple of F. KAB's is added to it.
      control: of one layer (strength [B, F]); None is plain Wan2.1.
      precision: policy of the model.

    Returns:
      [B, S, N, D] in the compute dtype.
    """
    if control is None:
        return _branches(q, keys, values, bias, None, precision)

    def anchored() -> jax.Array:
        return _branches(q, keys, values, add(kab.bias(q, keys, control, precision), bias), control, precision)

    def plain() -> jax.Array:
        return _branches(q, keys, values, bias, control, precision)

    # A layer or step outside KAB's window must cost nothing.
    return lax.cond(jnp.any(control.strength != 0), anchored, plain)


def add(a: CrossBias, b: CrossBias | None) -> CrossBias:
    """The sum of two biases; None counts as zero."""
    if b is None:
        return a
    pairs = ((a.text, b.text), (a.first, b.first), (a.last, b.last))
    return CrossBias(*(x if y is None else y if x is None else x + y for x, y in pairs))


def _branches(q, keys, values, bias, control, precision: Precision) -> jax.Array:
    """All branches, summed, with an explicit bias."""
    bias = bias or CrossBias()

    def attend(k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
        if bias is None:
            return attention(q, k, v, precision=precision)
        return _attend_by_frame(q, k, v, bias, precision)

    text = attend(keys.text, values.text, bias.text)
    if keys.first is None:
        return text
    if keys.last is None:
        return text + attend(keys.first, values.first, bias.first)

    def joint() -> jax.Array:
        k = jnp.concatenate([keys.first, keys.last], 1)
        v = jnp.concatenate([values.first, values.last], 1)
        return text + attend(k, v, _join(bias, keys))

    def isolated() -> jax.Array:
        first, last = attend(keys.first, values.first, bias.first), attend(keys.last, values.last, bias.last)
        w = control.weights
        return (w[0] * text + w[1] * first + w[2] * last).astype(text.dtype)

    return joint() if control is None else lax.cond(control.isolated, isolated, joint)


def _attend_by_frame(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, precision: Precision) -> jax.Array:
    """Attention with a bias [B, F, K], a frame at a time: neither the probabilities nor the bias of every query
    exist all at once."""

    def one(frame: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, bias = frame
        return attention(q, k, v, bias[:, None, None], precision=precision)

    out = lax.map(one, (kab.by_frame(q, bias.shape[1]), jnp.moveaxis(bias, 1, 0)))
    return constrain(rearrange(out, "F B Q N D -> B (F Q) N D"), "data", "sequence", "tensor", None)


def _join(bias: CrossBias, keys: Branches) -> jax.Array | None:
    """Biases of the two image branches side by side; a missing one counts as zero."""
    if bias.first is None and bias.last is None:
        return None
    shape = (bias.first if bias.first is not None else bias.last).shape[:2]
    first = jnp.zeros((*shape, keys.first.shape[1])) if bias.first is None else bias.first
    last = jnp.zeros((*shape, keys.last.shape[1])) if bias.last is None else bias.last
    return jnp.concatenate([first, last], -1)


def report(
    q: jax.Array,
    keys: Branches,
    bias: CrossBias | None,
    control: CrossControl,
    precision: Precision = FLOAT32,
) -> CrossReport:
    """What `cross_attention` of the same arguments attends to, for plots; costs a second attention."""
    frames = control.strength.shape[1]
    total = add(kab.bias(q, keys, control, precision), bias)

    def looked_at(bias: CrossBias) -> Branches:
        def of(k: jax.Array, bias: jax.Array | None) -> jax.Array:
            return kab.frame_attention(q, k, frames, bias, precision=precision)

        text = of(keys.text, bias.text)
        if keys.first is None or keys.last is None:
            return Branches(text, None if keys.first is None else of(keys.first, bias.first))
        size = keys.first.shape[1]

        def joint() -> tuple[jax.Array, jax.Array]:
            both = of(jnp.concatenate([keys.first, keys.last], 1), _join(bias, keys))
            return both[..., :size], both[..., size:]

        def isolated() -> tuple[jax.Array, jax.Array]:
            return of(keys.first, bias.first), of(keys.last, bias.last)

        return Branches(text, *lax.cond(control.isolated, isolated, joint))

    return CrossReport(looked_at(CrossBias()), looked_at(total), total)
