"""What a clip of a list costs after the first of its shape, writing included, and how much of it is not computing.

    python -m benchmarks.jobs --out benchmarks/results/jobs_tiny.json

In turn: a list of one clip, the same with more of them (other seeds), and those more by the library alone, which
encodes, denoises and decodes one after the other and keeps and writes nothing. A clip costs what the two lists differ
by; its overhead is that less what the library takes: reading and checking the line, the run folder, video, contact
sheet and JSON. Wall time is of the machine as it was, processor time is user and system of all threads.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measure
from samplers import cache, files, jobs, pipeline
from samplers.options import parser as command_line
from samplers.pipeline import Batch
from wanjax import checkpoint

MOST = 1.3
"""Seconds of overhead a clip, on two cores, that a list may have."""
CLOCKS = ("wall", "user", "system")


def spent(function: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds by clock, and what the function returned."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    found = function()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = time.perf_counter() - begun, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return dict(zip(CLOCKS, seconds, strict=True)), found


def listed(folder: Path, model: str, count: int, programs: Path | None) -> tuple[jobs.Jobs, list[dict[str, Any]]]:
    """Reads, checks and makes a list of so many clips in an empty folder; the list and its report."""
    told = {name: str(value) for name, value in files.example().items()}
    folder.mkdir()
    lines = [told | {"seed": seed, "out": f"{seed}.mp4"} for seed in range(count)]
    path = folder / "clips.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    found = jobs.read(path, command_line(), ["--model", model])
    jobs.make(found, programs=programs, tell=lambda line: None)
    report = [json.loads(line) for line in found.report.read_text(encoding="utf-8").splitlines()]
    for line in report:
        if "error" in line:
            raise OSError(f"{line['out']}: {line['error']}")
    return found, report


def run(options: argparse.Namespace) -> None:
    """Measures, writes and prints."""
    more, folder = options.clips, cache.enable()  # as on the command line
    programs, model = None if folder is None else cache.programs(folder), checkpoint.load(options.model)
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.repeats + 1):  # the first compiles
            here = Path(place) / str(number)
            here.mkdir()
            one, (first, _) = spent(lambda at=here / "one": listed(at, options.model, 1, programs))
            many, (_, told) = spent(lambda at=here / "many": listed(at, options.model, 1 + more, programs))
            job = first.lines[0].job
            batches = [Batch(job.inputs, [job.settings.prompt], [seed]) for seed in range(1, 1 + more)]
            alone, _ = spent(lambda job=job, batches=batches: [pipeline.make(model, job.plan, [b]) for b in batches])
            rounds.append({
                "clip": {clock: (many[clock] - one[clock]) / more for clock in CLOCKS},
                "library": {clock: alone[clock] / more for clock in CLOCKS},
                "stages": {name: sum(line["seconds"].get(name, 0) for line in told[1:]) / more
                           for name in ("encode", "denoise", "decode", "write")},
            })  # fmt: skip
    report = figures(rounds[1:])
    own = {name: getattr(job.settings, name) for name in ("size", "frames", "steps", "guidance", "solver")}
    environment = measure.environment()
    measure.write(options.out, {"benchmark": "jobs", "environment": environment, "settings": own, "clips": more,
                                "most": MOST, **report, "rounds": rounds[1:]})  # fmt: skip
    rows = [[name, *(f"{report[name][clock]:.3f}" for clock in (*CLOCKS, "processor"))]
            for name in ("clip", "library", "overhead")]  # fmt: skip
    measure.print_table(["seconds a clip", *CLOCKS, "processor"], rows)
    print(", ".join(f"{name} {value:.3f} s" for name, value in report["stages"].items()))


def figures(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over rounds of "clip", "library", "overhead" by clock, "processor" being user and system; "stages"."""
    own = [one | {"overhead": {clock: one["clip"][clock] - one["library"][clock] for clock in CLOCKS}}
           for one in rounds]  # fmt: skip
    for one in own:
        for name in ("clip", "library", "overhead"):
            one[name] = one[name] | {"processor": one[name]["user"] + one[name]["system"]}
    return {name: {key: median(one[name][key] for one in own) for key in own[0][name]} for name in own[0]}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__.splitlines()[0])
    line.add_argument("--model", default="tiny", help="'tiny' or a model folder (default %(default)s)")
    line.add_argument("--clips", type=measure.positive, default=6, help="after the first (default %(default)s)")
    line.add_argument("--repeats", type=measure.positive, default=3, help="rounds (default %(default)s)")
    line.add_argument("--out", type=measure.output, help="JSON file")
    options = line.parse_args(argv)
    measure.backend(line)
    return measure.checked(line, lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
