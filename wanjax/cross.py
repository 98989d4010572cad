"""Cross-attention of Wan2.1 to text and images: joint or isolated branches, with or without a bias, in one form.

Every branch, the text and each image, is attended to by itself; its softmax leaves (max, log sum). A joint softmax over
the images is their sum with the shares that those give, an isolated one the sum with fixed weights, so that which it is
may be traced. Axis letters as in `types`, and Q queries of one frame, c a branch. Inside this file branches are lists,
the text first.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from wanjax import kab
from wanjax.attention import Residual, attention, parallel, xla
from wanjax.layout import TokenLayout
from wanjax.precision import FLOAT32, Precision
from wanjax.types import Branches, CrossBias, CrossControl


@struct.dataclass
class CrossReport:
    """Where the frames of one layer look: text [B, F, K], images [B, F, M, K], mean over heads and queries.

    Attributes:
      plain: without any bias.
      biased: with KAB's bias and the caller's.
      bias: their sum.
    Where the images are not isolated, they are parts of one distribution.
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
    strength: jax.Array | None = None,
    precision: Precision = FLOAT32,
    kernel: str = "xla",
    inspect: bool = False,
    layout: TokenLayout | None = None,
) -> tuple[jax.Array, CrossReport | None]:
    """One softmax over the text and one over all images together, summed; or as `control` says.

    Args:
      q: [B, S, N, d], as `layout` lays the tokens of F frames.
      keys, values: text [B, K, N, d], images [B, M, K, N, d].
      bias: a caller's, of one layer. KAB's is added to it.
      control: None is plain Wan2.1.
      strength: KAB's in this layer, float32 [B, F]; goes with a control.
      precision: policy of the model.
      kernel: of attention without a bias.
      inspect: report too, at the cost of the path with a bias; needs a control.
      layout: of the tokens; None is frame by frame, S a multiple of F, whatever the mesh.

    Returns:
      ([B, S, N, d] in the compute dtype, the report or None).

    Raises:
      ValueError: queries that are not F frames of equal size.
    """
    chex.assert_rank([q, keys.text, values.text], 4)
    dtype, own = jnp.dtype(precision.compute), bias or CrossBias()
    if layout is None:
        rows = [x for x in (own.text, own.images, strength) if x is not None]
        frames = rows[0].shape[1] if rows else 1
        if q.shape[1] % frames:
            raise ValueError(f"{q.shape[1]} queries are not {frames} frames of equal size")
        layout = parallel.layout(frames, q.shape[1] // frames, kernel)
        out, seen = cross_attention(
            layout.lay(q), keys, values, bias, control, strength, precision, kernel, inspect, layout
        )
        return layout.restore(out), seen
    control, strength = jax.tree.map(jnp.asarray, (control, strength))
    q, scale = parallel.scaled(jnp.asarray(q), precision.compute)
    asked = inspect or own.text is not None or own.images is not None

    def run(q, keys, values, rows, control, part, axes) -> tuple[jax.Array, CrossReport | None]:
        """What one device does, or all of it."""
        strength, own = rows
        k, v = _parts(keys, 1), _parts(values, 1)

        def biased() -> tuple[jax.Array, CrossReport | None]:
            return _by_frame(q, scale, k, v, own, control, strength, precision, inspect, layout, part, axes)

        def plain() -> tuple[jax.Array, None]:
            found = [attention(q, *kv, scale=scale, precision=precision, kernel=kernel, residual=True)
                     for kv in zip(k, v, strict=True)]  # fmt: skip
            weights = [weight for _, weight in _shares([residual for _, residual in found], control)]
            out = sum(jnp.expand_dims(w, -1) * x.astype(jnp.float32) for w, (x, _) in zip(weights, found, strict=True))
            return out.astype(dtype), None

        if asked:
            return biased()
        if control is None:
            return plain()
        # A layer or step outside KAB's window must cost nothing.
        return lax.cond(jnp.any(strength != 0), biased, plain)

    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731  before it travels
    return parallel.cross_attention(run, q, cast(keys), cast(values), (strength, own), control)


def _parts(of: Branches | CrossBias, axis: int) -> list[jax.Array]:
    """[text, image 1, ... image M]; M is an `axis` of the images."""
    return [jnp.asarray(of.text), *([] if of.images is None else jnp.unstack(of.images, axis=axis))]


def _shares(residuals: list[Residual], control: CrossControl | None) -> list[tuple[jax.Array, jax.Array]]:
    """What the softmax of each branch counts for (in frame attention, in the output): like its residual, or [].

    Isolated branches count whole in frame attention and by their weights in the output. Shares of a joint softmax come
    from differences of maxima, which are exact where the maxima are large; an image that is hidden whole has none.
    """
    one, images = jnp.float32(1), residuals[1:]
    top = functools.reduce(jnp.maximum, [m for m, _ in images], -jnp.inf * one)
    masses = [jnp.exp((m - jnp.where(top == -jnp.inf, 0, top)) + s) for m, s in images]
    total = sum(masses, 0 * one)
    joint = [one, *(mass / jnp.where(total == 0, 1, total) for mass in masses)]
    if control is None or len(images) < 2:
        return [(share, share) for share in joint]
    choose = functools.partial(jnp.where, control.isolated)
    return [(choose(one, share), choose(weight, share)) for share, weight in zip(joint, control.weights, strict=True)]


def _by_frame(
    q, scale, keys, values, own, control, strength, precision, inspect, layout: TokenLayout, part, axes
) -> tuple[jax.Array, CrossReport | None]:
    """Attention with KAB's bias and the caller's, a frame at a time: neither the probabilities nor the bias of every
    query exist all at once. A frame's logits serve its frame attention and its output; in between they are kept as the
    policy's products return them, and each softmax of them is in its own dtype.

    The anchors come first, to fill the carry with their frame attention; what they put out then is written again.
    Of several devices each has its `part` of every frame; the mean over a frame is a sum over `axes`.
    """
    softmax = jnp.dtype(precision.softmax)
    frames, nothing = layout.frames, jnp.zeros((q.shape[0], layout.frames, 1), jnp.float32)
    added = _parts(own.replace(text=nothing if own.text is None else own.text), 2)
    added += [nothing] * (len(keys) - len(added))
    q = layout.split(q)
    counted, count = layout.counted(part), layout.queries * lax.psum(q.shape[3], [a for a in axes if a == "tensor"])
    first, value = jnp.zeros(0, jnp.int32) if control is None else control.anchors, jnp.concatenate(values, 1)
    order = jnp.concatenate([first, jnp.arange(frames)])

    def attend(scores: list[jax.Array], look: bool) -> tuple[list[jax.Array] | None, list[jax.Array]]:
        """Logits -> (frame attention [B, K] or None, probabilities in the output [B, N, Q, K]), lists over c."""
        found = [xla.softmax(x.astype(softmax)) for x in scores]
        shares = _shares([residual for _, residual in found], control)
        weighed = [p * jnp.expand_dims(weight, -1) for (p, _), (_, weight) in zip(found, shares, strict=True)]
        if not look:
            return None, weighed
        looked = [(p * jnp.expand_dims(share, -1)).astype(jnp.float32) for (p, _), (share, _) in
                  zip(found, shares, strict=True)]  # fmt: skip
        looked = looked if counted is None else [x * counted[:, None] for x in looked]
        return [x / count for x in lax.psum([x.sum((1, 2)) for x in looked], axes)], weighed

    def turn(carry: tuple, step: tuple[jax.Array, jax.Array]) -> tuple[tuple, tuple | None]:
        (anchored, out), (index, frame) = carry, step
        scores, plain = [xla.logits(q[frame], k, scale, precision, kept=True) for k in keys], None
        bias = [x[:, frame] for x in added]
        if control is not None:
            plain, _ = attend(scores, True)
            place, curve = (jnp.arange(len(first)) == index)[:, None, None], control.curve[frame][:, None, None]
            anchored = [jnp.where(place, row, x) for x, row in zip(anchored, plain, strict=True)]
            targets = [(curve * x).sum(0) for x in anchored]
            bias = [kab.anchor_bias(row, target, strength[:, frame], control.floor) + x
                    for row, target, x in zip(plain, targets, bias, strict=True)]  # fmt: skip
        scores = [x.astype(softmax) + b[:, None, None].astype(softmax) for x, b in zip(scores, bias, strict=True)]
        biased, probabilities = attend(scores, inspect)
        mixed = xla.mix(jnp.concatenate(probabilities, -1), value, precision)
        out = lax.dynamic_update_index_in_dim(out, mixed.astype(out.dtype), frame, 0)
        return (anchored, out), (plain, biased, bias) if inspect else None

    anchored = [jnp.zeros((len(first), k.shape[0], k.shape[1]), jnp.float32) for k in keys]
    (_, out), seen = lax.scan(turn, (anchored, jnp.zeros_like(q)), (jnp.arange(len(order)), order))
    out = layout.join(out)
    if not inspect:
        return out, None
    seen = [[jnp.moveaxis(x[len(first) :], 0, 1) for x in part] for part in seen]
    return out, CrossReport(*map(_join, (Branches, Branches, CrossBias), seen))


def _join(kind: type, parts: list[jax.Array]) -> Branches | CrossBias:
    """Branches [B, F, K] as one value again."""
    return kind(parts[0], jnp.stack(parts[1:], 2) if len(parts) > 1 else None)
