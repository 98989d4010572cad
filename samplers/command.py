"""The command line of `python -m samplers.inbetween`. No logic lives here."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from samplers import flags, plan, plan_command, schedule, solvers
from wanjax import config, kab, method, rope
from wanjax.guidance import MODES

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

RENAMED: MappingProxyType[str, str] = MappingProxyType(
    {"--grid": "--schedule", "--beta-end": "--strength-end", "--beta-mid": "--strength-mid", "--kab-eps": "--kab-floor"}
)
"""Options by the names that they had; still understood."""


def parser() -> argparse.ArgumentParser:
    """The command line, options in groups."""
    p = argparse.ArgumentParser(
        prog="python -m samplers.inbetween",
        description="Make the video between a first and a last keyframe.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without --first and --last the bundled example is made with the bundled tiny model.\n"
        "Defaults that depend on the model:\n" + _model_defaults(),
    )
    keyframes = p.add_argument_group("keyframes and text")
    keyframes.add_argument(
        "--first", metavar="IMAGE", help="first keyframe, any image file, or VIDEO@N for a frame (default: the example)"
    )
    keyframes.add_argument("--last", metavar="IMAGE", help="last keyframe, the same; VIDEO@-1 is the last frame")
    keyframes.add_argument("--prompt", help="what happens between them (default: empty, or the example's)")
    keyframes.add_argument("--negative-prompt", help="what guidance steers away from (default: the model's)")
    keyframes.add_argument(
        "--fit",
        choices=plan.FITS,
        default="stretch",
        help="how keyframes of another size are brought to --size (default: %(default)s)",
    )
    keyframes.add_argument(
        "--resample", choices=plan.RESAMPLES, help="filter of that (default: bicubic, as Wan2.1; diffusers: lanczos)"
    )
    keyframes.add_argument(
        "--clip-fit",
        choices=plan.CLIP_FITS,
        help="how the vision tower's square is made (default: stretch, as Wan2.1; diffusers: crop)",
    )
    keyframes.add_argument(
        "--matte",
        type=_colour,
        default=(0, 0, 0),
        metavar="R,G,B",
        help="colour under transparent keyframes and around --fit pad (default: 0,0,0)",
    )

    clip = p.add_argument_group("clip")
    clip.add_argument("--frames", type=int, metavar="N", help="4n+1, such as 25, 33, 65, 81 (default: the model's)")
    clip.add_argument(
        "--size",
        type=_size,
        metavar="HxW",
        help="height x width in pixels, or 'auto' for the first keyframe's aspect at the model's "
        "area (default: the model's)",
    )
    clip.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")

    sampling = p.add_argument_group("sampling")
    sampling.add_argument(
        "--preset",
        choices=tuple(plan.PRESETS),
        help="settings that belong together; options given beside it win: "
        + "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in own.items())}" for name, own in plan.PRESETS.items()),
    )
    sampling.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    sampling.add_argument("--guidance", type=float, help="guidance scale; 1 switches it off (default: the model's)")
    sampling.add_argument("--shift", type=float, help="timestep shift (default: the model's)")
    sampling.add_argument("--solver", choices=solvers.SOLVERS, help="(default: the model's)")
    sampling.add_argument("--schedule", choices=tuple(schedule.SCHEDULES), help="of sigmas (default: wan)")
    sampling.add_argument(
        "--timesteps", choices=schedule.ROUNDINGS, help="what the model is told (default: exact; Wan2.1: truncated)"
    )
    sampling.add_argument(
        "--guidance-interval", type=_span(float), metavar="A-B", help="guide where A <= step / steps < B (0-1)"
    )
    sampling.add_argument(
        "--guidance-mode",
        choices=MODES,
        default=MODES[0],
        help="both passes in turn or as one batch of two (default: %(default)s)",
    )
    sampling.add_argument(
        "--skip-passes", type=_skip, metavar="SHARE|auto|FILE",
        help="guess a share of the steps' passes (0-0.6) instead of running them, spread evenly; or those of a FILE of "
        "python -m samplers.calibrate; auto: of skip.json in the model's folder (default: 0)",
    )  # fmt: skip
    sampling.add_argument("--skip-in-kab", action=argparse.BooleanOptionalAction, help="also where KAB acts (yes)")
    _add_method(p)
    _add_model_and_output(p)
    return p


def _add_method(p: argparse.ArgumentParser) -> None:
    """The group of KAB, isolation and ReTRo; every option is a single change of --method."""
    group = p.add_argument_group(
        "method", "How attention differs from Wan2.1's. The options below change single settings of --method."
    )
    add = group.add_argument
    add(
        "--method",
        choices=tuple(method.METHODS),
        default="wan",
        help="wan: no change; paper: isolated branches, KAB, ReTRo by frequency; release: the paper's code, the "
        "same with ReTRo by magnitude (default: %(default)s)",
    )
    switch = argparse.BooleanOptionalAction
    add("--isolation", action=switch, help="a softmax each for text, first and last keyframe")
    add("--branch-weights", type=_numbers, metavar="T,F,L", help="of isolated branches (1,1,1)")
    add("--kab", action=switch, help="bias middle frames' cross-attention towards the keyframes'")
    add("--kab-layers", type=_span(int), metavar="A-B", help="from 0 (5-12 of 40, other depths in proportion)")
    add("--kab-steps", type=_span(float), metavar="A-B", help="active where A < step / steps <= B (0-0.4)")
    add("--strength-end", type=float, help="strength near the keyframes (0.7)")
    add("--strength-mid", type=float, help="strength half-way (0.3)")
    add("--kab-floor", type=float, help="attention below it counts as it (0.0005)")
    curves = ", ".join(kab.CURVES)
    add(
        "--anchor-curve", type=_curve, metavar="CURVE", help=f"{curves}, or a number a latent frame: 0,0.2,... (linear)"
    )
    add("--retro", action=switch, help="rescale the temporal rotary embedding")
    add("--retro-mode", choices=rope.MODES, help="what the scale does")
    add("--s-edge", type=float, help="scale near the keyframes (1.06)")
    add("--s-mid", type=float, help="scale between them (0.94)")
    add("--w-edge", type=float, help="edge width in pixel frames (8 of 81, other lengths in proportion)")
    add("--retro-smooth", type=int, metavar="N", help="half width of the smoothing in latent frames (2)")
    add("--explain", metavar="DIR", help="also write plots of scale, strength and attention there (needs matplotlib)")
    add("--explain-layer", type=int, metavar="L", help="whose attention (the middle of KAB's window)")
    add("--explain-step", type=int, metavar="K", help="from 0 (the first of KAB's window)")


def _add_model_and_output(p: argparse.ArgumentParser) -> None:
    """The two groups that say where to compute and where to write."""
    model = p.add_argument_group("model and devices")
    model.add_argument(
        "--model",
        default="tiny",
        metavar="tiny|PATH",
        help="the bundled tiny model or a model folder (default: %(default)s)",
    )
    model.add_argument("--dtype", choices=("float32", "bfloat16"), help="precision policy (default: the model's)")
    model.add_argument(
        "--devices",
        type=_devices,
        metavar="N",
        help="how many devices share the work, or 'all' (default: one)",
    )
    model.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,NUMBER,COUNT",
        help="share the work with other hosts, on each of which the same command runs; without a value JAX finds them "
        "(TPU pods, SLURM, Open MPI), else: address of host 0, this host's number from 0, how many. Host 0 writes; "
        "--devices is all of theirs",
    )
    model.add_argument(
        "--mesh",
        type=_mesh,
        default={},
        metavar="AXIS=N,...",
        help="instead of --devices, by hand: devices along data, fsdp, sequence, tensor",
    )

    for name in ("memory", "weights", "vae-memory"):
        model.add_argument(f"--{name}", **plan_command.OPTIONS[name])

    output = p.add_argument_group("output")
    output.add_argument(
        "--out",
        default="inbetween.mp4",
        metavar="FILE",
        help="mp4, webm, gif, webp, or a name without suffix for a folder of PNG frames; a contact "
        "sheet and a JSON of all settings go beside it (default: %(default)s)",
    )
    output.add_argument("--fps", type=float, help="frames per second (default: the model's)")
    output.add_argument(
        "--scale",
        type=int,
        metavar="N",
        help="enlarge N times, nearest neighbour (default: until the shorter side has 256 pixels)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    model.add_argument(
        "--compile-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR",
    )
    output.add_argument("--quiet", action="store_true", help="no progress bar")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 1 for a failed run, 130 after Ctrl-C, SIGTERM."""
    p = parser()
    options = vars(p.parse_args(renamed(sys.argv[1:] if arguments is None else arguments)))
    progress = not options.pop("quiet")
    note = flags.settle(distributed=options["distributed"] is not None)
    # Here, as they take a second: not for --help or a mistyped option.
    from samplers import cache, files
    from wanjax import hosts
    from wanjax.writing import terminate_as_interrupt

    with terminate_as_interrupt(), hosts.Company(p.prog) as company:
        try:
            if (where := options.pop("distributed")) is not None:
                company.join(where)
                options["devices"] = "all" if options["devices"] is None and not options["mesh"] else options["devices"]
            place = cache.enable() if options.pop("compile_cache") else None
            programs = None if place is None else cache.programs(place)
            options["method"] = _method(options)
            _check_devices()
            if (options["first"] is None) != (options["last"] is None):
                raise ValueError("keyframes: give both --first and --last, or neither for the bundled example")
            if options["first"] is None:
                example = files.example()
                options |= {"first": example["first"], "last": example["last"]}
                options["prompt"] = example["prompt"] if options["prompt"] is None else options["prompt"]
            job = files.prepare(**options)
            company.agree("keyframes, settings, model or versions", job.digest)
        except KeyboardInterrupt:
            return company.fail(INTERRUPTED, "interrupted; nothing was written")
        except (ValueError, OSError) as error:
            return company.fail(BAD_INPUT, error)
        for line in (*job.notes, *([note] if note else [])) if hosts.is_first() else ():
            print(f"note: {line}", file=sys.stderr)
        return _make(company, job, progress and hosts.is_first(), programs)


