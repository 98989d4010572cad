"""8-bit models for tests: NANO's parameters quantised by a plain loop in float64, apart from the product's function."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

DTYPES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
LARGEST = {"int8": 127, "fp8": 448}
NAMES = {"int8": "int8", "fp8": "float8_e4m3fn"}
KERNELS = {f"self_attn/{name}" for name in "qkvo"} | {"ffn_in", "ffn_out"} | {
    f"cross_attn/{name}" for name in (*"qkvo", "k_image", "v_image")
}  # fmt: skip


def eight(config, weights):
    """The same transformer (or whole model) with 8-bit kernels."""
    if hasattr(config, "dit"):
        return dataclasses.replace(config, dit=eight(config.dit, weights))
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, kernel=NAMES[weights]))


def codes(matrix, weights):
    """float64 oracle of one matrix [I, O]: codes as float64, factors [1, O] float32."""
    wide = np.asarray(matrix, np.float64)
    factor = np.abs(wide).max(0, keepdims=True).astype(np.float32) / np.float32(LARGEST[weights])
    factor[factor == 0] = np.finfo(np.float32).tiny
    scaled = (wide / factor).astype(np.float32)
    return (np.round(scaled) if weights == "int8" else scaled.astype(DTYPES["fp8"])).astype(np.float64), factor


def quantised(dit, weights):
    """The tree of a transformer's parameters with the kernels of its blocks as codes and factors."""
    flat = flatten_dict(jax.tree.map(np.asarray, dit), sep="/")
    for path in [f"blocks/{name}/kernel" for name in KERNELS if f"blocks/{name}/kernel" in flat]:
        layers = [codes(layer, weights) for layer in flat[path]]
        flat[path] = np.stack([own for own, _ in layers]).astype(DTYPES[weights])
        flat[path.replace("kernel", "factor")] = np.stack([factor for _, factor in layers])
    return unflatten_dict(flat, sep="/")
