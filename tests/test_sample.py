"""The scan and the host loop: against a plain loop and a float64 oracle, any division into parts, stopping at a
failure, progress, compile counts."""

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from samplers import run as host
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


def make_table(solver="unipc", steps=6, shift=5.0, name="wan"):
    return sampling.rows(solvers.table(solver, schedule.sigmas(name, steps, shift)))


def denoise(x, row, state):
    return velocity(x, row.step.timestep), state


def sample(denoise, noise, table, n=None):
    """All rows of a table as one scan: (latents, failed_step)."""
    carry = sampling.sample(denoise, sampling.start(noise), table, 0, n or len(table.live))
    return carry.sample, carry.failed_step


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
    return jax.jit(partial(sample, denoise))


@pytest.mark.parametrize("steps", [1, 2, 20, 100])
def test_float32_scan_against_float64(steps, run):
    for solver in ("euler", "unipc", "dpm++"):
        for name in schedule.SCHEDULES:
            levels = schedule.sigmas(name, steps, 16.0)
            latents, failed = run(make_noise(), make_table(solver, steps, 16.0, name))
            assert latents.dtype == jnp.float32 and failed.dtype == jnp.int32 and failed.shape == ()
            assert int(failed) == -1
            assert relative_error(latents, oracle(solver, levels, make_noise())) <= 3e-6, (solver, name)


def test_equals_a_plain_loop(run):
    step = jax.jit(lambda carry, row: sampling.advance(carry, velocity(carry.sample, row.step.timestep), row.step))
    for solver in ("euler", "unipc", "dpm++"):
        table = make_table(solver)
        carry = sampling.start(jnp.asarray(make_noise()))
        for i in range(6):
            carry = step(carry, jax.tree.map(lambda leaf, i=i: leaf[i], table))
        latents, _ = run(make_noise(), table)
        assert relative_error(latents, np.asarray(carry.sample, np.float64)) <= 1e-6, solver


def test_denoise_sees_float32_and_unrounded_times():
    seen = []

    def looking(x, row, state):
        timestep = row.step.timestep
        assert x.dtype == timestep.dtype == jnp.float32 and timestep.shape == ()
        jax.debug.callback(lambda t: seen.append(float(t)), timestep)
        return velocity(x, timestep).astype(jnp.bfloat16), state

    table = make_table(steps=80, shift=16.0)
    latents, _ = sample(looking, jnp.asarray(make_noise(), jnp.bfloat16), table)
    jax.effects_barrier()
    assert latents.dtype == jnp.float32
    assert sorted(seen, reverse=True) == [float(t) for t in table.step.timestep[:80]] and len(set(seen)) == 80


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_stops_at_the_step_that_fails(poison):
    evaluated = []

    @jax.jit
    def part(carry, table, first, bad_time):
        def failing(x, row, state):
            jax.debug.callback(lambda: evaluated.append(1))
            v = velocity(x, row.step.timestep)
            return v.at[0, 0, 0, 0, 0].add(jnp.where(row.step.timestep == bad_time, poison, 0.0)), state

        return sampling.sample(failing, carry, table, first, 6)

    for solver in ("euler", "unipc", "dpm++"):
        for step in (0, 3, 5):
            evaluated.clear()
            table = make_table(solver)
            carry = part(sampling.start(make_noise()), table, 0, table.step.timestep[step])
            jax.effects_barrier()
            assert int(carry.failed_step) == step and carry.failed_step.dtype == jnp.int32
            assert len(evaluated) == step + 1
            assert not np.isfinite(carry.sample).all()
            with pytest.raises(FloatingPointError, match=rf"^latents: NaN or inf .* step {step} \(from 0\)"):
                host.check(carry)


def test_non_finite_noise_fails_at_step_zero(run):
    noise = make_noise()
    noise[1, 2, 3, 3, 4] = np.inf
    assert int(run(noise, make_table())[1]) == 0


def test_check_takes_a_batch_of_runs():
    def carry(failed):
        return sampling.start(make_noise()).replace(failed_step=np.array(failed))

    host.check(carry([-1, -1]))
    with pytest.raises(FloatingPointError, match="step 2 "):
        host.check(carry([-1, 7, 2]))


