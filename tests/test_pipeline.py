"""The whole pipeline on a random model: what recompiles, guidance, failure, sharding, batches."""

import dataclasses
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from nano import NANO, write_model
from PIL import Image
from reference import relative_error

from samplers import ahead, pipeline
from samplers.ahead import compile_ahead
from samplers.pipeline import Batch, Inputs
from samplers.plan import Plan, Settings
from samplers.programs import Programs
from wanjax import checkpoint, sharding
from wanjax.method import METHODS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.load(write_model(tmp_path_factory.mktemp("models") / "nano"))


def images(seed=0, shape=(20, 30, 3)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2)]


def settings(**changes):
    return Settings.of(NANO, **{"prompt": "a red circle moves left"} | changes)


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


def inbetween(model, images, settings, **options):
    return pipeline.inbetween(model, *images, settings=settings, **options)


def encoded_of(model, pairs, prompts, chosen):
    """(plan, conditions of B pairs and prompts)."""
    plan = Plan.of(NANO, chosen)
    return plan, pipeline.encode(model, plan, [Inputs.prepare(pairs, plan)], [prompts])[0]


@pytest.mark.parametrize("mode", ["sequential", pytest.param("batched", marks=pytest.mark.slow)])
def test_values_do_not_recompile(model, mode):
    jax.clear_caches()  # of tests that came before
    base = settings(guidance_mode=mode)
    with count_compilations() as compiled:
        plain = inbetween(model, images(), base)
    assert compiled, "the counter sees compilations"
    changes = [
        {"prompt": "a blue square moves up over"}, {"seed": 7}, {"guidance": 4.5}, {"guidance": 1.0},
        {"shift": 11.0}, {"solver": "euler"}, {"schedule": "linear"}, {"negative_prompt": "red"}, {"steps": 4},
        {"guidance_interval": (0.5, 1.0)}, {"timesteps": "truncated"},
    ]  # fmt: skip
    with count_compilations() as compiled:
        runs = [inbetween(model, images(), dataclasses.replace(base, **c)) for c in changes]
        runs.append(inbetween(model, images(seed=1), base))
        again = inbetween(model, images(), base)
    assert compiled == []
    for run, change in zip(runs, [*changes, "keyframes"], strict=True):
        assert relative_error(run.latents, plain.latents) > 1e-4, change
    assert np.array_equal(again.latents, plain.latents)
    with count_compilations() as compiled:
        whole = inbetween(model, images(), base, chunk=base.steps)
    assert len(compiled) == 1, "the whole run as one scan is another program"
    assert np.array_equal(whole.latents, plain.latents)


def test_several_clips_by_one_program(model):
    """Pairs, prompts and seeds; each clip is what it is alone, and the second compiles nothing."""
    pairs, prompts = [images(1), images(2)], ["a red circle", "a blue square moves right"]
    columns = [list(column) for column in zip(*pairs, strict=True)]
    inbetween(model, images(), settings())
    with count_compilations() as compiled:
        several = inbetween(model, columns, settings(), prompt=prompts, seeds=[3, 4])
        alone = [inbetween(model, pair, settings(prompt=text, seed=seed))
                 for pair, text, seed in zip(pairs, prompts, (3, 4), strict=True)]  # fmt: skip
        seeds = inbetween(model, images(1), settings(prompt=prompts[0]), seeds=range(3, 6))
    assert len(compiled) <= 2, "but for putting two and three clips together"
    assert several.video.shape[0] == 2 and seeds.video.shape[0] == 3
    for i in range(2):
        assert np.array_equal(several.video[i], alone[i].video[0])
        assert np.array_equal(several.latents[i], alone[i].latents[0])
    assert np.array_equal(seeds.latents[0], alone[0].latents[0])
    assert relative_error(seeds.latents[1], seeds.latents[0]) > 1e-4


