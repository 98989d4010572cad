"""Films: where clips lie, what neighbours share, that the solver stays consistent, and what is refused."""

import dataclasses
import re
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano import NANO, write_model
from reference import relative_error

from samplers import film, pipeline, run, sample, schedule, solvers
from samplers.plan import Settings
from wanjax import checkpoint, sharding

STRIDE = 4
FILMS = [([9], 0), ([9], 4), ([5, 9], 0), ([9, 9], 4), ([17, 9, 13], 4), ([17, 17, 17, 33], 8), ([81, 49], 24)]


def pixels(latent):
    """The pixel frames of a clip that a latent frame holds."""
    return [0] if latent == 0 else list(range(STRIDE * (latent - 1) + 1, STRIDE * latent + 1))


@pytest.mark.parametrize("frames, overlap", FILMS, ids=str)
def test_clips_lie_where_a_table_of_pixel_frames_says(frames, overlap):
    clips = film.spans(frames, overlap, STRIDE, longest=200)
    total = sum(frames) - (len(frames) - 1)
    begins = np.cumsum([0, *(count - 1 for count in frames)])
    assert film.places(clips) == tuple(begins) and film.places(clips)[-1] == total - 1
    shown = []
    for number, (one, count) in enumerate(zip(clips, frames, strict=True)):
        assert [one.begin + place for place in one.at] == [begins[number], begins[number + 1]]
        before = begins[number] - (overlap if number else 0)
        after = begins[number + 1] + (overlap if number < len(frames) - 1 else 0)
        assert (one.begin, one.begin + one.frames - 1) == (before, after)
        assert one.frames % STRIDE == 1 and one.at[1] - one.at[0] == count - 1
        shown += [one.begin + frame for frame in range(one.frames)[one.shown]]
    assert shown == list(range(total))


