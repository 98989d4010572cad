"""Solvers of the flow-matching ODE as tables of numbers.

The model's velocity v at step i gives a data estimate ``m_i = x_i - sigma_i * v_i``. Euler, DPM++ (2M) and
UniPC are linear in the current sample and the last few estimates, so each is nothing but coefficients, one
row a step:

    corrected_i = corrector[i] . (x_i, corrected_{i-1}, m_i, m_{i-1}, m_{i-2})
    x_{i+1}     = predictor[i] . (corrected_i, m_i, m_{i-1})

The consistency sampler "lcm" adds fresh noise after the predictor, with the deviation of its own column. The tables are
made once in float64 on the host. Notation: alpha = 1 - sigma; lambda = log(alpha / sigma), half the
log signal-to-noise ratio; h = lambda_{i+1} - lambda_i; ratio = sigma_{i+1} / sigma_i. For flow matching
``alpha_{i+1} * (1 - exp(-h)) = 1 - ratio`` exactly, which has no logarithm in it: so the first-order
exponential step IS the Euler step, and the limits sigma = 1 (lambda = -inf) and sigma = 0 (lambda = +inf) are
finite.

Sources: DPM-Solver++ (arXiv 2211.01095, the 2M midpoint form), UniPC (arXiv 2302.04867, B(h) = exp(h) - 1 called bh2,
data prediction), latent consistency models (arXiv 2310.04378). UniPC's second-order predictor with its customary weight
1/2 is the 2M midpoint step; what it adds is the corrector. Both take first order at the first and at the last step,
whatever the number of steps.
"""

from typing import Literal, get_args

import flax.struct
import jax
import numpy as np

from samplers import schedule

Solver = Literal["euler", "unipc", "dpm++", "lcm"]
SOLVERS: tuple[str, ...] = get_args(Solver)


@flax.struct.dataclass
class StepTable:
    """One solver on one schedule, float32. A pytree: another table of the same shape is no recompilation.

    Attributes:
      sigma: [steps] noise level at the start of each step.
      timestep: [steps] what the model is given: ``1000 * sigma``, see `schedule.timesteps`.
      corrector: [steps, 5] weights of (x_i, corrected_{i-1}, m_i, m_{i-1}, m_{i-2}).
      predictor: [steps, 3] weights of (corrected_i, m_i, m_{i-1}).
      renoise: [steps] standard deviation of noise that is added after the predictor; None for solvers of the ODE.
    """

    sigma: jax.Array | np.ndarray
    timestep: jax.Array | np.ndarray
    corrector: jax.Array | np.ndarray
    predictor: jax.Array | np.ndarray
    renoise: jax.Array | np.ndarray | None = None


def table(solver: Solver, sigmas: np.ndarray, rounding: schedule.Rounding = "exact") -> StepTable:
    """Coefficient table of ``solver`` on ``sigmas``, float64 [steps + 1].

    Args:
      rounding: of the timesteps, see `schedule.timesteps`.

    Raises:
      ValueError: as `coefficients` and `schedule.timesteps`.
    """
    corrector, predictor = coefficients(solver, sigmas)
    levels = np.asarray(sigmas, np.float64)
    renoise = [levels[1:]] if solver == "lcm" else []
    rows = (levels[:-1], schedule.timesteps(levels, rounding), corrector, predictor, *renoise)
    return StepTable(*(np.asarray(values, np.float32) for values in rows))


