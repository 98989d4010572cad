"""Plots that explain the method of a run: ReTRo's scales, KAB's strength, and where frames look with and without it.

Needs matplotlib (`pip install 'wanjax[explain]'`), which is imported only here, and only when asked for a plot.
Axis letters: F latent frames, K keys of a branch, L layers.
"""

import contextlib
import dataclasses
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from samplers import pipeline, sample, schedule, solvers, video
from samplers.pipeline import Keyframes, Settings
from wanjax import kab, retro, rope, sharding
from wanjax.checkpoint import Model
from wanjax.config import DiTConfig, ModelConfig
from wanjax.cross import CrossReport
from wanjax.dit import WanDiT
from wanjax.kab import KAB
from wanjax.method import MethodArrays
from wanjax.tokenizer import CLOSE
from wanjax.types import Conditions, CrossBias

NAMES = ("retro.png", "strength.png", "attention.png", "attention.json")
"""What the folder holds."""

DPI = 150
_HIDDEN = ".wanjax-"
# Families that matplotlib may fall back on for characters its own font lacks, such as those of Chinese prompts.
_FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS",
)  # fmt: skip


def check(
    folder: str | os.PathLike[str],
    settings: Settings,
    config: ModelConfig,
    layer: int | None = None,
    step: int | None = None,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Checks, before any compute, that `explain` can run and write, and fills in what to look at.

    Args:
      folder: to make; absent or empty, or with `overwrite` one that holds nothing but earlier plots. The folder
        it lies in must exist; that it can be written to is tried.
      settings: of the run, valid for the model.
      config: of the model.
      layer: 0 .. L - 1; None takes the middle of KAB's layers (without KAB, of those it would have).
      step: 0 .. steps - 1; None takes the first with KAB, or the second of the run where none has it.
      overwrite: whether earlier plots may be replaced.

    Returns:
      (layer, step).

    Raises:
      ValueError: no matplotlib, or a layer or step outside the model or run. OutputError: a folder that cannot
      be written, or holds other things.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("--explain needs matplotlib: pip install 'wanjax[explain]'") from error
    layers, steps = config.dit.num_layers, settings.steps
    if layer is None:
        layer = sum(kab.layer_window(settings.method.kab or KAB(), layers)) // 2
    if step is None:
        active = np.flatnonzero(settings.method_arrays(config).strength.any((1, 2)))
        step = int(active[0]) if len(active) else min(1, steps - 1)
    if not 0 <= layer < layers:
        raise ValueError(f"explain layer {layer}: the model has layers 0 to {layers - 1}; give one of them")
    if not 0 <= step < steps:
        raise ValueError(f"explain step {step}: the run has steps 0 to {steps - 1}; give one of them, or more steps")
    _check_folder(Path(folder), overwrite)
    return layer, step


def explain(
    model: Model,
    first: Image.Image | np.ndarray,
    last: Image.Image | np.ndarray,
    settings: Settings,
    folder: str | os.PathLike[str],
    layer: int | None = None,
    step: int | None = None,
    cross_bias: CrossBias | None = None,
    mesh: Mesh | None = None,
) -> list[Path]:
    """Makes a folder of plots of one run:

    - retro.png: ReTRo's factor of each latent frame, and what it does to the frame's rotary position.
    - strength.png: KAB's strength by frame and by step, and its anchor curve.
    - attention.png: how much each frame looks at each prompt token and keyframe patch in one layer and step (mean
      over heads and the frame's queries): without bias, with it, and the difference.
    - attention.json: every number in the three plots, with labels and settings.

    Denoises up to the step, then evaluates the conditional pass once more. Earlier plots in `folder` are replaced
    (`check` asks before); the folder appears whole or not at all.

    Args:
      model: from `wanjax.checkpoint.load`.
      first, last: keyframes, RGB, as `pipeline.inbetween` takes them.
      settings: of the run.
      folder: to make, see `check`.
      layer, step: where to look, counted from 0; None as in `check`.
      cross_bias: the caller's own bias of the run, leaves [L, 1, F, K].
      mesh: that the model's params lie on.

    Returns:
      The files, in the order of `NAMES`.

    Raises:
      ValueError: as `check` and `Settings.check`. FloatingPointError: NaN or inf in the latents or the attention.
      OSError: a full disk.
    """
    settings.check(model.config)
    layer, step = check(folder, settings, model.config, layer, step, overwrite=True)
    seen = observe(model, first, last, settings, layer, step, cross_bias, mesh)
    numbers = _numbers(model, settings, layer, step, seen, cross_bias is not None)
    folder = Path(folder)
    with _replacing(folder) as part:
        for name, draw in zip(NAMES, (_draw_retro, _draw_strength, _draw_attention), strict=False):
            _save(draw(numbers), part / name)
        video.write_json(part / NAMES[-1], numbers)
    return [folder / name for name in NAMES]


def observe(
    model: Model,
    first: Image.Image | np.ndarray,
    last: Image.Image | np.ndarray,
    settings: Settings,
    layer: int,
    step: int,
    cross_bias: CrossBias | None = None,
    mesh: Mesh | None = None,
) -> CrossReport:
    """Where the frames look in one layer and step of a run, in the pass with the prompt.

    Args: as `explain`; layer and step are given.

    Returns:
      Leaves float32 [F, K] in host memory. `plain` and `biased` differ in the bias of this layer alone: both come
      from the run's own latents, with the method at work in earlier steps and layers.

    Raises:
      FloatingPointError: NaN or inf in the latents or the attention.
    """
    config = model.config
    prepared = Keyframes.prepare([(first, last)], config, settings)
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        encoded = pipeline.encode(model, prepared, [settings.prompt], settings)
        conditions, negative = pipeline.place(*encoded, mesh)
        table = solvers.table(settings.solver, schedule.sigmas(settings.grid, settings.steps, settings.shift))
        method = settings.method_arrays(config)
        latents = _entering(model, conditions, negative, settings, table, method, step, cross_bias, mesh)
        strength = method.strength[step]
        timestep = table.timestep[step : step + 1]
        method = method.replace(strength=None)
        args = (latents, timestep, conditions, method, strength, np.int32(layer), cross_bias)
        seen = jax.device_get(_inspect(config.dit, model.params["dit"], *args))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((seen.plain, seen.biased))):
        raise FloatingPointError(
            f"attention: NaN or inf in layer {layer}, step {step}; check the weights and the bias, or try float32"
        )
    if cross_bias is None and not strength[layer].any():
        return seen.replace(biased=seen.plain)  # they are, but for rounding
    return seen


