"""Pictures of a report: differences with intervals, by arm and by category, and PSNR along the clip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tgi.arms import ARMS, BASELINE, THREE
from benchmarks.tgi.compare import PRIMARY
from wanjax import marks

MORE = tuple(arm.name for arm in THREE)
CURVES = ("wan", "paper", "release", "kab", "retro", "trf", "vibid", "cross-fade", "vae", *MORE)
TICKS = (-20, -10, -5, -2, -1, -0.5, -0.2, 0, 0.2, 0.5, 1, 2, 5, 10, 20)  # dB
BY_CHALLENGE = ("paper", "release", "kab", "retro", "isolation", "empty-caption", "trf", "cross-fade", *MORE)


def draw(report: Mapping[str, Any], length: str, folder: Path) -> list[Path]:
    """Writes LENGTH-differences.png, LENGTH-categories.png and LENGTH-frames.png; returns them.

    Raises:
      ValueError: no matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("report: the plots need matplotlib: pip install 'wanjax[bench]'") from error
    found, names = report["lengths"][length]["runs"], [run["name"] for run in report["runs"]]
    files = []
    for kind, size, fill in (("differences", (9, 8), _differences), ("categories", (11, 5), _categories),
                             ("frames", (8, 5), _frames)):  # fmt: skip
        figure = Figure(size, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure, found, names, length)
        file = folder / f"{length}-{kind}.png"
        figure.savefig(file, dpi=110, metadata={"Software": marks.mark()})
        files.append(file)
    return files


def _bars(
    axes: Any, place: np.ndarray, rows: list[Mapping[str, Any] | None], width: float, label: str, flat: bool
) -> None:
    """Means with their intervals as whiskers; None leaves a gap."""
    values = np.array([np.nan if row is None else row["mean"] for row in rows])
    ends = [(0, 0) if row is None or row["low"] is None else (row["mean"] - row["low"], row["high"] - row["mean"])
            for row in rows]  # fmt: skip
    whiskers = np.maximum(np.array(ends).T, 0)
    if flat:
        axes.barh(place, values, width, xerr=whiskers, label=label, capsize=2)
    else:
        axes.bar(place, values, width, yerr=whiskers, label=label, capsize=2)


def _differences(figure: Any, found: list, names: list[str], length: str) -> None:
    bounds = {arm.name for arm in ARMS if arm.group == "bound"}
    arms = [arm for arm in dict.fromkeys(a for run in found for a in run["differences"][PRIMARY]) if arm not in bounds]
    axes = figure.add_subplot()
    width = 0.8 / len(found)
    for number, (run, name) in enumerate(zip(found, names, strict=True)):
        rows = [run["differences"][PRIMARY].get(arm) for arm in arms]
        _bars(axes, np.arange(len(arms)) + number * width, rows, width, name, flat=True)
    axes.set_yticks(np.arange(len(arms)) + width * (len(found) - 1) / 2, arms)
    axes.invert_yaxis()
    low, high = axes.get_xlim()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.5)
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.grid(axis="x", linewidth=0.3)
    axes.set_xlim(low, high)
    axes.set_xlabel(f"interior PSNR, dB over {BASELINE} (95% interval; linear within 0.5 dB)")
    axes.set_title(f"{length} frames")
    axes.legend()


def _categories(figure: Any, found: list, names: list[str], length: str) -> None:
    for number, (run, name) in enumerate(zip(found, names, strict=True)):
        axes = figure.add_subplot(len(found), 1, number + 1)
        kinds = list(run["by_challenge"])
        arms = [arm for arm in BY_CHALLENGE if any(arm in run["by_challenge"][kind] for kind in kinds)]
        width = 0.8 / max(1, len(arms))
        for place, arm in enumerate(arms):
            rows = [run["by_challenge"][kind].get(arm) for kind in kinds]
            _bars(axes, np.arange(len(kinds)) + place * width, rows, width, arm, flat=False)
        axes.set_xticks(np.arange(len(kinds)) + 0.4, kinds)
        axes.axhline(0, color="black", linewidth=0.8)
        low, high = axes.get_ylim()
        axes.set_yscale("symlog", linthresh=0.5)
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.set_ylim(low, high)
        axes.set_ylabel(f"dB over {BASELINE}")
        axes.set_title(f"{length} frames, {name}")
        axes.legend(fontsize=7, ncols=4)


def _frames(figure: Any, found: list, names: list[str], length: str) -> None:
    for number, (run, name) in enumerate(zip(found, names, strict=True)):
        axes = figure.add_subplot(1, len(found), number + 1)
        for arm in CURVES:
            if arm in run["curves"]:
                axes.plot(run["curves"][arm], label=arm, linewidth=1.2)
        axes.set_xlabel("frame")
        axes.set_ylabel("PSNR, dB (mean over clips)")
        axes.set_title(f"{length} frames, {name}")
        axes.legend(fontsize=7)