def coefficients(solver: Solver, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corrector [steps, 5] and predictor [steps, 3] weights in float64, all finite.

    Args:
      solver: "euler" (order 1), "dpm++" (DPM-Solver++ 2M, midpoint), "unipc" (order 2, bh2, data prediction,
        corrector from the second step on) or "lcm" (the data estimate, noised anew to the next level; for weights
        distilled to a few steps).
      sigmas: [steps + 1] noise levels, strictly decreasing within [0, 1]; 1 and 0 are allowed at the ends.

    Raises:
      ValueError: an unknown solver, or sigmas that do not fall strictly from at most 1 to at least 0.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: unknown {solver!r}; choose one of {', '.join(SOLVERS)}")
    levels = np.asarray(sigmas, np.float64)
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"sigmas: got shape {levels.shape}; give [steps + 1] noise levels, at least two")
    if not (levels[0] <= 1 and levels[-1] >= 0 and np.all(np.diff(levels) < 0)):
        raise ValueError("sigmas: noise levels must fall strictly from at most 1 to at least 0 and be finite")
    log_snr, ratio = _log_snr(levels), levels[1:] / levels[:-1]
    corrector = np.zeros((len(ratio), 5))
    corrector[:, 0] = 1  # which corrects nothing
    predictor = np.stack([ratio, 1 - ratio, np.zeros_like(ratio)], axis=1)  # of first order
    if solver == "lcm":
        predictor[:] = np.stack([0 * ratio, 1 - levels[1:], 0 * ratio], axis=1)
    if solver in ("dpm++", "unipc"):
        _raise_predictor_to_second_order(predictor, levels, log_snr)
    if solver == "unipc":
        _fill_unipc_corrector(corrector, levels, log_snr)
    return corrector, predictor


def _log_snr(levels: np.ndarray) -> np.ndarray:
    """lambda of each level; -inf at sigma 1 and +inf at sigma 0, which the formulas below take as is."""
    with np.errstate(divide="ignore"):
        return np.log1p(-levels) - np.log(levels)


def _raise_predictor_to_second_order(predictor: np.ndarray, levels: np.ndarray, log_snr: np.ndarray) -> None:
    """Adds the 2M midpoint term to all steps but the first and the last, in place.

    The slope of m over lambda comes from the last two estimates:
    ``m + (m - m_previous) * h / (2 * h_previous)``. From sigma = 1, h_previous is infinite and the term
    vanishes: the limit of the formula.
    """
    inner = slice(1, len(levels) - 2)
    h = np.diff(log_snr)
    slope = 0.5 * h[1:-1] / h[:-2] * predictor[inner, 1]
    predictor[inner, 1] += slope
    predictor[inner, 2] -= slope


def _fill_unipc_corrector(corrector: np.ndarray, levels: np.ndarray, log_snr: np.ndarray) -> None:
    """UniC-1 at the second step, UniC-2 from the third on (bh2), in place.

    Redoes the step from i-1 to i, now with m_i known: a first-order step plus ``w_new * (m_i - m_{i-1})`` and
    ``w_old * (m_{i-2} - m_{i-1})``. For UniC-2, with r = (lambda_{i-2} - lambda_{i-1}) / h, the weights solve
    ``rho_old + rho_new = b_1`` and ``r*rho_old + rho_new = b_2``, ``w_old = rho_old / r``; written here in
    1/r, which is 0 where the run began at sigma = 1.
    """
    h = np.diff(log_snr)
    ratio = levels[1:] / levels[:-1]
    for step in range(1, len(corrector)):
        gain = 1 - ratio[step - 1]
        new, old = 0.5, 0.0
        if step > 1:
            phi_1, phi_2, phi_3 = _phi(-h[step - 1])
            b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
            inverse_r = -h[step - 1] / h[step - 2]
            rho_old = (b_1 - b_2) * inverse_r / (inverse_r - 1)
            new, old = b_1 - rho_old, rho_old * inverse_r
        corrector[step] = (0, ratio[step - 1], gain * new, gain * (1 - new - old), gain * old)


def _phi(z: float) -> tuple[float, float, float]:
    """The exponential integrator's phi_1, phi_2, phi_3 at z: ``phi_0 = exp``, ``phi_k = (phi_{k-1} -
    1/(k-1)!) / z``.

    The recursion loses all digits as z goes to 0, so below 1 in size the power series sum z^j / (j + k)! is
    used.
    """
    if abs(z) < 1:
        terms = z ** np.arange(20) / np.cumprod(np.arange(1.0, 21))
        phi_1 = terms.sum()
        phi_2 = (terms / np.arange(2, 22)).sum()
        phi_3 = (terms / (np.arange(2, 22) * np.arange(3, 23))).sum()
        return phi_1, phi_2, phi_3
    phi_1 = np.expm1(z) / z
    phi_2 = (phi_1 - 1) / z
    return phi_1, phi_2, (phi_2 - 0.5) / z
