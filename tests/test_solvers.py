"""Coefficient tables against diffusers' schedulers, known solutions and the limits at sigma 1 and 0.

The schedulers are run in float64, sample and sigmas, on our float64 schedule: theirs are float32, whose 1 - sigma
near sigma 1 has three digits left. One test runs them as they come. The field depends on sigma, not on the
timestep, so that their integer timesteps have no part in it.
"""

import jax
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from samplers import schedule, solvers

STEPS = (4, 20, 50, 100)
SHIFTS = (3.0, 5.0, 16.0)
SHAPE = (2, 3, 4, 5)
ODE = tuple(solver for solver in solvers.SOLVERS if solver != "lcm")  # which draws noise anew


def field(x, sigma):
    """A non-linear velocity field, smooth in x and sigma, in the precision of x."""
    sigma = x.dtype.type(sigma)
    return x - np.tanh(1.5 * x + np.sin(4 * x) * (1 - sigma)) + 0.3 * np.cos(3 * sigma + x)


def noise(dtype=np.float64):
    return np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)


def relative_error(a, b):
    return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b)


def trajectory(corrector, predictor, levels, velocity, x):
    """All samples x_1..x_steps of the table's rule, in the precision of x."""
    corrected = before = before_that = np.zeros_like(x)
    samples = []
    for i in range(len(predictor)):
        data = x - x.dtype.type(levels[i]) * velocity(x, levels[i])
        parts = (x, corrected, data, before, before_that)
        corrected = sum(weight * part for weight, part in zip(corrector[i], parts, strict=True))
        x = sum(w * part for w, part in zip(predictor[i], (corrected, data, before), strict=True))
        before, before_that = data, before
        samples.append(x)
    return samples


def reference_scheduler(solver, shift):
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return DPMSolverMultistepScheduler(**flow) if solver == "dpm++" else UniPCMultistepScheduler(**flow)


def reference_trajectory(scheduler, x):
    """All samples of a diffusers scheduler whose sigmas are set, in the precision of x."""
    scheduler.set_begin_index(0)
    x = torch.from_numpy(x)
    samples = []
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.from_numpy(field(x.numpy(), scheduler.sigmas[i].item()))
        x = scheduler.step(velocity, timestep, x).prev_sample
        samples.append(x.double().numpy())
    return samples


# First the scheduler's own schedule. "linear" begins at sigma 1, where their logarithms are infinite too.
SCHEDULES_OF = {
    "euler": ("diffusers-euler", "linear", "wan"),
    "dpm++": ("wan", "linear"),
    "unipc": ("diffusers-unipc", "wan", "linear"),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("solver", "name"), [(s, n) for s, names in SCHEDULES_OF.items() for n in names])
def test_every_step_of_diffusers_trajectory(solver, name, steps, shift):
    levels = schedule.sigmas(name, steps, shift)
    scheduler = reference_scheduler(solver, shift)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.from_numpy(levels)
    expected = reference_trajectory(scheduler, noise())
    table = solvers.table(solver, levels)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(table))
    single = trajectory(table.corrector, table.predictor, table.sigma, field, noise(np.float32))
    double = trajectory(*solvers.coefficients(solver, levels), levels, field, noise())
    assert single[0].dtype == np.float32 and double[0].dtype == np.float64
    for i in range(steps):
        assert relative_error(single[i], expected[i]) <= 1e-5, i
        # Euler and DPM++ of diffusers round the sample itself to float32 at every step.
        assert relative_error(double[i], expected[i]) <= (1e-10 if solver == "unipc" else 2e-6), i


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", ODE)
def test_diffusers_as_it_comes_in_float32(solver, steps, shift):
    scheduler = reference_scheduler(solver, shift)
    scheduler.set_timesteps(steps)
    expected = reference_trajectory(scheduler, noise(np.float32))
    table = solvers.table(solver, schedule.sigmas(SCHEDULES_OF[solver][0], steps, shift))
    actual = trajectory(table.corrector, table.predictor, table.sigma, field, noise(np.float32))
    for i in range(steps):
        assert relative_error(actual[i], expected[i]) <= 1e-5, i


def gaussian_velocity(x, sigma):
    """Exact velocity when the data are normal with mean 0.4 and deviation 0.7."""
    alpha = 1 - sigma
    slope = (sigma - alpha * 0.7**2) / (alpha**2 * 0.7**2 + sigma**2)
    return -0.4 + slope * (x - alpha * 0.4)


def convergence(solver, schedules):
    """Observed orders of the error at the end, between schedules of doubling step counts."""
    errors = []
    for levels in schedules:
        begin, end = (
            (1 - sigma) * 0.4 + np.hypot((1 - sigma) * 0.7, sigma) * noise() for sigma in (levels[0], levels[-1])
        )
        actual = trajectory(*solvers.coefficients(solver, levels), levels, gaussian_velocity, begin)[-1]
        errors.append(relative_error(actual, end))
    return np.log2(np.array(errors[:-1]) / errors[1:])