def _entering(
    model: Model,
    conditions: Conditions,
    negative: jax.Array,
    settings: Settings,
    table: solvers.StepTable,
    method: MethodArrays,
    step: int,
    cross_bias: CrossBias | None,
    mesh: Mesh | None,
) -> jax.Array:
    """Latents [1, F, h, w, C] that enter a step: those of `pipeline.denoise`, stopped before it."""
    shape = (*conditions.latent.shape[:-1], model.config.dit.out_channels)
    noise = jax.random.normal(jax.random.key(settings.seed), shape, jnp.float32)
    if mesh is not None:
        noise = sharding.shard_video(noise, mesh)
    if step == 0:
        return noise
    latents, failed_step = pipeline._denoise(
        model.config.dit,
        model.params["dit"],
        noise,
        conditions,
        negative,
        np.float32(settings.guidance),
        jax.tree.map(lambda rows: rows[:step], table),
        method.replace(strength=method.strength[:step]),
        cross_bias,
        guidance_mode=settings.guidance_mode,
        on_step=None,
    )
    sample.check(failed_step)
    return latents


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
    control = method.control.replace(strength=strength[:, None])
    _, seen = dit.apply({"params": params}, latents, timestep, conditions, method.table, cross_bias, control)
    return jax.tree.map(lambda leaf: leaf[layer, 0], seen)


def _numbers(
    model: Model, settings: Settings, layer: int, step: int, seen: CrossReport, own_bias: bool
) -> dict[str, Any]:
    """All that the plots show, as JSON can hold it."""
    config, method = model.config, settings.method
    arrays = settings.method_arrays(config)
    levels = schedule.sigmas(settings.grid, settings.steps, settings.shift)
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
        "timestep": float(1000 * levels[step]),
        "isolated": method.isolation is not None,
        "kab": bool(arrays.strength[step, layer].any()),
        "own_bias": own_bias,
        "pixel_frames": _pixel_frames(config, len(plain.text)),
        "retro": _retro_numbers(config, settings, len(plain.text)),
        "strength": {
            "layers": None if window is None else list(window),
            "of_layers": config.dit.num_layers,
            "beta": _floats(arrays.strength.max(1)),
            "curve": None if method.kab is None else _floats(arrays.control.curve),
        },
        "attention": {
            "text": {
                "labels": [*labels, f"padding ({padding})"],
                "plain": _floats(text(plain.text)),
                "biased": _floats(text(biased.text)),
            },
            "first": {"labels": image_labels, "plain": _floats(plain.first), "biased": _floats(biased.first)},
            "last": {"labels": image_labels, "plain": _floats(plain.last), "biased": _floats(biased.last)},
        },
    }


