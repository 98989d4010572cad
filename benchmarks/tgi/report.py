"""The report of one run, or of several with models of different training seeds: markdown, JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.tgi import compare, plots
from benchmarks.tgi.arms import BASELINE, KNOWN
from benchmarks.tgi.compare import COMPARED, PRIMARY
from benchmarks.tgi.run import strip_file
from benchmarks.tgi.scores import Key, Scores, unfinished
from samplers import video
from wanjax import writing

SHOWN = {
    "psnr_interior": ("PSNR interior", 2),
    "ssim_interior": ("SSIM interior", 4),
    "lpips_interior": ("LPIPS interior", 4),
    "fid": ("FID", 2),
    "fvd": ("FVD", 2),
    "psnr_all": ("PSNR all", 2),
    "psnr_ends": ("PSNR ends", 2),
    "pace_distance": ("pace distance", 4),
    "pace_variance": ("pace variance", 3),
    "flicker": ("flicker", 3),
}
"""Columns of the main table: heading and digits."""
WALL_CLIPS, GAP = 6, 4


def collect(
    runs: Sequence[Scores],
    names: Sequence[str],
    frechet: Sequence[Mapping[str, Any]],
    vbench: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Every figure of the report as plain JSON.

    Args:
      runs: compatible ones.
      names: of each, as the report calls it.
      frechet: of each run, length (as text) -> arm -> {"fid": figure or reason, "fvd": ...}.
      vbench: arm -> what `vbench.read` made of upstream's results.
    """
    lengths = compare.shared_lengths(runs)
    report: dict[str, Any] = {
        "config": {entry: runs[0].config[entry] for entry in ("settings", "metrics")}
                  | {"sets": {str(length): runs[0].config["sets"][str(length)] for length in lengths}},
        "runs": [{"name": name, "model": run.config["model"], "lines": len(run.lines), "arms": run.config["arms"],
                  "batch": run.config["batch"], "planned": run.config["planned"],
                  "environments": run.config["environments"],
                  "unfinished": [list(one) for one in unfinished(run.config, run.done)],
                  "left_out": [length for length in compare.lengths(run) if length not in lengths]}
                 for name, run in zip(names, runs, strict=True)],
        "vbench": dict(vbench or {}),
        "lengths": {},
    }  # fmt: skip
    for length in lengths:
        report["lengths"][str(length)] = {
            "runs": [_one(run, length, sets.get(str(length), {})) for run, sets in zip(runs, frechet, strict=True)],
            "claims": compare.judge(runs, length),
            "unjudged": compare.unjudged(runs, length),
        }
    return report


def _one(run: Scores, length: int, sets: Mapping[str, Any]) -> dict[str, Any]:
    by_challenge = {
        challenge: compare.differences(run, length, PRIMARY, challenge) for challenge in compare.challenges(run, length)
    }
    return {
        "means": compare.means(run, length),
        "frechet": dict(sets),
        "differences": {metric: compare.differences(run, length, metric) for metric in COMPARED},
        "by_challenge": by_challenge,
        "curves": compare.curves(run, length),
    }


def write(report: Mapping[str, Any], runs: Sequence[Scores], folder: Path) -> list[Path]:
    """report.md, report.json, plots and walls in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for length in report["lengths"]:
        files += plots.draw(report, length, folder)
        files += _walls(runs[0], int(length), folder)
    writing.write_json(folder / "report.json", report, overwrite=True, anything=True, mark=False)
    text = folder / "report.md"
    text.write_text(markdown(report, [file.name for file in files]), encoding="utf-8")
    return [text, folder / "report.json", *files]


def markdown(report: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The report as text: one section a length."""
    parts = ["# Inbetweening, arms compared\n", _preamble(report)]
    for length, found in report["lengths"].items():
        parts.append(f"## {length} frames\n")
        for run, name in zip(found["runs"], report["runs"], strict=True):
            parts += [f"### {name['name']}\n", _table(run, name["arms"]), _challenge_table(run)]
        parts += ["### Claims\n", _claims(found["claims"], report["runs"]), _unjudged(found["unjudged"])]
        parts += [f"![{name}]({name})\n" for name in pictures if name.split("-")[0] == length]
    parts += ["## VBench\n", _vbench(report["vbench"])]
    return "\n".join(parts)


