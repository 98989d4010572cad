"""8-bit kernels where they run: on several devices as on one, and never a stack of them in floats."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight import DTYPES, KERNELS, eight, quantised
from flax.traverse_util import flatten_dict
from reference import relative_error
from test_parallel import CONFIG, case, run

from wanjax import shapes, sharding
from wanjax.config import BFLOAT16
from wanjax.dit import WanDiT

WEIGHTS = sorted(DTYPES)


@functools.cache
def one_device(weights):
    params, *rest = case()
    return run(eight(CONFIG, weights), quantised(params, weights), *rest)[0]


@pytest.mark.parametrize("sizes", [
    {"fsdp": 2, "sequence": 4}, {"data": 2, "sequence": 2, "tensor": 2},
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow), pytest.param({"tensor": 4}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("weights", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_every_mesh_computes_the_same(sizes, weights):
    params, latents, conditions, *rest = case()
    params = quantised(params, weights)
    mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
    with jax.set_mesh(mesh):
        inputs = sharding.shard_batch((latents, conditions), mesh)
        out, _ = run(eight(CONFIG, weights), sharding.shard_params(params, mesh), *inputs, *rest)
    assert relative_error(out, one_device(weights)) <= 1e-5
    kernel = sharding.shard_params(params, mesh)["blocks"]["ffn_out"]["kernel"]
    assert kernel.dtype == DTYPES[weights] and not kernel.sharding.is_fully_replicated


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_no_stack_of_kernels_exists_in_floats(policy):
    """The compiled module of three steps: every array of kernels with the layer axis is of codes, inside the loop over
    steps and outside."""
    layers = 5
    precision = BFLOAT16 if policy == "bfloat16" else CONFIG.precision
    plain = dataclasses.replace(CONFIG, num_layers=layers, precision=precision)
    _, latents, conditions, table, *_ = case()
    model = WanDiT(eight(plain, "int8"))
    params = shapes.dit(model.config)

    def steps(params, latents):
        def step(x, t):
            return x - 0.1 * model.apply({"params": params}, x, t * jnp.ones(2), conditions, table), None

        return jax.lax.scan(step, latents, jnp.array([900.0, 500.0, 100.0]))[0]

    compiled = jax.jit(steps).lower(params, latents).compile({"xla_backend_optimization_level": 3})
    flat = flatten_dict(params["blocks"], sep="/")
    kernels = {",".join(map(str, flat[f"{name}/kernel"].shape)) for name in KERNELS}
    assert len(kernels) == 3
    found = re.findall(r"\b(\w+)\[([\d,]+)\]", compiled.as_text())
    assert {dtype for dtype, shape in found if shape in kernels} == {"s8"}