def _retro_numbers(config: ModelConfig, settings: Settings, frames: int) -> dict[str, Any]:
    """Scale and rotary position of every latent frame; positions are angles of the fastest pair, in radians."""
    own = settings.method.retro
    index = np.arange(frames, dtype=np.float64)
    scale = np.ones(frames) if own is None else retro.scale_vector(own, settings.frames, frames)
    mode = None if own is None else own.mode
    position = {"frequency": index * scale, "position": rope._warped(scale)}.get(mode, index)
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


def _draw_retro(numbers: dict[str, Any]) -> Any:
    """Factors of the frames; below, what they do."""
    own = numbers["retro"]
    mode, scale, position = own["mode"], np.array(own["scale"]), np.array(own["position"])
    frames = np.arange(len(scale))
    meaning = {
        None: "none in this method: s = 1 everywhere",
        "frequency": "frequency: temporal angle of frame i and frequency ω is s(i)·i·ω",
        "magnitude": "magnitude: temporal q and k grow s(i) times, angles stay i·ω",
        "position": "position: temporal angle is p(i)·ω, where p moves with speed s and keeps both ends",
    }
    figure = _figure(8, 3.6 if mode is None else 6.4)
    figure.suptitle(f"{_run(numbers)}\nReTRo, {meaning[mode]}", fontsize=11, parse_math=False)
    upper, *lower = figure.subplots(1 if mode is None else 2, 1, sharex=True, squeeze=False)[:, 0]
    upper.axhline(1, color="0.6", linewidth=1, linestyle="--", label="1: unchanged")
    upper.plot(frames, scale, "o-", color="C0", label="s")
    upper.set_ylabel("scale factor s")
    upper.set_ylim(min(scale.min(), 1) - 0.02, max(scale.max(), 1) + 0.02)
    if mode == "magnitude":
        lower[0].plot(frames, scale**2, "o-", color="C1", label="with itself: s(i)·s(i)")
        lower[0].plot(frames, scale * scale[0], "s-", color="C2", label="with the first frame: s(i)·s(0)")
        lower[0].axhline(1, color="0.6", linewidth=1, linestyle="--")
        lower[0].set_ylabel("gain of the temporal logits\nof frame i in self-attention")
    elif mode is not None:
        lower[0].axhline(0, color="0.6", linewidth=1, linestyle="--", label="0: unchanged")
        lower[0].plot(frames, position - frames, "o-", color="C1", label="moved by")
        lower[0].set_ylabel("rotary position minus i\n(latent frames)")
    for axes in (upper, *lower):
        axes.legend(fontsize=9)
        axes.grid(alpha=0.3)
    (lower or [upper])[0].set_xlabel("latent frame i (0: first keyframe, last: last keyframe)")
    upper.set_xticks(_spread(len(frames), 25))
    _add_pixel_axis(upper, numbers)
    return figure


def _draw_strength(numbers: dict[str, Any]) -> Any:
    """Strength and anchor curve by frame; below, strength by frame and step."""
    own = numbers["strength"]
    beta, curve = np.array(own["beta"]), own["curve"]
    steps, frames = beta.shape
    active = np.flatnonzero(beta.any(1))
    figure = _figure(8, 8.4)
    if own["layers"] is None:
        title = "KAB, none in this method: strength 0 everywhere"
    elif not len(active):
        title = "KAB, but its strength is 0 in every step and frame of this run"
    else:
        title = (
            f"KAB in {_span('layer', *own['layers'])} of 0-{own['of_layers'] - 1}, "
            f"{_span('step', active[0], active[-1])} of 0-{steps - 1}, the pass with the prompt"
        )
    figure.suptitle(f"{_run(numbers)}\n{title}", fontsize=11, parse_math=False)
    upper, lower = figure.subplots(2, 1)
    lines = upper.plot(np.arange(frames), beta.max(0), "o-", color="C0", label="strength β")
    upper.set_ylabel("strength β", color="C0")
    upper.set_ylim(-0.02, max(1.0, beta.max()) * 1.05)
    if curve is not None:
        twin = upper.twinx()
        lines += twin.plot(np.arange(frames), curve, "s--", color="C1", label="anchor curve τ")
        twin.set_ylabel("τ: last keyframe's share of the target", color="C1")
        twin.set_ylim(-0.02, 1.05)
    upper.legend(lines, [line.get_label() for line in lines], loc="upper center", fontsize=9)
    upper.grid(alpha=0.3)
    upper.set_xlim(-0.5, frames - 0.5)
    image = lower.imshow(beta, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=beta.max() or 1)
    lower.set_ylabel("denoising step")
    lower.set_yticks(_spread(steps, 15))
    figure.colorbar(image, ax=lower, label="strength β", location="bottom", aspect=40)
    for axes in (upper, lower):
        axes.set_xticks(_spread(frames, 25))
        axes.set_xlabel("latent frame")
    _add_pixel_axis(upper, numbers)
    return figure


