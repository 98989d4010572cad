"""`--method auto`: a method chosen by a few short tries of the very clip, judged without knowing the truth.

Each candidate makes the clip in few steps, from the same noises, at half the size where that is still a size that
models are trained at; a criterion then says whose clip is likeliest. Whether that finds better methods is measured by
`benchmarks.method_auto`, and told in docs/method.md. Axis letters as in `wanjax.types`; N candidates, R noises, A
keyframes; pixels are 0..255.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType

import jax
import numpy as np
from jax.sharding import Mesh

from samplers import pipeline
from samplers.pipeline import Encoded, ImageLike, Inputs
from samplers.plan import Plan, Settings
from samplers.programs import Programs
from wanjax.checkpoint import Model
from wanjax.config import ModelConfig
from wanjax.method import METHODS, Method
from wanjax.settings import one_of

STEPS = 4
"""Denoising steps of a try."""
NOISES = 2
"""Noises that every candidate is tried with."""
LEAST_SIDE = 240
"""Pixels: no side is halved to less."""
_PEAK, _CAP = 255.0, 60.0


def between(method: Method, share: float) -> Method:
    """A method weakened: KAB's strengths times `share`, ReTRo's factors that part of the way from 1.

    Isolation is kept as it is: there is nothing between one softmax and three.
    """
    kab, retro = method.kab, method.retro
    if kab is not None:
        ends = {name: share * getattr(kab, name) for name in ("strength_end", "strength_mid")}
        kab = dataclasses.replace(kab, **ends)
    if retro is not None:
        scales = {name: 1 + share * (getattr(retro, name) - 1) for name in ("s_edge", "s_mid")}
        retro = dataclasses.replace(retro, **scales)
    return dataclasses.replace(method, kab=kab, retro=retro)


def _joint(method: Method) -> Method:
    return dataclasses.replace(method, isolation=None)


CANDIDATES: Mapping[str, Method] = MappingProxyType(
    {
        **METHODS,
        "paper, half": between(METHODS["paper"], 0.5),
        "release, half": between(METHODS["release"], 0.5),
        "paper without isolation": _joint(METHODS["paper"]),
        "release without isolation": _joint(METHODS["release"]),
    }
)
"""What is tried, by name. Of equal ones the first is taken."""


def by_keyframes(tries: np.ndarray, keyframes: np.ndarray, at: Sequence[int]) -> np.ndarray:
    """PSNR in dB of the made frames at the keyframes' places against the keyframes, mean over these and noises."""
    error = np.square(tries[:, :, list(at)] - keyframes.astype(np.float32)).mean((-3, -2, -1), dtype=np.float64)
    with np.errstate(divide="ignore"):  # equal frames
        return np.minimum(10 * np.log10(_PEAK**2 / error), _CAP).mean((1, 2))


def by_smoothness(tries: np.ndarray, keyframes: np.ndarray, at: Sequence[int]) -> np.ndarray:
    """How evenly the interior runs from keyframe to keyframe, these in the place of the made frames: minus the mean
    absolute second difference over time against the first."""
    joined = tries.astype(np.float32)
    joined[:, :, list(at)] = keyframes
    first = np.abs(np.diff(joined, axis=2)).mean((2, 3, 4, 5), dtype=np.float64)
    second = np.abs(np.diff(joined, n=2, axis=2)).mean((2, 3, 4, 5), dtype=np.float64)
    return -(second / np.maximum(first, 1e-6)).mean(1)


def by_consensus(tries: np.ndarray, keyframes: np.ndarray, at: Sequence[int]) -> np.ndarray:
    """Nearness to the mean of all tries: minus the mean squared distance."""
    return -_squares(tries - tries.mean((0, 1), keepdims=True))


def by_certainty(tries: np.ndarray, keyframes: np.ndarray, at: Sequence[int]) -> np.ndarray:
    """How little the noise decides: minus the mean squared distance of a candidate's tries to their mean. Of a squared
    error to the truth this is the part that needs no truth."""
    return -_squares(tries - tries.mean(1, keepdims=True))


def _squares(difference: np.ndarray) -> np.ndarray:
    return np.square(difference).mean((1, 2, 3, 4, 5), dtype=np.float64)


Criterion = Callable[[np.ndarray, np.ndarray, Sequence[int]], np.ndarray]
"""(tries float32 [N, R, T, H, W, 3], keyframes [A, H, W, 3], their pixel frames) -> scores [N], the highest is best."""

CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {"keyframes": by_keyframes, "smoothness": by_smoothness, "consensus": by_consensus, "certainty": by_certainty}
)