@pytest.mark.parametrize("frames, overlap", FILMS, ids=str)
def test_shared_latents_hold_the_same_pixel_frames(frames, overlap):
    """Neighbours' latent frames that hold exactly the same frames of the film are those that are blended; no others."""
    clips = film.spans(frames, overlap, STRIDE, longest=200)
    count = film.shared_latents(clips, STRIDE)
    assert count == (0 if len(frames) == 1 else 2 * overlap // STRIDE)
    tables = []
    for one in clips:
        latents = (one.frames - 1) // STRIDE + 1
        tables.append([tuple(one.begin + pixel for pixel in pixels(latent)) for latent in range(latents)])
    for number, (left, right) in enumerate(zip(tables, tables[1:], strict=False)):
        alike = [(i, j) for i, a in enumerate(left) for j, b in enumerate(right) if a == b]
        assert alike == [(len(left) - count + m, 1 + m) for m in range(count)]
        joint = film.places(clips)[number + 1]
        covered = sorted(frame for i, _ in alike for frame in left[i])
        assert covered == list(range(joint - overlap + 1, joint + overlap + 1))
    for one, far in zip(tables, tables[2:], strict=False):
        assert not set(one) & set(far), "no more than two clips share a frame"


def carries(shapes, seed=0):
    """A carry of random history for each shape."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return [sample.Carry(*(draw(shape) for _ in range(4)), jnp.full((), -1, jnp.int32)) for shape in shapes]


SHAPES = [(2, 5, 2, 3, 4), (2, 7, 2, 3, 4), (2, 6, 2, 3, 4)]
MOVING = ("sample", "corrected", "data_1", "data_2")


def test_a_blend_is_the_ramp_in_the_shared_frames_and_nothing_elsewhere():
    count, before = 3, carries(SHAPES)
    after = film.blended(before, count)
    weights = np.arange(1, 4)[:, None, None, None] / 4
    for name in MOVING:
        old, new = ([np.asarray(getattr(one, name)) for one in of] for of in (before, after))
        for n in range(2):
            wanted = (1 - weights) * old[n][:, -count:] + weights * old[n + 1][:, 1 : count + 1]
            np.testing.assert_allclose(new[n][:, -count:], wanted, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(new[n + 1][:, 1 : count + 1], new[n][:, -count:])
        for one, other in zip(old, new, strict=True):
            np.testing.assert_array_equal(one[:, 0], other[:, 0])
        np.testing.assert_array_equal(old[0][:, :-count], new[0][:, :-count])
        np.testing.assert_array_equal(old[2][:, count + 1 :], new[2][:, count + 1 :])
    assert film.blended(before, 0) == before
    np.testing.assert_allclose(film.ramp(4) + film.ramp(4)[::-1], 1, rtol=1e-6)


def tables(solver, steps, clips):
    levels = schedule.sigmas("wan", steps, 3.0)
    return [sample.rows(solvers.table(solver, levels))] * clips


@pytest.mark.parametrize("solver", ["euler", "dpm++", "unipc"])
def test_a_blended_step_is_the_step_of_blended_histories(solver):
    """Solvers are linear: blending carries and estimates, then stepping, is stepping, then blending."""
    count, table = 3, tables(solver, 6, 1)[0]
    rng = np.random.default_rng(5)
    states = carries(SHAPES[:2])
    row = jax.tree.map(lambda leaf: leaf[3], table).step
    velocities = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SHAPES[:2]]
    stepped = film.blended([sample.advance(*one, row) for one in zip(states, velocities, strict=True)], count)
    mixed = film.blend(*velocities, film.ramp(count))
    other = [sample.advance(*one, row) for one in zip(film.blended(states, count), mixed, strict=True)]
    for one, two in zip(stepped, other, strict=True):
        for name in MOVING:
            np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-4, atol=1e-5, err_msg=name)


def drawn_to(goal):
    """A part of the sampler whose estimate of the data is always `goal`."""

    def denoise(latents, row, state):
        return (latents - goal) / row.step.sigma, state

    return lambda carry, table, first, n: sample.sample(denoise, carry, table, first, n)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_clips_that_want_different_things_agree_where_they_overlap(solver):
    count, goals, seen = 3, (-1.0, 2.0, 0.5), []
    noises = film.share_noise([one.sample for one in carries(SHAPES)], count)
    parts = [drawn_to(goal) for goal in goals]

    def look(done, found):
        seen.append(done)
        for left, right in zip(found, found[1:], strict=False):
            for name in MOVING:
                pair = getattr(left, name)[:, -count:], getattr(right, name)[:, 1 : count + 1]
                np.testing.assert_array_equal(*pair, err_msg=f"{name} after {done} steps")

    starts = [sample.start(noise) for noise in noises]
    done = film.lockstep(parts, starts, tables(solver, 6, 3), 6, count, on_step=look)
    assert seen == list(range(7))
    for number, weight in enumerate(film.ramp(count)):  # the end is the ramp between what the two want
        wanted = (1 - weight) * goals[0] + weight * goals[1]
        np.testing.assert_allclose(done[0].sample[:, 2 + number], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(done[0].sample[:, :2], goals[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(done[2].sample[:, 4:], goals[2], rtol=1e-4, atol=1e-4)


def test_a_run_in_two_halves_is_the_whole_run():
    count, kept = 3, []
    parts, starts, rows = [drawn_to(goal) for goal in (-1.0, 2.0, 0.5)], carries(SHAPES), tables("unipc", 6, 3)
    whole = film.lockstep(parts, starts, rows, 6, count, on_step=lambda done, found: kept.append(found))
    halves = film.lockstep(parts, kept[2], rows, 6, count, first=2)
    for one, other in zip(whole, halves, strict=True):
        for name in MOVING:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_noise_is_shared_and_stays_noise():
    shape = (1, 9, 8, 8, 16)
    noises = [jax.random.normal(jax.random.key(seed), shape) for seed in range(3)]
    shared = film.share_noise(noises, 4)
    np.testing.assert_array_equal(shared[0], noises[0])
    for left, right, own in zip(shared, shared[1:], noises[1:], strict=False):
        np.testing.assert_array_equal(right[:, 1:5], left[:, -4:])
        np.testing.assert_array_equal(right[:, [0, 5, 6, 7, 8]], own[:, [0, 5, 6, 7, 8]])
    assert abs(np.asarray(shared[1]).std() - 1) < 0.03
    assert film.share_noise(noises, 0) == noises


def test_a_failed_step_is_named():
    starts = carries(SHAPES[:2])
    parts = [drawn_to(0.0), drawn_to(np.nan)]
    with pytest.raises(FloatingPointError, match="after denoising step 0"):
        film.lockstep(parts, starts, tables("euler", 3, 2), 3, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano")


@pytest.fixture(scope="module")
def model(folder):
    return checkpoint.load(folder)


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(count)]


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


PROMPTS = ["a red circle moves left", "a blue square moves up"]


def test_without_overlap_clips_are_those_made_alone(model):
    pictures, settings = images(3), Settings.of(NANO, steps=3)
    made = film.film(model, pictures, PROMPTS, [5, 9], seeds=[3, 4], settings=settings)
    alone = [pipeline.inbetween(model, *pictures[i : i + 2], PROMPTS[i], seeds=3 + i, frames=frames, settings=settings)
             for i, frames in enumerate((5, 9))]  # fmt: skip
    for one, other in zip(made.latents, alone, strict=True):
        np.testing.assert_array_equal(one, other.latents)
    np.testing.assert_array_equal(made.video, np.concatenate([alone[0].video[0], alone[1].video[0, 1:]]))
    assert made.video.shape == (13, 16, 24, 3) and made.video.dtype == np.uint8 and made.at == (0, 4, 12)
    assert {"encode", "denoise", "decode"} <= made.seconds.keys()


def test_overlapping_clips_are_one_where_they_overlap(model):
    """All agree in the shared frames, and differ from clips made alone; one value holds for all clips; progress."""
    seen = []
    made = film.film(model, images(3), PROMPTS, 9, overlap=4, steps=3, on_step=lambda done, found: seen.append(done))
    assert made.video.shape == (17, 16, 24, 3) and made.at == (0, 8, 16) and seen == [0, 1, 2, 3]
    left, right = made.latents
    assert left.shape[1] == right.shape[1] == 4
    np.testing.assert_array_equal(left[:, -2:], right[:, 1:3])
    other = film.film(model, images(3), PROMPTS[::-1], 9, overlap=4, steps=3)
    assert not np.array_equal(other.latents[0][:, -2:], left[:, -2:])
    for clip, plan in zip(made.spans, film.plans(NANO, Settings.of(NANO), made.spans), strict=True):
        assert plan.at == clip.at and plan.settings.frames == clip.frames == 13


@pytest.mark.slow
def test_a_longer_film_compiles_nothing(model):
    """Of clips of one length there are three kinds, whatever their number: first, inner and last."""
    film.film(model, images(5), "a", 9, overlap=4, steps=2)
    with count_compilations() as compiled:
        film.film(model, images(6, seed=2), "b", 9, overlap=4, steps=3, seeds=[1, 2, 3, 4, 5])
    assert not compiled


def test_each_part_of_the_model_is_read_once(model, folder):
    """Under the policy "stage", whatever the clips; and the film is the same."""
    staged, read = checkpoint.load(folder, policy="stage"), []
    own = staged.parts._read

    def reading(name, mesh, rules):
        read.append(name)
        return own(name, mesh, rules)

    staged.parts._read = reading
    made = film.film(staged, images(3), PROMPTS, [5, 9], steps=2)
    assert read == ["umt5", "clip", "vae", "dit", "vae"]
    np.testing.assert_array_equal(made.video, film.film(model, images(3), PROMPTS, [5, 9], steps=2).video)


def overlapping(model, steps=4):
    """Plans, encoded conditions and noise of two overlapping clips, and the latent frames that they share."""
    clips = film.spans([9, 9], 4, STRIDE)
    plans, pictures = film.plans(NANO, Settings.of(NANO, steps=steps), clips), images(3)
    inputs = [pipeline.Inputs.prepare([pictures[n : n + 2]], plan) for n, plan in enumerate(plans)]
    told = film.encode(model, plans, inputs, [[text] for text in PROMPTS])
    return plans, told, [pipeline.noise(plan, [3]) for plan in plans], film.shared_latents(clips, STRIDE)


@pytest.mark.slow
def test_a_film_goes_on_where_it_stopped(model):
    """From what `on_step` was given, to the same bits."""
    kept, (plans, told, noises, shared) = [], overlapping(model)
    whole = film.denoise(model, plans, told, noises, shared, on_step=lambda done, found: kept.append(found))
    rest = film.denoise(model, plans, told, None, shared, carries=kept[3], first=3)
    for one, other in zip(whole, rest, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_film_on_a_mesh_is_that_of_one_device(model):
    """And a blend leaves everything where it lay, so that no step is compiled again."""
    plans, told, noises, shared = overlapping(model)
    plain = film.denoise(model, plans, told, noises, shared)
    mesh = sharding.make_mesh({"fsdp": 2}, jax.devices()[:2])
    spread = model.place(mesh)
    with jax.set_mesh(mesh):
        told = [pipeline.place(one, mesh) for one in told]
        noises = [pipeline.noise(plan, [3], mesh) for plan in plans]
        made = film.denoise(spread, plans, told, noises, shared)
        with count_compilations() as compiled:
            again = film.denoise(spread, plans, told, noises, shared)
    assert not compiled
    for one, other, third in zip(plain, made, again, strict=True):
        assert relative_error(other, one) < 1e-5 and len(other.sharding.device_set) == 2
        np.testing.assert_array_equal(other, third)


REFUSED = {
    "frames 10: must be 4n+1": {"frames": [9, 10]},
    "frames: 3 given for 2 clips": {"frames": [9, 9, 9]},
    "prompts: 1 given for 2 clips": {"prompts": ["a"]},
    "seeds: 3 given": {"seeds": range(3)},
    "keyframes: 1 given": {"keyframes": images(1)},
    "overlap 6: give a multiple of 4": {"overlap": 6},
    "overlap -4": {"overlap": -4},
    "overlap 8: more than half of a clip of 9 frames; give at most 4": {"overlap": 8},
    "clip 1: 21 frames with its overlap; the weights know at most 20; give it at most 16, or less overlap":
        {"frames": [17, 9], "overlap": 4, "longest": 20},
    "clip 2: 85 frames; the weights know at most 81; give it at most 81": {"frames": [9, 85]},
    "solver lcm": {"overlap": 4, "solver": "lcm"},
    "seed -1": {"seeds": -1},
    "prompt 3": {"prompts": [3, "a"]},
    "steps": {"steps": 0},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_are_one_line_and_before_any_work(model, message, monkeypatch):
    monkeypatch.setattr(pipeline, "encode_texts", lambda *_: pytest.fail("computing began"))
    options = {"keyframes": images(3), "prompts": "a", "frames": 9} | REFUSED[message]
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        film.film(model, **options)
    assert "\n" not in str(found.value)


def test_a_model_of_longer_clips_may_have_them(model):
    long = dataclasses.replace(NANO, sampling=dataclasses.replace(NANO.sampling, frames=121))
    with pytest.raises(ValueError, match="the weights know at most 121"):
        film.film(dataclasses.replace(model, config=long), images(2), "a", 125)


def test_the_bar_is_an_on_step(capsys):
    with run.bar(2) as step:
        film.lockstep([drawn_to(0.0)], carries(SHAPES[:1]), tables("euler", 2, 1), 2, on_step=step)
    assert "2/2" in capsys.readouterr().err