def _draw_attention(numbers: dict[str, Any]) -> Any:
    """Columns: text, first, last keyframe. Rows: without bias, with it, difference."""
    from matplotlib.colors import FuncNorm, LogNorm
    from matplotlib.ticker import LogLocator

    branches = numbers["attention"]
    frames = len(branches["text"]["plain"])
    image_width = min(max(4.5, 0.025 * len(branches["first"]["labels"])), 8)
    widths = [min(max(3.5, 0.24 * len(branches["text"]["labels"])), 30), image_width, image_width]
    height = min(max(1.8, 0.16 * frames), 5)
    figure = _figure(sum(widths) + 4, 3 * height + 2.6)
    figure.suptitle(_attention_title(numbers), fontsize=11, parse_math=False)
    grid = figure.subplots(3, 3, width_ratios=widths, squeeze=False)
    columns = {"text": "prompt", "first": "first keyframe", "last": "last keyframe"}
    names = {
        (True, True): "KAB and own bias",
        (True, False): "KAB",
        (False, True): "own bias",
        (False, False): "bias (none here)",
    }
    rows = ("without bias", f"with {names[numbers['kab'], numbers['own_bias']]}", "difference")
    for column, (branch, name) in enumerate(columns.items()):
        axes = grid[:, column]
        plain, biased = (np.array(branches[branch][key]) for key in ("plain", "biased"))
        both = np.stack([plain, biased])
        # Most of the attention lies on a few keys; what KAB does to the others shows on a logarithmic scale.
        top = both.max()
        norm = LogNorm(np.clip(both.min(), 1e-4 * top, 0.5 * top), top, clip=True)
        for ax, values in zip(axes, both, strict=False):
            image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap="magma", norm=norm)
        ticks = LogLocator(subs=(1, 2, 5))
        bar = figure.colorbar(image, ax=list(axes[:2]), label="share of attention (log)", ticks=ticks, format="%g")
        bar.minorticks_off()
        change = biased - plain
        limit = max(np.abs(change).max(), 1e-4)
        norm = FuncNorm((_signed_root, _signed_square), -limit, limit)
        image = axes[2].imshow(change, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=norm)
        ticks = limit * np.array([-1, -0.5, -0.1, 0, 0.1, 0.5, 1])
        figure.colorbar(image, ax=axes[2], label="change of share (root)", ticks=ticks, format="%.2g")
        for ax, row in zip(axes, rows, strict=True):
            ax.set_title(f"{name}, {row}", fontsize=10)
            ax.set_ylabel("latent frame")
            ax.set_yticks(_spread(frames, 11))
            ax.tick_params(labelsize=8)
        _label_keys(axes, branch, branches[branch]["labels"], widths[column])
    return figure


