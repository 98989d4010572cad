"""The options of `python -m samplers.inbetween`: what may stand on its command line, and in a line of its jobs."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

from samplers import plan, plan_command, schedule, solvers
from samplers.resume import EVERY
from wanjax import config, kab, method, rope
from wanjax.guidance import MODES

MOST_SEEDS = 1000

RENAMED: MappingProxyType[str, str] = MappingProxyType(
    {"--grid": "--schedule", "--beta-end": "--strength-end", "--beta-mid": "--strength-mid", "--kab-eps": "--kab-floor"}
)
"""Options by the names that they had; still understood."""


class Parser(argparse.ArgumentParser):
    """The command line's, whose errors are one line; as that of a line of jobs it raises ValueError instead."""

    raises = False

    def error(self, message: str) -> NoReturn:
        """Ends with the message, or raises it."""
        if self.raises:
            raise ValueError(message)
        self.exit(2, f"{self.prog}: error: {message}\n")  # argparse would show sixty lines of usage before it


def parser() -> Parser:
    """The command line, options in groups."""
    p = Parser(
        prog="python -m samplers.inbetween",
        description="Make the video between keyframes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without any keyframe the bundled example is made with the bundled tiny model.\n"
        "Defaults that depend on the model:\n" + _model_defaults(),
    )
    keyframes = p.add_argument_group("keyframes and text")
    keyframes.add_argument(
        "--first", metavar="IMAGE", help="first keyframe, any image file, or VIDEO@N for a frame (default: the example)"
    )
    keyframes.add_argument("--last", metavar="IMAGE", help="last keyframe, the same; VIDEO@-1 is the last frame")
    keyframes.add_argument(
        "--keyframe",
        action="append",
        type=_keyframe,
        metavar="IMAGE@FRAME",
        help="another in pixel frame FRAME of the clip, -1 the last; may be given often, also without --first, --last",
    )
    keyframes.add_argument("--loop", action="store_true", help="the first keyframe is the last one too")
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

    _add_clip_and_sampling(p)
    _add_method(p)
    _add_model_and_output(p)
    _add_several(p)
    return p


def _add_clip_and_sampling(p: argparse.ArgumentParser) -> None:
    """The two groups of settings of a run."""
    clip = p.add_argument_group("clip")
    clip.add_argument(
        "--frames",
        type=int,
        nargs="+",
        metavar="N",
        help="4n+1, such as 25, 33, 65, 81; of a storyboard one for each clip (default: the model's)",
    )
    clip.add_argument(
        "--size",
        type=_size,
        metavar="HxW",
        help="height x width in pixels, or 'auto' for the first keyframe's aspect at the model's "
        "area (default: the model's)",
    )
    clip.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    clip.add_argument(
        "--seeds", type=_seeds, metavar="A-B|A,B,...", help="a variant of the clip for each, and a sheet of all"
    )
    clip.add_argument("--count", type=int, metavar="N", help="as --seeds, from --seed on")

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
        "--guidance-interval", type=_share_span, metavar="A-B", help="guide where A <= step / steps < B (0-1)"
    )
    sampling.add_argument(
        "--guidance-mode",
        choices=MODES,
        default=MODES[0],
        help="both passes in turn or as one batch of two (default: %(default)s)",
    )
    sampling.add_argument(
        "--skip-passes",
        type=_skip,
        metavar="SHARE|auto|FILE",
        help="guess a share of the steps' passes (0-0.6) instead of running them, spread evenly; or those of a FILE of "
        "python -m samplers.calibrate; auto: of skip.json in the model's folder (default: 0)",
    )
    sampling.add_argument("--skip-in-kab", action=argparse.BooleanOptionalAction, help="also where KAB acts (yes)")


def _add_several(p: argparse.ArgumentParser) -> None:
    """The group of what is made from files other than keyframes."""
    group = p.add_argument_group("many clips, and clips again")
    group.add_argument(
        "--jobs",
        metavar="FILE",
        help="a clip for each line of a .jsonl or .csv file, whose fields are these options; those given beside it "
        "hold for every line that does not say otherwise. Finished clips are left alone when it is run again",
    )
    group.add_argument(
        "--from",
        dest="recalled",
        metavar="FILE",
        help="the settings of an earlier clip, from its JSON, mp4, webm, gif, webp or PNG; options given beside it win",
    )
    group.add_argument(
        "--storyboard",
        nargs="+",
        metavar="IMAGE",
        help="a film of clips between neighbours of these keyframes; --prompts and --frames give one for each clip",
    )
    group.add_argument("--prompts", nargs="+", metavar="TEXT", help="of a storyboard's clips, one for each or for all")
    group.add_argument(
        "--overlap",
        type=int,
        metavar="N",
        help="frames that a storyboard's clips go on beyond a keyframe that they share, blended with the other clip's, "
        "so that motion does not stop there; a multiple of 4 (default: 0)",
    )
    group.add_argument("--decode", metavar="FILE", help="only decode latents that --keep-latents wrote")


