"""From scores to figures: means, paired differences with intervals, corrected p, and which claims held.

A claim about the method is judged over all runs given, one for each training seed of the model: it holds only if in
every run the difference has the expected sign, its interval excludes 0 and Holm's p is below 0.05.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.tgi import paired
from benchmarks.tgi.arms import BASELINE, CLAIMS, KNOWN
from benchmarks.tgi.metrics import HIGHER_IS_BETTER
from benchmarks.tgi.scores import GROWING_TABLES, Scores, by_clip, pairs

PRIMARY = "psnr_interior"
COMPARED = ("psnr_interior", "ssim_interior", "lpips_interior", "pace_distance")
ALPHA = 0.05
ENOUGH_CLIPS, ENOUGH_RUNS = 128, 2


def lengths(scores: Scores) -> list[int]:
    return sorted({line["length"] for line in scores.lines})


def shared_lengths(runs: Sequence[Scores]) -> list[int]:
    """Those that every run has scores of."""
    return [length for length in lengths(runs[0]) if all(length in lengths(run) for run in runs)]


def arms(scores: Scores, length: int) -> list[str]:
    """Arms with scores at a length: those of KNOWN in its order, then others."""
    found = {line["arm"] for line in scores.lines if line["length"] == length}
    known = [arm.name for arm in KNOWN if arm.name in found]
    return known + sorted(found - set(known))


def challenges(scores: Scores, length: int) -> list[str]:
    return sorted({line["challenge"] for line in scores.lines if line["length"] == length})


def means(scores: Scores, length: int) -> dict[str, dict[str, dict[str, Any]]]:
    """arm -> metric -> {"mean", "low", "high", "clips"}; a metric without a value on any clip is absent."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for arm in arms(scores, length):
        table[arm] = {}
        for metric in HIGHER_IS_BETTER:
            values = np.array(list(by_clip(scores.lines, length, arm, metric).values()))
            if len(values):
                low, high = paired.interval(values)
                table[arm][metric] = _plain({"mean": values.mean(), "low": low, "high": high, "clips": len(values)})
    return table


def differences(scores: Scores, length: int, metric: str, challenge: str | None = None) -> dict[str, dict[str, Any]]:
    """arm -> paired difference to BASELINE on the clips and seeds that both have, with Holm's p over the arms of the
    table."""
    rows = {}
    for arm in arms(scores, length):
        own, base = pairs(scores.lines, length, arm, BASELINE, metric, challenge)
        if arm != BASELINE and own:
            rows[arm] = paired.compare(own, base)
    # The bounds are no rivals, nor is what is told more: they would only use up the correction.
    family = {arm: row.p for arm, row in rows.items() if _group(arm) not in ("bound", "three keyframes")}
    corrected = paired.holm(family)
    return {arm: _plain(dataclasses.asdict(row)) | {"p_holm": corrected.get(arm)} for arm, row in rows.items()}


def _group(arm: str) -> str:
    return next((one.group for one in KNOWN if one.name == arm), "own")


def judge(runs: Sequence[Scores], length: int) -> list[dict[str, Any]]:
    """Every claim whose arms were run, with its difference in each run and the verdict.

    Verdicts: "held" and "opposite" (in every run, see the module's docstring), "not shown" otherwise. `enough` says
    whether there were at least 2 runs and 128 clips in each: without them a verdict stands for these clips and this
    model alone.
    """
    rows = []
    for claim in CLAIMS:
        found = [pairs(run.lines, length, claim.arm, claim.against, PRIMARY) for run in runs]
        if all(own for own, _ in found):
            rows.append({"claim": claim, "runs": [paired.compare(*pair) for pair in found]})
    for number in range(len(runs)):
        corrected = paired.holm({str(i): row["runs"][number].p for i, row in enumerate(rows)})
        for i, row in enumerate(rows):
            row.setdefault("p_holm", []).append(corrected[str(i)])
    return [_judged(row) for row in rows]


def unjudged(runs: Sequence[Scores], length: int) -> list[dict[str, str]]:
    """{"arm", "against"} of the claims that some runs could tell and others could not, for want of an arm."""
    found = []
    for claim in CLAIMS:
        have = [{claim.arm, claim.against} <= set(arms(run, length)) for run in runs]
        if any(have) and not all(have):
            found.append({"arm": claim.arm, "against": claim.against})
    return found


def _judged(row: Mapping[str, Any]) -> dict[str, Any]:
    claim, found = row["claim"], row["runs"]
    sign = 1 if claim.expected == "better" else -1
    sure = all(p < ALPHA for p in row["p_holm"])

    def all_one_side(side: int) -> bool:
        return sure and all(min(side * d.low, side * d.high) > 0 for d in found)

    verdict = "held" if all_one_side(sign) else "opposite" if all_one_side(-sign) else "not shown"
    return {
        **dataclasses.asdict(claim),
        "runs": [_plain(dataclasses.asdict(d)) | {"p_holm": p} for d, p in zip(found, row["p_holm"], strict=True)],
        "verdict": verdict,
        "enough": len(found) >= ENOUGH_RUNS and all(d.clips >= ENOUGH_CLIPS for d in found),
    }


def curves(scores: Scores, length: int) -> dict[str, list[float]]:
    """arm -> PSNR in dB of each frame, mean over clips and seeds."""
    table: dict[str, list[list[float]]] = {}
    for line in scores.lines:
        if line["length"] == length:
            table.setdefault(line["arm"], []).append(line["psnr_frames"])
    return {arm: np.mean(table[arm], 0).round(4).tolist() for arm in arms(scores, length)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that JSON knows: NaN, an interval of a single clip, becomes null."""

    def one(value: Any) -> Any:
        if isinstance(value, (float, np.floating)):
            return None if math.isnan(value) else round(float(value), 6)
        return value

    return {name: one(value) for name, value in values.items()}


def _common(member: Mapping[str, Any]) -> dict[str, Any]:
    """An arm without the image-to-video model that it may have: runs are of different models."""
    return {name: value for name, value in member.items() if name != "image_model"}


def compatible(runs: Sequence[Scores], names: Sequence[str]) -> None:
    """Raises ValueError unless runs are of different models, and alike in what both have of lengths and arms."""
    for (one, first), (other, second) in combinations(zip(runs, names, strict=True), 2):
        a, b = one.config, other.config
        wrong = [entry for entry in ("settings", "metrics") if a[entry] != b[entry]]
        for table, what in GROWING_TABLES.items():
            shared = [member for member in a[table] if member in b[table]]
            wrong += [f"{what} {member}" for member in shared if _common(a[table][member]) != _common(b[table][member])]
        if wrong:
            raise ValueError(f"{second}: its {', '.join(wrong)} are not those of {first}; report it by itself")
        if a["model"]["sha256"] == b["model"]["sha256"]:
            raise ValueError(f"{second}: the same model as {first}; give runs of models trained from different seeds")
    if not shared_lengths(runs):
        raise ValueError(f"{', '.join(names)}: no clip length that all have scores of; report them by themselves")
