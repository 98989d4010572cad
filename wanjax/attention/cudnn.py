"""The fused attention of cuDNN, for half-precision policies on NVIDIA GPUs."""

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.attention import xla
from wanjax.precision import Precision


def attend(
    q, k, v, bias, valid: np.ndarray | None, scale: float, precision: Precision, residual: bool
) -> tuple[jax.Array, xla.Residual | None]:
    """The kernel "cudnn"; the log sum of its residual holds the whole log-sum-exp beside a maximum of 0.

    Left to "xla" is what it refuses: float32, head widths over 128 or no multiples of 8, and biases (it wants them
    whole over queries and in half precision). Keys that do not count are taken out before: it knows of padding only
    at the end. Several devices call it from within `parallel`, for its own partitioning rule does not split queries.

    Raises:
      ValueError: the residual is differentiated, which cuDNN's backward pass would ignore.
    """
    half = precision.compute in ("bfloat16", "float16")
    if not half or bias is not None or q.shape[-1] % 8 or q.shape[-1] > 128:
        return xla.attend(q, k, v, bias, valid, scale, precision, residual)
    if valid is not None and not valid.all():
        k, v = (jnp.take(x, np.flatnonzero(valid), axis=1) for x in (k, v))
    if not residual:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn"), None
    # The public function rounds the log-sum-exp to the output's dtype: its shares would be off by several percent.
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    out, log_sum_exp = dot_product_attention(q, k, v, scale=scale, return_residual=True)
    log_sum_exp = _without_gradient(jnp.moveaxis(log_sum_exp, 1, 2).astype(jnp.float32))
    return out, (jnp.zeros_like(log_sum_exp), log_sum_exp)


@jax.custom_jvp
def _without_gradient(x: jax.Array) -> jax.Array:
    return x


@_without_gradient.defjvp
def _refuse(primals, tangents):
    raise ValueError('attention kernel "cudnn" has no gradient of its log-sum-exp: train with attention="xla"')
