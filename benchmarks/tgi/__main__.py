"""Command lines of the evaluation, `python -m benchmarks.tgi run|report|tune|vbench`; see README.md beside this.

Bad input ends with one line and exit code 2, a failed run with one line and 1, Ctrl-C with 130; what was scored by
then stays and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.tgi import arms, compare, neural, procedural, report, run, tune, vbench
from benchmarks.tgi.data import DataSet
from benchmarks.tgi.neural import Neural
from benchmarks.tgi.run import Plan
from benchmarks.tgi.scores import Scores, ScoresError, model_identity, unfinished
from benchmarks.tgi.tgi_bench import tgi_bench
from benchmarks.tgi.videos import videos
from samplers.options import renamed
from samplers.plan import Settings
from wanjax import checkpoint


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.tgi", description="Compare ways of inbetweening on clips.")
    commands = p.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="make and score videos; the same command goes on with what is missing")
    one.add_argument("--out", type=Path, required=True, help="folder of the results")
    _add_data(one, "test")
    _add_model(one)
    one.add_argument("--arms", nargs="+", default=["all"], help="names, or 'all' (default): " + ", ".join(
        arm.name for arm in arms.ARMS) + "; by name alone, given the middle frame too: " + ", ".join(
        arm.name for arm in arms.THREE))  # fmt: skip
    one.add_argument("--own-arms", type=Path, metavar="JSON", help="settings of one's own, as `tune` writes them")
    one.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the noise (default 0)")
    one.add_argument("--weights", type=Path, metavar="FOLDER", help="converted weights of LPIPS, Inception and I3D")
    one.add_argument("--strips", type=int, default=12, help="clips a length kept as pictures (default %(default)s)")
    one.add_argument("--videos", action="store_true", help="keep every video, as VBench wants them")
    one.set_defaults(run=_run)

    two = commands.add_parser("report", help="tables, claims and plots of one run, or of several training seeds")
    two.add_argument("folders", type=Path, nargs="+", help="folders that `run` wrote, one for each model")
    two.add_argument("--out", type=Path, required=True, help="folder of the report")
    two.add_argument("--names", nargs="+", help="of the runs (default: the folders' names)")
    two.add_argument("--partial", action="store_true", help="report arms that lack clips, on those that they have")
    two.add_argument("--vbench", nargs="+", default=[], metavar="ARM=PATH", help="results of upstream VBench, "
                     "a file or the folder of all")  # fmt: skip
    two.set_defaults(run=_report)

    vb = commands.add_parser("vbench", help="lay out a run's videos for upstream VBench and print its commands")
    vb.add_argument("folder", type=Path, help="folder that `run --videos` wrote")
    vb.add_argument("--arm", required=True, help="whose videos")
    vb.add_argument("--length", type=int, required=True, help="frames")
    vb.add_argument("--out", type=Path, required=True, help="new folder: videos/ and, for upstream, results/")
    vb.set_defaults(run=_vbench)

    three = commands.add_parser("tune", help="search settings of KAB and ReTRo, on development clips only")
    three.add_argument("--out", type=Path, required=True, help="folder of the scores, and of tuned.json")
    _add_data(three, "dev")
    _add_model(three)
    three.add_argument("--trials", type=int, default=24, help="settings tried for each method (default %(default)s)")
    three.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the noise (default 0)")
    three.set_defaults(run=_tune)
    return p


def _add_data(p: argparse.ArgumentParser, split: str) -> None:
    p.add_argument("--data", default=f"procedural-{split}", help="procedural-test, procedural-dev, tgi:FOLDER "
                   "(TGI-Bench as published) or videos:FOLDER (default %(default)s)")  # fmt: skip
    p.add_argument("--captions", type=Path, metavar="JSON", help="of videos: {file name: caption}")
    p.add_argument("--lengths", type=int, nargs="+", default=[25], help="frames (default 25)")
    p.add_argument("--clips", type=int, help="the first so many of a length (default: all; procedural: 144)")


def _add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="tiny", help="'tiny' or a model folder (default %(default)s)")
    p.add_argument("--image-model", help="conditioned on one image, for trf and vibid (tiny: itself)")
    p.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels (default: the model's)")
    p.add_argument("--batch", type=int, default=12, help="clips at once (default %(default)s)")
    for name, kind, words in (("steps", int, "denoising steps"), ("guidance", float, "guidance scale"),
                              ("shift", float, "timestep shift"), ("solver", str, "sampler"),
                              ("schedule", str, "of sigmas"), ("negative-prompt", str, "what it steers away from"),
                              ("guidance-mode", str, "of the passes")):  # fmt: skip
        p.add_argument(f"--{name}", type=kind, help=f"{words} (default: the model's)")


def _sets(options: argparse.Namespace) -> tuple[DataSet, ...]:
    kind, _, folder = options.data.partition(":")
    if options.captions is not None and kind != "videos":
        raise ValueError("--captions: belongs to --data videos:FOLDER")
    if len(set(options.lengths)) < len(options.lengths):
        raise ValueError(f"--lengths {options.lengths}: one is named twice; name each once")
    sources: dict[str, Callable[[int], DataSet]] = {
        "procedural-test": lambda n: procedural.procedural("test", n, options.clips or procedural.CLIPS),
        "procedural-dev": lambda n: procedural.procedural("dev", n, options.clips or procedural.CLIPS),
        "tgi": lambda n: tgi_bench(folder, n),
        "videos": lambda n: videos(folder, n, options.captions),
    }
    if kind not in sources or (kind in ("tgi", "videos")) != bool(folder):
        raise ValueError(f"--data {options.data}: give procedural-test, procedural-dev, tgi:FOLDER or videos:FOLDER")
    if options.clips is not None and options.clips < 1:
        raise ValueError(f"--clips {options.clips}: take at least 1")
    return tuple(run.first(sources[kind](length), options.clips) for length in options.lengths)


def _plan(options: argparse.Namespace, config: Any, chosen: Sequence[arms.Arm], **more: Any) -> Plan:
    names = ("steps", "guidance", "shift", "solver", "schedule", "negative_prompt", "guidance_mode")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.size is not None:
        given["size"] = tuple(options.size)
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: take at least 1")
    if len(set(options.seeds)) < len(options.seeds) or not all(0 <= seed < 2**32 for seed in options.seeds):
        raise ValueError(f"--seeds {options.seeds}: give different whole numbers from 0 to {2**32 - 1}")
    settings = Settings.of(config, **given)
    return Plan(_sets(options), tuple(chosen), tuple(options.seeds), settings, options.batch, **more)


def _score(options: argparse.Namespace, plan: Plan, networks: Neural, config: Any, folder: Path) -> Scores:
    """Checks everything, then runs the plan; the scores come back closed."""
    image_folder = image_config = None
    if options.image_model is not None:
        image_folder, image_config = checkpoint.read_config(options.image_model)
    elif run.knows_one_keyframe(config):
        image_config = config
    plan.check(config, image_config)
    networks.check(plan.settings.size)
    identity = {"name": config.name, "sha256": model_identity(folder)}
    other = None
    if image_folder is not None and plan.two_way and (digest := model_identity(image_folder)) != identity["sha256"]:
        other = {"name": image_config.name, "sha256": digest}
    described = plan.describe(identity, networks, other) | {"environments": [measure.environment()]}
    with Scores(options.out, described) as scores:
        model = checkpoint.load(options.model)
        image_model = None if image_config is None else model
        if other is not None:
            image_model = checkpoint.load(options.image_model)
        run.run(plan, model, image_model, scores, networks)
    return scores


def _run(options: argparse.Namespace) -> None:
    own = () if options.own_arms is None else arms.read_own(options.own_arms)
    folder, config = checkpoint.read_config(options.model)
    plan = _plan(options, config, arms.choose(options.arms, own), strips=options.strips, videos=options.videos)
    scores = _score(options, plan, Neural(options.weights), config, folder)
    for length, arm, clips, value in run.summary(scores, options.lengths):
        print(f"{length:3d} frames  {arm:22s} {clips:4d} clips  interior PSNR {value:6.2f} dB")


def _report(options: argparse.Namespace) -> None:
    names = options.names or [folder.name for folder in options.folders]
    if len(names) != len(options.folders) or len(set(names)) < len(names):
        raise ValueError(f"--names {' '.join(names)}: give {len(options.folders)} different names")
    upstream = vbench_results(options.vbench)
    runs = [Scores(folder, None) for folder in options.folders]
    for one in runs:
        if not one.lines:
            raise ScoresError(f"{one.folder}: no scores yet; `run` goes on with it")
        if lacking := [] if options.partial else unfinished(one.config, one.done):
            length, arm, done, clips = lacking[0]
            more = f", and {len(lacking) - 1} more arms" if len(lacking) > 1 else ""
            raise ScoresError(f"{one.folder}: {arm} has {done} of {clips} clips of {length} frames{more}; `run` goes "
                              "on with it, or take --partial")  # fmt: skip
    compare.compatible(runs, names)
    unknown = upstream.keys() - {arm for one in runs for arm in one.config["arms"]}
    if unknown:
        raise ValueError(f"--vbench {min(unknown)}=...: no run has this arm; give one of theirs")
    lengths = compare.shared_lengths(runs)
    sets = [{str(n): neural.distances(one, n, compare.arms(one, n)) for n in lengths} for one in runs]
    made = report.write(report.collect(runs, names, sets, upstream), runs, options.out)
    print(f"{made[0]} and {len(made) - 1} more files")


def vbench_results(pairs: Sequence[str]) -> dict[str, Any]:
    """ARM=PATH pairs read: arm -> dimension -> {"mean", "videos"}. ValueError for what is not such a pair or file."""
    found = {}
    for pair in pairs:
        arm, equals, file = pair.partition("=")
        if not (arm and equals and file):
            raise ValueError(f"--vbench {pair}: give ARM=PATH, such as paper=results/x_eval_results.json")
        if arm in found:
            raise ValueError(f"--vbench {pair}: {arm} is named twice; give each arm once")
        found[arm] = vbench.read(Path(file))
    return found


def _vbench(options: argparse.Namespace) -> None:
    scores = Scores(options.folder, None)
    keys = [key for key in scores.done if (key.arm, key.length) == (options.arm, options.length)]
    for length, arm, done, clips in unfinished(scores.config, scores.done):
        if (arm, length) == (options.arm, options.length):
            raise ScoresError(f"{options.folder}: {arm} has {done} of {clips} clips of {length} frames; `run` goes on "
                              "with it")  # fmt: skip
    files = {key.name: run.video_file(options.folder, key) for key in sorted(keys, key=lambda key: key.name)}
    absent = [name for name, file in files.items() if not file.exists()]
    if not files or absent:
        what = f"{len(absent)} of {len(files)} videos missing, {absent[0]} first" if files else "no scores"
        raise ValueError(f"{options.folder}: {what} for arm {options.arm} at {options.length} frames; the command that "
                         "made the folder makes them, with --videos")  # fmt: skip
    commands = vbench.commands(options.out / "videos", options.out / "results")
    vbench.lay_out(files, options.out / "videos")
    for command in commands:
        print(shlex.join(command))


def _tune(options: argparse.Namespace) -> None:
    if options.trials < 1:
        raise ValueError(f"--trials {options.trials}: take at least 1")
    folder, config = checkpoint.read_config(options.model)
    plan = _plan(options, config, tune.candidates(options.trials, config.dit.num_layers), strips=0)
    tune.refuse_test_clips(plan.sets)
    scores = _score(options, plan, Neural(None), config, folder)
    best = tune.best(scores, plan.arms, options.lengths, plan.seeds)
    tune.write(best, plan.sets[0].name, options.out / "tuned.json")
    for name, one in best.items():
        print(f"{name}: {one['gain']:+.3f} dB over wan on {plan.sets[0].name}, {one['settings']}")
    print(options.out / "tuned.json")


def _check_out(out: Path) -> None:
    """Raises ValueError unless `out` is a folder, or can become one as far as its name goes."""
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"--out {out}: {place} is a file; name a folder")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = parser().parse_args(renamed(sys.argv[1:] if arguments is None else arguments))
    try:
        _check_out(options.out)
        options.run(options)
    except ValueError as error:
        print(f"benchmarks.tgi {options.command}: {error}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError) as error:
        print(f"benchmarks.tgi {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"benchmarks.tgi {options.command}: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
