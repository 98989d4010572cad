"""Guidance against its formula, and how often the model runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error

from wanjax.guidance import MODES, guided
from wanjax.types import Conditions

TEXT, NEGATIVE = (np.random.default_rng(i).normal(size=(2, 3, 4)).astype(np.float32) for i in range(2))
LATENTS = np.random.default_rng(2).normal(size=(2, 2, 4, 4, 16)).astype(np.float32)
CONDITIONS = Conditions(TEXT, latent=np.ones((2, 2, 4, 4, 20), np.float32))


def model(latents, timestep, conditions, control=None, bias=None):
    text = conditions.text.mean((1, 2))[:, None, None, None, None]
    return jnp.sin(latents * 3 + text) * timestep[:, None, None, None, None] + conditions.latent.mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 7.0])
def test_formula(mode, scale):
    out = jax.jit(lambda s: guided(model, CONDITIONS, NEGATIVE, s, mode)(jnp.asarray(LATENTS), 0.5))(scale)
    conditional, unconditional = (
        np.float64(model(LATENTS, np.full(2, 0.5), CONDITIONS.replace(text=t))) for t in (TEXT, NEGATIVE)
    )
    assert relative_error(out, unconditional + scale * (conditional - unconditional)) < 1e-6
    if scale == 1:
        assert relative_error(out, conditional) < 1e-7


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale, rows", [(1.0, 2), (3.0, 4)])
def test_scale_one_runs_one_pass(mode, scale, rows):
    """The samples that the model really computed, counted on the host."""
    seen = []

    def counting(latents, timestep, conditions, control, bias):
        jax.debug.callback(lambda: seen.append(latents.shape[0]))
        return model(latents, timestep, conditions)

    run = jax.jit(lambda s: guided(counting, CONDITIONS, NEGATIVE, s, mode)(jnp.asarray(LATENTS), 0.5))
    run(scale).block_until_ready()
    jax.effects_barrier()
    assert sum(seen) == rows


def test_unknown_mode():
    with pytest.raises(ValueError, match="guidance mode 'both': choose one of sequential, batched"):
        guided(model, CONDITIONS, NEGATIVE, 1.0, "both")
