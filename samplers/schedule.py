"""Schedules of flow matching: sigmas by name.

A latent at noise level sigma is ``x = (1 - sigma) * data + sigma * noise``; sigma falls from about 1 (noise) to
0 (data). Every schedule is linear in an unshifted time s and then shifted:
``sigma = shift*s / (1 + (shift - 1)*s)``.

| name              | s of the steps                         | matches |
|-------------------|----------------------------------------|---------|
| `wan`             | linspace(0.999, 0, steps+1)[:-1]       | original Wan2.1's UniPC; diffusers' `DPMSolverMultistepScheduler(use_flow_sigmas=True)`; diffusers' `UniPCMultistepScheduler(use_flow_sigmas=True)` before it began at 1 |
| `linear`          | linspace(1, 0, steps+1)[:-1]           | the Euler sampler released with the paper; original Wan2.1's DPM++ |
| `diffusers-unipc` | linspace(1, 0.001, steps+1)[:-1]       | `UniPCMultistepScheduler(use_flow_sigmas=True)` of diffusers 0.42, which lowers the first sigma by 1e-6 to keep its logarithms finite |
| `diffusers-euler` | linspace(1, s_min, steps)              | `FlowMatchEulerDiscreteScheduler`: s_min is 0.001 already shifted once, so the tail is shifted twice |

The last step of every schedule goes to sigma 0. Computed in float64; nothing here touches a device.
"""  # noqa: E501

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from wanjax.settings import one_of

TRAIN_TIMESTEPS = 1000.0
"""The timestep given to the model is this times sigma."""

MOST_STEPS = 1000
"""More steps than the model was trained with noise levels bring nothing."""

Rounding = Literal["exact", "truncated"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)


def shifted(s: np.ndarray | float, shift: float) -> np.ndarray | float:
    """Noise level of unshifted time ``s`` in [0, 1]: ``shift*s / (1 + (shift - 1)*s)``. Any shape."""
    return shift * s / (1 + (shift - 1) * s)


def check_steps(steps: object) -> None:
    """Raises ValueError unless it is a number of denoising steps; before anything as long is made."""
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps: got {steps!r}; give a whole number of denoising steps, 1 to {MOST_STEPS}")


def sigmas(schedule: str, steps: int, shift: float) -> np.ndarray:
    """Noise levels of a run.

    Args:
      schedule: one of ``SCHEDULES`` (see the module docstring for what each matches).
      steps: number of denoising steps, at least 1.
      shift: timestep shift, positive and finite; 1 leaves it linear.

    Returns:
      float64 [steps + 1], strictly decreasing, the last one 0. Step i goes from ``[i]`` to ``[i + 1]``.

    Raises:
      ValueError: an unknown schedule, a bad step count or shift, or a shift so extreme that two levels coincide.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    check_steps(steps)
    if not (isinstance(shift, (int, float, np.number)) and math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift: got {shift!r}; give a positive finite number (Wan2.1 uses 3 to 16)")
    levels = np.append(SCHEDULES[schedule](int(steps), float(shift)), 0.0)
    if not np.all(np.diff(levels) < 0):
        raise ValueError(f"shift: {shift!r} makes noise levels of {steps} steps coincide; use one nearer to 1")
    return levels


def timesteps(levels: np.ndarray, rounding: Rounding = "exact") -> np.ndarray:
    """Timesteps for the model: ``1000 * sigma`` of each step's start, float64 [steps].

    Args:
      levels: [steps + 1] of `sigmas`.
      rounding: "exact" leaves them as they are, as the paper's code and diffusers' Euler do; "truncated" cuts them to
        integers, as the original Wan2.1 and diffusers' multistep schedulers do (11 % of the latents after 4 steps).
        The model's sinusoidal embedding takes any real number. Keep them in float32: bfloat16 has steps of 4 there.

    Raises:
      ValueError: an unknown rounding.
    """
    one_of("timesteps", rounding, ROUNDINGS)
    exact = TRAIN_TIMESTEPS * np.asarray(levels, np.float64)[:-1]
    return np.trunc(exact) if rounding == "truncated" else exact


def _diffusers_unipc(steps: int, shift: float) -> np.ndarray:
    levels = shifted(np.linspace(1, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1], shift)
    levels[0] -= 1e-6
    return levels


SCHEDULES: dict[str, Callable[[int, float], np.ndarray]] = {
    "wan": lambda steps, shift: shifted(np.linspace(0.999, 0, steps + 1)[:-1], shift),
    "linear": lambda steps, shift: shifted(np.linspace(1, 0, steps + 1)[:-1], shift),
    "diffusers-unipc": _diffusers_unipc,
    "diffusers-euler": lambda steps, shift: shifted(np.linspace(1, shifted(1 / TRAIN_TIMESTEPS, shift), steps), shift),
}
