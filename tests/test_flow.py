"""The flow-matching objective against float64 and against the formula that the tiny model was trained by."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.training_utils import compute_loss_weighting_for_sd3
from nano import NANO, random_params
from scipy.stats import kstest, norm
from torch import from_numpy

from benchmarks.tiny import train_dit
from samplers import schedule
from wanjax import flow, rope
from wanjax.dit import WanDiT
from wanjax.types import Conditions

KEY = jax.random.key(3)
DATA = np.random.default_rng(0).normal(size=(8, 2, 4, 4, 16)).astype(np.float32)
DENSITIES = {
    "uniform": (flow.uniform, lambda u: u),
    "logit-normal": (flow.logit_normal, lambda u: 1 / (1 + np.exp(-norm.ppf(u)))),
    "moved": (partial(flow.logit_normal, mean=0.5, std=0.7), lambda u: 1 / (1 + np.exp(-0.5 - 0.7 * norm.ppf(u)))),
}


def present_loss(config, params, batch, key):
    """The objective as it stood in train_dit when the bundled model was trained, to the letter."""
    time_key, order_key, noise_key = jax.random.split(key, 3)
    size = batch.latents.shape[0]
    strata = jax.random.permutation(order_key, size)
    sigma = schedule.shifted((strata + jax.random.uniform(time_key, (size,))) / size, 3.0)
    noise = jax.random.normal(noise_key, batch.latents.shape)
    level = sigma[:, None, None, None, None]
    noisy = (1 - level) * batch.latents + level * noise
    grid = tuple(n // one for n, one in zip(noisy.shape[1:4], config.dit.patch_size, strict=True))
    velocity = WanDiT(config.dit).apply(
        {"params": params["dit"]}, noisy, schedule.TRAIN_TIMESTEPS * sigma,
        train_dit.encode_conditions(config, params, batch), rope.table(grid, config.dit.head_dim),
    )  # fmt: skip
    return jnp.square(velocity - (noise - batch.latents)).mean()


def test_the_tiny_trainer_has_the_loss_it_had():
    """Bit for bit."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (8, 2, 16, 16, 3)).astype(np.uint8)
    batch = train_dit.Batch(DATA, DATA[::-1].copy(), np.ones((8, 2, 4), np.float32), rng.integers(3, 15, (8, 4)),
                            np.ones((8, 4), np.int32), images, np.ones((8, 2), bool))  # fmt: skip
    params = random_params(NANO)
    found, expected = (jax.jit(partial(loss, NANO))(params, batch, KEY) for loss in (train_dit.loss_of, present_loss))
    assert float(found) > 0.1 and float(found) == float(expected)


def test_shift_and_timesteps_are_those_of_sampling():
    s = np.linspace(0, 1, 11)
    np.testing.assert_allclose(flow.shifted(s, 16.0), schedule.shifted(s, 16.0), rtol=1e-15)
    assert flow.TRAIN_TIMESTEPS == schedule.TRAIN_TIMESTEPS


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_levels_against_float64(name, shift):
    """Every number of a batch is the quantile of its own stratum; over many batches the density is the named one."""
    density, oracle = DENSITIES[name]
    batches = jax.vmap(lambda key: flow.draw(key, jnp.zeros((8, 1)), density, shift).sigma)(jax.random.split(KEY, 500))
    batches = np.asarray(batches, np.float64)
    edges = flow.shifted(oracle(np.arange(9) / 8), shift)
    ordered = np.sort(batches, -1)
    assert (ordered >= edges[:-1] - 1e-6).all() and (ordered <= edges[1:] + 1e-6).all()
    grid = np.linspace(0, 1, 100_001)
    cdf = lambda x: np.interp(x, flow.shifted(oracle(grid), shift), grid)  # noqa: E731
    assert kstest(batches[:, 0], cdf).pvalue > 1e-3, "one place of the batch alone is not drawn from the density"
    assert abs(np.corrcoef(batches[:, 0], np.arange(500))[0, 1]) < 0.2
    u = np.linspace(0.001, 0.999, 99)
    np.testing.assert_allclose(density(jnp.float32(u)), oracle(u), rtol=2e-5)


def test_densities_are_finite_at_the_ends():
    np.testing.assert_array_equal(flow.logit_normal(jnp.array([0.0, 1.0])), [0, 1])