def _vbench(found: Mapping[str, Any]) -> str:
    if not found:
        return "Unavailable: upstream's results were not given (benchmarks/tgi/README.md says how to make them).\n"
    dimensions = sorted({dimension for results in found.values() for dimension in results})
    rows = [
        [f"`{arm}`", *(f"{results[d]['mean']:.4f} ({len(results[d]['videos'])})" if d in results else "unavailable"
                       for d in dimensions)]
        for arm, results in found.items()
    ]  # fmt: skip
    return f"By the upstream package, each dimension by itself (videos).\n\n{_grid(['arm', *dimensions], rows)}"


def _preamble(report: Mapping[str, Any]) -> str:
    settings = report["config"]["settings"]
    sets = report["config"]["sets"]
    name = next(iter(sets.values()))["name"]
    models = "; ".join(f"{one['name']}: {one['model']['name']} ({one['model']['sha256']})" for one in report["runs"])
    words = ", ".join(f"{key} {value}" for key, value in settings.items())
    lacking = [
        f"{run['name']}: {arm} {done} of {clips} at {length} frames"
        for run in report["runs"] for length, arm, done, clips in run["unfinished"]
    ]  # fmt: skip
    lone = "".join(
        f"{run['name']} has {', '.join(map(str, run['left_out']))} frames too, which not all runs have.\n\n"
        for run in report["runs"] if run["left_out"]
    )  # fmt: skip
    noise = "; ".join(f"{run['name']}: {_seeds(run['planned'])}" for run in report["runs"])
    partial = f"UNFINISHED (means of different arms may be of different clips): {'; '.join(lacking)}.\n\n"
    places = {}
    for run in report["runs"]:
        for one in run["environments"]:
            jax = one["versions"].get("jax")
            places[f"{one['device']} ({one['processor']}, {one['cores']} cores), jax {jax}, commit {one['commit']}, "
                   f"from {one['date'][:10]}: `{one['command']}`"] = None  # fmt: skip
    return (
        f"{partial if lacking else ''}"
        f"Data: {name}. Models: {models}. Settings: {words}. Noise seeds: {noise}.\n\n{lone}"
        f"Differences are to `{BASELINE}`, paired by clip and noise seed, in dB of interior PSNR, with 95% bootstrap "
        "intervals over clips; p is of the sign-flip test after Holm's correction over the arms. How each metric is "
        "computed stands in report.json under config.metrics.\n\n" + "".join(f"- {place}\n" for place in places)
    )


def _seeds(planned: Mapping[str, Mapping[str, Sequence[int | None]]]) -> str:
    """The seeds of the arms that noise enters; where they differ, of which arms they are."""
    found: dict[str, dict[str, None]] = {}
    for arms in planned.values():
        for arm, seeds in arms.items():
            if None not in seeds:
                found.setdefault(", ".join(map(str, seeds)), {})[arm] = None
    if len(found) < 2:
        return "".join(found) or "none"
    return ", and ".join(f"{seeds} of {', '.join(arms)}" for seeds, arms in found.items())