def renamed(arguments: Sequence[str]) -> list[str]:
    """Arguments with today's names of options, for `parse_args`."""
    split = ((name, sign, value) for name, sign, value in (argument.partition("=") for argument in arguments))
    return ["".join((RENAMED.get(name, name), sign, value)) for name, sign, value in split]


def _make(company: Any, job: Any, progress: bool, programs: Path | None) -> int:
    """Runs a checked job, of several `hosts.Company` together; returns the exit code."""
    import jax

    from samplers import files
    from wanjax import hosts
    from wanjax.tokenizer import PromptCut

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptCut)  # said above, in one line
            report = files.make(job, progress, programs)
        company.done()
    except KeyboardInterrupt:
        return company.fail(INTERRUPTED, "interrupted; nothing was written under the final name")
    except (ValueError, FloatingPointError, OSError) as error:
        return company.fail(FAILED, error)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).splitlines() or ["out of memory"])[0]
        mend = "if memory ran out, try --memory stage or stream, --weights int8, a smaller size, or bfloat16"
        return company.fail(FAILED, f"{reason}; {mend}")
    if not hosts.is_first():
        return 0
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report["seconds"].items())
    _say(f"{job.outputs.video}  ({seconds})\n{job.outputs.sheet}\n{job.outputs.settings}")
    return 0


