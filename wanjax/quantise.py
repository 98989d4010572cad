"""8-bit kernels: codes in int8 or float8 and one factor for each output channel, from float kernels, on the host."""

from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np

BOUNDS: Mapping[np.dtype, float] = MappingProxyType(
    {np.dtype(np.int8): 127.0, np.dtype(ml_dtypes.float8_e4m3fn): 448.0}
)
"""The largest code of each dtype; int8's is the same on both sides."""


def quantise(kernel: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes whose products with their factors are nearest to the kernel.

    Args:
      kernel: [..., I, O] of any float dtype; worked on a matrix at a time, in float32.
      dtype: one of BOUNDS.

    Returns:
      codes [..., I, O] in that dtype, and factors [..., 1, O] float32: the channel's largest size over the largest
      code, positive also where a channel is all zeros.

    Raises:
      ValueError: NaN or inf in the kernel.
    """
    dtype = np.dtype(dtype)
    codes, factors = np.empty(kernel.shape, dtype), np.empty((*kernel.shape[:-2], 1, kernel.shape[-1]), np.float32)
    for index in np.ndindex(kernel.shape[:-2]):
        with np.errstate(over="ignore"):  # of float64: becomes inf, and is refused
            matrix = np.array(kernel[index], np.float32)
        # Not abs().max(): that would be one more matrix. NaN passes through both.
        size = np.maximum(matrix.max(-2, keepdims=True), -matrix.min(-2, keepdims=True))
        if not np.isfinite(size).all():
            raise ValueError("NaN or inf in a kernel, which 8 bits cannot hold; its file is damaged, get it again")
        factors[index] = np.maximum(size / np.float32(BOUNDS[dtype]), np.finfo(np.float32).tiny)
        matrix /= factors[index]
        codes[index] = (np.rint(matrix, out=matrix) if dtype == np.int8 else matrix).astype(dtype)
    return codes, factors
