"""VBench, which is run by its own package in an environment of its own: what goes in, and what comes back.

`pip install vbench` (0.1.5) asks for numpy below 2 and an old transformers, so it cannot live with this project, and it
needs a CUDA device. Here are the folder and the commands of its "custom_input" mode, which takes any videos and
measures them in six dimensions, and the reader of the JSON files that it leaves. The dimensions are reported one by
one: they have different units, and a mean of them is nobody's measure. Upstream's rule is for videos below 5 seconds;
it sends longer ones to its VBench-Long.

    vbench.lay_out({"clip-1": Path("clip-1.mp4")}, folder)
    for command in vbench.commands(folder, results): print(shlex.join(command))

Sources: the README, `vbench/cli/evaluate.py`, `vbench/__init__.py` and the dimensions' files of Vchitect/VBench, and
its issues 19 and 28 for numbers in the results.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""What upstream supports for videos and prompts of one's own."""

SUFFIX = ".mp4"
"""The one kind of video file that all six dimensions read. Upstream passes over subfolders and over most other files
without a word, but takes in pictures, and a GIF, at which dynamic_degree stops."""

RESULTS = "_eval_results.json"

PER_VIDEO = MappingProxyType({"imaging_quality": 0.01})
"""Factor that brings a video's own number to the scale of the mean: upstream divides that of this dimension by 100."""

HIGHEST = 1.001
"""Of every number, brought to that scale: all dimensions end at 1, but for rounding of cosines. Older releases wrote
sums over frames for the consistency of a video, and imaging quality up to 100; no file says which release made it."""

Results = dict[str, dict[str, Any]]
"""dimension -> {"mean": float, "videos": {file name: float}}."""


def lay_out(videos: Mapping[str, Path], folder: Path) -> None:
    """Puts videos into one flat folder, as upstream reads it.

    Args:
      videos: name without suffix -> file. The name becomes the file's name and, without a "-NUMBER" at its end,
        upstream's prompt, which none of the six dimensions uses.
      folder: made if it is not there; must be empty, as upstream measures whatever it finds.

    Raises:
      ValueError: no videos, a missing one, a name with a separator in it, another suffix than ".mp4", or a folder
        with files.
    """
    if not videos:
        raise ValueError("no videos for VBench")
    for name, file in videos.items():
        if not name or PurePosixPath(name).name != name:
            raise ValueError(f"{name!r}: a name of a video must not lead out of the folder")
        if file.suffix.lower() != SUFFIX:
            raise ValueError(f"{file}: VBench measures {SUFFIX} files in all of its dimensions, and no others")
        if not file.is_file():
            raise ValueError(f"{file}: no such video")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files already, and VBench measures all it finds; name an empty folder")
    for name, file in videos.items():
        shutil.copyfile(file, folder / f"{name}{SUFFIX}")


def commands(videos: Path, results: Path, dimensions: Sequence[str] = DIMENSIONS) -> list[list[str]]:
    """The command lines to run in upstream's environment, one for each dimension.

    Args:
      videos: the folder of `lay_out`.
      results: folder for upstream's JSON files, one for each dimension; `read` takes it as it is.

    Raises:
      ValueError: a dimension that needs upstream's own prompts, or a path that upstream's shell would take apart.
    """
    if odd := [name for name in dimensions if name not in DIMENSIONS]:
        raise ValueError(f"{', '.join(odd)}: not for videos of one's own; VBench has {', '.join(DIMENSIONS)}")
    for path in (videos, results):
        # Upstream joins its arguments with spaces and gives the line to a shell.
        if not re.fullmatch(r"[\w./+@%,:=-]+", os.fspath(path), re.ASCII):
            raise ValueError(f"{str(path)!r}: VBench passes paths through a shell; use letters, digits and ._-/ only")
    fixed = ["--videos_path", os.fspath(videos), "--mode", "custom_input", "--output_path", os.fspath(results)]
    return [["vbench", "evaluate", "--dimension", name, *fixed] for name in dimensions]


def read(path: Path) -> Results:
    """What upstream measured.

    Args:
      path: a `*_eval_results.json`, or a folder with several of them for different dimensions.

    Returns:
      dimension -> {"mean": upstream's own, "videos": {file name: float}}, both on the scale of the mean. The mean of
      subject and background consistency is over frames, so it need not be the videos' mean.

    Raises:
      ValueError: not such a file, a dimension in two files, no results in the folder, or numbers on the scale of an
        old release; one line.
    """
    files = sorted(path.glob(f"*{RESULTS}")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no *{RESULTS} in this folder; run VBench first")
    found: Results = {}
    for file in files:
        one = _one(file)
        if twice := sorted(set(one) & set(found)):
            raise ValueError(f"{file}: {', '.join(twice)} is in another file of the folder too; remove one of them")
        found |= one
    return found


def _one(file: Path) -> Results:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); it is cut short or no VBench result") from error
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{file}: not VBench's results, which are dimension -> [mean, videos]")
    return {name: _dimension(file, name, entry) for name, entry in tree.items()}


def _dimension(file: Path, name: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
        raise ValueError(f"{file}: {name} is not [mean, list of videos]")
    mean, listed = entry
    videos: dict[str, float] = {}
    for item in listed:
        if not isinstance(item, dict) or not isinstance(item.get("video_path"), str):
            raise ValueError(f"{file}: {name} has a video without video_path")
        video = item["video_path"].replace("\\", "/").rsplit("/", 1)[-1]
        if video in videos:
            raise ValueError(f"{file}: {name} has {video} twice")
        videos[video] = _number(file, f"{name} of {video}", item.get("video_results"), PER_VIDEO.get(name, 1.0))
    if not videos:
        raise ValueError(f"{file}: {name} has no videos")
    return {"mean": _number(file, f"mean of {name}", mean), "videos": videos}


def _number(file: Path, what: str, value: Any, factor: float = 1.0) -> float:
    """A number, times the factor; a truth value is one, as `dynamic_degree` says of each video whether it moves."""
    if not isinstance(value, (bool, int, float)) or not abs(value) < sys.float_info.max:
        raise ValueError(f"{file}: {what} is {value!r}, not a finite number")
    scaled = float(value) * factor
    if scaled > HIGHEST:
        raise ValueError(f"{file}: {what} is {value}, too large for VBench 0.1.5; an older one has other scales")
    return scaled
