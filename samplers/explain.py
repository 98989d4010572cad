"""Plots that explain the method of a run: ReTRo's scales, KAB's strength, and where frames look with and without it.

Needs matplotlib (`pip install 'wanjax[explain]'`), which is imported only here, and only when asked for a plot.
Axis letters: F latent frames, K keys of a branch, L layers.
"""

import dataclasses
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from samplers import pipeline, plots, video
from samplers.pipeline import Encoded, ImageLike, Inputs
from samplers.plan import Plan, Settings
from wanjax import hosts, kab, retro, rope, writing
from wanjax.checkpoint import Model
from wanjax.config import DiTConfig, ModelConfig
from wanjax.cross import CrossReport
from wanjax.dit import WanDiT
from wanjax.kab import KAB
from wanjax.method import MethodArrays
from wanjax.tokenizer import CLOSE
from wanjax.types import Conditions, CrossBias
from wanjax.writing import Target

NAMES = ("retro.png", "strength.png", "attention.png", "attention.json")
"""What the folder holds."""


def check(plan: Plan, layer: int | None = None, step: int | None = None) -> tuple[int, int]:
    """Checks, before any compute, that plots can be drawn, and fills in what to look at.

    Args:
      plan: of the run.
      layer: 0 .. L - 1; None takes the middle of KAB's layers (without KAB, of those it would have).
      step: 0 .. steps - 1; None takes the first with KAB, or the second of the run where none has it.

    Returns:
      (layer, step).

    Raises:
      ValueError: no matplotlib, or a layer or step outside the model or run.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("--explain needs matplotlib: pip install 'wanjax[explain]'") from error
    return where(plan, layer, step)


def where(plan: Plan, layer: int | None = None, step: int | None = None) -> tuple[int, int]:
    """What to look at, as `check`, for numbers without plots. ValueError: outside the model or run."""
    layers, steps = plan.config.dit.num_layers, plan.settings.steps
    if layer is None:
        layer = sum(kab.layer_window(plan.settings.method.kab or KAB(), layers)) // 2
    if step is None:
        step = int(plan.kab_steps[0]) if len(plan.kab_steps) else min(1, steps - 1)
    if not 0 <= layer < layers:
        raise ValueError(f"explain layer {layer}: the model has layers 0 to {layers - 1}; give one of them")
    if not 0 <= step < steps:
        raise ValueError(f"explain step {step}: the run has steps 0 to {steps - 1}; give one of them, or more steps")
    return layer, step


def target(folder: str | os.PathLike[str]) -> Target:
    """Where plots go, for `wanjax.writing`: a folder that holds nothing but plots."""
    return Target(writing.absolute(folder), folder=True, names=NAMES.__contains__, label="explain folder")


def explain(
    model: Model,
    first: ImageLike,
    last: ImageLike,
    settings: Settings,
    folder: str | os.PathLike[str],
    layer: int | None = None,
    step: int | None = None,
    cross_bias: CrossBias | None = None,
    mesh: Mesh | None = None,
) -> list[Path]:
    """Makes a folder of plots of one run, which is computed up to the step; `draw` says what is in it.

    Args:
      model: from `samplers.load`.
      first, last: keyframes, as `pipeline.inbetween` takes them.
      settings: of the run.
      folder: to make; appears whole or not at all, and earlier plots in it are replaced.
      layer, step: where to look, counted from 0; None as in `check`.
      cross_bias: the caller's own bias of the run, leaves [L, 1, F, ...].
      mesh: that the model's params lie on.

    Returns:
      The files, in the order of `NAMES`.

    Raises:
      ValueError: as `check` and `Plan.of`; OutputError for a folder that cannot be written or holds other things.
      FloatingPointError: NaN or inf in the latents or the attention.
      OSError: a full disk.
    """
    plan = Plan.of(model.config, settings)
    layer, step = check(plan, layer, step)
    place = target(folder)
    checked = writing.check([place], overwrite=True)
    inputs = Inputs.prepare([(first, last)], plan)
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        encoded = pipeline.place(*pipeline.encode(model, plan, [inputs], [[settings.prompt]]), mesh)
        noise = pipeline.noise(plan, [settings.seed], mesh)
        latents = pipeline.denoise(model, plan, encoded, noise, mesh=mesh, cross_bias=cross_bias, until=step)
    with writing.staged(checked) as (part,):
        seen = observe(model, plan, encoded, latents, layer, step, cross_bias, mesh)
        draw(part, model, plan, seen, layer, step, cross_bias is not None)
    return [place.path / name for name in NAMES]


def draw(
    folder: Path, model: Model, plan: Plan, seen: CrossReport, layer: int, step: int, own_bias: bool = False
) -> None:
    """Makes a folder of plots of a run that was looked into:

    - retro.png: ReTRo's factor of each latent frame, and what it does to the frame's rotary position.
    - strength.png: KAB's strength by frame and by step, and its anchor curve.
    - attention.png: how much each frame looks at each prompt token and keyframe patch in one layer and step (mean
      over heads and the frame's queries): without bias, with it, and the difference.
    - attention.json: every number in the three plots, with labels and settings.

    Args:
      folder: must not exist.
      seen: by `observe`, in this layer and step.
      own_bias: whether the run had a bias of the caller's.

    Raises:
      OSError: a full disk.
    """
    found = numbers(model, plan, layer, step, seen, own_bias)
    folder.mkdir()
    for name, figure in zip(NAMES, (plots.draw_retro, plots.draw_strength, plots.draw_attention), strict=False):
        plots.save(figure(found), folder / name)
    video.write_json(folder / NAMES[-1], found)


def observe(
    model: Model,
    plan: Plan,
    encoded: Encoded,
    latents: jax.Array,
    layer: int,
    step: int,
    cross_bias: CrossBias | None = None,
    mesh: Mesh | None = None,
) -> CrossReport:
    """Where the frames look in one layer and step of a run, in the pass with the prompt.

    Args:
      plan, encoded: of the run, of one clip.
      latents: [1, F, h, w, 16] that enter the step.
      layer, step, cross_bias, mesh: as `explain`.

    Returns:
      Leaves float32 [F, K] and [F, M, K] in host memory. `plain` and `biased` differ in the bias of this layer alone:
      both come from the run's own latents, with the method at work in earlier steps and layers.

    Raises:
      FloatingPointError: NaN or inf in the attention.
    """
    strength, timestep = plan.strength[step], plan.table.step.timestep[step : step + 1]
    args = (latents, timestep, encoded.conditions, plan.method, strength, np.int32(layer), cross_bias)
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        seen = jax.tree.map(hosts.fetch, _inspect(plan.config.dit, model.part("dit"), *args))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((seen.plain, seen.biased))):
        raise FloatingPointError(
            f"attention: NaN or inf in layer {layer}, step {step}; check the weights and the bias, or try float32"
        )
    if cross_bias is None and not strength[layer].any():
        return seen.replace(biased=seen.plain)  # they are, but for rounding
    return seen


@partial(jax.jit, static_argnums=0)
def _inspect(
    config: DiTConfig,
    params: Any,
    latents: jax.Array,
    timestep: jax.Array,
    conditions: Conditions,
    method: MethodArrays,
    strength: jax.Array,
    layer: jax.Array,
    cross_bias: CrossBias | None,
) -> CrossReport:
    """One evaluation; strength [L, F]. The report of one layer and the only sample, leaves [F, K]."""
    dit = WanDiT(config, inspect=True)
    changes = cross_bias, method.control, strength[:, None]
    _, seen = dit.apply({"params": params}, latents, timestep, conditions, method.table, *changes)
    return jax.tree.map(lambda leaf: leaf[layer, 0], seen)


def numbers(
    model: Model, plan: Plan, layer: int, step: int, seen: CrossReport, own_bias: bool = False
) -> dict[str, Any]:
    """All that the plots show, as JSON can hold it; arguments as of `draw`."""
    config, settings, method = plan.config, plan.settings, plan.settings.method
    window = None if method.kab is None else kab.layer_window(method.kab, config.dit.num_layers)
    labels = _token_labels(model, settings.prompt)
    padding = config.dit.text_length - len(labels)
    image_labels = ["class", *(f"patch {index}" for index in range(config.dit.image_tokens - 1))]

    def text(leaf: np.ndarray) -> np.ndarray:
        prompt, rest = leaf[:, : len(labels)], leaf[:, len(labels) :]
        return np.concatenate([prompt, rest.sum(-1, keepdims=True)], -1)

    plain, biased = seen.plain, seen.biased
    return {
        "model": config.name,
        "settings": dataclasses.asdict(settings),
        "layer": layer,
        "step": step,
        "timestep": float(plan.table.step.timestep[step]),
        "isolated": method.isolation is not None,
        "kab": bool(plan.strength[step, layer].any()),
        "own_bias": own_bias,
        "pixel_frames": _pixel_frames(config, len(plain.text)),
        "retro": _retro_numbers(plan),
        "strength": {
            "layers": None if window is None else list(window),
            "of_layers": config.dit.num_layers,
            "anchors": list(plan.anchors),
            "by_step": _floats(plan.strength.max(1)),
            "curve": None if method.kab is None else _floats(plan.method.control.curve),
        },
        "attention": {
            "text": {
                "labels": [*labels, f"padding ({padding})"],
                "plain": _floats(text(plain.text)),
                "biased": _floats(text(biased.text)),
            },
        }
        | {
            name: {"labels": image_labels, "plain": _floats(plain.images[:, i]), "biased": _floats(biased.images[:, i])}
            for i, name in zip(range(config.dit.num_images), ("first", "last"), strict=False)
        },
    }


def _retro_numbers(plan: Plan) -> dict[str, Any]:
    """Scale and rotary position of every latent frame; positions are angles of the fastest pair, in radians."""
    own, frames = plan.settings.method.retro, plan.grid[0]
    index = np.arange(frames, dtype=np.float64)
    scale = np.ones(frames) if own is None else retro.scale_vector(own, plan.settings.frames, frames, plan.anchors)
    mode = None if own is None else own.mode
    position = {"frequency": index * scale, "position": rope.warped(scale)}.get(mode, index)
    return {"mode": mode, "scale": _floats(scale), "position": _floats(position)}


def _token_labels(model: Model, prompt: str) -> list[str]:
    """The prompt's pieces as the model gets them, cut like `Tokenizer.encode`; a space begins a word."""
    pieces = model.tokenizer.tokens(prompt)[:-1][: model.config.dit.text_length - 1]
    return [piece.replace("▁", " ") for piece in (*pieces, CLOSE)]


def _pixel_frames(config: ModelConfig, frames: int) -> list[list[int]]:
    """First and last pixel frame of each latent frame; the first latent frame holds one alone."""
    stride, patch = config.vae.temporal_stride, config.dit.patch_size[0]
    return [[max(0, (i * patch - 1) * stride + 1), (i * patch + patch - 1) * stride] for i in range(frames)]


def _floats(values: np.ndarray) -> list:
    """Nested lists of the shortest numbers that are the same in float32."""
    if np.ndim(values):
        return [_floats(row) for row in values]
    return float(str(np.float32(values)))
