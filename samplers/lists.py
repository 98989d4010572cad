"""A file of many clips, read and checked as a whole; `samplers.jobs` makes them.

    {"first": "a.png", "last": "b.png", "prompt": "a red circle moves right", "seeds": [0, 1], "out": "one.mp4"}
    {"storyboard": ["a.png", "b.png", "c.png"], "frames": [49, 33], "overlap": 8, "out": "film.mp4"}

A line of a .jsonl file, or a row of a .csv file with a header, has the options of `python -m samplers.inbetween` by
their names; relative paths are against the file.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from samplers import asked, files, resume, storyboard
from samplers.options import Parser, argument
from samplers.request import Job
from samplers.storyboard import FilmJob
from wanjax import hosts, writing
from wanjax.writing import Target

PATHS = ("first", "last", "out", "explain", "from", "model", "skip_passes")
SEVERAL = ("keyframe", "storyboard")
"""Of which a line may have several paths."""
MOST_LINES = 10_000


@dataclass(frozen=True, eq=False)
class Line:
    """One clip or film of a list: a line of the file, or a variant of it.

    Attributes:
      number: of the line, from 1.
      job: what to make.
      finished: whether its outputs are there already.
      variants: where the sheet of the line's variants goes; None for a line of one.
    """

    number: int
    job: Job | FilmJob
    finished: bool
    variants: Path | None = None


@dataclass(frozen=True)
class Jobs:
    """A checked list.

    Attributes:
      lines: in the file's order.
      report: where it is told how each ended; None for variants from the command line.
    """

    lines: tuple[Line, ...]
    report: Path | None

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Of all clips, each once."""
        return tuple(dict.fromkeys(note for line in self.lines for note in line.job.notes))

    @cached_property
    def digest(self) -> str:
        """What the hosts of a run must have in common."""
        return resume.digest([[line.job.digest, line.finished] for line in self.lines])


def read(path: str | Path, p: Parser, arguments: Sequence[str]) -> Jobs:
    """Reads and checks a list.

    Args:
      p: the command line's.
      arguments: of it, which hold where a line does not say otherwise; without --jobs.

    Raises:
      ValueError: no such file, or not of these kinds; else one line for every bad line, all in one message.
    """
    path = writing.absolute(path)
    lines, wrong = [], []
    taken: dict[Path, int] = {}
    p.raises = True
    try:
        for number, fields in _fields(path):
            try:
                if isinstance(fields, Exception):
                    raise fields
                found = _line(number, fields, path, p, arguments)
                _refuse_twice(found, number, taken)
                lines += found
            except (ValueError, OSError) as error:
                wrong.append(f"{path.name} line {number}: {error}")
    finally:
        p.raises = False
    if wrong:
        raise ValueError("\n".join([*wrong, f"{path}: {len(wrong)} of its lines cannot be made; nothing was begun"]))
    if not lines:
        raise ValueError(f"{path}: holds no clip; give a line for each")
    report = path.with_name(f"{path.stem}.report.jsonl")
    if hosts.is_first():
        writing.check_parent(Target(report))
        _check_report(report)
    return Jobs(tuple(lines), report)