@pytest.mark.slow
def test_a_batch_computes_its_clips(model):
    """Two clips in one program; the noise of each is that of its own seed."""
    pairs, prompts, chosen = [images(1), images(2)], ["a red circle", "a blue square moves right"], settings()
    plan = Plan.of(NANO, chosen)
    (both,) = pipeline.make(model, plan, [Batch(Inputs.prepare(pairs, plan), prompts, [3, 4])])
    for i in range(2):
        alone = inbetween(model, pairs[i], settings(prompt=prompts[i], seed=3 + i))
        assert relative_error(both.latents[i], alone.latents[0]) < 1e-5


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_the_noise_of_a_seed_stays_what_it_is(seed):
    plan = Plan.of(NANO, settings())
    drawn = jax.jit(  # as anybody compiles it; tests run at a lower level
        lambda: jax.random.normal(jax.random.key(seed), (1, *plan.latent_shape), jnp.float32),
        compiler_options={"xla_backend_optimization_level": 3},
    )
    expected = drawn()
    np.testing.assert_array_equal(pipeline.noise(plan, [seed]), expected)


@pytest.mark.slow
def test_more_keyframes_by_the_call_alone(model):
    """One, two or three keyframes anywhere; each reaches the latents, in any order, by any spelling of its place."""
    first, last = images(0)
    middle = images(1)[0]
    plain = inbetween(model, (first, last), settings())
    three = inbetween(model, (first, last), settings(), keyframes={2: middle})
    same = inbetween(model, (None, None), settings(), keyframes={-1: last, -3: middle, 0: first})
    alone = inbetween(model, (first, None), settings())
    assert np.array_equal(three.latents, same.latents)
    assert relative_error(three.latents, plain.latents) > 1e-3
    assert relative_error(alone.latents, plain.latents) > 1e-3
    with pytest.raises(ValueError, match="keyframes at 0, 2, 2, 4: two at one frame"):
        inbetween(model, (first, last), settings(), keyframes={2: middle, -3: middle})
    with pytest.raises(ValueError, match="keyframe at 5: give a whole number from -5 to 4"):
        inbetween(model, (first, last), settings(), keyframes={5: middle})
    with pytest.raises(ValueError, match="keyframe at '2': give a whole number"):
        inbetween(model, (first, last), settings(), keyframes={"2": middle})
    with pytest.raises(ValueError, match="given too; give it once"):
        inbetween(model, (first, last), settings(), keyframes={-1: middle})
    with pytest.raises(ValueError, match="none given"):
        inbetween(model, (None, None), settings())


@pytest.mark.slow
def test_guidance_modes_agree_and_scale_one_ignores_the_negative_prompt(model):
    def latents(**changes):
        return inbetween(model, images(), settings(**changes)).latents

    both = [latents(guidance_mode=mode, guidance=3.0) for mode in ("sequential", "batched")]
    assert relative_error(*both) < 1e-5
    for mode in ("sequential", "batched"):
        one = [latents(guidance_mode=mode, guidance=1.0, negative_prompt=text) for text in ("", "red over")]
        two = [latents(guidance_mode=mode, guidance=2.0, negative_prompt=text) for text in ("", "red over")]
        assert np.array_equal(*one)
        assert relative_error(*two) > 1e-5


def test_a_batch_is_its_samples(model):
    """The conditions of two pairs encoded together are those of each alone."""
    pairs, prompts = [images(1), images(2)], ["a red circle", "a blue square moves right"]
    _, together = encoded_of(model, pairs, prompts, settings())
    for i in range(2):
        _, alone = encoded_of(model, [pairs[i]], [prompts[i]], settings())
        for name in ("text", "images", "latent"):
            a, b = (getattr(one.conditions, name) for one in (together, alone))
            assert relative_error(a[i], b[0]) < 1e-5, name


def test_result_and_timings(model):
    result = inbetween(model, images(), settings(frames=9))
    assert result.video.shape == (1, 9, 16, 24, 3) and result.video.dtype == np.uint8
    assert result.latents.shape == (1, 3, 4, 6, 16)
    assert set(result.seconds) == {"encode", "compile", "denoise", "decode"}
    assert all(value >= 0 for value in result.seconds.values())


