"""From options to what `request.prepare` takes: the settings of an earlier clip, the example, the seeds of variants."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samplers import plan
from samplers.options import Parser, method_of, renamed
from samplers.video import SUFFIXES
from wanjax import keyframes

MODES = ("jobs", "decode", "storyboard")
_DECODING = ("out", "model", "dtype", "fps", "scale", "overwrite", "vae_memory")
_OF_A_CLIP = ("explain", "keep_latents", "preview_every")
_ELSEWHERE = (*MODES, "seeds", "count", "loop", "keyframe", "distributed", "compile_cache", "quiet",
              "prompts", "overlap")  # fmt: skip
"""Options that `prepare` does not take."""


def parse(p: Parser, arguments: Sequence[str], of_a_list: bool = False) -> dict[str, Any]:
    """Options, those of an earlier clip (--from) in the place of the defaults.

    Args:
      of_a_list: whether they are one clip's of the list that --jobs among them names.

    Raises:
      ValueError: a file that tells no settings, options that cannot stand together; of a parser that raises, also a bad
        option.
    """
    arguments = renamed(arguments)
    alone = {"jobs": None} if of_a_list else {}
    options = vars(p.parse_args(arguments)) | alone
    check_modes(options)
    if options["recalled"] is None:
        return options
    found = _without_given(earlier(options["recalled"], options["preset"]), options)
    before = {name: p.get_default(name) for name in found}
    p.set_defaults(**found)
    try:
        options = vars(p.parse_args(arguments)) | alone
    finally:
        p.set_defaults(**before)
    check_modes(options, whole=True)
    return options


def _without_given(found: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Options of an earlier clip without the keyframes in whose place others are given."""
    if options["storyboard"] is not None:
        return found | {"first": None, "last": None, "keyframe": None, "prompt": None}
    frames = (options["frames"] or found["frames"])[0]
    given = {place % frames for _, place in options["keyframe"] or ()}
    inner = [(path, place) for path, place in found["keyframe"] or () if place % frames not in given]
    found = found | {"keyframe": inner or None}
    if 0 in given:
        found["first"] = None
    if frames - 1 in given or options["loop"]:
        found["last"] = None
    return found


def earlier(path: str | Path, preset: str | None = None) -> dict[str, Any]:
    """Options of a clip that was made before, from its JSON report or from the media file itself.

    Args:
      preset: whose settings are left to it.

    Raises:
      ValueError: not such a file; one line.
    """
    from samplers import recall

    found = recall.read(path)
    own = dict(vars(found.settings))
    own["frames"] = [own["frames"]]
    for name in plan.PRESETS[preset] if preset else ():
        own.pop(name)
    last = own["frames"][0] - 1
    ends = (0, last) if len(found.keyframes) == 2 else (0,)  # of reports from before keyframes had places
    images = [(str(_beside(one.path, Path(path))), end if one.frame is None else one.frame)
              for one, end in zip(found.keyframes, [*ends, *[last] * len(found.keyframes)], strict=False)
              if one.path is not None]  # fmt: skip
    ends = {{0: "first", last: "last"}[place]: image for image, place in images if place in (0, last)}
    inner = [(image, place) for image, place in images if place not in (0, last)]
    own |= {"first": ends.get("first"), "last": ends.get("last"), "keyframe": inner or None}
    own |= {name: value for name, value in (("fps", found.fps), ("scale", found.scale)) if value is not None}
    if found.storyboard is not None:
        own |= {"first": None, "last": None, "prompt": None, "keyframe": None} | _board(found.storyboard, Path(path))
    source = found.source or (found.model if found.model == "tiny" else None)
    return own | ({} if source is None else {"model": source})


def _board(told: dict[str, Any], path: Path) -> dict[str, Any]:
    """Options of the film that a report tells of."""
    clips = told["clips"]
    return {"storyboard": [str(_beside(image, path)) for image in told["images"]], "overlap": told["overlap"],
            "seed": clips[0]["seed"], "prompts": [clip["prompt"] for clip in clips],
            "frames": [clip["frames"] for clip in clips]}  # fmt: skip


def _beside(image: str, told: Path) -> Path:
    """A keyframe's path as a report has it, or beside the report where it lies there alone."""
    path = Path(image)
    moved = told.parent / path.name
    return moved if not keyframes.split(path)[0].exists() and keyframes.split(moved)[0].exists() else path


