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
from nano import write_model, write_orbax
from reference import relative_error
from test_hosts import begin, end, free_port
from test_parallel import CONFIG, case, run

from wanjax import shapes, sharding
from wanjax.dit import WanDiT
from wanjax.precision import BFLOAT16

WEIGHTS = sorted(DTYPES)


@functools.cache
def one_device(weights):
    params, *rest = case()
    return run(eight(CONFIG, weights), quantised(params, weights), *rest)[0]


@pytest.mark.parametrize("sizes", [
    {"data": 2, "sequence": 2, "tensor": 2}, pytest.param({"fsdp": 2, "sequence": 4}, marks=pytest.mark.slow),
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


@pytest.mark.parametrize("policy", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
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


READ = """
import sys
from pathlib import Path
import jax, numpy as np
from eight import eight, quantised
from nano import NANO, random_params
from wanjax import checkpoint, hosts, sharding, store
with hosts.Company("read") as company:
    company.join(sys.argv[1])
    for folder in sys.argv[2:]:
        params = store.restore(Path(folder), "dit", checkpoint.param_shapes(eight(NANO, "int8"))["dit"],
                               sharding.make_mesh({"fsdp": 4, "sequence": 2}))
        wanted, split = quantised(random_params(NANO)["dit"], "int8"), 0
        for leaf, own in zip(*map(jax.tree.leaves, (params, wanted)), strict=True):
            split += leaf.dtype == np.int8 and not leaf.sharding.is_fully_replicated
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, own[shard.index])
        print("split", split)
    company.done()
"""


def test_hosts_quantise_what_they_share(tmp_path):
    """Two processes of four devices: codes are of all inputs, though each host keeps its own rows."""
    folders = [write_model(tmp_path / "model"), write_orbax(tmp_path / "orbax")]
    port = free_port()
    results = end([begin(["-c", READ, f"127.0.0.1:{port},{number},2", *folders], 4) for number in (0, 1)])
    assert [code for code, *_ in results] == [0, 0], results
    assert [out for _, out, _ in results] == [["split 12", "split 12"]] * 2