def make_part(traces, **static):
    """The compiled sampler as the host loop takes it; `traces` grows by one at every trace of the model."""

    @partial(jax.jit, static_argnames="n")
    def part(carry, table, first, n):
        def counted(x, row, state):
            traces.append(1)
            return velocity(x, row.step.timestep), None if state is None else state + row.step.sigma

        return sampling.sample(counted, carry, table, first, n)

    return lambda carry, table, first, n: part(carry, table, first, n=n)


def test_any_division_into_parts_gives_the_same_bits(run):
    """Also where parts do not divide the run, reach beyond the table, or stop before its end; one program a size."""
    for steps in (6, 64):
        table = make_table(steps=steps)
        whole, _ = run(make_noise(), table)
        for chunk in (1, 4, 5, steps):
            traces = []
            part = make_part(traces)
            begin = sampling.start(jnp.asarray(make_noise()), state=jnp.zeros(()))
            carry = host.run(part, begin, table, steps, chunk=chunk)
            assert np.array_equal(carry.sample, whole), (steps, chunk)
            assert len(traces) == 1
            np.testing.assert_allclose(carry.state, table.step.sigma[:steps].sum(), rtol=1e-5)
            early = host.run(part, begin, table, 3, chunk=chunk)
            late = host.run(part, early, table, steps, chunk=chunk, first=3)
            assert np.array_equal(late.sample, whole) and len(traces) == 1
            assert not np.array_equal(early.sample, whole)
            assert np.array_equal(host.run(part, begin, table, 0, chunk=chunk).sample, make_noise())


def test_one_program_for_other_values_tables_and_step_counts():
    """Noise, shift, solver, schedule and the number of steps change; nothing compiles anew."""
    traces = []
    part = make_part(traces)
    ends = []
    for seed, solver, steps, shift, name in (
        (0, "unipc", 6, 5.0, "wan"),
        (1, "unipc", 6, 5.0, "wan"),
        (0, "dpm++", 6, 5.0, "wan"),
        (0, "euler", 6, 5.0, "wan"),
        (0, "unipc", 6, 16.0, "wan"),
        (0, "unipc", 6, 5.0, "linear"),
        (0, "unipc", 7, 5.0, "wan"),
        (0, "unipc", 64, 5.0, "wan"),
    ):
        table = make_table(solver, steps, shift, name)
        ends.append(np.asarray(host.run(part, sampling.start(make_noise(seed)), table, steps).sample))
    assert len(traces) == 1
    assert all(relative_error(end, ends[0].astype(np.float64)) > 1e-4 for end in ends[1:])
    host.run(part, sampling.start(make_noise()), make_table(steps=65), 65)
    assert len(traces) == 2  # beyond LEAST_ROWS the next power of two


def test_the_host_hears_of_every_part_and_can_stop():
    heard = []

    def on_step(done, carry):
        heard.append((done, float(jnp.abs(carry.sample).sum())))
        if done == 4:
            raise KeyboardInterrupt

    part = make_part([])
    with pytest.raises(KeyboardInterrupt):
        host.run(part, sampling.start(make_noise()), make_table(), 6, on_step=on_step)
    assert [done for done, _ in heard] == [0, 1, 2, 3, 4] and len({size for _, size in heard}) == 5
    heard.clear()
    host.run(part, sampling.start(make_noise()), make_table(), 6, chunk=5, on_step=lambda n, carry: heard.append(n))
    assert heard == [0, 5, 6]


def test_lcm_renoises_each_sample_by_its_own_key():
    """Against the formula of consistency sampling, with the noise of the keys."""
    steps, keys = 4, jax.random.split(jax.random.key(5), 2)
    levels = schedule.sigmas("linear", steps, 5.0)
    table = make_table("lcm", steps, 5.0, "linear")
    carry = sampling.sample(denoise, sampling.start(make_noise(), keys=keys), table, 0, steps)
    x = make_noise().astype(np.float64)
    for i in range(steps):
        fresh = np.stack([np.asarray(jax.random.normal(jax.random.fold_in(key, i), SHAPE[1:])) for key in keys])
        data = x - levels[i] * velocity(x, 1000 * levels[i])
        x = (1 - levels[i + 1]) * data + levels[i + 1] * fresh
    assert relative_error(carry.sample, x) < 1e-6