@pytest.mark.parametrize("name", ["linear", "wan"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_order_of_convergence_from_noise_to_data(solver, order, name):
    """Over the whole range the first-order first and last steps hold UniPC at order 2.

    Near both ends lambda moves by log 2 and more a step however many steps there are: DPM++ gets a log(steps)
    there.
    """
    orders = convergence(solver, [schedule.sigmas(name, steps, 3.0) for steps in (200, 400, 800)])
    assert np.all(np.abs(orders - order) < 0.35), orders


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 3)])
def test_order_of_convergence_inside(solver, order):
    """Even steps of lambda with a short first and last one: UniPC's corrector then shows its third order."""
    schedules = []
    for steps in (20, 40, 80, 160):
        h = 6 / steps
        log_snr = np.concatenate([[-3], np.linspace(-3 + 0.1 * h**2, 3 - 0.1 * h**2, steps), [3]])
        schedules.append(1 / (1 + np.exp(log_snr)))
    orders = convergence(solver, schedules)
    assert np.all(np.abs(orders[-2:] - order) < 0.2), orders


@pytest.mark.parametrize("solver", ODE)
@pytest.mark.parametrize("name", schedule.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 1000])
def test_weights_are_finite_and_keep_constant_data(solver, name, steps):
    """If every estimate is the same m, then x = (1 - sigma) m + sigma * noise must hold at every level."""
    levels = schedule.sigmas(name, steps, 16.0)
    corrector, predictor = solvers.coefficients(solver, levels)
    assert np.isfinite(corrector).all() and np.isfinite(predictor).all()
    assert corrector.shape == (steps, 5) and predictor.shape == (steps, 3)
    assert np.abs(predictor).max() < 10 and np.abs(corrector).max() < 10
    m, e = 0.7, noise()
    begin = (1 - levels[0]) * m + levels[0] * e
    samples = trajectory(corrector, predictor, levels, lambda x, sigma: (x - m) / sigma, begin)
    for level, actual in zip(levels[1:], samples, strict=True):
        np.testing.assert_allclose(actual, (1 - level) * m + level * e, rtol=0, atol=1e-11)


@pytest.mark.parametrize("solver", ODE)
def test_limit_at_sigma_one(solver, monkeypatch):
    """lambda of the first level going to -inf (sigma rounds to 1 long before) tends to the weights there."""
    levels = schedule.sigmas("linear", 6, 5.0)
    exact = solvers.coefficients(solver, levels)
    log_snr = solvers._log_snr
    for first, tolerance in ((-1e4, 1e-3), (-1e9, 1e-8)):
        moved = np.append(first, log_snr(levels)[1:])
        monkeypatch.setattr(solvers, "_log_snr", lambda _, moved=moved: moved)
        for weights, limit in zip(solvers.coefficients(solver, levels), exact, strict=True):
            np.testing.assert_allclose(weights, limit, rtol=0, atol=tolerance)


@pytest.mark.parametrize("z", [-1e-8, -1e-3, -0.3, -0.999999, -1.000001, -4.0, -40.0, 0.5, 2.0])
def test_phi_against_the_integral(z):
    """phi_k(z) = integral over t in [0, 1] of exp((1 - t) z) t^(k-1) / (k-1)!."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t = (nodes + 1) / 2
    for k, value in enumerate(solvers._phi(z), start=1):
        integrand = np.exp((1 - t) * z) * t ** (k - 1) / max(1, k - 1)
        assert value == pytest.approx(np.sum(weights * integrand) / 2, rel=1e-12)


def test_solvers_differ():
    """Guards the parity tests against a solver quietly becoming another."""
    levels = schedule.sigmas("wan", 20, 5.0)
    ends = {}
    for solver in ODE:
        ends[solver] = trajectory(*solvers.coefficients(solver, levels), levels, field, noise())[-1]
    for a, b in (("euler", "unipc"), ("euler", "dpm++"), ("unipc", "dpm++")):
        assert relative_error(ends[a], ends[b]) > 1e-4


def test_unknown_solver_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'heun'; choose one of euler, unipc, dpm\+\+, lcm$"):
        solvers.table("heun", schedule.sigmas("wan", 4, 3.0))


@pytest.mark.parametrize("bad", [[1, 0.5, 0.5, 0], [0, 1], [1.1, 0], [0.5, -0.1], [np.nan, 0], [1], 1])
def test_bad_sigmas_are_named(bad):
    with pytest.raises(ValueError, match=r"^sigmas: "):
        solvers.table("euler", np.array(bad))