def _say(text: str) -> None:
    """Prints to whoever still listens: the files are written, and a closed pipe changes nothing of that."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at the end


def _check_devices() -> None:
    """Raises ValueError, in one line, where JAX has none of the platforms that were asked for."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter of a platform whose library finds no device
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"devices: JAX has none of JAX_PLATFORMS={asked}{reason and f' ({reason})'}; install wanjax[cuda12], "
            "[cuda13] or [tpu] on such a machine, or unset JAX_PLATFORMS"
        ) from error


def _method(options: dict[str, Any]) -> method.Method:
    """Takes the method's options out of `options` and makes one value of them."""
    switches = {name: options.pop(name) for name in ("isolation", "kab", "retro")}
    overrides = {name: options.pop(name) for name in method.OVERRIDES}
    return method.override(method.named(options["method"]), overrides, **switches)


def _model_defaults() -> str:
    lines = []
    for name in config.PRESETS:
        d = config.preset(name).sampling
        height, width = d.size
        lines.append(f"  {name}: {d.frames} frames, {height}x{width}, {d.steps} steps, "
                     f"guidance {d.guidance:g}, shift {d.shift:g}, {d.solver}, {d.fps} fps")  # fmt: skip
    return "\n".join(lines)


def _size(text: str) -> tuple[int, int] | str:
    if text == "auto":
        return text
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 480x864") from error
    return height, width


def _colour(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= value <= 255 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not R,G,B with numbers from 0 to 255")
    return values


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,0.5,1") from error


def _curve(text: str) -> str | tuple[float, ...]:
    return text if text in kab.CURVES or "," not in text else _numbers(text)


def _span(kind: type) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        try:
            low, high = (kind(part) for part in text.split("-"))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not A-B, such as 5-12 or 0-0.4") from error
        return low, high

    return parse


def _skip(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _mesh(text: str) -> dict[str, int]:
    try:
        return {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not AXIS=N,..., such as data=2,sequence=4") from error


def _devices(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or 'all'") from error
