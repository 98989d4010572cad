"""The scan: against a plain loop and a float64 oracle, stopping at a failure, progress, compile counts."""

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from samplers import sample as sampling
from samplers import schedule, solvers

SHAPE = (2, 3, 4, 4, 5)


def velocity(x, timestep, scale=1.0):
    """Non-linear field for jnp and numpy alike, in the precision of x."""
    xp = np if isinstance(x, np.ndarray) else jnp
    sigma = timestep / 1000
    return x - scale * xp.tanh(1.5 * x + xp.sin(4 * x) * (1 - sigma)) + 0.3 * xp.cos(3 * sigma + x)


def make_noise(seed=0):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def make_table(solver="unipc", steps=6, shift=5.0, grid="wan"):
    return solvers.table(solver, schedule.sigmas(grid, steps, shift))


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def oracle(solver, levels, noise):
    """The table's rule in float64, written with whole histories instead of a carry."""
    corrector, predictor = solvers.coefficients(solver, levels)
    x, zero = noise.astype(np.float64), np.zeros(noise.shape)
    data, corrected = [zero, zero], [zero]
    for i, sigma in enumerate(levels[:-1]):
        data.append(x - sigma * velocity(x, 1000 * sigma))
        c, p = corrector[i], predictor[i]
        parts = (x, corrected[-1], data[-1], data[-2], data[-3])
        corrected.append(sum(weight * part for weight, part in zip(c, parts, strict=True)))
        x = p[0] * corrected[-1] + p[1] * data[-1] + p[2] * data[-2]
    return x


@pytest.fixture(scope="module")
def run():
    """One jitted program for all tests that need no other: it compiles once for each number of steps."""
    return jax.jit(partial(sampling.sample, velocity))


@pytest.mark.parametrize("steps", [1, 2, 20, 100])
def test_float32_scan_against_float64(steps, run):
    for solver in solvers.SOLVERS:
        for grid in schedule.GRIDS:
            levels = schedule.sigmas(grid, steps, 16.0)
            latents, failed = run(make_noise(), solvers.table(solver, levels))
            assert latents.dtype == jnp.float32 and failed.dtype == jnp.int32 and failed.shape == ()
            assert int(failed) == -1
            sampling.check(failed)
            assert relative_error(latents, oracle(solver, levels, make_noise())) <= 3e-6, (solver, grid)


def test_equals_a_plain_loop(run):
    step = jax.jit(lambda carry, row: sampling.advance(carry, velocity(carry.sample, row.timestep), row))
    for solver in solvers.SOLVERS:
        table = make_table(solver)
        carry = sampling.start(jnp.asarray(make_noise()))
        for i in range(6):
            carry = step(carry, jax.tree.map(lambda leaf, i=i: leaf[i], table))
        latents, _ = run(make_noise(), table)
        assert relative_error(latents, np.asarray(carry.sample, np.float64)) <= 1e-6, solver


def test_denoise_sees_float32_and_unrounded_times():
    seen = []

    def denoise(x, timestep):
        assert x.dtype == timestep.dtype == jnp.float32 and timestep.shape == ()
        jax.debug.callback(lambda t: seen.append(float(t)), timestep)
        return velocity(x, timestep).astype(jnp.bfloat16)

    table = make_table(steps=80, shift=16.0)
    latents, _ = sampling.sample(denoise, jnp.asarray(make_noise(), jnp.bfloat16), table)
    jax.effects_barrier()
    assert latents.dtype == jnp.float32
    assert sorted(seen, reverse=True) == [float(t) for t in table.timestep] and len(set(seen)) == 80


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_stops_at_the_step_that_fails(poison):
    evaluated, reported = [], []

    def denoise(x, timestep, bad_time):
        jax.debug.callback(lambda: evaluated.append(1))
        v = velocity(x, timestep)
        return v.at[0, 0, 0, 0, 0].add(jnp.where(timestep == bad_time, poison, 0.0))

    @jax.jit
    def run(noise, table, bad_time):
        return sampling.sample(lambda x, t: denoise(x, t, bad_time), noise, table, reported.append)

    for solver in solvers.SOLVERS:
        for failing in (0, 3, 5):
            evaluated.clear()
            reported.clear()
            table = make_table(solver)
            latents, failed = run(make_noise(), table, table.timestep[failing])
            jax.effects_barrier()
            assert int(failed) == failing and failed.dtype == jnp.int32
            assert len(evaluated) == failing + 1
            assert sorted(reported) == list(range(failing + 1))
            assert not np.isfinite(latents).all()
            with pytest.raises(FloatingPointError, match=rf"^latents: NaN or inf .* step {failing} \(from 0\)"):
                sampling.check(failed)


def test_non_finite_noise_fails_at_step_zero(run):
    noise = make_noise()
    noise[1, 2, 3, 3, 4] = np.inf
    assert int(run(noise, make_table())[1]) == 0


def test_check_takes_a_batch_of_runs():
    sampling.check(np.array([-1, -1]))
    with pytest.raises(FloatingPointError, match="step 2 "):
        sampling.check(np.array([-1, 7, 2]))


