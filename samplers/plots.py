"""Figures of `samplers.explain`, from the numbers that it also writes as JSON.

matplotlib is imported inside the functions, through its object-oriented interface: no global state of pyplot's.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wanjax import marks

DPI = 150
# Families that matplotlib may fall back on for characters its own font lacks, such as those of Chinese prompts.
_FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS",
)  # fmt: skip


def draw_retro(numbers: dict[str, Any]) -> Any:
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


def draw_strength(numbers: dict[str, Any]) -> Any:
    """Strength by frame, and each keyframe's part of the target; below, strength by frame and step."""
    own = numbers["strength"]
    strength, curve = np.array(own["by_step"]), own["curve"]
    steps, frames = strength.shape
    active = np.flatnonzero(strength.any(1))
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
    lines = upper.plot(np.arange(frames), strength.max(0), "o-", color="C0", label="strength")
    upper.set_ylabel("strength", color="C0")
    upper.set_ylim(-0.02, max(1.0, strength.max()) * 1.05)
    if curve is not None:
        twin = upper.twinx()
        for part, (anchor, values) in enumerate(zip(own["anchors"], np.transpose(curve), strict=True)):
            label = f"anchor curve of frame {anchor}"
            lines += twin.plot(np.arange(frames), values, "s--", color=f"C{1 + part}", label=label)
        twin.set_ylabel("each keyframe's part of the target")
        twin.set_ylim(-0.02, 1.05)
    upper.legend(lines, [line.get_label() for line in lines], loc="upper center", fontsize=9)
    upper.grid(alpha=0.3)
    upper.set_xlim(-0.5, frames - 0.5)
    image = lower.imshow(
        strength, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=strength.max() or 1
    )
    lower.set_ylabel("denoising step")
    lower.set_yticks(_spread(steps, 15))
    figure.colorbar(image, ax=lower, label="strength", location="bottom", aspect=40)
    for axes in (upper, lower):
        axes.set_xticks(_spread(frames, 25))
        axes.set_xlabel("latent frame")
    _add_pixel_axis(upper, numbers)
    return figure


def draw_attention(numbers: dict[str, Any]) -> Any:
    """Columns: text and the keyframes that the model sees. Rows: without bias, with it, difference."""
    from matplotlib.colors import FuncNorm, LogNorm
    from matplotlib.ticker import LogLocator

    branches = numbers["attention"]
    frames = len(branches["text"]["plain"])
    image_width = min(max(4.5, 0.025 * len(branches["first"]["labels"])), 8)
    known = {"text": "prompt", "first": "first keyframe", "last": "last keyframe"}
    columns = {branch: name for branch, name in known.items() if branch in branches}
    widths = [min(max(3.5, 0.24 * len(branches["text"]["labels"])), 30), *[image_width] * (len(columns) - 1)]
    height = min(max(1.8, 0.16 * frames), 5)
    figure = _figure(sum(widths) + 4, 3 * height + 2.6)
    figure.suptitle(_attention_title(numbers), fontsize=11, parse_math=False)
    grid = figure.subplots(3, len(columns), width_ratios=widths, squeeze=False)
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
        norm = FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x)), -limit, limit)
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


def _attention_title(numbers: dict[str, Any]) -> str:
    layer, step = numbers["layer"], numbers["step"]
    lines = [
        _run(numbers),
        f"Frame attention in layer {layer} of 0-{numbers['strength']['of_layers'] - 1}, step {step} of "
        f"0-{numbers['settings']['steps'] - 1} (timestep {numbers['timestep']:.0f}): mean over heads and the "
        f"frame's queries{', each row of a map sums to 1' if numbers['isolated'] else ''}",
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


def save(figure: Any, path: Path) -> None:
    """Writes a figure as PNG at DPI, on white, with the mark of wanjax."""
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": marks.mark()})