def _add_method(p: argparse.ArgumentParser) -> None:
    """The group of KAB, isolation and ReTRo; every option is a single change of --method."""
    group = p.add_argument_group(
        "method", "How attention differs from Wan2.1's. The options below change single settings of --method."
    )
    add = group.add_argument
    add(
        "--method",
        choices=(*method.METHODS, "auto"),
        default="wan",
        help="wan: no change; paper: isolated branches, KAB, ReTRo by frequency; release: the paper's code, the "
        "same with ReTRo by magnitude; auto: of a handful the one that agrees best with the keyframes in short tries "
        "(docs/method.md says what that is worth) (default: %(default)s)",
    )
    switch = argparse.BooleanOptionalAction
    add("--isolation", action=switch, help="a softmax each for text, first and last keyframe")
    add("--branch-weights", type=_numbers, metavar="T,F,L", help="of isolated branches (1,1,1)")
    add("--kab", action=switch, help="bias middle frames' cross-attention towards the keyframes'")
    add("--kab-layers", type=_whole_span, metavar="A-B", help="from 0 (5-12 of 40, other depths in proportion)")
    add("--kab-steps", type=_share_span, metavar="A-B", help="active where A < step / steps <= B (0-0.4)")
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
        type=device_count,
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
        type=mesh_axes,
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
    output.add_argument("--keep-latents", action="store_true", help="write the latents beside the video, for --decode")
    output.add_argument(
        "--save-every",
        type=int,
        metavar="K",
        help="what is computed is kept beside the output every K steps, so that the same command goes on after it was "
        f"stopped (default: {EVERY}); 0 keeps nothing",
    )
    output.add_argument("--restart", action="store_true", help="throw away what a stopped run kept, and begin anew")
    output.add_argument(
        "--preview-every", type=int, metavar="K", help="write a small picture of the clip beside it every K steps"
    )
    model.add_argument(
        "--compile-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR",
    )
    output.add_argument("--quiet", action="store_true", help="no progress bar")


def renamed(arguments: Sequence[str]) -> list[str]:
    """Arguments with today's names of options, for `parse_args`."""
    split = ((name, sign, value) for name, sign, value in (argument.partition("=") for argument in arguments))
    return ["".join((RENAMED.get(name, name), sign, value)) for name, sign, value in split]


def argument(p: Parser, name: str, value: Any) -> list[str]:
    """A field of a line of jobs as arguments of the command line.

    Args:
      name: of the option, with underscores.
      value: text, a number, true or false, or a list of them where the option takes several.

    Raises:
      ValueError: no such option, or a value that none can have.
    """
    option = f"--{name.replace('_', '-')}"
    action = p._option_string_actions.get(RENAMED.get(option, option))  # argparse has no public way to ask
    if action is None:
        raise ValueError(f"{name}: no such option; python -m samplers.inbetween --help names them")
    if action.nargs == 0:
        told = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        chosen = value if isinstance(value, bool) else told.get(str(value).strip().lower())
        if chosen is None:
            raise ValueError(f"{name} {value!r}: give true or false")
        if chosen:
            return [option]
        return [f"--no-{option[2:]}"] if f"--no-{option[2:]}" in action.option_strings else []
    if action.nargs == "+":
        return [option, *map(str, value if isinstance(value, list) else [value])]
    if isinstance(value, list) and isinstance(action, argparse._AppendAction):
        return [f"{option}={one}" for one in value]
    if isinstance(value, list) and action.type in (None, int, float):
        raise ValueError(f"{name} {value!r}: give one value, not a list")
    if isinstance(value, list):
        return [f"{option}={JOINED.get(action.type, ',').join(map(str, value))}"]
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"{name} {value!r}: give text, a number or a list of them")
    return [f"{option}={value}"]


def method_of(options: dict[str, Any]) -> method.Method | str:
    """Takes the method's options out of `options` and makes one value of them."""
    switches = {name: options.pop(name) for name in ("isolation", "kab", "retro")}
    overrides = {name: options.pop(name) for name in method.OVERRIDES}
    base = options["method"]  # a name, or the whole of an earlier clip's
    if base == "auto":
        if any(value is not None for value in (*switches.values(), *overrides.values())):
            raise ValueError("--method auto: chooses all settings of the method; leave the others away")
        return base
    return method.override(method.named(base) if isinstance(base, str) else base, overrides, **switches)


def _model_defaults() -> str:
    lines = []
    for name in config.PRESETS:
        d = config.preset(name).sampling
        height, width = d.size
        lines.append(f"  {name}: {d.frames} frames, {height}x{width}, {d.steps} steps, "
                     f"guidance {d.guidance:g}, shift {d.shift:g}, {d.solver}, {d.fps} fps")  # fmt: skip
    return "\n".join(lines)


def _keyframe(text: str) -> tuple[str, int]:
    path, _, place = text.rpartition("@")
    try:
        return path, int(place)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not IMAGE@FRAME, such as middle.png@12") from error


def _seeds(text: str) -> tuple[int, ...]:
    try:
        if "-" in text:
            low, high = (int(part) for part in text.split("-"))
            if high - low > MOST_SEEDS:
                raise argparse.ArgumentTypeError(f"{text!r}: more than {MOST_SEEDS} seeds; give fewer")
            seeds = tuple(range(low, high + 1))
        else:
            seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len({*seeds}) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} is not A-B or A,B,... with different seeds, such as 0-3 or 5,8")
    return seeds


def _size(text: str) -> tuple[int, int] | str:
    return text if text == "auto" else plan_command.size(text)


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


def _span(text: str, kind: type) -> tuple:
    try:
        low, high = (kind(part) for part in text.split("-"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not A-B, such as 5-12 or 0-0.4") from error
    return low, high


_whole_span, _share_span = partial(_span, kind=int), partial(_span, kind=float)


def _skip(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def mesh_axes(text: str) -> dict[str, int]:
    """The value of --mesh: axis -> devices. argparse.ArgumentTypeError: no such text."""
    try:
        return {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not AXIS=N,..., such as data=2,sequence=4") from error


def device_count(text: str) -> int | str:
    """The value of --devices: a number or "all". argparse.ArgumentTypeError: neither."""
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or 'all'") from error


JOINED: MappingProxyType[Callable[[str], Any] | None, str] = MappingProxyType(
    {_size: "x", _whole_span: "-", _share_span: "-"}
)
"""What stands between the values of an option that takes several, by its type; a comma between others."""