BROKEN = {
    "text": ("umt5", "final_norm/scale"),
    "image tokens": ("clip", "pre_norm/scale"),
    "keyframe latent": ("vae", "encoder"),
    "latents: NaN or inf after denoising step 0": ("dit", "head/bias"),
    "decoded video": ("vae", "decoder"),
}


@pytest.mark.parametrize("stage", BROKEN)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stops_the_run_and_names_the_stage(model, stage, value):
    part, path = BROKEN[stage]
    flat = flatten_dict(model.params[part], sep="/")
    name = next(name for name in flat if path in name)
    flat[name] = jnp.full_like(flat[name], value)
    params = {name: model.params[name] for name in ("dit", "vae", "umt5", "clip")} | {
        part: unflatten_dict(flat, sep="/")
    }
    with pytest.raises(FloatingPointError, match=stage) as caught:
        inbetween(dataclasses.replace(model, params=params), images(), settings())
    assert "\n" not in str(caught.value)


def sharded(model, sizes, devices=8):
    mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
    params = {name: sharding.shard_params(tree, mesh) for name, tree in model.params.items()}
    return dataclasses.replace(model, params=params), mesh


CASES = [
    pytest.param({"data": 2, "fsdp": 2, "sequence": 2}, "sequential", marks=pytest.mark.slow),
    pytest.param({"data": 2, "fsdp": 2, "sequence": 2}, "batched", marks=pytest.mark.slow),
    pytest.param({"fsdp": 4, "sequence": 2}, "sequential", marks=pytest.mark.slow),
    pytest.param({"fsdp": 4, "tensor": 2}, "sequential", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes, mode", CASES, ids=str)
def test_sharded_denoising_is_the_same(model, sizes, mode):
    """Batch or guidance axis, token axis (18 tokens do not divide by 4 or 8, frames straddle devices) and weights,
    with isolation, KAB and ReTRo at work."""
    chosen = settings(frames=9, guidance_mode=mode, method=METHODS["paper"])
    plan, encoded = encoded_of(model, [images(seed) for seed in range(2)], ["a red circle", "a blue square"], chosen)
    plain = pipeline.denoise(model, plan, encoded, pipeline.noise(plan, [0, 1]))
    spread, mesh = sharded(model, sizes)
    with jax.set_mesh(mesh):
        noise = pipeline.noise(plan, [0, 1], mesh)
        latents = pipeline.denoise(spread, plan, pipeline.place(encoded, mesh), noise, mesh=mesh)
    assert len(latents.sharding.device_set) == 8
    assert relative_error(latents, plain) < 1e-5


@pytest.mark.slow
def test_a_sharded_run_is_the_same_from_keyframes_to_pixels(model):
    """Encoders and VAE too; on two devices, as the VAE's program takes long to compile for eight."""
    chosen = settings()
    plain = inbetween(model, images(), chosen)
    spread, mesh = sharded(model, {"sequence": 2}, devices=2)
    spread = inbetween(spread, images(), chosen, mesh=mesh)
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
        ({"clip_fit": "pad"}, "clip fit 'pad': choose stretch, crop"),
        ({"resample": "box"}, "resample 'box'"),
        ({"timesteps": "rounded"}, "timesteps 'rounded': choose exact, truncated"),
        ({"frames": 5.0}, "frames 5.0: give a whole number"),
        ({"size": (16, 24, 3)}, "give .height, width."),
        ({"size": (16.0, 24)}, "size 16.0: give a whole number"),
        ({"steps": 10**9}, "steps: got 1000000000; give a whole number of denoising steps, 1 to 1000"),
        ({"steps": True}, "steps: got True"),
        ({"seed": 1.5}, "seed 1.5: give a whole number"),
        ({"guidance": "strong"}, "guidance strong: give a number"),
        ({"guidance_interval": (0.5, 0.1)}, "guidance interval 0.5-0.1"),
        ({"guidance_interval": (0.0, 2.0)}, "guidance interval 2.0: give a number from 0 to 1"),
        ({"prompt": ["one", "two"]}, r"prompt .'one', 'two'.: give a text"),
        ({"prompt": None}, "prompt None: give a text"),
        ({"method": 3}, "method 3: give a wanjax.Method or one of wan, paper, release"),
        ({"method": "ours"}, "unknown method 'ours': choose one of wan"),
    ],
)
def test_bad_settings_are_named(model, changes, message):
    with pytest.raises(ValueError, match=message):
        inbetween(model, images(), settings(**changes))