def choose(
    model: Model,
    settings: Settings,
    images: Sequence[ImageLike],
    at: Sequence[int] = (0, -1),
    *,
    criterion: str = "keyframes",
    candidates: Mapping[str, Method] = CANDIDATES,
    steps: int = STEPS,
    noises: int = NOISES,
    config: ModelConfig | None = None,
    mesh: Mesh | None = None,
    on_try: Callable[[str], None] | None = None,
) -> tuple[Method, str]:
    """The method that suits one clip best, and a line that says why.

    Args:
      model: from `samplers.load`.
      settings: of the clip; what their method is does not matter.
      images: A keyframes, in the order of `at`, of any size.
      at: their pixel frames, ascending, negative ones counted from the end.
      criterion: a name in CRITERIA.
      candidates: methods by name; of equal ones the first wins.
      steps: of each try, if the clip has no fewer.
      noises: seeds that each is tried with, the clip's own and those after it; criterion "certainty" needs 2.
      config: of the model, as the run will have it (tiles of the VAE, streaming); None takes the model's own.
      mesh: that the model lies on.
      on_try: told the name of each candidate before it is tried, for a bar.

    Raises:
      ValueError: an unknown criterion, nothing to choose from, or what `Plan.of` refuses of settings and candidates.
      FloatingPointError: NaN or inf.
    """
    one_of("criterion", criterion, CRITERIA)
    if not candidates or noises < (2 if criterion == "certainty" else 1):
        raise ValueError(f"method auto: {len(candidates)} candidates and {noises} noises; give one or more, and 2 "
                         "noises for certainty")  # fmt: skip
    config = model.config if config is None else config
    plan = short(config, settings, steps, at)
    inputs = Inputs.prepare([list(images)], plan)
    seeds = [(settings.seed + k) % 2**32 for k in range(noises)]
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        (encoded,) = pipeline.encode(model, plan, [inputs], [[settings.prompt]])
        encoded = pipeline.place(encoded, mesh)
        starts = [pipeline.noise(plan, [seed], mesh) for seed in seeds]
        made = tries(model, plan, encoded, starts, candidates, seeds=[[seed] for seed in seeds], on_try=on_try)
    scores = CRITERIA[criterion](made[:, :, 0], inputs.pixels[0], plan.at)
    best = int(np.argmax(scores))
    name, values = list(candidates)[best], dict(zip(candidates, scores, strict=True))
    others = ", ".join(f"{other} {values[other]:.4g}" for other in candidates if other != name)
    height, width = plan.settings.size
    line = (f"method auto: {name}, {criterion} {values[name]:.4g} in {plan.settings.steps} steps at "
            f"{height}x{width}" + (f"; {others}" if others else ""))  # fmt: skip
    return candidates[name], line


def short(config: ModelConfig, settings: Settings, steps: int = STEPS, at: Sequence[int] = (0, -1)) -> Plan:
    """The plan of a try: few steps, low size, no method. ValueError as `Plan.of`."""
    size = low_size(settings.size, config.size_multiple)
    few = dataclasses.replace(settings, size=size, steps=min(steps, settings.steps), method=Method())
    return Plan.of(config, few, at)


def tries(
    model: Model,
    plan: Plan,
    encoded: Encoded,
    noises: Sequence[jax.Array],
    candidates: Mapping[str, Method],
    *,
    seeds: Sequence[Sequence[int]] | None = None,
    on_try: Callable[[str], None] | None = None,
) -> np.ndarray:
    """B clips by every candidate from every noise, float32 [N, R, B, T, H, W, 3] in 0..255.

    All use one compiled program, and a part of the model that comes and goes is needed once.

    Args:
      plan: of the tries; its method does not matter.
      encoded: of the clips.
      noises: R of [B, F, h, w, C].
      seeds: of each noise's clips, for solvers that add noise anew.
    """
    programs = Programs.of(plan)
    latents = []
    for name, method in candidates.items():
        if on_try is not None:
            on_try(name)
        own = Plan.of(plan.config, dataclasses.replace(plan.settings, method=method), plan.at)
        for number, noise in enumerate(noises):
            given = None if seeds is None else seeds[number]
            latents.append(pipeline.denoise(model, own, encoded, noise, seeds=given, programs=programs))
    videos = np.stack([pipeline.decode(model, plan, one, programs) for one in latents]).astype(np.float32)
    return videos.reshape(len(candidates), len(noises), *videos.shape[1:])


def low_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width) of a try: half of each side, to the nearest multiple, or the size itself where that is too small
    for models to know."""
    if min(size) < 2 * LEAST_SIDE:
        return size
    height, width = (round(side / (2 * multiple)) * multiple for side in size)
    return height, width
