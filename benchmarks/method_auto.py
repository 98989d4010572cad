"""Does `--method auto` (`samplers.auto`) find better methods than none? Every criterion, on clips with their truth.

Of each clip every candidate is tried as `auto.choose` does, and also run in full, so that each criterion's choice,
each candidate by itself, the tuned arms and the best that any choice could have been are compared on the same clips:
interior PSNR, and its paired difference to `wan` with standard error. A criterion wins on development clips if it is
over `wan` by more than one standard error in every model; only then the frozen test set is run for it.

    python -m benchmarks.method_auto --model tiny benchmarks/tgi/models/seed11 --out benchmarks/results/method_auto.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.tgi import arms, generate, metrics, procedural
from benchmarks.tgi.data import Item
from benchmarks.tgi.run import clips_of
from samplers import auto
from samplers.plan import Settings
from wanjax import checkpoint
from wanjax.checkpoint import Model

TUNED = Path(__file__).parent / "results" / "tgi_tiny_tuned" / "tuned.json"
TUNED_ARMS = ("kab-tuned", "retro-tuned", "both-tuned")
TUNED_ON = 48
"""The first development clips are what the tuned arms were chosen on, so others are taken here."""
SEED = 0
BATCH = 12


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.method_auto", description=__doc__.split("\n")[0])
    p.add_argument("--model", nargs="+", default=["tiny"], help="'tiny' or model folders (default: tiny)")
    p.add_argument("--split", choices=procedural.SPLITS, default="dev", help="of the clips (default %(default)s)")
    p.add_argument("--clips", type=measure.positive, default=48, help="so many (default %(default)s)")
    p.add_argument("--frames", type=measure.positive, default=25, help="of each (default %(default)s)")
    p.add_argument("--out", type=measure.output, metavar="JSON", help="report to write")
    return p


def items_of(split: str, frames: int, clips: int) -> tuple[Item, ...]:
    """The test set's first clips, or those development clips that nothing was tuned on.

    Raises:
      ValueError: clips of another length than there are.
    """
    skipped = TUNED_ON if split == "dev" else 0
    return procedural.procedural(split, frames, skipped + clips).items[skipped:]


def trial(model: Model, items: Sequence[Item], settings: Settings, own: Sequence[arms.Arm]) -> list[dict[str, Any]]:
    """One entry a clip: {"clip", "scores": criterion -> candidate -> value, "psnr": arm or candidate -> dB}."""
    found = []
    for start in range(0, len(items), BATCH):
        some = items[start : start + BATCH]
        # Filled up, as a smaller batch would be another program.
        batch = generate.Batch(
            model, None, settings, clips_of([*some, *some[-1:] * (BATCH - len(some))], settings.size)
        )
        scores, psnr = _scores(batch), _psnr(batch, own)
        for n, item in enumerate(some):
            found.append({
                "clip": item.id,
                "scores": {criterion: {name: round(float(values[n]), 5) for name, values in judged.items()}
                           for criterion, judged in scores.items()},
                "psnr": {name: round(float(values[n]), 4) for name, values in psnr.items()},
            })  # fmt: skip
        print(f"{start + len(some)} of {len(items)} clips", flush=True)
    return found


def _scores(batch: generate.Batch) -> dict[str, dict[str, np.ndarray]]:
    """Criterion -> candidate -> float [B]."""
    short = auto.short(batch.model.config, batch.settings, auto.STEPS)
    noises = [batch.noise(SEED + k) for k in range(auto.NOISES)]
    tries = auto.tries(batch.model, short, batch.encoded, noises, auto.CANDIDATES)
    keyframes = batch.inputs.pixels
    by_clip = [{name: judge(tries[:, :, n], keyframes[n], short.at) for name, judge in auto.CRITERIA.items()}
               for n in range(len(keyframes))]  # fmt: skip
    return {name: dict(zip(auto.CANDIDATES, np.stack([one[name] for one in by_clip], 1), strict=True))
            for name in auto.CRITERIA}  # fmt: skip


def _psnr(batch: generate.Batch, own: Sequence[arms.Arm]) -> dict[str, np.ndarray]:
    """Interior PSNR of full runs: arm or candidate -> dB [B]."""
    methods = dict(auto.CANDIDATES) | {arm.name: arm.method for arm in own}
    run = {name: generate.make(arms.Arm(name, "own", "", method=method), batch, SEED)
           for name, method in methods.items()}  # fmt: skip
    return {name: np.array([metrics.psnr(one[1:-1], truth[1:-1]).mean()
                            for one, truth in zip(made, batch.clips.truth, strict=True)])
            for name, made in run.items()}  # fmt: skip


def summary(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arm -> interior PSNR, its difference to `wan` and that one's standard error in dB; of criteria also how they
    chose, and the mean over clips of the rank correlation of their scores with the truth's."""
    names = list(clips[0]["scores"]["keyframes"])
    table = {name: np.array([clip["psnr"][name] for clip in clips]) for name in clips[0]["psnr"]}
    candidates = np.stack([table[name] for name in names])
    rows = {name: _row(values, table["wan"]) for name, values in table.items()}
    rows["best of the candidates by the truth"] = _row(candidates.max(0), table["wan"])
    rows["mean of the candidates"] = _row(candidates.mean(0), table["wan"])
    for criterion in clips[0]["scores"]:
        scores = np.array([[clip["scores"][criterion][name] for name in names] for clip in clips]).T
        chosen = scores.argmax(0)
        ranks = [_rank_correlation(one, truth) for one, truth in zip(scores.T, candidates.T, strict=True)]
        rows[f"auto by {criterion}"] = _row(candidates[chosen, np.arange(len(clips))], table["wan"]) | {
            "chosen": {name: int((chosen == n).sum()) for n, name in enumerate(names)},
            "rank_correlation": round(float(np.mean(ranks)), 4),
        }
    return rows


