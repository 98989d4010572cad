"""The whole pipeline on a random model: what recompiles, guidance, failure, sharding, batches."""

import dataclasses
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from nano import NANO, write_model
from reference import relative_error

from samplers import pipeline
from samplers.pipeline import Keyframes, Settings
from samplers.sample import Progress
from wanjax import checkpoint, sharding
from wanjax.method import METHODS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.load(write_model(tmp_path_factory.mktemp("models") / "nano"))


def images(seed=0, shape=(20, 30, 3)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2)]


def settings(**changes):
    return Settings.of(NANO, prompt="a red circle moves left", **changes)


@contextmanager
def count_compilations():
    """A list that grows by one at every XLA compilation inside the block."""
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_values_do_not_recompile(model, mode):
    progress = Progress()
    first, last = images()
    base = settings(guidance_mode=mode)
    with count_compilations() as compiled:
        plain = pipeline.inbetween(model, first, last, base, progress)
    assert compiled, "the counter sees compilations"
    changes = [
        {"prompt": "a blue square moves up over"}, {"seed": 7}, {"guidance": 4.5}, {"guidance": 1.0},
        {"shift": 11.0}, {"solver": "euler"}, {"grid": "linear"}, {"negative_prompt": "red"},
    ]  # fmt: skip
    with count_compilations() as compiled:
        runs = [pipeline.inbetween(model, first, last, dataclasses.replace(base, **c), progress) for c in changes]
        runs.append(pipeline.inbetween(model, *images(seed=1), base, progress))
        again = pipeline.inbetween(model, first, last, base, progress)
    assert compiled == []
    for run, change in zip(runs, [*changes, "keyframes"], strict=True):
        assert relative_error(run.latents, plain.latents) > 1e-4, change
    assert np.array_equal(again.latents, plain.latents)
    with count_compilations() as compiled:
        pipeline.inbetween(model, first, last, dataclasses.replace(base, steps=4), progress)
    assert compiled, "another number of steps is another program"


def test_guidance_modes_agree_and_scale_one_ignores_the_negative_prompt(model):
    first, last = images()

    def latents(**changes):
        return pipeline.inbetween(model, first, last, settings(**changes)).latents

    both = [latents(guidance_mode=mode, guidance=3.0) for mode in ("sequential", "batched")]
    assert relative_error(*both) < 1e-5
    for mode in ("sequential", "batched"):
        one = [latents(guidance_mode=mode, guidance=1.0, negative_prompt=text) for text in ("", "red over")]
        two = [latents(guidance_mode=mode, guidance=2.0, negative_prompt=text) for text in ("", "red over")]
        assert np.array_equal(*one)
        assert relative_error(*two) > 1e-5


def test_a_batch_is_its_samples(model):
    """Same noise shape differs with the batch, so samples are compared through the conditions."""
    pairs, prompts = [tuple(images(1)), tuple(images(2))], ["a red circle", "a blue square moves right"]
    chosen = settings()
    together, _ = pipeline.encode(model, Keyframes.prepare(pairs, NANO, chosen), prompts, chosen)
    for i in range(2):
        alone, _ = pipeline.encode(model, Keyframes.prepare([pairs[i]], NANO, chosen), [prompts[i]], chosen)
        for name in ("text", "first", "last", "latent"):
            assert relative_error(getattr(together, name)[i], getattr(alone, name)[0]) < 1e-5, name


def test_result_and_timings(model):
    first, last = images()
    result = pipeline.inbetween(model, first, last, settings(frames=9))
    assert result.video.shape == (1, 9, 16, 24, 3) and result.video.dtype == np.uint8
    assert result.latents.shape == (1, 3, 4, 6, 16)
    assert set(result.seconds) == {"encode", "compile", "denoise", "decode"}
    assert all(value >= 0 for value in result.seconds.values())


def test_nan_stops_the_run_and_names_the_step(model):
    broken = jax.tree.map(lambda x: x, model.params)
    broken["dit"]["head"]["bias"] = broken["dit"]["head"]["bias"].at[3].set(np.nan)
    with pytest.raises(FloatingPointError, match="step 0"):
        pipeline.inbetween(dataclasses.replace(model, params=broken), *images(), settings())


def sharded(model, sizes, devices=8):
    mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
    params = {name: sharding.shard_params(tree, mesh) for name, tree in model.params.items()}
    return dataclasses.replace(model, params=params), mesh


CASES = [
    ({"data": 2, "sequence": 4}, "sequential"),
    ({"data": 2, "sequence": 4}, "batched"),
    ({"sequence": 8}, "sequential"),
    ({"fsdp": 2, "sequence": 2, "tensor": 2}, "sequential"),
]


@pytest.mark.parametrize("sizes, mode", CASES, ids=str)
def test_sharded_denoising_is_the_same(model, sizes, mode):
    """Batch or guidance axis, token axis (18 tokens do not divide by 4 or 8, frames straddle devices) and weights,
    with isolation, KAB and ReTRo at work."""
    chosen = settings(frames=9, guidance_mode=mode, method=METHODS["paper"])
    prepared = Keyframes.prepare([tuple(images(seed)) for seed in range(2)], NANO, chosen)
    encoded = pipeline.encode(model, prepared, ["a red circle", "a blue square"], chosen)
    plain = pipeline.denoise(model, *encoded, chosen)
    spread, mesh = sharded(model, sizes)
    with jax.set_mesh(mesh):
        latents = pipeline.denoise(spread, *pipeline.place(*encoded, mesh), chosen, mesh=mesh)
    assert len(latents.sharding.device_set) == 8
    assert relative_error(latents, plain) < 1e-5


def test_a_sharded_run_is_the_same_from_keyframes_to_pixels(model):
    """Encoders and VAE too; on two devices, as the VAE's program takes long to compile for eight."""
    chosen = settings()
    prepared = Keyframes.prepare([tuple(images())], NANO, chosen)
    plain = pipeline.run(model, prepared, ["a red circle"], chosen)
    spread, mesh = sharded(model, {"sequence": 2}, devices=2)
    spread = pipeline.run(spread, prepared, ["a red circle"], chosen, mesh=mesh)
    assert relative_error(spread.latents, plain.latents) < 1e-5
    assert np.abs(spread.video.astype(int) - plain.video.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frames": 24}, "nearest are 21 and 25"),
        ({"size": (20, 24)}, "nearest size is"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"seed": -1}, "seed -1"),
        ({"steps": 0}, "steps"),
        ({"shift": 0.0}, "shift"),
        ({"solver": "heun"}, "solver 'heun': choose euler, unipc, dpm"),
        ({"fit": "squash"}, "fit 'squash'"),
    ],
)
def test_bad_settings_are_named(model, changes, message):
    with pytest.raises(ValueError, match=message):
        pipeline.inbetween(model, *images(), settings(**changes))


def test_a_model_without_two_keyframes_is_refused():
    clip_less = dataclasses.replace(
        NANO,
        dit=dataclasses.replace(NANO.dit, num_images=1),
    )
    with pytest.raises(ValueError, match="takes 1 keyframes"):
        settings().check(clip_less)