def _signed_root(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


def _attention_title(numbers: dict[str, Any]) -> str:
    layer, step = numbers["layer"], numbers["step"]
    lines = [
        _run(numbers),
        f"Frame attention in layer {layer} of 0-{numbers['strength']['of_layers'] - 1}, step {step} of "
        f"0-{numbers['settings']['steps'] - 1} (timestep {numbers['timestep']:.0f}): mean over heads and the "
        "frame's queries, each row of a map sums to 1",
    ]
    if not (numbers["kab"] or numbers["own_bias"]):
        lines.append("No KAB in this layer and step: with and without bias are the same")
    if not numbers["isolated"]:
        lines.append("Keyframes are not isolated: a frame's rows of first and last keyframe sum to 1 together")
    return "\n".join(lines)


def _label_keys(axes: Sequence[Any], branch: str, labels: Sequence[str], width: float) -> None:
    """Names the columns under the lowest map; the maps above carry the ticks only."""
    if branch == "text":
        ticks = _every(len(labels), math.ceil(len(labels) * 0.15 / width))
        names, families = _drawable([labels[i] for i in ticks], ticks)
        options = {"rotation": 90, "fontfamily": families, "parse_math": False}
        replaced = any(name == f"#{place}" for name, place in zip(names, ticks, strict=True))
        missing = " (#n: no font for it, see the JSON)" if replaced else ""
        axes[-1].set_xlabel(f"token of the prompt{missing}")
    else:
        side = math.isqrt(len(labels) - 1)
        square = side * side == len(labels) - 1
        # No tick for row 0: it begins right beside the class token, too near for two labels.
        ticks = [0, *range(1 + side, len(labels), side)] if square else [0]
        names = ["class", *(f"row {row}" for row in range(1, side))] if square else ["class"]
        options = {"rotation": 90}
        axes[-1].set_xlabel("vision token: class, then patches row by row")
    for ax in axes[:-1]:
        ax.set_xticks(ticks, [])
    axes[-1].set_xticks(ticks, names, fontsize=8, **options)


def _drawable(labels: Sequence[str], places: Sequence[int]) -> tuple[list[str], list[str]]:
    """Labels with those that no installed font can draw replaced by #place, and the font families to draw with."""
    from matplotlib import font_manager, rcParams

    installed = set(font_manager.get_font_names())
    families = [*rcParams["font.family"], *(name for name in _FALLBACKS if name in installed)]
    properties = (font_manager.FontProperties(family=[name]) for name in families)
    known = set().union(*(font_manager.get_font(font_manager.findfont(p)).get_charmap() for p in properties))
    names = [label.strip() or "␣" for label in labels]
    good = [all(ord(character) in known for character in name) for name in names]
    return [n if fine else f"#{place}" for n, fine, place in zip(names, good, places, strict=True)], families


def _every(count: int, stride: int) -> list[int]:
    """0, stride, ... with the last one always in, and none too near to it."""
    return [*range(0, count - stride, stride), count - 1]


def _span(name: str, first: int, last: int) -> str:
    return f"{name} {first}" if first == last else f"{name}s {first}-{last}"


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly but for the last, both ends in."""
    return _every(count, math.ceil(count / most))


def _run(numbers: dict[str, Any]) -> str:
    settings = numbers["settings"]
    height, width = settings["size"]
    return f"{numbers['model']}, {settings['frames']} frames of {height}x{width}, {settings['steps']} steps"


def _add_pixel_axis(axes: Any, numbers: dict[str, Any]) -> None:
    """The video's frames along the top, at the last one of each latent frame."""
    top = axes.secondary_xaxis("top")
    places = _spread(len(numbers["pixel_frames"]), 13)
    top.set_xticks(places, [str(numbers["pixel_frames"][i][1]) for i in places])
    top.set_xlabel("frame of the video")


def _figure(width: float, height: float) -> Any:
    """A figure of this size in inches, free of pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, facecolor="white")


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.name in ("", ".."):
        raise video.OutputError(f"explain folder {str(folder)!r}: names no new folder; give one such as explain")
    video._check_folder(folder)
    try:
        mode = os.lstat(folder).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise video.OutputError(f"explain folder {folder}: not a usable name ({error}); choose another") from error
    if not stat.S_ISDIR(mode):
        raise video.OutputError(f"explain folder {folder}: exists and is not a plain folder; choose another name")
    held = list(folder.iterdir())
    foreign = [entry.name for entry in held if entry.name not in NAMES or not entry.is_file()]
    if foreign:
        raise video.OutputError(
            f"explain folder {folder}: holds {min(foreign)!r}, which is none of the plots; choose another name"
        )
    if held and not overwrite:
        raise video.OutputError(f"explain folder {folder}: holds plots; pass --overwrite or choose another name")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write to, hidden beside `folder`; it takes its name when the block ends well, and only then."""
    with tempfile.TemporaryDirectory(prefix=_HIDDEN, dir=folder.parent) as hidden:
        part, old = Path(hidden) / "new", Path(hidden) / "old"
        part.mkdir()
        yield part
        _check_folder(folder, overwrite=True)  # other files may have come since
        if not folder.exists():
            os.replace(part, folder)
            return
        # A folder that holds something cannot be renamed over: the old one steps aside, and back on failure.
        os.replace(folder, old)
        try:
            os.replace(part, folder)
        except BaseException:
            os.replace(old, folder)
            raise