def _row(values: np.ndarray, base: np.ndarray) -> dict[str, float]:
    difference = values - base
    error = difference.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    figures = {"psnr_interior": values.mean(), "over_wan": difference.mean(), "standard_error": error}
    return {name: round(float(value), 4) for name, value in figures.items()}


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(ranks)[0, 1])


def winners(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Criteria that are over `wan` by more than one standard error in every model."""
    rows = [f"auto by {criterion}" for criterion in auto.CRITERIA]
    return [
        row.removeprefix("auto by ")
        for row in rows
        if all(one["arms"][row]["over_wan"] > one["arms"][row]["standard_error"] for one in models.values())
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    measure.backend(line)
    try:
        configs = [checkpoint.read_config(model)[1] for model in args.model]
        items = items_of(args.split, args.frames, args.clips)
        own = [arm for arm in arms.read_own(TUNED) if arm.name in TUNED_ARMS]
    except ValueError as error:
        line.error(str(error))
    for config in configs:
        measure.check_clip(line, config, config.sampling.size, args.frames)

    def measured() -> bool:
        models = {}
        for name in args.model:
            begun, cpu = time.perf_counter(), time.process_time()
            model = checkpoint.load(name)
            clips = trial(model, items, Settings.of(model.config, frames=args.frames), own)
            spent = {"wall": time.perf_counter() - begun, "cpu": time.process_time() - cpu}
            models[Path(name).name] = {"arms": summary(clips), "seconds": spent, "clips": clips}
            print(f"{name}: {spent['cpu']:.0f} CPU seconds")
            rows = [
                [
                    arm,
                    *(f"{row[k]:+.3f}" for k in ("psnr_interior", "over_wan", "standard_error")),
                    row.get("rank_correlation", ""),
                ]
                for arm, row in models[Path(name).name]["arms"].items()
            ]
            measure.print_table((args.split, "PSNR", "over wan", "error", "rank"), rows)
        won = winners(models)
        print(f"over wan by more than its standard error in every model: {', '.join(won) or 'none'}")
        measure.write(args.out, {
            "split": args.split, "frames": args.frames, "items": [items[0].id, items[-1].id], "tried_steps": auto.STEPS,
            "noises": auto.NOISES, "winners": won, "models": models, "environment": measure.environment(),
        })  # fmt: skip
        return True

    return measure.guarded(line, measured)


if __name__ == "__main__":
    raise SystemExit(main())
