"""Passes that are guessed: which, from what, by how many evaluations; the same bits however a run is divided."""

import dataclasses
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano import NANO, write_model
from reference import relative_error
from test_pipeline import count_compilations

from samplers import ahead, pipeline, programs, sample, schedule, skipping, solvers
from samplers.pipeline import Inputs
from samplers.plan import Plan, Settings
from wanjax import checkpoint, sharding
from wanjax.guidance import MODES, Past, Skip, skippable
from wanjax.types import Conditions, CrossBias

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)
STEPS = 8


def plan_of(**changes):
    return Plan.of(NANO, Settings.of(NANO, **{"steps": STEPS} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano")


@pytest.fixture(scope="module")
def model(folder):
    return checkpoint.load(folder)


@pytest.fixture(scope="module")
def clip(model):
    """Conditions and noise of one clip."""
    plan = plan_of()
    (encoded,) = pipeline.encode(model, plan, [Inputs.prepare([PICTURES], plan)], [["a red circle"]])
    return encoded, pipeline.noise(plan, [3])


# Which steps


@pytest.mark.parametrize("steps", [4, 5, 10, 20, 50, 101])
def test_a_share_is_spread_evenly_over_what_may_be_skipped(steps):
    for share in (0.0, 0.1, 0.3, 0.5, 0.6):
        found = skipping.chosen(share, steps)
        allowed = range(2, steps - 1)
        assert len(found) == min(int(share * steps + 0.5), len(allowed)) and len(set(found)) == len(found)
        assert set(found) <= set(allowed) and list(found) == sorted(found)
        gaps = np.diff([allowed.index(step) for step in found])
        assert len(found) < 2 or gaps.max() - gaps.min() <= 1


def test_steps_of_ones_own_and_kabs_window():
    assert skipping.chosen((7, 2, 4), 10) == (2, 4, 7)
    assert skipping.chosen((), 10) == () and skipping.chosen(0.5, 3) == ()
    assert set(skipping.chosen(0.6, 10, range(2, 5))) == {5, 6, 7, 8}
    with pytest.raises(ValueError, match="skip passes 3, 4: KAB acts there; give others"):
        skipping.chosen((3, 4, 6), 10, range(2, 5))
    acting = set(plan_of(method="paper", frames=9, steps=20).kab_steps)
    assert acting == set(range(1, 9))
    plan = plan_of(method="paper", frames=9, steps=20, skip_passes=0.3, skip_in_kab=False)
    assert plan.table.skip.sum() == 12 and not acting & set(np.flatnonzero(plan.table.skip.any(1)))
    plan = plan_of(method="paper", frames=9, steps=20, skip_passes=0.3)
    assert plan.table.skip.sum() == 12 and acting & set(np.flatnonzero(plan.table.skip.any(1)))
    with pytest.raises(ValueError, match="skip passes 2: KAB acts there"):
        plan_of(method="paper", frames=9, steps=20, skip_passes=[2, 12], skip_in_kab=False)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("span", [(0, 12), (0, 5), (4, 9), (10, 12), (6, 6), (11, 12)])
def test_two_evaluations_come_before_every_guess(span, together):
    guidance = np.ones(12, np.float32)
    guidance[slice(*span)] = 3.0
    skipped = range(2, 11)
    found = skipping.flags(skipped, guidance, together)
    runs = np.stack([np.ones(12, bool), guidance != 1], 1)
    assert not (found & ~runs).any()
    for which in range(2):
        real = 0
        for step in range(12):
            assert not found[step, which] or real >= 2
            real += runs[step, which] and not found[step, which]
    assert not found[[0, 1, 11]].any()
    if together:
        assert (found[runs.all(1), 0] == found[runs.all(1), 1]).all()
    else:
        assert found[2:11, 0].all()
        begin = max(span[0], 0)
        assert found[max(begin + 2, 2) : min(span[1], 11), 1].all() and not found[:, 1][: begin + 2].any()
    assert skipping.passes(found, guidance) == (found.sum(), 12 + span[1] - span[0])


@pytest.mark.parametrize("changes, message", [
    ({"skip_passes": 0.7}, "skip passes 0.7: give a share of the steps from 0 to 0.6, or the steps"),
    ({"skip_passes": -0.1}, "skip passes -0.1"),
    ({"skip_passes": float("nan")}, "skip passes nan"),
    ({"skip_passes": True}, "skip passes True"),
    ({"skip_passes": None}, "skip passes None"),
    ({"skip_passes": "half"}, "skip passes 'half'"),
    ({"skip_passes": (1, 3)}, "skip passes 1: the first two steps and the last are always run; give steps from 2 to 6"),
    ({"skip_passes": (3, 7)}, "skip passes 7: the first two"),
    ({"skip_passes": (3, 8)}, "skip passes 8: give a whole number from 0 to 7"),
    ({"skip_passes": (3, 2.5)}, "skip passes 2.5: give a whole number"),
    ({"skip_passes": [3, 3]}, "skip passes 3: given twice"),
    ({"skip_passes": (2,), "steps": 3}, "skip passes 2: .*take more steps"),
    ({"skip_in_kab": "no"}, "skip in kab 'no': give True or False"),
])  # fmt: skip
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        plan_of(**changes)
    assert "\n" not in str(caught.value)


def test_settings_are_json():
    for value in (0.3, [2, 4], (2, 4), np.array([2, 4]), np.float64(0.3)):
        settings = Settings.of(NANO, steps=STEPS, skip_passes=value)
        again = Settings.of(
            NANO, steps=STEPS, skip_passes=json.loads(json.dumps(dataclasses.asdict(settings)))["skip_passes"]
        )
        assert again == settings and hash(again) == hash(settings)


def test_a_schedule_is_for_its_settings(tmp_path):
    """Also where these hold numpy's numbers; whatever else differs does not matter."""
    settings = Settings.of(NANO, steps=np.int64(STEPS), shift=np.float32(3), method="paper")
    found = skipping.Schedule.of(settings, np.array([2, 4]), 0.01, 3)
    (tmp_path / "own.json").write_text(json.dumps(found.report()))
    other = Settings.of(NANO, steps=STEPS, method="paper", guidance=4.0, seed=3, skip_passes=str(tmp_path / "own.json"))
    assert skipping.settled(other, tmp_path).skip_passes == (2, 4)
    assert skipping.settled(dataclasses.replace(other, skip_passes=0.3), tmp_path).skip_passes == 0.3
    with pytest.raises(ValueError, match="made for another shift, method; make one"):
        skipping.settled(dataclasses.replace(other, method="wan", shift=4.0), tmp_path)


# What is guessed


def velocity(x, timestep, text, xp):
    return (
        x - xp.tanh(1.5 * x + xp.sin(4 * x) * (1 - timestep / 1000)) + 0.3 * xp.cos(3 * timestep / 1000 + x) + text * x
    )


def toy(latents, timestep, conditions, strength=None, bias=None):
    over = (slice(None), *[None] * 4)
    return velocity(latents, timestep[over], conditions.text.mean((1, 2))[over], jnp)


SHAPE = (2, 2, 3, 3, 4)
TEXT, NEGATIVE = np.full((2, 1, 1), 0.3, np.float32), np.full((2, 1, 1), -0.2, np.float32)


def oracle(solver, levels, noise, guidance, skip):
    """The run in float64, with whole histories."""
    corrector, predictor = solvers.coefficients(solver, levels)
    x, zero = noise.astype(np.float64), np.zeros(noise.shape)
    data, corrected, known = [zero, zero], [zero], ([], [])
    for i, sigma in enumerate(levels[:-1]):
        total = 0.0
        for which, (text, weight) in enumerate(((0.3, guidance[i]), (-0.2, 1 - guidance[i]))):
            if which and guidance[i] == 1:
                continue
            if skip[i, which]:
                (s0, v0), (s1, v1) = known[which][-2:]
                v = v1 + (v1 - v0) * (sigma - s1) / (s1 - s0)
            else:
                v = velocity(x, 1000 * sigma, text, np)
                known[which].append((sigma, v))
            total = total + weight * v
        data.append(x - sigma * total)
        parts = (x, corrected[-1], data[-1], data[-2], data[-3])
        corrected.append(sum(weight * part for weight, part in zip(corrector[i], parts, strict=True)))
        x = predictor[i][0] * corrected[-1] + predictor[i][1] * data[-1] + predictor[i][2] * data[-2]
    return x


@pytest.mark.parametrize("mode", MODES)
def test_extrapolation_against_float64(mode):
    """Every solver, schedules with and without guidance in all steps, as one program a mode; and what is evaluated."""
    seen, noise = [], np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)

    def counting(latents, *others):
        jax.debug.callback(lambda: seen.append(latents.shape[0] // SHAPE[0]))
        return toy(latents, *others)

    @jax.jit
    def run(carry, table):
        def denoise(latents, row, state):
            evaluate = skippable(counting, Conditions(TEXT), NEGATIVE, row.guidance, mode)
            return evaluate(latents, row.step.timestep, None, Skip(row.skip, row.step.sigma, state))

        return sample.sample(denoise, carry, table, 0, len(table.live))

    levels = schedule.sigmas("wan", 12, 5.0)
    whole, middle = np.full(12, 2.5), np.where((np.arange(12) >= 3) & (np.arange(12) < 9), 2.5, 1.0)
    for solver, guidance, skipped in (
        ("euler", whole, (2, 3, 5, 8, 10)), ("unipc", whole, (3, 6, 7)), ("dpm++", middle, (2, 4, 5, 6, 8, 10)),
        ("unipc", middle, range(2, 11)), ("unipc", whole, ()),
    ):  # fmt: skip
        flags = skipping.flags(skipped, guidance, mode == "batched")
        flags = np.zeros((12, 2), bool) if flags is None else flags
        table = sample.rows(solvers.table(solver, levels), guidance=guidance.astype(np.float32), skip=flags)
        seen.clear()
        end = run(sample.start(noise, Past.empty(jnp.asarray(noise))), table)
        jax.effects_barrier()
        expected = oracle(solver, levels, noise, guidance, flags)
        assert relative_error(end.sample, expected) < 1e-5, (solver, skipped)
        skips, passes = skipping.passes(flags, guidance)
        assert sum(seen) == passes - skips, "the model is really not run"
        assert end.state.last.shape == (2, *SHAPE) and end.state.last.dtype == jnp.float32
        if len(skipped):
            assert relative_error(end.sample, oracle(solver, levels, noise, guidance, 0 * flags)) > 1e-4
    assert run._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_nano_run_by_hand(model, clip, mode):
    """KAB and a caller's bias in what is really run, nothing of them in what is guessed."""
    (encoded, noise), rng = clip, np.random.default_rng(1)
    plan = plan_of(method="paper", skip_passes=(2, 4, 5), solver="euler", guidance_mode=mode)
    layers, frames = NANO.dit.num_layers, plan.grid[0]
    bias = CrossBias(rng.normal(size=(layers, 1, frames, 8)).astype(np.float32),
                     rng.normal(size=(layers, 1, frames, 2, NANO.dit.image_tokens)).astype(np.float32))  # fmt: skip
    found = pipeline.denoise(model, plan, encoded, noise, cross_bias=bias)
    evaluate = jax.jit(programs.evaluator(plan.config.dit, model.part("dit"), plan.method))
    x, known, levels = np.asarray(noise, np.float64), ([], []), np.append(plan.table.step.sigma[:STEPS], 0)
    for step, sigma in enumerate(levels[:-1].astype(np.float64)):
        total = 0.0
        for which, weight in enumerate((2.0, -1.0)):
            if step in (2, 4, 5):
                (s0, v0), (s1, v1) = known[which][-2:]
                v = v1 + (v1 - v0) * (sigma - s1) / (s1 - s0)
            else:
                off = which == 1
                told = encoded.conditions.replace(text=encoded.negative) if off else encoded.conditions
                own = plan.strength[step][:, None], bias
                own = jax.tree.map(np.zeros_like, own) if off else own
                v = np.float64(evaluate(np.float32(x), plan.table.step.timestep[[step]], told, *own))
                known[which].append((sigma, v))
            total = total + weight * v
        x = x + (levels[step + 1] - sigma) * total
    assert relative_error(found, x) < 2e-5
    assert relative_error(pipeline.denoise(model, plan, encoded, noise), x) > 1e-3


# The program


def lowered(plan, n=2):
    program = programs.Programs.of(plan, n).denoise
    return program.func.lower(*program.args, *ahead.shapes(plan)["denoise"], **program.keywords).as_text()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_it_where_nothing_is_skipped(mode):
    """One program with the settings' default, with a share of which no step comes, and with as few steps as skip none;
    another one, of more branches and a larger carry, where something is skipped."""
    plain = plan_of(guidance_mode=mode)
    assert plain.table.skip is None and pipeline.start(plain, jnp.zeros((1, *plain.latent_shape))).state is None
    text = lowered(plain)
    others = [plan_of(guidance_mode=mode, skip_passes=0.05), plan_of(guidance_mode=mode, skip_passes=()),
              plan_of(guidance_mode=mode, skip_passes=0.6, steps=3)]  # fmt: skip
    assert all(lowered(plan) == text for plan in others)
    skips = lowered(plan_of(guidance_mode=mode, skip_passes=0.3))
    assert skips.count("stablehlo.case") == text.count("stablehlo.case") + (1 if mode == "sequential" else 2)
    assert skips.count("stablehlo.while") == text.count("stablehlo.while")


def test_flags_that_skip_nothing_change_nothing(model, clip):
    plan = plan_of(method="paper")
    flags = np.zeros((len(plan.table.live), 2), bool)
    idle = dataclasses.replace(plan, table=plan.table.replace(skip=flags))
    assert np.array_equal(pipeline.denoise(model, idle, *clip), pipeline.denoise(model, plan, *clip))


def test_another_schedule_compiles_nothing(model, clip):
    ends = [pipeline.denoise(model, plan_of(skip_passes=0.3), *clip)]
    with count_compilations() as compiled:
        for value in (0.5, (3,), (2, 3, 4, 5, 6)):
            ends.append(pipeline.denoise(model, plan_of(skip_passes=value), *clip))
        ends.append(pipeline.denoise(model, plan_of(skip_passes=0.3, steps=12, solver="euler"), *clip))
    assert compiled == []
    assert all(relative_error(a, b) > 1e-5 for a, b in itertools.combinations(ends, 2))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_any_division_and_the_loop_over_layers_give_the_same_bits(folder, model, clip, mode):
    """Also where a part ends between two guesses; with KAB, guidance in an interval, and noise anew."""
    looped = checkpoint.load(folder, policy="stream")
    kinds = [{"method": "paper"}, {"guidance_interval": (0.3, 0.9), "solver": "euler"}, {"solver": "lcm"}]
    for changes in kinds[: 3 if mode == "sequential" else 2]:
        plan = plan_of(skip_passes=(3, 4, 6), guidance_mode=mode, **changes)
        whole = pipeline.denoise(model, plan, *clip)
        assert np.array_equal(pipeline.denoise(model, plan, *clip, chunk=3), whole), changes
        other = Plan.of(looped.config, plan.settings)
        assert np.array_equal(pipeline.denoise(looped, other, *clip, chunk=3), whole), changes


def test_a_guess_from_two_evaluations_at_one_level_is_the_last():
    """As a solver has them that evaluates a step twice; on two levels it is the line, in float64."""
    rng = np.random.default_rng(0)
    one, two = rng.standard_normal((2, 1, 2, 2, 2, 4)).astype(np.float32)
    past = Past.empty(jnp.asarray(one)).after(1, one, 0.8).after(1, two, 0.8)
    np.testing.assert_array_equal(past.guess(1, 0.6), two)
    past = past.after(1, one, 0.5)
    line = one + (0.3 - 0.5) / (0.5 - 0.8) * (one.astype(np.float64) - two)
    assert relative_error(past.guess(1, 0.3), line) < 1e-6


def test_the_loop_fetches_no_layer_for_a_guess(folder, clip):
    looped = checkpoint.load(folder, policy="stream")
    fetched, streamed = [], looped.part("dit")

    def read(layer):
        fetched.append(layer)
        return streamed.read(layer)

    params = streamed.replace(read=read)
    for mode in MODES:
        fetched.clear()
        plan = Plan.of(looped.config, plan_of(skip_passes=(3, 4, 6), guidance_mode=mode).settings)
        loop = programs.Programs.of(plan, STEPS).denoise
        encoded, noise = clip
        loop(
            params, pipeline.start(plan, noise), plan.table, 0, encoded.conditions, encoded.negative, plan.method, None
        )
        assert len(fetched) == (STEPS - 3) * (2 if mode == "sequential" else 1) * NANO.dit.num_layers


def test_the_loops_programs_ahead(folder):
    plan = Plan.of(checkpoint.load(folder, policy="stream").config, plan_of(skip_passes=0.3).settings)
    arguments = ahead.shapes(plan)["denoise"]
    assert sorted(arguments) == ["add", "advance", "embed", "guess", "head", "keep", "layer"]
    past, index, sigma = arguments["guess"]
    latents = (1, *plan.latent_shape)
    assert jax.eval_shape(partial(Past.guess), past, index, sigma).shape == latents
    assert past.last.shape == (2, *latents) and arguments["advance"][0].state == past


@pytest.mark.slow
def test_on_a_mesh_the_state_lies_as_the_latents(model, clip):
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[:2])
    plan = plan_of(skip_passes=(3, 4, 6))
    encoded = pipeline.Encoded(*jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]),
                                             (clip[0].conditions, clip[0].negative)))  # fmt: skip
    plain = pipeline.denoise(model, plan, encoded, pipeline.noise(plan, [0, 1]))
    with jax.set_mesh(mesh):
        noise = pipeline.noise(plan, [0, 1], mesh)
        state = pipeline.start(plan, noise).state
        assert noise.sharding.spec[0] == "data"
        for leaf in (state.last, state.before):
            assert leaf.sharding.spec[:2] == (None, "data") and len(leaf.sharding.device_set) == 2
        params = {name: sharding.shard_params(tree, mesh) for name, tree in model.params.items()}
        spread = dataclasses.replace(model, params=params)
        found = pipeline.denoise(spread, plan, pipeline.place(encoded, mesh), noise, mesh=mesh)
    assert relative_error(found, plain) < 1e-5
