"""Which passes of a run cost least to skip, found for a model and its settings on a few clips.

A whole run is made of each clip, and the velocities that the model gives in it are kept as their inner products, one
number for two of them. What a schedule of skipped steps would do to the end of that run, to first order and without
what the model would answer, is then a quadratic form in these numbers, so that schedules are searched without the
model; the best are run, and the one whose latents are nearest to those of the whole run is it.
"""

import sys

if __name__ == "__main__":  # python -m samplers.calibrate; above the imports, for which --help need not wait
    from samplers.calibrate_command import main

    sys.exit(main())

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from samplers import pipeline, skipping
from samplers.pipeline import Encoded
from samplers.plan import Plan
from samplers.programs import Programs
from samplers.sample import Carry
from samplers.skipping import Schedule
from wanjax.checkpoint import Model
from wanjax.guidance import CONDITIONAL
from wanjax.settings import refuse

BLOCK = 1 << 18
"""Numbers of each velocity that are widened to float64 at a time."""


@dataclass(frozen=True)
class Whole:
    """What is known of whole runs.

    Attributes:
      products: float64 [2 * steps, 2 * steps], inner products of the velocities of step i and pass p (at 2 * i + p),
        summed over clips; zero where a pass is not run.
      sigmas: float64 [steps + 1], noise levels. scale: float64 [steps], guidance.
    """

    products: np.ndarray
    sigmas: np.ndarray
    scale: np.ndarray

    def errors(self, flags: np.ndarray) -> np.ndarray:
        """What each step adds to the latents too much, float64 [steps, 2 * steps] as weights of the velocities.

        Args:
          flags: bool [steps, 2] of `skipping.flags`.
        """
        steps = len(self.scale)
        found = np.zeros((steps, 2 * steps))
        weight = np.stack([self.scale, 1 - self.scale], 1) * np.diff(self.sigmas)[:, None]
        for which in range(2):
            real: list[int] = []
            for step in range(steps):
                if flags[step, which]:
                    before, last = real[-2:]
                    far = (self.sigmas[step] - self.sigmas[last]) / (self.sigmas[last] - self.sigmas[before])
                    for source, share in ((last, 1 + far), (before, -far), (step, -1)):
                        found[step, 2 * source + which] += weight[step, which] * share
                elif which == CONDITIONAL or self.scale[step] != 1:
                    real.append(step)
        return found

    def together(self, flags: np.ndarray) -> float:
        """The square of the errors' sum: steps may make up for each other."""
        total = self.errors(flags).sum(0)
        return float(total @ self.products @ total)

    def apart(self, flags: np.ndarray) -> float:
        """The sum of the errors' squares."""
        errors = self.errors(flags)
        return float(((errors @ self.products) * errors).sum())


COSTS: tuple[Callable[[Whole, np.ndarray], float], ...] = (Whole.together, Whole.apart)


def sources(plan: Plan) -> Plan:
    """The same plan, with the program of one that skips, and nothing skipped: its state holds the last velocities."""
    return replace(plan, table=plan.table.replace(skip=np.zeros((len(plan.table.live), 2), bool)))


def observe(model: Model, plan: Plan, clips: Sequence[tuple[Encoded, jax.Array]]) -> tuple[Whole, list[np.ndarray]]:
    """Runs clips as a plan has it but for skipping, and gives their `Whole` and latents.

    Args:
      clips: conditions and noise, a batch of them at a time.
    """
    plan = sources(plan)
    steps = plan.settings.steps
    scale = plan.table.guidance[:steps].astype(np.float64)
    levels = np.append(plan.table.step.sigma[:steps].astype(np.float64), 0.0)
    products, latents = np.zeros((2 * steps, 2 * steps)), []
    programs = Programs.of(plan)
    for encoded, noise in clips:
        velocities: list[np.ndarray] = []

        def on_step(done: int, carry: Carry, velocities: list[np.ndarray] = velocities) -> None:
            if done:
                given = np.array(carry.state.last)
                given[1] *= scale[done - 1] != 1
                velocities.extend(given.reshape(2, -1))

        out = pipeline.denoise(model, plan, encoded, noise, on_step=on_step, programs=programs)
        latents.append(np.asarray(out))
        for begin in range(0, velocities[0].size, BLOCK):
            part = np.stack([one[begin : begin + BLOCK] for one in velocities]).astype(np.float64)
            products += part @ part.T
    return Whole(products, levels, scale), latents


