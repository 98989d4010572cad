"""A checked list of clips and films, made a stage at a time; what is finished is left alone.

`samplers.lists` reads lists. Clips that share a model and its programs are one group, and so are such films.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from samplers import files, resume, storyboard, video, work
from samplers.lists import Jobs, Line, read, variants
from samplers.request import Asked, Job, is_finished
from samplers.storyboard import FilmJob, Reel
from samplers.work import Clip
from wanjax import checkpoint, hosts, keyframes, writing

__all__ = ["Jobs", "Line", "Outcome", "read", "variants", "make", "groups"]

MOST_AT_ONCE = 32
"""Clips that go through the stages together: what they hold lies on the device, and each has an open lock."""
FAILURES = (ValueError, FloatingPointError, OSError, MemoryError, jax.errors.JaxRuntimeError)
"""What ends one clip and not the others."""

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
    """Those whose model and programs are the same, in the order of their first ones; of no more than `MOST_AT_ONCE`
    clips, or one film."""
    found: dict[Any, list[Line]] = {}
    for line in lines:
        clips = line.job.clips if isinstance(line.job, FilmJob) else (line.job,)
        found.setdefault((type(line.job), *map(_alike, clips)), []).append(line)
    parts = []
    for (_, *clips), alike in found.items():
        size = max(1, MOST_AT_ONCE // len(clips))
        parts += [alike[at : at + size] for at in range(0, len(alike), size)]
    return parts


def _alike(job: Asked) -> Any:
    """What decides which programs a clip needs, and its negative text, which is encoded once for all."""
    table = jax.tree.structure(job.plan.table), tuple(np.shape(leaf) for leaf in jax.tree.leaves(job.plan.table))
    model = str(job.folder.path), job.config, job.dtype, job.weights, job.memory.policy, tuple(job.mesh.items())
    settings = job.plan.latent_shape, job.plan.at, job.settings.guidance_mode, job.settings.negative_prompt
    return *model, *settings, table


class _Clips:
    """How single clips go through the stages."""

    begin = Clip

    def loaded(self, job: Job, programs: Path | None) -> AbstractContextManager[tuple[checkpoint.Model, Any, float]]:
        """Model, programs, seconds."""
        return work.loaded(job, programs)

    def settle(self, model: checkpoint.Model, clip: Clip) -> None:
        """What is decided with the model alone."""
        files.settle(clip, model)

    def encode(self, model: checkpoint.Model, clips: Sequence[Clip], ready: Any) -> None:
        """Of all of a group."""
        work.encode(model, clips, ready)

    def denoise(self, model: checkpoint.Model, clips: Sequence[Clip], ready: Any, title: str | None) -> None:
        """Of those that go side by side."""
        work.denoise(model, clips, ready, title)

    def write(self, model: checkpoint.Model, clip: Clip, ready: Any) -> np.ndarray:
        """Decodes one and writes it; the frames."""
        with files.written(clip) as write:
            made = work.decode(model, clip, ready)
            write(model, made, None)
        clip.carry = clip.encoded = None
        return made


class _Films:
    """How films do."""

    begin = Reel

    @contextmanager
    def loaded(self, job: FilmJob, programs: Path | None) -> Iterator[tuple[checkpoint.Model, Any, float]]:
        """Model, None, seconds."""
        with storyboard.loaded(job) as (model, seconds):
            yield model, None, seconds

    def settle(self, model: checkpoint.Model, reel: Reel) -> None:
        """Nothing."""

    def encode(self, model: checkpoint.Model, reels: Sequence[Reel], ready: Any) -> None:
        """Of all of a group."""
        storyboard.encode(model, reels)

    def denoise(self, model: checkpoint.Model, reels: Sequence[Reel], ready: Any, title: str | None) -> None:
        """Of one: its clips go side by side already."""
        storyboard.denoise(model, reels[0], title)

    def write(self, model: checkpoint.Model, reel: Reel, ready: Any) -> np.ndarray:
        """Decodes one and writes it; the frames."""
        with storyboard.written(reel) as write:
            made = storyboard.decode(model, reel)
            write(made, None)
        reel.carries = reel.encoded = None
        return made


@dataclass(frozen=True, eq=False)
class _Running:
    """A clip or film on its way: what it holds is let go of when `held` is closed."""

    line: Line
    clip: Clip | Reel
    held: ExitStack


def _make_group(
    lines: Sequence[Line], progress: bool, programs: Path | None, end: End, seen: dict[Line, Frames]
) -> None:
    """A stage at a time for all clips of a group; one that fails leaves it, is told, and the others go on.

    `seen` gets a few frames of each variant.
    """
    kind = _Films() if isinstance(lines[0].job, FilmJob) else _Clips()
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
            kind.denoise(model, [one.clip for one in own], ready, title if progress else None)

        def finish(own: Sequence[_Running]) -> None:
            one = own[0]
            made = kind.write(model, one.clip, ready)
            if one.line.variants is not None:
                seen[one.line] = [(n, video.enlarge(made[n], one.line.job.scale)) for n in _places(one.line.job)]
            one.clip.finish()
            one.held.close()
            end(one.line, "made", one.clip.seconds)

        running: list[_Running] = []
        for line in lines:
            attempt([_Running(line, kind.begin(line.job), stack.enter_context(ExitStack()))], begin)
        if not running:
            return
        try:
            model, ready, seconds = stack.enter_context(kind.loaded(running[0].clip.job, programs))
        except FAILURES as error:
            if hosts.count() > 1:
                raise
            for one in running:
                fail(one, error)
            return
        running[0].clip.seconds["load"] = seconds
        running = [one for each in running for one in attempt([each], lambda own: kind.settle(model, own[0].clip))]
        running = attempt(running, lambda own: kind.encode(model, [one.clip for one in own], ready))
        for each in [one for own in _side_by_side(running) for one in attempt(own, denoise)]:
            attempt([each], finish)


def _made_meanwhile(job: Job | FilmJob) -> bool:
    """Whether another process, on the same list, finished a clip since the check."""
    fresh = job.outputs.checked is not None and not any(job.outputs.checked.seen)
    return fresh and hosts.count() == 1 and is_finished(job.outputs, job)


def _side_by_side(running: Sequence[_Running]) -> Iterator[list[_Running]]:
    """Clips that are denoised at once: as many as the mesh has room for, of equal settings but prompt and seed, after
    the same step. Films go one by one."""
    if running and isinstance(running[0].clip, Reel):
        yield from ([one] for one in running)
        return
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