def _check_report(path: Path) -> None:
    """OutputError for something in the report's place that is none."""
    if not path.is_symlink() and not path.exists():
        return
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        ours = path.is_file() and not path.is_symlink() and (not first or "outcome" in json.loads(first))
    except (OSError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise writing.OutputError(f"report {path}: exists and is not a report of jobs; move it away")


def variants(options: dict[str, Any]) -> Jobs:
    """The variants of one clip, from the command line. ValueError as `request.prepare`."""
    return Jobs(tuple(_variants(1, options)), None)


def _fields(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Number and fields of each line that holds something; an error in the place of what cannot be read."""
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv"):
        raise ValueError(f"jobs {path}: give a .jsonl file (a JSON object a line) or a .csv file with a header")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text in UTF-8"
        raise ValueError(f"jobs {path}: cannot be read ({reason}); check the path") from error
    if text.count("\n") > MOST_LINES:
        raise ValueError(f"jobs {path}: more than {MOST_LINES} lines; divide it")
    yield from _rows(text) if suffix == ".csv" else _objects(text)


def _objects(text: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    for number, line in enumerate(text.split("\n"), 1):  # others that `splitlines` knows may stand in a text
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=_once)
        except (json.JSONDecodeError, RecursionError) as error:
            mend = "; write / or two backslashes in paths" if "escape" in str(error) else ""
            yield number, ValueError(f"not JSON ({error}){mend}")
            continue
        except ValueError as error:
            yield number, error
            continue
        yield number, fields if isinstance(fields, dict) else ValueError("not a JSON object; write {...}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object by name, hyphens as underscores. ValueError for one that is there twice."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        name = name.replace("-", "_")
        if name in fields:
            raise ValueError(f"{name}: given twice; give each option once")
        fields[name] = value
    return fields


def _rows(text: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        yield 1, ValueError(f"not CSV ({error})")
        return
    other = next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None)
    twice = next((name for name in names if names.count(name) > 1), None)
    if other is not None or twice is not None:
        yield 1, ValueError(f"cells divided by {other!r}; save it with commas between them" if other is not None
                            else f"{twice!r} heads two columns; give each option once")  # fmt: skip
        return
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, ValueError(f"not CSV ({error})")
            return
        if row is None:
            return
        if None in row or None in row.values():
            yield reader.line_num, ValueError("another number of cells than the header has")
        else:
            yield reader.line_num, {name.strip(): cell for name, cell in row.items() if cell.strip()}


def _line(number: int, fields: dict[str, Any], path: Path, p: Parser, arguments: Sequence[str]) -> list[Line]:
    """The clips of one line. ValueError: an unknown or bad field, or a clip that cannot be made."""
    fields = {name.replace("-", "_"): value for name, value in fields.items() if value is not None}
    for name in ("jobs", "decode", "distributed", "quiet", "compile_cache", "help"):
        if name in fields:
            raise ValueError(f"{name}: belongs on the command line, not in a line")
    for name in PATHS:
        word = name in ("model", "skip_passes")  # which may be a path
        if isinstance(fields.get(name), str) and not (word and not (path.parent / fields[name]).exists()):
            fields[name] = str(path.parent / Path(fields[name]).expanduser())
    for name in SEVERAL:
        if name in fields:
            several = fields[name] if isinstance(fields[name], list) else [fields[name]]
            fields[name] = [str(path.parent / Path(str(one)).expanduser()) for one in several]
    fields.setdefault("out", str(path.with_name(f"{path.stem}-{number:03d}.mp4")))
    own = [text for name, value in fields.items() for text in argument(p, name, value)]
    options = asked.parse(p, [*arguments, *own], of_a_list=True)
    if options["storyboard"] is not None:
        film = storyboard.prepare(**asked.board(options), again=True)
        return [Line(number, film, film.finished)]
    return _variants(number, options)


def _variants(number: int, options: dict[str, Any]) -> list[Line]:
    several = asked.variants(options)
    sheet = Path(asked.named(options["out"], "")).with_suffix(".variants.png") if len(several) > 1 else None
    if sheet is not None and hosts.is_first():
        sheet = writing.absolute(sheet)
        writing.check([Target(sheet)], overwrite=True)
    found = []
    for one in several:
        job = files.prepare(**asked.one(one), again=True)
        found.append(Line(number, job, job.finished, sheet))
    return found


def _refuse_twice(found: Sequence[Line], number: int, taken: dict[Path, int]) -> None:
    """ValueError for an output that an earlier line has too."""
    for line in found:
        outputs = line.job.outputs
        more = () if outputs.checked is None else (target.path for target in outputs.checked.targets)
        own = {outputs.video, outputs.sheet, outputs.settings, *more}
        for path in sorted(own & taken.keys()):
            raise ValueError(f"out {path.name}: of line {taken[path]} too; give each clip a name of its own")
        taken |= dict.fromkeys(own, number)
    for path in {line.variants for line in found} - {None}:
        if path in taken:
            raise ValueError(f"out {path.name}: of line {taken[path]} too; give each clip a name of its own")
        taken[path] = number
