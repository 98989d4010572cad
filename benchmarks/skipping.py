"""What skipping passes costs: clips with fewer passes against the truth and against the same clips with all of them.

    python -m benchmarks.skipping --out benchmarks/results/skipping.json

Every case is one model, method, solver and number of steps. Schedules are even ones, and ones that were calibrated on
training clips (`samplers.calibrate`); beside them guidance in a third of the steps alone. PSNR as in
`benchmarks.tiny.evaluate`: to the truth of interior frames, to the uncached clip of all frames. Axis letters: N clips.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure, residuals
from benchmarks.tiny.clips import Clip, clip
from benchmarks.tiny.evaluate import BATCH, heldout, psnr
from samplers import calibrate, pipeline, skipping
from samplers.pipeline import Encoded, Inputs
from samplers.plan import Plan, Settings
from wanjax.checkpoint import Model, load

GUIDANCE = 1.5
CALIBRATION = 4
"""Training clips of a calibration."""
BESIDE = 64
"""Clips on which caching the residual is compared with guessing velocities."""
SECOND = "benchmarks/tgi/models/seed11"
METHODS, SOLVERS = ("wan", "paper"), ("unipc", "euler")
INTERVALS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))
TIMED = (0.0, 0.3, 0.5)


@dataclass(frozen=True)
class Case:
    """Runs that are compared with one.

    Attributes:
      model: "tiny" or a folder.
      shares: of steps, each with the number of clips that it is tried on.
      intervals: whether guidance in a third of the steps is tried too, on `BATCH` clips.
    """

    model: str
    method: str
    solver: str
    steps: int
    shares: tuple[tuple[float, int], ...]
    intervals: bool = False


def cases(scale: float = 1.0) -> list[Case]:
    """All of them, the most telling first.

    Args:
      scale: of the numbers of clips; below 1 for a trial.
    """

    def shares(**clips: int) -> tuple[tuple[float, int], ...]:
        return tuple((int(name[1:]) / 100, max(1, round(n * scale))) for name, n in clips.items())

    twenty, ten = shares(s50=64, s20=16, s30=16, s40=16, s60=16), shares(s20=16, s30=16, s40=16, s50=16, s60=16)
    fifty, second = shares(s30=8, s50=8, s60=8), shares(s30=16, s50=16)
    kinds = [(method, solver) for solver in SOLVERS for method in METHODS]
    return [
        *(Case("tiny", *kind, 20, twenty, True) for kind in kinds),
        *(Case("tiny", *kind, 10, ten) for kind in kinds),
        *(Case(SECOND, *kind, 20, second) for kind in kinds),
        *(Case("tiny", *kind, 50, fifty) for kind in kinds),
    ]


Prepared = Sequence[tuple[Encoded, jax.Array]]
"""Conditions and noise, a batch at a time."""


def prepare(model: Model, plan: Plan, clips: Sequence[Clip]) -> Prepared:
    """Batches of clips; a clip's noise is that of its number."""
    found = []
    for begin in range(0, len(clips), BATCH):
        part = clips[begin : begin + BATCH]
        inputs = Inputs.prepare([(one.video[0], one.video[-1]) for one in part], plan)
        (encoded,) = pipeline.encode(model, plan, [inputs], [[one.caption for one in part]])
        found.append((encoded, pipeline.noise(plan, range(begin, begin + len(part)))))
    return found


def videos(model: Model, plan: Plan, clips: Prepared) -> np.ndarray:
    """uint8 [N, T, H, W, 3]."""
    chunk = plan.settings.steps
    return np.concatenate([
        pipeline.decode(model, plan, pipeline.denoise(model, plan, *one, chunk=chunk)) for one in clips
    ])  # fmt: skip


def first(clips: Prepared, count: int) -> Prepared:
    """The first clips of batches."""
    found = []
    for begin, (encoded, noise) in zip(range(0, count, BATCH), clips, strict=False):
        told, negative, noise = jax.tree.map(
            lambda leaf: leaf[: count - begin],  # noqa: B023
            (encoded.conditions, encoded.negative, noise),
        )
        found.append((Encoded(told, negative), noise))
    return found


