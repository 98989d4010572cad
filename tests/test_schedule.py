"""Schedules against diffusers' schedulers and against the formulas written out."""

import math

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from samplers import schedule

CASES = [(steps, shift) for steps in (1, 4, 20, 50, 100) for shift in (1.0, 3.0, 5.0, 16.0)]


# diffusers turns a torch tensor into numpy in a way that numpy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("steps", "shift"), CASES)
def test_wan_grid_is_that_of_diffusers_dpm(steps, shift):
    reference = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        algorithm_type="dpmsolver++",
    )
    reference.set_timesteps(steps)
    levels = schedule.sigmas("wan", steps, shift)
    np.testing.assert_allclose(levels, reference.sigmas.double().numpy(), rtol=1e-6, atol=0)
    # Theirs are the same numbers cut to integers; 1e-9 is for products that land on an integer.
    cut = np.floor(schedule.timesteps(levels) + 1e-9)
    assert np.max(np.abs(cut - reference.timesteps.numpy())) <= 1
    assert np.mean(cut == reference.timesteps.numpy()) > 0.9


@pytest.mark.parametrize(("steps", "shift"), CASES)
def test_unipc_grid_is_that_of_diffusers(steps, shift):
    reference = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    reference.set_timesteps(steps)
    levels = schedule.sigmas("diffusers-unipc", steps, shift)
    np.testing.assert_allclose(levels, reference.sigmas.double().numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("steps", "shift"), CASES)
def test_euler_grid_is_that_of_diffusers(steps, shift):
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(steps)
    levels = schedule.sigmas("diffusers-euler", steps, shift)
    np.testing.assert_allclose(levels, reference.sigmas.double().numpy(), rtol=1e-6, atol=0)
    np.testing.assert_allclose(schedule.timesteps(levels), reference.timesteps.double().numpy(), rtol=1e-6)


@pytest.mark.parametrize(("steps", "shift"), CASES)
def test_linear_grid_one_by_one(steps, shift):
    levels = schedule.sigmas("linear", steps, shift)
    for i in range(steps):
        s = 1 - i / steps
        assert levels[i] == pytest.approx(shift * s / (1 + (shift - 1) * s), rel=1e-14)
    assert levels[0] == 1 and levels[-1] == 0


@pytest.mark.parametrize("name", schedule.SCHEDULES)
@pytest.mark.parametrize(("steps", "shift"), CASES)
def test_every_schedule_falls_strictly_to_zero_in_float64(name, steps, shift):
    levels = schedule.sigmas(name, steps, shift)
    assert levels.dtype == np.float64 and levels.shape == (steps + 1,)
    assert np.all(np.diff(levels) < 0) and levels[0] <= 1 and levels[-1] == 0
    assert schedule.timesteps(levels).dtype == np.float64 and schedule.timesteps(levels).shape == (steps,)


def test_timesteps_are_not_rounded_where_integers_would_coincide():
    times = schedule.timesteps(schedule.sigmas("wan", 70, 16.0))
    assert math.floor(times[0]) == math.floor(times[1]) == 999
    assert len(np.unique(times.astype(np.float32))) == 70


@pytest.mark.parametrize("steps", [0, -3, 2.0, True, None])
def test_bad_steps_are_named(steps):
    with pytest.raises(ValueError, match=r"^steps: .*1 to 1000$"):
        schedule.sigmas("wan", steps, 3.0)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_bad_shifts_are_named(shift):
    with pytest.raises(ValueError, match=r"^shift: .*positive finite"):
        schedule.sigmas("wan", 4, shift)


def test_a_shift_that_merges_levels_is_refused():
    with pytest.raises(ValueError, match=r"^shift: .*coincide"):
        schedule.sigmas("wan", 50, 1e20)


def test_unknown_grid_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'karras'; choose one of wan, linear"):
        schedule.sigmas("karras", 4, 3.0)