def _table(run: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    columns = [
        m for m in SHOWN if m in ("fid", "fvd", "lpips_interior") or any(m in row for row in run["means"].values())
    ]
    head = ["arm", *(SHOWN[m][0] for m in columns), "difference", "p", "wins"]
    rows = []
    for arm, figures in run["means"].items():
        cells = [f"`{arm}`", *(_cell(m, figures, run["frechet"].get(arm, {})) for m in columns)]
        change = run["differences"][PRIMARY].get(arm)
        cells += ["", "", ""] if change is None else [_change(change), _p(change["p_holm"]), f"{change['wins']:.0%}"]
        rows.append(cells)
    about = {arm.name: arm.about for arm in KNOWN}
    legend = (f"- `{arm}`: {about.get(arm) or _own(settings[arm])}{_by(settings[arm])}\n" for arm in run["means"])
    return f"{_grid(head, rows)}\n{''.join(legend)}"


def _own(arm: Mapping[str, Any]) -> str:
    """Settings of an arm that is not one of KNOWN, in a line."""
    parts = [f"{part} {json.dumps(settings)}" for part, settings in arm["method"].items() if settings is not None]
    return "; ".join([arm["kind"], *parts]).replace('"', "")


def _by(arm: Mapping[str, Any]) -> str:
    """The model of an arm that another one makes."""
    return "; by {name} ({sha256})".format(**arm["image_model"]) if "image_model" in arm else ""


def _cell(metric: str, figures: Mapping[str, Any], sets: Mapping[str, Any]) -> str:
    digits = SHOWN[metric][1]
    if metric in ("fid", "fvd"):
        found = sets.get(metric, "unavailable")
        return found if isinstance(found, str) else f"{found['distance']:.{digits}f}"
    return f"{figures[metric]['mean']:.{digits}f}" if metric in figures else "unavailable"


def _change(change: Mapping[str, Any]) -> str:
    if change["low"] is None:
        return f"{change['mean']:+.2f} (one clip)"
    return f"{change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value >= 1e-4 else "<0.0001"


def _challenge_table(run: Mapping[str, Any]) -> str:
    names = list(run["by_challenge"])
    if len(names) < 2:
        return ""
    clips = [max((d["clips"] for d in run["by_challenge"][n].values()), default=0) for n in names]
    head = ["arm", *(f"{n} ({count})" for n, count in zip(names, clips, strict=True))]
    rows = [
        [f"`{arm}`", *(_change(run["by_challenge"][n][arm]) if arm in run["by_challenge"][n] else "" for n in names)]
        for arm in run["differences"][PRIMARY]
    ]
    return f"Differences by category (clips):\n\n{_grid(head, rows)}"


def _claims(claims: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    if not claims:
        return "None of the claims can be judged with these arms.\n"
    head = ["expected", "source", *(f"{r['name']}: difference, p" for r in runs), "verdict"]
    rows = []
    for one in claims:
        sign = ">" if one["expected"] == "better" else "<"
        found = [f"{_change(d)}, {_p(d['p_holm'])}" for d in one["runs"]]
        rows.append([f"`{one['arm']}` {sign} `{one['against']}`", one["source"], *found, one["verdict"]])
    few = "" if all(one["enough"] for one in claims) else (
        f"Fewer than {compare.ENOUGH_RUNS} training seeds or {compare.ENOUGH_CLIPS} clips: the verdicts stand for this "
        "model and these clips alone, not for the method.\n"
    )  # fmt: skip
    return f"{_grid(head, rows)}\n{few}"


def _unjudged(claims: Sequence[Mapping[str, Any]]) -> str:
    if not claims:
        return ""
    pairs = ", ".join(f"`{one['arm']}` and `{one['against']}`" for one in claims)
    return f"Not judged, as not all runs have the arms: {pairs}.\n"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _walls(run: Scores, length: int, folder: Path) -> list[Path]:
    """A picture of all arms under each other for the first clips that the run kept strips of."""
    order = list(dict.fromkeys(("truth", *compare.arms(run, length))))
    found = (_strips(run, length, clip, order) for clip in run.config["sets"][str(length)]["ids"])
    columns = list(islice(filter(None, found), WALL_CLIPS))
    order = [arm for arm in order if any(arm in column for column in columns)]
    if not order:
        return []
    columns = [_column(column, order) for column in columns]
    labels = _labels(order, columns[0].height // len(order))
    wall = Image.new("RGB", (labels.width + sum(c.width + GAP for c in columns), columns[0].height), "white")
    wall.paste(labels, (0, 0))
    left = labels.width
    for column in columns:
        wall.paste(column, (left, 0))
        left += column.width + GAP
    file = folder / f"{length}-wall.png"
    video.write_png(file, np.asarray(wall))
    return [file]


def _strips(run: Scores, length: int, clip: str, arms: Sequence[str]) -> dict[str, Image.Image]:
    """Arm -> strip of a clip, of those that have one; of the one noise seed that most of them have."""
    planned = run.config["planned"].get(str(length), {})
    kept: dict[int | None, dict[str, Path]] = {}
    for arm in arms:
        for seed in planned.get(arm, ()):
            if (file := strip_file(run.folder, Key(length, clip, arm, seed))).exists():
                kept.setdefault(seed, {})[arm] = file
    seedless = kept.pop(None, {})
    files = seedless | max((kept[seed] for seed in sorted(kept)), key=len, default={})
    return {arm: _picture(file) for arm, file in files.items()}


def _picture(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


def _column(strips: Mapping[str, Image.Image], order: Sequence[str]) -> Image.Image:
    """Strips of one clip, an empty place where an arm has none."""
    width, height = next(iter(strips.values())).size
    column = Image.new("RGB", (width, (height + GAP) * len(order)), "white")
    for row, arm in enumerate(order):
        if arm in strips:
            column.paste(strips[arm], (0, row * (height + GAP)))
    return column


def _labels(order: Sequence[str], height: int) -> Image.Image:
    labels = Image.new("RGB", (150, height * len(order)), "white")
    draw = ImageDraw.Draw(labels)
    for row, arm in enumerate(order):
        draw.text((4, row * height + height // 2 - 6), arm, fill="black")
    return labels