class Compared:
    """The clips of a case with all passes, and what others are beside them."""

    def __init__(self, model: Model, case: Case) -> None:
        self.model, self.case = model, case
        self.plan = self.planned()
        clips = heldout(max([count for _, count in case.shares] + [BATCH] * case.intervals))
        self.truth = np.stack([one.video for one in clips])
        self.clips = prepare(model, self.plan, clips)
        self.base = videos(model, self.plan, self.clips)
        self.to_truth = psnr(self.base[:, 1:-1], self.truth[:, 1:-1])

    def planned(self, **changes: Any) -> Plan:
        """The case's plan with other settings."""
        c = self.case
        own = {"guidance": GUIDANCE, "steps": c.steps, "solver": c.solver, "method": c.method}
        return Plan.of(self.model.config, Settings.of(self.model.config, **own | changes))

    def row(self, kind: str, count: int, **changes: Any) -> dict[str, Any]:
        """The figures of other settings on the first clips."""
        plan = self.planned(**changes)
        passes = skipping.passes(plan.table.skip, plan.table.guidance[: self.case.steps])
        made = videos(self.model, plan, first(self.clips, min(count, len(self.truth))))
        return self.figures(kind, made, passes[1] - passes[0]) | changes

    def figures(self, kind: str, made: np.ndarray, passes: int) -> dict[str, Any]:
        """Of videos of the first clips, made by so many passes."""
        n = len(made)
        truth = psnr(made[:, 1:-1], self.truth[:n, 1:-1])
        change, uncached = truth - self.to_truth[:n], psnr(made, self.base[:n])
        return {
            "kind": kind,
            "passes": passes,
            "passes_skipped": 1 - passes / (2 * self.case.steps),
            "clips": n,
            "truth": truth.mean(),
            "change": change.mean(),
            "standard_error": change.std(ddof=1) / np.sqrt(n) if n > 1 else float("nan"),
            "uncached": uncached.mean(),
            "uncached_least": uncached.min(),
        }


def rows(case: Case) -> Iterator[dict[str, Any]]:
    """The case with all passes, then with fewer."""
    model = load(case.model)
    compared = Compared(model, case)
    n = len(compared.truth)
    spread = compared.to_truth.std(ddof=1) / np.sqrt(n) if n > 1 else float("nan")
    yield {"kind": "all", "passes": 2 * case.steps, "clips": n, "truth": compared.to_truth.mean(),
           "truth_standard_error": spread}  # fmt: skip
    examples = prepare(model, compared.plan, [clip(seed, "train") for seed in range(CALIBRATION)])
    seen = calibrate.observe(model, compared.plan, examples)
    for share, count in sorted(case.shares):
        yield compared.row("even", count, skip_passes=share) | {"share": share}
        found, tried = calibrate.find(model, compared.plan, share, examples, seen)
        own = {"share": share, "latents": found.error, "tried": {str(list(k)): v for k, v in tried.items()}}
        yield compared.row("calibrated", count, skip_passes=found.skip_passes) | own
    for interval in INTERVALS if case.intervals else ():
        yield compared.row("guidance", BATCH, guidance_interval=interval)


def residual_rows(case: Case) -> Iterator[dict[str, Any]]:
    """The residual cached instead, on its rule's schedule and an even one; velocities guessed on the same two."""
    model = load(case.model)
    compared = Compared(model, case)
    examples = prepare(model, compared.plan, [clip(seed, "train") for seed in range(CALIBRATION)])
    _, norms = residuals.denoise(model, compared.plan, examples, ())
    for share, count in sorted(case.shares):
        allowed = skipping.free(case.steps)
        even = skipping.even(skipping.count(share, case.steps, allowed), allowed)
        rule = residuals.schedule(norms, len(even))
        for kind, steps in (("residual, its rule", rule), ("residual, even", even)):
            latents, _ = residuals.denoise(model, compared.plan, compared.clips, steps)
            made = np.concatenate([pipeline.decode(model, compared.plan, one) for one in latents])
            yield compared.figures(kind, made, 2 * (case.steps - len(steps))) | {"share": share, "skip_passes": steps}
        for kind, steps in (("velocity, that rule", rule), ("velocity, even", even)):
            yield compared.row(kind, count, skip_passes=steps) | {"share": share}


def seconds(case: Case, count: int) -> dict[str, float]:
    """Processor seconds of denoising one batch, by share of steps that is skipped; compiled before."""
    model = load(case.model)
    compared = Compared(model, replace(case, shares=((0.0, count),), intervals=False))
    spent = {}
    for share in TIMED:
        plan = compared.planned(skip_passes=share)
        for _ in range(2):
            begin = time.process_time()
            jax.block_until_ready(pipeline.denoise(model, plan, *compared.clips[0], chunk=case.steps))
            spent[f"{share:g}"] = time.process_time() - begin
    return spent


