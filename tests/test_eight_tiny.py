"""8-bit weights on the bundled model, whose weights are trained: how far its velocities and clips move."""

import jax
import numpy as np
import pytest
from eight import DTYPES
from reference import relative_error

from benchmarks.tiny.clips import clip
from benchmarks.tiny.evaluate import psnr
from convert import __main__ as command
from samplers import pipeline
from samplers.pipeline import Batch, Inputs, make
from samplers.plan import Plan, Settings
from wanjax import checkpoint, rope
from wanjax.dit import WanDiT

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