def one(options: dict[str, Any]) -> dict[str, Any]:
    """What `request.prepare` takes, of one clip.

    Raises:
      ValueError: a keyframe twice, --loop without one, or settings of the method that it refuses.
    """
    from samplers import files

    given = {name: value for name, value in options.items() if name not in _ELSEWHERE}
    more = options["keyframe"] or []
    places = [place for _, place in more]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"keyframe @{twice}: given twice; give each place once")
    given["keyframes"] = {place: path for path, place in more}
    if options["loop"]:
        if given["first"] is None or given["last"] is not None:
            raise ValueError("--loop: makes the first keyframe the last one too; give --first and no --last")
        given["last"] = given["first"]
    none = given["first"] is None and given["last"] is None and not more
    if none and options["recalled"] is not None:
        raise ValueError(f"{options['recalled']}: tells the settings and not where the keyframes are; give them too, "
                         "as --first and --last")  # fmt: skip
    if none:
        example = files.example()
        given |= {"first": example["first"], "last": example["last"]}
        given["prompt"] = example["prompt"] if given["prompt"] is None else given["prompt"]
    elif not more and (given["first"] is None) != (given["last"] is None):
        raise ValueError("keyframes: give both --first and --last, or one of them as --keyframe IMAGE@FRAME if nothing "
                         "else is known of the clip")  # fmt: skip
    given["method"] = method_of(given)
    given["frames"] = options["frames"] and options["frames"][0]
    return given


def board(options: dict[str, Any]) -> dict[str, Any]:
    """What `storyboard.prepare` takes."""
    unknown = (*_OF_A_CLIP, "explain_layer", "explain_step", "first", "last", "prompt", "storyboard", "recalled")
    given = {name: value for name, value in options.items() if name not in (*_ELSEWHERE, *unknown)}
    more = {"prompts": options["prompts"], "overlap": options["overlap"] or 0}
    return given | more | {"images": options["storyboard"], "method": method_of(given)}


def check_modes(options: dict[str, Any], whole: bool = False) -> None:
    """ValueError for options that cannot stand together.

    Args:
      whole: whether those of an earlier clip are in their places already.
    """
    whole = whole or options["recalled"] is None
    modes = [name for name in MODES if options[name] is not None]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]}: give one of them")
    alone = [name for name in ("prompts", "overlap") if options[name] is not None and options["storyboard"] is None]
    if alone and whole:
        raise ValueError(f"--{alone[0]}: belongs to --storyboard; give its images")
    if options["storyboard"] is None and len(options["frames"] or ()) > 1 and whole:
        raise ValueError("--frames: several belong to --storyboard; give one number")
    for name in ("first", "last", "keyframe", "loop", "prompt", "seeds", "count", *_OF_A_CLIP):
        if options["storyboard"] is not None and options[name]:
            raise ValueError(f"--storyboard: --{name.replace('_', '-')} is of a single clip; leave it away")
    anew = ("first", "last", "keyframe", "prompt", "recalled", "seeds", "count", "explain")
    given = [name for name in anew if options[name]]
    if options["decode"] is not None and options["distributed"] is not None:
        raise ValueError("--decode: is the work of one host; leave --distributed away")
    if options["decode"] is not None and given:
        name = "from" if given[0] == "recalled" else given[0]
        raise ValueError(f"--decode: makes nothing anew; leave --{name} away")


def decoding(options: dict[str, Any]) -> dict[str, Any]:
    """What `latents.prepare` takes."""
    return {name: options[name] for name in _DECODING}


def variants(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of each variant: one for every seed, its name in the output's; `options` alone where none is asked
    for.

    Raises:
      ValueError: seeds and a count, or a count of none.
    """
    seeds, count = options["seeds"], options["count"]
    if seeds is None and count is None:
        return [options]
    if seeds is not None and count is not None:
        raise ValueError("seeds and count: the seeds say already how many; give one of them")
    if seeds is None:
        if not 1 <= count <= 1000:
            raise ValueError(f"count {count}: give a whole number from 1 to 1000")
        seeds = range(options["seed"], options["seed"] + count)
    return [options | {"seed": seed, "seeds": None, "count": None} |
            {name: options[name] and named(options[name], f"-seed{seed}") for name in ("out", "explain")}
            for seed in seeds]  # fmt: skip


def named(out: str | Path, what: str) -> str:
    """An output's name with something added before its suffix."""
    path = Path(out)
    known = path.suffix.lower() in SUFFIXES
    return str(path.with_name(f"{path.stem if known else path.name}{what}{path.suffix if known else ''}"))