def test_there_is_exactly_one_scan_and_no_callback():
    jaxpr = jax.make_jaxpr(partial(sample, denoise, n=6))(make_noise(), make_table(steps=6))
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("scan") == 1
    assert "while" not in str(jaxpr) and "callback" not in str(jaxpr)


def test_vmapped_runs_equal_single_runs(run):
    noises = np.stack([make_noise(seed) for seed in range(3)])
    batch = jax.jit(jax.vmap(partial(sample, denoise), in_axes=(0, None)))
    latents, failed = batch(noises, make_table())
    assert failed.shape == (3,) and np.all(np.asarray(failed) == -1)
    for got, noise in zip(latents, noises, strict=True):
        assert relative_error(got, np.asarray(run(noise, make_table())[0], np.float64)) <= 1e-6


def test_sharded_latents_keep_values_and_sharding():
    """Over all devices there are (8 where the suite runs on fake ones)."""
    devices = np.array(jax.devices())
    noise = np.random.default_rng(3).standard_normal((len(devices), 2 * len(devices), 5)).astype(np.float32)
    sharding = NamedSharding(Mesh(devices, ("data",)), PartitionSpec(None, "data"))
    run = jax.jit(partial(sample, denoise))
    latents, failed = run(jax.device_put(noise, sharding), make_table(steps=6))
    assert int(failed) == -1
    assert latents.sharding.is_equivalent_to(sharding, latents.ndim)
    single, _ = jax.jit(partial(sample, denoise))(noise, make_table(steps=6))
    assert relative_error(latents, np.asarray(single, np.float64)) <= 1e-6


def test_bad_model_and_noise_are_named():
    with pytest.raises(ValueError, match=r"^noise: got dtype int32"):
        sampling.start(jnp.zeros(SHAPE, jnp.int32))
    with pytest.raises(ValueError, match=r"^denoise: returned shape \(2,\) for latents \(2, 3, 4, 4, 5\)"):
        sample(lambda x, row, state: (x[:, 0, 0, 0, 0], state), make_noise(), make_table())


@pytest.fixture
def screen(monkeypatch):
    """What the bars drew, and the bars."""
    text, bars = io.StringIO(), []
    real = host.tqdm

    def drawn(**options):
        bars.append(real(**options, file=text, mininterval=0))
        return bars[-1]

    monkeypatch.setattr(host, "tqdm", drawn)
    return text, bars


def test_progress_bar_is_complete_and_closed(screen):
    text, bars = screen
    part = make_part([])
    for _ in range(2):
        with host.bar(6) as shown:
            host.run(part, sampling.start(make_noise()), make_table(), 6, on_step=shown)
    # tqdm marks a closed bar as disabled.
    assert [(bar.n, bar.total, bar.disable) for bar in bars] == [(6, 6, True)] * 2
    assert "6/6" in text.getvalue() and "denoise: 100%" in text.getvalue()


def test_progress_bar_stops_at_a_failure_and_at_an_exception(screen):
    _, bars = screen
    table = make_table()

    def part(carry, table, first, n):
        bad = lambda x, row, state: (jnp.where(row.step.timestep == time, jnp.nan, velocity(x, 0.5)), state)  # noqa: E731
        return sampling.sample(bad, carry, table, first, n)

    time = table.step.timestep[2]
    with pytest.raises(FloatingPointError), host.bar(6) as shown:
        host.run(part, sampling.start(make_noise()), table, 6, on_step=shown)
    with pytest.raises(KeyboardInterrupt), host.bar(6) as shown:
        shown(1, None)
        raise KeyboardInterrupt
    assert [bar.n for bar in bars] == [2, 1] and all(bar.disable for bar in bars)
