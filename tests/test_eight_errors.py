"""How far 8 bits move what comes out: velocities and clips of the bundled model, and a random block of full width."""

import dataclasses

import jax
import numpy as np
import pytest
from eight import DTYPES, KERNELS, NAMES
from flax.traverse_util import flatten_dict, unflatten_dict
from reference import relative_error

from benchmarks.random_model import params as random_params
from benchmarks.tiny.clips import clip
from benchmarks.tiny.evaluate import psnr
from convert import __main__ as command
from samplers import pipeline
from samplers.pipeline import Batch, Inputs, make
from samplers.plan import Plan, Settings
from wanjax import checkpoint, rope, shapes
from wanjax.config import DiTConfig
from wanjax.dit import Block, WanDiT
from wanjax.layout import TokenLayout
from wanjax.precision import Precision
from wanjax.quantise import quantise
from wanjax.types import Branches

VELOCITY = {"int8": 0.006, "fp8": 0.014}
"""Relative root mean square, at most, against the same policy with its kernels whole."""
CLIPS = {"int8": 56.0, "fp8": 48.0}
"""PSNR in dB, at least, in the mean, from the clips of the float32 model with the same seeds."""


@pytest.fixture(scope="module")
def told():
    """What the transformer is told of two held-out clips, and noise."""
    model = checkpoint.load("tiny")
    plan = Plan.of(model.config, Settings.of(model.config))
    clips = [clip(seed, "heldout") for seed in (0, 1)]
    inputs = Inputs.prepare([(c.video[0], c.video[-1]) for c in clips], plan)
    (encoded,) = pipeline.encode(model, plan, [inputs], [[c.caption for c in clips]])
    return encoded.conditions, jax.random.normal(jax.random.key(0), (2, *plan.latent_shape))


def velocity(dtype, weights, told):
    model = checkpoint.load("tiny", dtype, weights=weights, policy="stage")
    config = model.config.for_platform("cpu").dit
    conditions, latents = told
    frames, height, width = latents.shape[1:4]
    table = rope.table((frames, height // 2, width // 2), config.head_dim)
    times = np.float32([700, 300])
    return jax.jit(WanDiT(config).apply)({"params": model.part("dit")}, latents, times, conditions, table)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_velocities(told, dtype):
    plain = velocity(dtype, None, told)
    for weights, limit in VELOCITY.items():
        made = velocity(dtype, weights, told)
        for own, wanted in zip(made, plain, strict=True):
            assert limit / 10 < relative_error(own, wanted) <= limit, weights


@pytest.mark.slow
@pytest.mark.parametrize("weights", sorted(DTYPES))
def test_clips(tmp_path, weights):
    """Eight held-out clips, three seeds, ten steps; the folder is that of `python -m convert`, so bfloat16 products."""
    assert command.main([str(checkpoint.bundled()), str(tmp_path / "m"), "--dtype", weights]) == 0
    clips, found = [clip(seed, "heldout") for seed in range(8)], {}
    for name in ("tiny", tmp_path / "m"):
        model = checkpoint.load(name)
        plan = Plan.of(model.config, Settings.of(model.config, steps=10))
        inputs = Inputs.prepare([(c.video[0], c.video[-1]) for c in clips], plan)
        captions = [c.caption for c in clips]
        found[name] = np.concatenate([
            make(model, plan, [Batch(inputs, captions, [seed] * len(clips))], chunk=10)[0].video for seed in (0, 1, 2)
        ])  # fmt: skip
    plain, made = found.values()
    assert psnr(made, plain).mean() >= CLIPS[weights]


BLOCK = {"int8": 0.02, "fp8": 0.05}
"""Relative root mean square, at most, of what the block adds."""


@pytest.mark.slow
def test_a_block_of_full_width():
    """Width 5120 and 13824, random weights, 64 tokens: what it adds to them, against the same policy unquantised."""
    rng = np.random.default_rng(0)
    layout = TokenLayout.of(4, 16)
    table = rope.table((4, 4, 4), 128)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    x, six = normal(1, 64, 5120), normal(1, 6, 5120)
    context = Branches(normal(1, 32, 5120), normal(1, 2, 9, 5120))
    whole = DiTConfig(num_layers=1, precision=Precision(param="bfloat16"))
    plain = flatten_dict(jax.tree.map(lambda leaf: leaf[0], random_params(
        {"blocks": shapes.dit(whole)["blocks"]})["blocks"]), sep="/")  # fmt: skip

    def added(compute, weights):
        params, precision = dict(plain), Precision("bfloat16", compute, kernel=weights and NAMES[weights])
        for name in KERNELS if weights else ():
            codes, factor = quantise(np.asarray(params[f"{name}/kernel"]), DTYPES[weights])
            params |= {f"{name}/kernel": codes, f"{name}/factor": factor}
        block = Block(dataclasses.replace(whole, precision=precision), layout)
        out, _ = jax.jit(block.apply)(
            {"params": unflatten_dict(params, sep="/")}, x, None, None, six, context, table, None
        )
        return np.asarray(out, np.float64) - x

    for compute in ("float32", "bfloat16"):
        wanted = added(compute, None)
        for weights, limit in BLOCK.items():
            assert limit / 10 < relative_error(added(compute, weights), wanted) <= limit, (compute, weights)
