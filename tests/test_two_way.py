"""Time-reversal fusion and ViBiDSampler against their steps written out with the model itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano import NANO, write_model
from reference import relative_error

from benchmarks.tgi import generate, two_way
from benchmarks.tgi.arms import choose
from benchmarks.tgi.generate import Batch, Clips
from benchmarks.tgi.two_way import Options
from samplers import schedule
from samplers.plan import Plan, Settings
from wanjax import checkpoint, vae
from wanjax.dit import WanDiT

FRAMES = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.load(write_model(tmp_path_factory.mktemp("models") / "nano"))


@pytest.fixture(scope="module")
def setup(model):
    truth = np.random.default_rng(0).integers(0, 256, (2, FRAMES, 16, 24, 3), dtype=np.uint8)
    settings = Settings.of(NANO, frames=FRAMES, steps=2, guidance=2.0)
    told, backwards = ["a red circle", "a blue square"], ["a circle moves left", None]
    ends = [(video[0], video[-1]) for video in truth]
    batch = Batch(model, model, settings, Clips(["a", "b"], told, backwards, ends, truth))
    return batch, settings


def velocity(model, settings, conditions, negative, latents, sigma):
    """Guided velocity at a noise level, two plain passes."""
    method = Plan.of(model.config, settings).method
    dit = WanDiT(model.config.dit)
    told, untold = (
        dit.apply({"params": model.params["dit"]}, latents, jnp.full(2, 1000 * sigma), c, method.table)
        for c in (conditions, conditions.replace(text=negative))
    )
    return untold + settings.guidance * (told - untold)


def test_conditions_hold_one_keyframe(setup):
    batch, _ = setup
    told = batch.encoded.conditions
    _, forwards, backwards, _ = batch.one_way
    for place, one in enumerate((forwards, backwards)):
        np.testing.assert_allclose(one.images[:, 0], told.images[:, place], rtol=1e-5, atol=1e-6)
        assert not np.asarray(one.images[:, 1]).any()
        given = np.asarray(one.latent)[..., :4]
        assert (given[:, 0] == 1).all() and not given[:, 1:].any()
    assert not np.array_equal(forwards.latent, backwards.latent)


def test_each_direction_is_told_what_it_shows(model, setup):
    """What nobody says stays without a prompt."""
    batch, settings = setup
    _, forwards, backwards, _ = batch.one_way
    for conditions, prompts in (
        (forwards, ["a red circle", "a blue square"]),
        (backwards, ["a circle moves left", ""]),
    ):
        other = Batch(model, None, settings, dataclasses.replace(batch.clips, captions=prompts))
        np.testing.assert_allclose(conditions.text, other.encoded.conditions.text, rtol=1e-5, atol=1e-6)
    assert not np.allclose(forwards.text, backwards.text, atol=1e-3)


def reversal(model, flip):
    """Latents -> latents of the reversed video."""
    params, config = model.params["vae"], model.config.vae
    if flip == "latent":
        return lambda data: data[:, ::-1]
    return lambda data: vae.encode(config, params, vae.decode(config, params, data)[:, ::-1])


def fresh(keys, row, shape):
    """The noise that is put back after evaluation number `row`, a sample at a time."""
    return jnp.stack(
        [jax.random.normal(jax.random.fold_in(key, row), shape[1:]) for key in (keys[n] for n in range(shape[0]))]
    )


def behind(model, settings, conditions, negative, reverse, x, ahead, here):
    """The estimate of the backwards direction, in forward time."""
    rest = (x - (1 - here) * ahead) / here
    turned = (1 - here) * reverse(ahead) + here * rest[:, ::-1]
    return reverse(turned - here * velocity(model, settings, conditions, negative, turned, here))


@pytest.mark.parametrize(
    "flip, repeats",
    [
        ("latent", 0),
        pytest.param("pixel", 0, marks=pytest.mark.slow),
        pytest.param("latent", 1, marks=pytest.mark.slow),
    ],
)
def test_trf_is_a_weighted_sum_of_both_directions(model, setup, flip, repeats):
    """With repeats, each step of the first half is taken again from renewed noise."""
    batch, settings = setup
    _, forwards, backwards, negative = batch.one_way
    options, noise, keys = Options("trf", flip, repeats=repeats), batch.noise(0), batch.keys(0, 4)
    made = two_way.sample(model, forwards, backwards, negative, settings, options, noise, keys)
    reverse = reversal(model, flip)

    @jax.jit
    def expected(x):
        levels = schedule.sigmas(settings.schedule, settings.steps, settings.shift)
        weight = jnp.linspace(1, 0, x.shape[1])[None, :, None, None, None]
        steps = [(here, after, here) for here, after in zip(levels[:1], levels[1:2], strict=True)] * repeats
        steps += [(here, after, after) for here, after in zip(levels[:-1], levels[1:], strict=True)]
        for row, (here, after, back) in enumerate(steps):
            ahead = x - here * velocity(model, settings, forwards, negative, x, here)
            data = weight * ahead + (1 - weight) * behind(
                model, settings, backwards, negative, reverse, x, ahead, here
            )  # fmt: skip
            x = data + after / here * (x - data)
            if back > after:  # from the mixture at `after` to that at `back`
                keep = (1 - back) / (1 - after)
                x = keep * x + np.sqrt(back**2 - (keep * after) ** 2) * fresh(keys, row, x.shape)
        return x

    assert relative_error(made, expected(noise)) < 2e-5


@pytest.mark.parametrize("flip", ["latent", pytest.param("pixel", marks=pytest.mark.slow)])
def test_vibid_goes_both_ways_in_every_step(model, setup, flip):
    batch, settings = setup
    _, forwards, backwards, negative = batch.one_way
    settings = dataclasses.replace(settings, steps=1)
    noise, keys, reverse = batch.noise(0), batch.keys(5, 4), reversal(model, flip)
    made = two_way.sample(model, forwards, backwards, negative, settings, Options("vibid", flip), noise, keys)

    @jax.jit
    def expected(x):
        here = schedule.sigmas(settings.schedule, 1, settings.shift)[0]
        ahead = x - here * velocity(model, settings, forwards, negative, x, here)
        x = (1 - here) * ahead + here * fresh(keys, 0, x.shape)
        return behind(model, settings, backwards, negative, reverse, x, ahead, here)

    assert relative_error(made, expected(noise)) < 2e-5


@pytest.mark.parametrize("name", ["trf", "vibid"])
def test_the_arm_is_the_scheme(model, setup, name):
    """And a clip's video does not depend on the others of its batch, its renewed noise included."""
    batch, settings = setup
    (arm,) = choose([name])
    noise, keys = batch.noise(3), batch.keys(3, 4)
    made = generate.make(arm, batch, 3)
    latents = two_way.sample(*batch.one_way, settings, arm.options, noise, keys)
    np.testing.assert_array_equal(made, batch.decode(latents))
    clips = batch.clips
    turned = Clips(
        clips.ids[::-1], clips.captions[::-1], clips.backwards[::-1], clips.keyframes[::-1], clips.truth[::-1]
    )
    other = generate.make(arm, Batch(model, model, settings, turned), 3)
    assert np.abs(other[::-1].astype(int) - made).max() <= 1