def test_noising_target_and_loss_against_float64():
    rng = np.random.default_rng(2)
    data, noise, predicted = (rng.normal(size=(3, 2, 4, 4, 16)) for _ in range(3))
    sigma, weight = rng.random(3), rng.random(3)
    ours = [jnp.float32(x) for x in (data, noise, predicted, sigma, weight)]
    noisy = np.stack([(1 - s) * d + s * n for s, d, n in zip(sigma, data, noise, strict=True)])
    np.testing.assert_allclose(flow.noised(ours[0], ours[1], ours[3]), noisy, rtol=1e-5, atol=1e-6)
    target = flow.velocity(ours[0], ours[1])
    np.testing.assert_allclose(target, noise - data, rtol=1e-5, atol=1e-6)
    errors = ((predicted - (noise - data)) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(flow.mse(ours[2], target), errors.mean(), rtol=1e-6)
    np.testing.assert_allclose(flow.mse(ours[2], target, ours[4]), (weight * errors).mean(), rtol=1e-6)
    # From any level, a step of -sigma along the velocity ends at the data.
    back = flow.noised(ours[0], ours[1], ours[3]) - ours[3][:, None, None, None, None] * target
    np.testing.assert_allclose(back, data, atol=1e-5)


def test_a_drawn_batch_is_consistent():
    drawn = flow.draw(KEY, DATA, flow.logit_normal, 3.0)
    noise = np.asarray(drawn.velocity) + DATA
    np.testing.assert_allclose(drawn.noisy, flow.noised(DATA, noise, drawn.sigma), atol=1e-5)
    np.testing.assert_array_equal(drawn.timestep, 1000 * drawn.sigma)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    jax.tree.map(np.testing.assert_array_equal, drawn, flow.draw(KEY, DATA, flow.logit_normal, 3.0))
    assert not np.array_equal(drawn.noisy, flow.draw(jax.random.key(4), DATA, flow.logit_normal, 3.0).noisy)


def test_gradients_against_the_derivative():
    """Of a linear prediction a * noisy: d loss / d a by hand in float64, and of the density by differences."""
    drawn = flow.draw(KEY, DATA, shift=3.0)

    def loss(a, weight):
        return flow.mse(a * drawn.noisy, drawn.velocity, weight)

    weight = flow.cosmap(drawn.sigma)
    noisy, target = (np.asarray(x, np.float64) for x in (drawn.noisy, drawn.velocity))
    for own in (None, weight):
        rows = 1 if own is None else np.asarray(own, np.float64)[:, None, None, None, None]
        expected = (rows * 2 * (0.3 * noisy - target) * noisy).mean()
        np.testing.assert_allclose(jax.grad(loss)(0.3, own), expected, rtol=1e-5)
    jax.test_util.check_grads(flow.logit_normal, (jnp.array([0.1, 0.5, 0.9]),), 1, rtol=1e-2)


def test_weights_are_those_of_diffusers():
    sigma = np.linspace(0, 1, 21, dtype=np.float32)
    expected = compute_loss_weighting_for_sd3("cosmap", from_numpy(sigma)).numpy()
    np.testing.assert_allclose(flow.cosmap(sigma), expected, rtol=1e-6)
    np.testing.assert_allclose(flow.cosmap((np.arange(10_000) + 0.5) / 10_000).mean(), 1, rtol=1e-6)


def conditions(images=True, fill=1.0, size=400):
    made = np.full((size, 2, 5, 3), fill, np.float32), np.full((size, 2, 4, 4, 20), fill, np.float32)
    return Conditions(np.full((size, 8, 6), fill, np.float32), *(made if images else (None, None)))


def test_captions_are_dropped_at_their_rate_and_nothing_else():
    empty = np.arange(48, dtype=np.float32).reshape(8, 6) - 100
    found = jax.jit(partial(flow.drop_captions, rate=0.1))(KEY, conditions(), empty)
    gone = (np.asarray(found.text) == empty).all((1, 2))
    assert 20 < gone.sum() < 65 and (np.asarray(found.text)[~gone] == 1).all()
    assert (np.asarray(found.images) == 1).all() and (np.asarray(found.latent) == 1).all()
    np.testing.assert_array_equal(gone, ~np.asarray(flow.kept(KEY, 400, 0.1)))
    for rate, count in ((0.0, 400), (1.0, 0)):
        assert int(flow.kept(KEY, 400, rate).sum()) == count


def test_keyframes_are_dropped_together_and_the_text_stays():
    found = flow.drop_keyframes(KEY, conditions(), conditions(fill=0.0), 0.3)
    images, latent = (np.asarray(x) for x in (found.images, found.latent))
    gone = (images == 0).all((1, 2, 3))
    assert 80 < gone.sum() < 160
    np.testing.assert_array_equal(gone, (latent == 0).all((1, 2, 3, 4)))
    assert (images[~gone] == 1).all() and (latent[~gone] == 1).all() and (np.asarray(found.text) == 1).all()
    plain = flow.drop_keyframes(KEY, conditions(images=False), conditions(images=False, fill=0.0), 1.0)
    assert plain.images is None and plain.latent is None


@pytest.mark.parametrize("call, message", [
    (lambda: flow.draw(KEY, DATA, shift=0.0), "shift: got 0.0"),
    (lambda: flow.draw(KEY, DATA, shift=float("nan")), "shift: got nan"),
    (lambda: flow.draw(KEY, DATA.astype(np.float16)), "data: is float16"),
    (lambda: flow.kept(KEY, 3, 1.5), "rate: got 1.5"),
])  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