def test_a_model_without_keyframes_is_refused():
    dit = dataclasses.replace(NANO.dit, num_images=0, image_dim=None, in_channels=16)
    with pytest.raises(ValueError, match="takes no keyframes"):
        Plan.of(dataclasses.replace(NANO, dit=dit, clip=None), settings())


def test_a_model_of_one_image_takes_both_keyframes(tmp_path):
    """As Fun-InP and I2V weights do: both by mask and latent, the vision tokens of the first alone."""
    config = dataclasses.replace(NANO, dit=dataclasses.replace(NANO.dit, num_images=1))
    model = checkpoint.load(write_model(tmp_path / "one", config))
    first, last = images()
    chosen = Settings.of(config, prompt="a red circle", method="paper")
    plan = Plan.of(config, chosen)
    encoded = pipeline.encode(model, plan, [Inputs.prepare([(first, last)], plan)], [["a red circle"]])[0].conditions
    assert encoded.images.shape[1] == 1
    mask = np.asarray(encoded.latent)[0, :, 0, 0, :4]
    assert mask[0].all() and mask[-1].tolist() == [0, 0, 0, 1]
    made = pipeline.inbetween(model, first, last, settings=chosen)
    other = pipeline.inbetween(model, first, images(5)[1], settings=chosen)
    assert relative_error(made.latents, other.latents) > 1e-3


BAD_CALLS = [
    ({"first": 3}, "give a path"),
    ({"first": "nowhere.png"}, "nowhere.png: no such file"),
    ({"last": np.zeros((4, 4), np.uint8)}, "4, 4"),
    ({"first": np.zeros((0, 4, 3), np.uint8)}, "0, 4, 3"),
    ({"prompt": ["one", "two"], "seeds": [1, 2, 3]}, "lists of 1, 1, 2, 3"),
    ({"prompt": 5}, "prompt 5: give a text"),
    ({"seeds": [-1]}, "seed -1"),
    ({"seeds": []}, "lists of"),
    ({"colour": "red"}, "settings colour: no such"),
]


@pytest.mark.parametrize("changes, message", BAD_CALLS, ids=str)
def test_bad_arguments_from_python_are_named(model, monkeypatch, changes, message):
    monkeypatch.setattr(pipeline, "encode", lambda *_: pytest.fail("computing began"))
    first, last = images()
    with pytest.raises(ValueError, match=message) as caught:
        pipeline.inbetween(model, **{"first": first, "last": last} | changes)
    assert "\n" not in str(caught.value)


def test_images_of_any_kind_are_the_same_keyframes(model, tmp_path):
    """Paths, Pillow images, numpy and JAX arrays."""
    first, last = images()
    for name, pixels in (("a.png", first), ("b.png", last)):
        Image.fromarray(pixels).save(tmp_path / name)
    kinds = [
        (first, last), (Image.fromarray(first), jnp.asarray(last)),
        (str(tmp_path / "a.png"), tmp_path / "b.png"),
    ]  # fmt: skip
    made = [inbetween(model, pair, settings()).latents for pair in kinds]
    assert all(np.array_equal(one, made[0]) for one in made)