def test_one_trace_for_other_values_and_tables():
    """Noise, model values, shift, solver and grid change; only the number of steps compiles anew."""
    traces = []

    def denoise(x, timestep, scale):
        traces.append(1)
        return velocity(x, timestep, scale)

    progress = sampling.Progress()

    @partial(jax.jit, static_argnames="on_step")
    def run(noise, table, scale, on_step):
        return sampling.sample(lambda x, t: denoise(x, t, scale), noise, table, on_step)[0]

    ends = []
    for seed, scale, solver, shift, grid in (
        (0, 1.0, "unipc", 5.0, "wan"),
        (1, 1.0, "unipc", 5.0, "wan"),
        (0, 0.9, "unipc", 5.0, "wan"),
        (0, 1.0, "dpm++", 5.0, "wan"),
        (0, 1.0, "euler", 5.0, "wan"),
        (0, 1.0, "unipc", 16.0, "wan"),
        (0, 1.0, "unipc", 5.0, "linear"),
    ):
        ends.append(np.asarray(run(make_noise(seed), make_table(solver, 6, shift, grid), scale, progress)))
    assert len(traces) == 1 and run._cache_size() == 1
    assert all(relative_error(end, ends[0].astype(np.float64)) > 1e-4 for end in ends[1:])
    run(make_noise(), make_table(steps=7), 1.0, progress)
    assert len(traces) == 2 and run._cache_size() == 2


def test_there_is_exactly_one_scan():
    jaxpr = jax.make_jaxpr(partial(sampling.sample, velocity))(make_noise(), make_table(steps=6))
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("scan") == 1
    assert "while" not in str(jaxpr)


def test_vmapped_runs_equal_single_runs(run):
    noises = np.stack([make_noise(seed) for seed in range(3)])
    batch = jax.jit(jax.vmap(partial(sampling.sample, velocity), in_axes=(0, None)))
    latents, failed = batch(noises, make_table())
    assert failed.shape == (3,) and np.all(np.asarray(failed) == -1)
    for got, noise in zip(latents, noises, strict=True):
        assert relative_error(got, np.asarray(run(noise, make_table())[0], np.float64)) <= 1e-6


def test_sharded_latents_keep_values_and_sharding():
    """Over all devices there are (8 where the suite runs on fake ones), with one call of on_step a step."""
    devices = np.array(jax.devices())
    noise = np.random.default_rng(3).standard_normal((len(devices), 2 * len(devices), 5)).astype(np.float32)
    sharding = NamedSharding(Mesh(devices, ("data",)), PartitionSpec(None, "data"))
    reported = []
    run = jax.jit(partial(sampling.sample, velocity, on_step=reported.append))
    latents, failed = run(jax.device_put(noise, sharding), make_table(steps=6))
    jax.effects_barrier()
    assert sorted(reported) == list(range(6)) and int(failed) == -1
    assert latents.sharding.is_equivalent_to(sharding, latents.ndim)
    single, _ = jax.jit(partial(sampling.sample, velocity))(noise, make_table(steps=6))
    assert relative_error(latents, np.asarray(single, np.float64)) <= 1e-6


def test_bad_model_and_noise_are_named():
    with pytest.raises(ValueError, match=r"^noise: got dtype int32"):
        sampling.sample(velocity, jnp.zeros(SHAPE, jnp.int32), make_table())
    with pytest.raises(ValueError, match=r"^denoise: returned shape \(2,\) for latents \(2, 3, 4, 4, 5\)"):
        sampling.sample(lambda x, t: x[:, 0, 0, 0, 0], make_noise(), make_table())


@pytest.fixture
def screen(monkeypatch):
    """What the bars drew, and the bars."""
    text, bars = io.StringIO(), []
    real = sampling.tqdm

    def drawn(**options):
        bars.append(real(**options, file=text, mininterval=0))
        return bars[-1]

    monkeypatch.setattr(sampling, "tqdm", drawn)
    return text, bars


def test_progress_bar_is_complete_and_closed(screen):
    text, bars = screen
    progress = sampling.Progress("denoise")
    run = jax.jit(partial(sampling.sample, velocity), static_argnames="on_step")
    for _ in range(2):
        with progress.open(total=6) as opened:
            assert opened is progress
            run(make_noise(), make_table(steps=6), on_step=progress)
    assert run._cache_size() == 1
    # tqdm marks a closed bar as disabled.
    assert [(bar.n, bar.total, bar.disable) for bar in bars] == [(6, 6, True)] * 2
    assert "6/6" in text.getvalue() and "denoise: 100%" in text.getvalue()
    run(make_noise(), make_table(steps=6), on_step=progress)  # no bar open: silent
    jax.effects_barrier()
    assert len(bars) == 2


def test_progress_bar_stops_at_a_failure_and_at_an_exception(screen):
    _, bars = screen
    progress = sampling.Progress()
    table = make_table(steps=6)
    with progress.open(total=6):
        bad = lambda x, t: jnp.where(t == table.timestep[2], jnp.nan, velocity(x, t))  # noqa: E731
        jax.jit(lambda noise: sampling.sample(bad, noise, table, progress))(make_noise())
    with pytest.raises(KeyboardInterrupt), progress.open(total=6):
        progress(0)
        raise KeyboardInterrupt
    assert [bar.n for bar in bars] == [3, 1] and all(bar.disable for bar in bars)


def test_progress_takes_calls_in_any_order(screen):
    _, bars = screen
    progress = sampling.Progress()
    with progress.open(total=3):
        for step, shown in ((1, 2), (0, 2), (2, 3)):
            progress(step)
            assert bars[0].n == shown


def test_progress_refuses_a_second_bar(screen):
    progress = sampling.Progress()
    with progress.open(total=3), pytest.raises(ValueError, match=r"^progress: .*already open"):
        progress.open(total=3)
    progress.close()


def test_progress_waits_for_late_calls_before_it_closes(screen, monkeypatch):
    """CPU programs run the callbacks before they return, accelerators may not: here the barrier delivers."""
    _, bars = screen
    progress = sampling.Progress()
    monkeypatch.setattr(jax, "effects_barrier", lambda: progress(2))
    with progress.open(total=3):
        assert bars[0].n == 0
    assert bars[0].n == 3 and bars[0].disable
    with pytest.raises(KeyboardInterrupt), progress.open(total=3):
        raise KeyboardInterrupt
    assert bars[1].n == 0 and bars[1].disable