def number(plan: Plan, share: float) -> int:
    """How many steps a share of a plan's is. ValueError: a bad share, or one of which no step comes."""
    steps = plan.settings.steps
    refuse((isinstance(share, tuple), "share: give a number, not steps"))
    skipping.check(share, steps)
    found = skipping.count(share, steps, free(plan))
    refuse((not found, f"share {share:g}: comes to none of {steps} steps that may be skipped; give more of either"))
    return found


def free(plan: Plan) -> tuple[int, ...]:
    """Steps that a plan's settings let be skipped."""
    return skipping.free(plan.settings.steps, () if plan.settings.skip_in_kab else plan.kab_steps)


def search(whole: Whole, plan: Plan, count: int, cost: Callable[[Whole, np.ndarray], float]) -> tuple[int, ...]:
    """So many of the steps that a plan's settings let be skipped, of least cost as far as exchanges of two find it."""
    s = plan.settings
    allowed, scale = free(plan), plan.table.guidance[: s.steps]

    def worth(steps: Sequence[int]) -> float:
        flags = skipping.flags(steps, scale, s.guidance_mode == "batched")
        useless = flags is None or not flags[list(steps)].any(1).all()  # of both passes as one, where guidance begins
        return np.inf if useless else cost(whole, flags)

    found: list[int] = []
    for _ in range(count):
        found.append(min(set(allowed) - set(found), key=lambda step: worth([*found, step])))
    best = worth(found)
    while found:
        trials = [[*(one for one in found if one != out), new] for out in found for new in set(allowed) - set(found)]
        least, trial = min(((worth(one), one) for one in trials), default=(best, found))
        if least >= best * (1 - 1e-9):
            break
        best, found = least, trial
    return tuple(sorted(found))


def distance(
    model: Model, plan: Plan, clips: Sequence[tuple[Encoded, jax.Array]], whole: Sequence[np.ndarray]
) -> float:
    """Relative distance of the latents of a plan's runs from others, root mean square."""
    programs = Programs.of(plan)
    made = [np.asarray(pipeline.denoise(model, plan, *clip, programs=programs), np.float64) for clip in clips]
    off = sum(np.square(one - other).sum() for one, other in zip(made, whole, strict=True))
    return float(np.sqrt(off / sum(np.square(one.astype(np.float64)).sum() for one in whole)))


def find(
    model: Model,
    plan: Plan,
    share: float,
    clips: Sequence[tuple[Encoded, jax.Array]],
    seen: tuple[Whole, list[np.ndarray]] | None = None,
) -> tuple[Schedule, dict[tuple[int, ...], float]]:
    """The schedule of a share of a plan's steps, and the distance of each that was tried.

    Args:
      clips: see `observe`.
      seen: what `observe` gave for them; None asks it.

    Raises:
      ValueError: as `number`.
    """
    s, wanted = plan.settings, number(plan, share)
    whole, latents = seen or observe(model, plan, clips)
    trials = {skipping.even(wanted, free(plan)), *(search(whole, plan, wanted, cost) for cost in COSTS)}
    tried = {}
    for steps in sorted(trials):
        other = Plan.of(model.config, replace(s, skip_passes=steps), plan.at)
        tried[steps] = distance(model, other, clips, latents)
    best = min(tried, key=tried.__getitem__)
    return Schedule.of(s, best, tried[best], sum(len(noise) for _, noise in clips)), tried