def test_guidance_in_an_interval_runs_one_pass_outside(model):
    """As guidance 1 there: with an empty interval the run is the unguided one, and half of it is neither."""
    none = inbetween(model, images(), settings(guidance=4.0, guidance_interval=(0.0, 0.0)))
    assert np.array_equal(none.latents, inbetween(model, images(), settings(guidance=1.0)).latents)
    plan = Plan.of(NANO, settings(guidance=4.0, steps=5, guidance_interval=(0.2, 0.6)))
    assert plan.table.guidance[:5].tolist() == [1, 4, 4, 1, 1]


def test_parts_of_any_size_and_what_the_host_sees(model):
    plan, encoded = encoded_of(model, [images()], ["a red circle"], settings())
    seen = []
    whole = pipeline.denoise(model, plan, encoded, pipeline.noise(plan, [0]), on_step=lambda n, c: seen.append(n))
    assert seen == [0, 1, 2, 3]
    stopped = pipeline.denoise(model, plan, encoded, pipeline.noise(plan, [0]), until=0)
    assert np.array_equal(stopped, pipeline.noise(plan, [0]))
    with pytest.raises(ValueError, match="noise of shape"):
        pipeline.denoise(model, plan, encoded, whole[:, :1])


def test_programs_compiled_ahead_are_those_of_the_run(model):
    """Nothing is compiled or traced again in the stages they are for, and the bits are those of the jitted ones."""
    jax.clear_caches()
    chosen = settings(seed=9)
    plan = Plan.of(NANO, chosen)
    batch = Batch(Inputs.prepare([images()], plan), [chosen.prompt], [chosen.seed])
    with compile_ahead(plan) as ready:
        for stage in ("encode", "denoise", "decode"):
            ready(stage)
        with count_compilations() as compiled:
            (made,) = pipeline.make(model, plan, [batch], ready=ready)
    stages = [getattr(Programs.of(plan), field.name).func for field in dataclasses.fields(Programs)]
    assert not any(stage._cache_size() for stage in stages)
    assert len(compiled) <= 8, "small helpers alone"
    again = inbetween(model, images(), chosen)
    assert np.array_equal(made.latents, again.latents) and np.array_equal(made.video, again.video)
    assert all(stage._cache_size() for stage in stages)


@pytest.mark.parametrize(
    "at, solver, precision",
    [((0, -1), "unipc", "float32"), ((-1,), "lcm", "bfloat16"), ((0, 2, -1), "lcm", "float32")],
)
def test_shapes_compiled_ahead_are_those_that_programs_give(at, solver, precision):
    """What one program gives is what the next was compiled for, without tracing any to know it."""
    config = checkpoint.with_dtype(NANO, precision)
    plan = Plan.of(config, Settings.of(config, solver=solver), at)
    given, made = ahead.shapes(plan), {}
    for name, arguments in given.items():
        program = getattr(Programs.of(plan), name)
        made[name] = program.func.eval_shape(*program.args, *arguments, **program.keywords)
    _, carry, _, _, conditions, negative, *_ = given["denoise"]
    (text, _), (tokens, _), (latent, _) = (made[name] for name in ("text", "images", "keyframes"))
    assert (2, *conditions.text.shape[1:]) == text.shape and conditions.text.dtype == negative.dtype == text.dtype
    assert conditions.images.shape[2:] == tokens.shape[1:] and conditions.images.dtype == tokens.dtype
    assert (conditions.latent.shape, conditions.latent.dtype) == (latent.shape, latent.dtype)
    assert made["denoise"] == carry and made["denoise"].sample == given["decode"][1] == made["noise"]


def test_presets_and_profiles_by_name():
    chosen = Settings.of(NANO, "lightx2v-4", shift=7.0)
    assert (chosen.steps, chosen.guidance, chosen.schedule, chosen.solver, chosen.shift) == (
        4,
        1.0,
        "linear",
        "euler",
        7.0,
    )
    assert Settings.of(NANO, method="paper").method == METHODS["paper"]
    with pytest.raises(ValueError, match="preset 'turbo': choose lightx2v-4"):
        Settings.of(NANO, "turbo")