def tables(report: Mapping[str, Any]) -> list[str]:
    """A report's rows side by side, in Markdown: even and calibrated schedules, then guidance in thirds."""
    shares = [["model", "method", "solver", "steps", "fewer passes", "clips", "even: truth (change), dB",
               "uncached, dB", "calibrated: truth (change), dB", "uncached, dB"]]  # fmt: skip
    thirds = [["model", "method", "solver", "steps", "guidance in", "fewer passes", "clips", "truth (change), dB"]]
    for case in report["cases"]:
        own = [case["model"].rpartition("/")[2], case["method"], case["solver"], case["steps"]]
        by = {(row["kind"], row.get("share")): row for row in case["rows"]}
        for (kind, share), row in by.items():
            fewer = f"{row.get('passes_skipped', 0):.0%}"
            if kind == "even" and ("calibrated", share) in by:
                other = by["calibrated", share]
                shares.append([*own, fewer, row["clips"], _truth(row), f"{row['uncached']:.1f}", _truth(other),
                               f"{other['uncached']:.1f}"])  # fmt: skip
        for row in (row for row in case["rows"] if row["kind"] == "guidance"):
            low, high = row["guidance_interval"]
            span = f"{low:.2f}-{high:.2f} of the run"
            thirds.append([*own, span, f"{row['passes_skipped']:.0%}", row["clips"], _truth(row)])
    lines = []
    for head, *rest in (shares, thirds):
        lines += [_line(head), "|" + "---|" * len(head), *map(_line, rest), ""]
    return lines[:-1]


def _truth(row: Mapping[str, Any]) -> str:
    return f"{row['truth']:.2f} ({_change(row)})"


def _change(row: Mapping[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['change']:+.3f}" + ("" if error is None or np.isnan(error) else f" ±{error:.3f}")


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def show(row: Mapping[str, Any], case: Case) -> None:
    """One row, as soon as it is there."""
    what = {"all": "all passes", "guidance": "guidance in {:.2f}-{:.2f}".format(*row.get("guidance_interval", (0, 0)))}
    share = what.get(row["kind"], row["kind"])
    cells = [case.model.rpartition("/")[2], case.method, case.solver, case.steps, share]
    if row["kind"] == "all":
        cells += ["0", row["clips"], f"{row['truth']:.2f}", "", ""]
    else:
        cells += [f"{row['passes_skipped']:.0%}", row["clips"], f"{row['truth']:.2f}", _change(row),
                  f"{row['uncached']:.1f}"]  # fmt: skip
    print(_line(cells), flush=True)


HEAD = ("model", "method", "solver", "steps", "skipped", "passes", "clips", "truth, dB", "change", "uncached, dB")


def run(arguments: argparse.Namespace) -> bool:
    """All cases; writes what there is after each."""
    report: dict[str, Any] = {"benchmark": "skipping", "environment": measure.environment(), "guidance": GUIDANCE,
                              "calibration_clips": CALIBRATION, "cases": []}  # fmt: skip
    print(_line(HEAD), flush=True)
    asked = cases(arguments.scale)[: arguments.cases]
    if arguments.residual:
        shares = tuple((share, max(1, round(BESIDE * arguments.scale))) for share in (0.3, 0.5))
        asked = [replace(case, shares=shares, intervals=False) for case in asked if case.steps == 20]
    for case in asked:
        found = {**asdict(case), "rows": []}
        report["cases"].append(found)
        for row in residual_rows(case) if arguments.residual else rows(case):
            found["rows"].append({name: float(value) if isinstance(value, np.floating) else value
                                  for name, value in row.items()})  # fmt: skip
            show(row, case)
        measure.write(arguments.out, report)
    if arguments.residual:
        return True
    report["seconds"] = seconds(asked[0], max(1, round(BATCH * arguments.scale)))
    print(f"processor seconds of denoising: {report['seconds']}", flush=True)
    measure.write(arguments.out, report)
    return True


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = argparse.ArgumentParser(prog="python -m benchmarks.skipping", description=__doc__.splitlines()[0])
    line.add_argument("--cases", type=measure.positive, help="so many of them, the most telling first (default: all)")
    line.add_argument("--residual", action="store_true", help="cache the block stack's residual instead, 20 steps")
    line.add_argument("--show", metavar="FILE", help="print the tables of an earlier report, no more")
    line.add_argument("--scale", type=float, default=1.0, help="of the numbers of clips, below 1 for a trial")
    line.add_argument("--out", type=measure.output, help="JSON file, written anew after every case")
    arguments = line.parse_args(argv)
    if not 0 < arguments.scale <= 1:
        line.error(f"--scale {arguments.scale:g}: give a number above 0, at most 1")
    if arguments.show is not None:
        print("\n".join(tables(json.loads(Path(arguments.show).read_text(encoding="utf-8")))))
        return 0
    return measure.guarded(line, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
