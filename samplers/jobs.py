"""Many clips from one file: read and checked as a whole, made a stage at a time, what is finished left alone.

    {"first": "a.png", "last": "b.png", "prompt": "a red circle moves right", "seeds": [0, 1], "out": "one.mp4"}

A line of a .jsonl file, or a row of a .csv file with a header, has the options of `python -m samplers.inbetween` by
their names; relative paths are against the file.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from samplers import asked, files, resume, video, work
from samplers.options import Parser, argument
from samplers.request import Job, is_finished
from samplers.work import Clip
from wanjax import hosts, keyframes, writing
from wanjax.writing import Target

PATHS = ("first", "last", "out", "explain", "from", "model", "skip_passes")
MOST_AT_ONCE = 32
"""Clips that go through the stages together: what they hold lies on the device, and each has an open lock."""
MOST_LINES = 10_000
FAILURES = (ValueError, FloatingPointError, OSError, MemoryError, jax.errors.JaxRuntimeError)
"""What ends one clip and not the others."""


@dataclass(frozen=True, eq=False)
class Line:
    """One clip of a list: a line of the file, or a variant of it.

    Attributes:
      number: of the line, from 1.
      job: what to make.
      finished: whether its outputs are there already.
      variants: where the sheet of the line's variants goes; None for a line of one.
    """

    number: int
    job: Job
    finished: bool
    variants: Path | None = None


Frames = list[tuple[int, np.ndarray]]  # numbers and pictures uint8 [H, W, 3] of a few frames of a clip
End = Callable[..., None]  # (line, outcome, seconds, error): hears how a clip ended


@dataclass
class Outcome:
    """How a clip ended: "made", "skipped" (it was there) or "failed"."""

    line: Line
    outcome: str
    seconds: dict[str, float]
    error: str | None = None

    def told(self) -> dict[str, Any]:
        """For the report."""
        job = self.line.job
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        own = {"line": self.line.number, "out": str(job.outputs.video), "seed": job.settings.seed}
        return own | {"outcome": self.outcome, "seconds": seconds} | ({"error": self.error} if self.error else {})


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
    for name in ("jobs", "decode", "storyboard", "prompts", "overlap", "distributed", "quiet", "compile_cache", "help"):
        if name in fields:
            raise ValueError(f"{name}: belongs on the command line, not in a line")
    for name in PATHS:
        word = name in ("model", "skip_passes")  # which may be a path
        if isinstance(fields.get(name), str) and not (word and not (path.parent / fields[name]).exists()):
            fields[name] = str(path.parent / Path(fields[name]).expanduser())
    if "keyframe" in fields:
        several = fields["keyframe"] if isinstance(fields["keyframe"], list) else [fields["keyframe"]]
        fields["keyframe"] = [str(path.parent / str(one)) for one in several]
    fields.setdefault("out", str(path.with_name(f"{path.stem}-{number:03d}.mp4")))
    own = [text for name, value in fields.items() for text in argument(p, name, value)]
    return _variants(number, asked.parse(p, [*arguments, *own]))


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


def make(jobs: Jobs, progress: bool = False, programs: Path | None = None, tell: Callable[[str], None] = print) -> bool:
    """Makes what is not finished, group by group of clips that share a model and its programs.

    Args:
      progress: draws a bar for each clip.
      programs: folder where compiled programs are kept.
      tell: hears how each clip ended, in one line.

    Returns:
      Whether all of them are made.
    """
    outcomes: dict[int, Outcome] = {}
    seen: dict[Line, Frames] = {}

    def end(line: Line, outcome: str, seconds: dict[str, float], error: str | None = None) -> None:
        outcomes[jobs.lines.index(line)] = Outcome(line, outcome, seconds, error)
        total = f" ({seconds['total']:.1f} s)" if "total" in seconds else ""
        tell(f"{line.job.outputs.video}: {outcome}{total}{f': {error}' if error else ''}")

    try:
        for line in jobs.lines:
            if line.finished:
                if line.job.kept is not None and hosts.is_first():
                    line.job.kept.tidy()
                end(line, "skipped", {})
        for group in groups([line for line in jobs.lines if not line.finished]):
            _make_group(group, progress, programs, end, seen)
        _sheets(jobs, outcomes, seen, tell)
    finally:
        if jobs.report is not None and hosts.is_first():
            told = [outcomes[number].told() for number in sorted(outcomes)]
            text = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in told)
            writing.write_text(jobs.report, text, overwrite=True, anything=True)
    return all(one.outcome != "failed" for one in outcomes.values())


def groups(lines: Sequence[Line]) -> list[list[Line]]:
    """Clips whose model and programs are the same, in the order of their first ones; no more than `MOST_AT_ONCE`."""
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(_alike(line.job), []).append(line)
    return [alike[at : at + MOST_AT_ONCE] for alike in found.values() for at in range(0, len(alike), MOST_AT_ONCE)]


def _alike(job: Job) -> Any:
    """What decides which programs a clip needs, and its negative text, which is encoded once for all."""
    table = jax.tree.structure(job.plan.table), tuple(np.shape(leaf) for leaf in jax.tree.leaves(job.plan.table))
    model = str(job.folder.path), job.config, job.dtype, job.weights, job.memory.policy, tuple(job.mesh.items())
    settings = job.plan.latent_shape, job.plan.at, job.settings.guidance_mode, job.settings.negative_prompt
    return *model, *settings, table


@dataclass(frozen=True, eq=False)
class _Running:
    """A clip on its way: what it holds is let go of when `held` is closed."""

    line: Line
    clip: Clip
    held: ExitStack


def _make_group(
    lines: Sequence[Line], progress: bool, programs: Path | None, end: End, seen: dict[Line, Frames]
) -> None:
    """A stage at a time for all clips of a group; one that fails leaves it, is told, and the others go on.

    `seen` gets a few frames of each variant.
    """
    with ExitStack() as stack:

        def attempt(own: Sequence[_Running], stage: Callable[[Sequence[_Running]], Any]) -> list[_Running]:
            """Those that a stage was done for; where it fails for several, each alone shows which cannot be made."""
            try:
                stage(own)
            except FAILURES as error:
                if hosts.count() > 1 and not isinstance(error, FloatingPointError):
                    raise  # of this host alone, perhaps: the others would wait for it
                if len(own) > 1:
                    return [one for each in own for one in attempt([each], stage)]
                fail(own[0], error)
                return []
            return list(own)

        def fail(one: _Running, error: BaseException) -> None:
            one.held.close()
            end(one.line, "failed", one.clip.seconds, " ".join(str(error).split()) or type(error).__name__)

        def begin(own: Sequence[_Running]) -> None:
            one = own[0]
            one.held.enter_context(one.clip.opened())
            if _made_meanwhile(one.line.job):
                one.held.close()
                end(one.line, "skipped", {})
            else:
                one.clip.restore()
                running.append(one)

        def denoise(own: Sequence[_Running]) -> None:
            title = f"clip {lines.index(own[0].line) + 1} of {len(lines)}"
            work.denoise(model, [one.clip for one in own], ready, title if progress else None)

        def finish(own: Sequence[_Running]) -> None:
            one = own[0]
            with files.written(one.clip) as write:
                made = work.decode(model, one.clip, ready)
                write(model, made, None)
            if one.line.variants is not None:
                seen[one.line] = [(n, video.enlarge(made[n], one.line.job.scale)) for n in _places(one.line.job)]
            one.clip.finish()
            one.clip.carry = one.clip.encoded = None
            one.held.close()
            end(one.line, "made", one.clip.seconds)

        running: list[_Running] = []
        for line in lines:
            attempt([_Running(line, Clip(line.job), stack.enter_context(ExitStack()))], begin)
        if not running:
            return
        try:
            model, ready, seconds = stack.enter_context(work.loaded(running[0].clip.job, programs))
        except FAILURES as error:
            if hosts.count() > 1:
                raise
            for one in running:
                fail(one, error)
            return
        running[0].clip.seconds["load"] = seconds
        running = [one for each in running for one in attempt([each], lambda own: files.settle(own[0].clip, model))]
        running = attempt(running, lambda own: work.encode(model, [one.clip for one in own], ready))
        for each in [one for own in _side_by_side(running) for one in attempt(own, denoise)]:
            attempt([each], finish)


def _made_meanwhile(job: Job) -> bool:
    """Whether another process, on the same list, finished a clip since the check."""
    fresh = job.outputs.checked is not None and not any(job.outputs.checked.seen)
    return fresh and hosts.count() == 1 and is_finished(job.outputs, job)


def _side_by_side(running: Sequence[_Running]) -> Iterator[list[_Running]]:
    """Clips that are denoised at once: as many as the mesh has room for, of equal settings but prompt and seed, after
    the same step."""
    alike: dict[str, list[_Running]] = {}
    for one in running:
        settings = dataclasses.asdict(one.clip.plan.settings) | {"prompt": None, "seed": None}
        alike.setdefault(resume.digest([settings, one.clip.done, one.clip.job.explain]), []).append(one)
    for several in alike.values():
        job = several[0].clip.job
        passes = 2 if job.settings.guidance_mode == "batched" and job.settings.guidance != 1 else 1
        data = job.mesh.get("data", 1)
        room = data // math.gcd(data, passes)
        for start in range(0, len(several), room):
            yield several[start : start + room]


def _sheets(jobs: Jobs, outcomes: dict[int, Outcome], seen: dict[Line, Frames], tell: Callable[[str], None]) -> None:
    """A sheet for each line of several variants, of those that are there."""
    several: dict[Path, list[Line]] = {}
    for number, line in enumerate(jobs.lines):
        if line.variants is not None and number in outcomes and outcomes[number].outcome != "failed":
            several.setdefault(line.variants, []).append(line)
    for sheet, lines in several.items() if hosts.is_first() else ():
        video.write_png(
            sheet,
            video.variants_sheet(
                {f"seed {line.job.settings.seed}": seen.get(line) or _read(line.job) for line in lines}
            ),
        )
        tell(f"{sheet}: the variants beside each other")


def _places(job: Job, count: int = 7) -> list[int]:
    """Evenly spaced frames of a clip, the first and the last among them."""
    return sorted({round(n) for n in np.linspace(0, job.settings.frames - 1, count)})


def _read(job: Job) -> Frames:
    """Of a clip that an earlier run wrote."""
    path = job.outputs.video
    return [(n, np.asarray(keyframes.read(f"{path}@{n}" if path.suffix else path / f"{n:05d}.png")))
            for n in _places(job)]  # fmt: skip
