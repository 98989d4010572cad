"""The command line of `python -m samplers.calibrate`: a file for `--skip-passes`, from clips."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samplers import plan_command, skipping, solvers
from wanjax import method

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
FIRST, LAST = ".first.", ".last."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(
        "python -m samplers.calibrate",
        description="Find which passes of a run cost least to skip, for a model and settings, on a few clips: one run "
        "of each with all passes, three with fewer.",
    )
    add, options = line.add_argument, plan_command.OPTIONS
    add("--model", default="tiny", metavar="tiny|PATH", help="the bundled tiny model or a model folder (tiny)")
    add("--method", choices=tuple(method.METHODS), default="wan", help="as for samplers.inbetween (wan)")
    add("--solver", choices=solvers.SOLVERS, help="(default: the model's)")
    for name in ("size", "frames", "steps", "guidance"):
        add(f"--{name}", **options[name])
    add("--seed", type=int, default=0, help="of the first clip's noise; the others count on (0)")
    add("--share", type=float, required=True, help=f"of the steps that are to be skipped, up to {skipping.MOST:g}")
    add("--skip-in-kab", action=argparse.BooleanOptionalAction, default=True, help="also where KAB acts (yes)")
    add("--clips", required=True, metavar="FILE.jsonl|FOLDER",
        help='lines such as {"first": "a.png", "last": "b.png", "prompt": "..."}, paths against the file; or a folder '
        "of NAME.first.png, NAME.last.png and NAME.txt with the prompt")  # fmt: skip
    add("--memory", choices=("keep", "stage", "stream"), default="keep", help="as for samplers.inbetween (keep)")
    add("--out", default=skipping.FILE, help=f"JSON file; {skipping.FILE} in the model's folder is found by "
        "--skip-passes auto (default: %(default)s)")  # fmt: skip
    return line


def pairs(source: str | Path) -> list[dict[str, Any]]:
    """Clips as {"first", "last", "prompt"}, from a file or a folder; see `parser`.

    Raises:
      ValueError: nothing there, or a line or pair that is not whole; one line.
    """
    path = Path(source)
    found = _folder(path) if path.is_dir() else _lines(path)
    if not found:
        raise ValueError(f"clips {path}: there are none; give NAME{FIRST}png with NAME{LAST}png, or lines of JSON")
    return found


def _folder(path: Path) -> list[dict[str, Any]]:
    found = []
    for first in sorted(one for one in path.iterdir() if FIRST in one.name):
        name, _, kind = first.name.rpartition(FIRST)
        last, text = path / f"{name}{LAST}{kind}", path / f"{name}.txt"
        if not last.is_file():
            raise ValueError(f"clips {path}: {first.name} has no {last.name}; give both keyframes")
        prompt = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        found.append({"first": first, "last": last, "prompt": prompt})
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except ValueError:
            one = None
        if not isinstance(one, dict) or not all(isinstance(one.get(name), str) for name in ("first", "last")):
            raise ValueError(
                f'clips {path}, line {number}: give {{"first": "a.png", "last": "b.png", "prompt": "..."}}'
            )
        ends = {name: path.parent / one[name] for name in ("first", "last")}
        found.append(ends | {"prompt": one.get("prompt", "")})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 1 for a failed run, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    # Here, as they take a second: not for --help or a mistyped option.
    import jax

    from samplers import cache, calibrate, pipeline
    from samplers.memory import check
    from samplers.pipeline import Inputs
    from samplers.plan import Plan, Settings, check_seed, check_settings
    from wanjax import checkpoint, keyframes, streaming, writing

    try:
        cache.enable()
        folder = checkpoint.open_folder(args.model)
        config = streaming.with_stream(folder.config) if args.memory == "stream" else folder.config
        names = ("method", "solver", "size", "frames", "steps", "guidance", "skip_in_kab")
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        settings = Settings.of(config, **given)
        check_settings(config, settings)
        check_seed(args.seed)
        check(config, settings, policy=args.memory)
        plan = Plan.of(config, settings)
        calibrate.number(plan, args.share)
        clips = pairs(args.clips)
        images = [[keyframes.read(one[end], settings.matte) for end in ("first", "last")] for one in clips]
        inputs = [Inputs.prepare([pair], plan) for pair in images]
        out = writing.absolute(args.out)
        writing.check([writing.Target(out)], overwrite=True)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted; nothing was written")
    except (ValueError, OSError) as error:
        return _fail(BAD_INPUT, error)
    try:
        model = checkpoint.load(folder, policy=args.memory)
        encoded = pipeline.encode(model, plan, inputs, [[one["prompt"]] for one in clips])
        noise = [pipeline.noise(plan, [args.seed + i]) for i in range(len(clips))]
        found, tried = calibrate.find(model, plan, args.share, list(zip(encoded, noise, strict=True)))
        writing.write_json(out, found.report(), overwrite=True)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted; nothing was written")
    except (ValueError, FloatingPointError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        return _fail(FAILED, error)
    for steps, distance in sorted(tried.items(), key=lambda item: item[1]):
        print(f"{distance:.2%} from the whole run: steps {', '.join(map(str, steps))}")
    print(f"{out}  (use it by --skip-passes {out})")
    return 0


def _fail(code: int, error: Any) -> int:
    print(f"error: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
    return code