def test_order_of_steps():
    """Of each evaluation the level it starts from; the one that fresh noise brings it back to, from the row's own
    numbers: the data's share after the update is 1 - that level."""
    levels = np.array([1.0, 0.8, 0.5, 0.0])
    for options, sigma, back in (
        (Options("trf", repeats=2, repeat_share=0.34), [1, 1, 1, 0.8, 0.8, 0.8, 0.5], [1, 1, 0.8, 0.8, 0.8, 0.5, 0]),
        (Options("vibid"), [1, 1, 0.8, 0.8, 0.5, 0.5], [1, 0.8, 0.8, 0.5, 0.5, 0]),
    ):
        table = two_way.rows(options, levels)
        live = table.live
        np.testing.assert_allclose(table.step.sigma[live], sigma, rtol=1e-6)
        ratio, kept, _ = table.step.predictor[live].T
        data = kept + ratio * (1 - np.array(sigma))
        np.testing.assert_allclose(1 - data, back, atol=1e-6)
    np.testing.assert_array_equal(table.extra[live], [0, 1] * 3)


@pytest.mark.parametrize("level, higher", [(0.3, 0.7), (0.0, 0.5), (0.5, 0.5), (0.9, 1.0)])
def test_renoise_reaches_the_higher_level(level, higher):
    """From x = (1 - a) data + a noise, the mixture at b has (1 - b) of the data and variance b^2 of noise."""
    rng = np.random.default_rng(0)
    data, first, second = (rng.normal(size=200_000) for _ in range(3))
    keep, deviation = two_way.renoise(np.array(level), np.array(higher))
    made = keep * ((1 - level) * data + level * first) + deviation * second
    share = (made * data).mean()
    assert share == pytest.approx(1 - higher, abs=0.01)
    assert np.std(made - (1 - higher) * data) == pytest.approx(higher, abs=0.01)
    if level == higher:
        np.testing.assert_allclose(made, (1 - level) * data + level * first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [{"scheme": "other"}, {"flip": "other"}, {"repeats": -1}, {"repeat_share": 2.0}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad)).split("_")[0]):
        Options(**{"scheme": "trf"} | bad)
