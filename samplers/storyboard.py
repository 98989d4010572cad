"""A film from files: keyframes in; a video through all of them, its contact sheet and its settings out.

`prepare` finds everything that can be wrong, `make` runs `samplers.film` and keeps what is computed, as
`samplers.files` does for one clip. Films on their way are `Reel`s, which go through the stages as `samplers.work`'s
clips do, several of them together.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from samplers import ahead, files, film, pipeline, resume, video
from samplers.film import Span
from samplers.pipeline import Encoded, Timings
from samplers.plan import Plan, Settings
from samplers.request import Asked, ask, is_finished
from samplers.resume import CARRY, ENCODED, EVERY, RunFolder
from samplers.run import OnStep, bar
from samplers.sample import Carry
from samplers.work import on, share
from wanjax import checkpoint, hosts, marks
from wanjax.keyframes import split
from wanjax.settings import refuse, whole


@dataclass(frozen=True)
class FilmJob:
    """A checked film.

    Attributes:
      clips: between neighbouring keyframes, each with its overlap; spans: where they lie in the film.
      images: the keyframes' files.
      prompts, frames: of the clips, frames without overlap.
      overlap: pixel frames beyond each shared keyframe.
      outputs: where to write.
      kept: where the run keeps what it has; None for nowhere.
      notes: lines that the user should see.
      finished: whether this very film is there already; then nothing was looked at but that.
    """

    clips: tuple[Asked, ...]
    spans: tuple[Span, ...]
    images: tuple[str, ...]
    prompts: tuple[str, ...]
    frames: tuple[int, ...]
    overlap: int
    outputs: video.Outputs
    kept: RunFolder | None
    notes: tuple[str, ...]
    finished: bool = False

    @property
    def settings(self) -> Settings:
        """Of the first clip; the others have other frames, prompts and seeds."""
        return self.clips[0].settings

    @property
    def fps(self) -> float:
        """Of the video file."""
        return self.clips[0].fps

    @property
    def scale(self) -> int:
        """Of the video file."""
        return self.clips[0].scale

    @property
    def plans(self) -> list[Plan]:
        """Of the clips."""
        return [clip.plan for clip in self.clips]

    @property
    def shared(self) -> int:
        """Latent frames that neighbours share."""
        return film.shared_latents(self.spans, self.clips[0].config.vae.temporal_stride)

    @property
    def steps(self) -> int:
        """Of denoising."""
        return self.settings.steps

    @property
    def seeds(self) -> list[list[int]]:
        """Of each clip's noise."""
        return [[clip.settings.seed] for clip in self.clips]

    @cached_property
    def told(self) -> dict[str, Any]:
        """What decides the film, as JSON."""
        return {"overlap": self.overlap, "clips": [clip.told for clip in self.clips]}

    @cached_property
    def digest(self) -> str:
        """What the hosts of a run must have in common."""
        return resume.digest([self.told, self.clips[0].mesh])


def prepare(
    images: Sequence[str | Path],
    out: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    frames: Sequence[int] | None = None,
    overlap: int = 0,
    seed: int = 0,
    overwrite: bool = False,
    save_every: int | None = None,
    restart: bool = False,
    again: bool = False,
    **how: Any,
) -> FilmJob:
    """Reads and checks everything a film needs; computes nothing.

    Args:
      images: of the keyframes, at least two, in order.
      out, overwrite, save_every, restart, again: as `request.prepare`.
      prompts, frames: one for each clip, or one for all; None takes the model's.
      overlap: see `film.film`.
      seed: of the first clip's noise; each further clip takes the next.
      how: as `request.ask`.

    Raises:
      ValueError: one clear line.
    """
    count = len(images) - 1
    refuse((count < 1, f"storyboard: {count + 1} image; a film takes at least 2"))
    folder = checkpoint.open_folder(how.get("model", "tiny"))
    usual = folder.config.sampling.frames
    lengths = _each("frames", frames or [usual], count)
    texts = _each("prompts", prompts or [""], count)
    spans = film.spans(lengths, overlap, folder.config.vae.temporal_stride, max(film.LONGEST, usual))
    clips = _ask(images, spans, texts, seed, how)
    longest = max(clips, key=lambda clip: clip.settings.frames)
    if len({(clip.memory.policy, clip.weights) for clip in clips}) > 1:  # one model makes all: as the largest needs it
        how = how | {"memory": longest.memory.policy, "weights": longest.weights or how.get("weights", "auto")}
        clips = _ask(images, spans, texts, seed, how)
    refuse((clips[0].auto, "--method auto: chooses for one clip; name a method for a film"))
    film.check_solver(clips[0].settings, overlap)
    outputs = video.name_outputs(out)
    job = FilmJob(
        tuple(clips), spans, tuple(map(str, images)), tuple(texts), tuple(lengths), overlap, outputs, None, ()
    )
    every = whole("save_every", EVERY if save_every is None else save_every, 0, 10**6)
    kept = RunFolder.of(outputs.video, job.told, every, restart) if every else None
    video.check_sides(out, *(side * clips[0].scale for side in clips[0].settings.size))
    notes = [note for clip in clips for note in clip.notes]
    finished = again and not overwrite and is_finished(outputs, job)
    if hosts.is_first() and not finished:
        sources = (split(path)[0] for path in images)
        outputs = video.check_output(out, overwrite, inputs=(*sources, folder.path))
        notes += [*outputs.notes, *(kept.check() if kept is not None else [])]
    return dataclasses.replace(job, outputs=outputs, kept=kept, notes=tuple(dict.fromkeys(notes)), finished=finished)


def _ask(
    images: Sequence[str | Path], spans: Sequence[Span], texts: Sequence[str], seed: int, how: dict[str, Any]
) -> list[Asked]:
    """The clips between neighbours, all of the first one's size."""
    clips: list[Asked] = []
    for number, (pair, span, text) in enumerate(zip(pairwise(images), spans, texts, strict=True)):
        places = dict(zip(span.at, pair, strict=True))
        own = how | ({"size": clips[0].settings.size} if clips else {})
        clips.append(ask(None, None, keyframes=places, prompt=text, frames=span.frames, seed=(seed + number) % 2**32,
                         **own))  # fmt: skip
    return clips


def _each(name: str, values: Sequence[Any], count: int) -> list[Any]:
    """One for each clip. ValueError: another number of them."""
    refuse((len(values) not in (1, count), f"{name}: {len(values)} given for {count} clips; give one for each, or one"))
    return list(values) * (count if len(values) == 1 else 1)


@dataclass
class Reel:
    """One film between two stages.

    Attributes:
      job: what is asked for.
      seconds: by stage.
      encoded: what the transformer is told of each clip; None before that, and where it is not needed any more.
      carries: of the sampler, of each clip; None before the first step.
      done: steps that the carries have behind them.
    """

    job: FilmJob
    seconds: dict[str, float] = field(default_factory=dict)
    encoded: list[Encoded] | None = None
    carries: list[Carry] | None = None
    done: int = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Holds the run folder, if there is one, for this process alone. OutputError: another run works in it."""
        kept = self.job.kept
        with kept.opened() if kept is not None and hosts.is_first() else nullcontext():
            yield

    def restore(self) -> None:
        """Takes the carries from the run folder. OutputError where they are damaged."""
        job = self.job
        if job.kept is None:
            return
        like = [ahead.start(clip.plan, seeds, clip.devices) for clip, seeds in zip(job.clips, job.seeds, strict=True)]
        if (found := job.kept.read(CARRY, (np.zeros((), np.int32), like))) is not None:
            self.done, self.carries = int(found[0]), found[1]

    def finish(self) -> None:
        """Empties the run folder, which then goes: the results are written."""
        if self.job.kept is not None and hosts.is_first():
            self.job.kept.empty()


@contextmanager
def loaded(job: FilmJob) -> Iterator[tuple[checkpoint.Model, float]]:
    """A film's model, and the seconds that reading took."""
    start, first = time.perf_counter(), job.clips[0]
    model = checkpoint.load(first.folder, first.dtype, first.devices, policy=first.memory.policy, weights=first.weights)
    yield model, time.perf_counter() - start


def make(job: FilmJob, progress: bool = False) -> dict[str, Any]:
    """Makes a film and writes video, contact sheet and JSON, all or none; of several hosts the first writes.

    What is computed is kept in the run folder, and after a run that died the same job goes on, to the same bits.

    Args:
      progress: draws a bar while denoising.

    Returns:
      The report, as it is written to the JSON file.

    Raises:
      ValueError: damaged weights or run folder, or a file that came to the output's name meanwhile.
      FloatingPointError: NaN or inf; names the stage. OSError: a full disk.
    """
    start, reel = time.perf_counter(), Reel(job)
    with reel.opened():
        with written(reel) as write, loaded(job) as (model, seconds):
            reel.seconds["load"] = seconds
            reel.restore()
            encode(model, [reel])
            denoise(model, reel, "denoise" if progress else None)
            told = write(decode(model, reel), start)
        reel.finish()
    return told


Write = Callable[[np.ndarray, float | None], dict[str, Any]]
"""(film uint8 [T, H, W, 3], when it was begun, or None where it was one of many) -> report."""


@contextmanager
def written(reel: Reel) -> Iterator[Write]:
    """The names of a film's outputs are its own inside; they appear at the end, all or none.

    Yields:
      What writes them, on the first of several hosts.

    Raises:
      OutputError: another run is writing one of them, or something appeared or changed there since the check.
    """
    job = reel.job
    with video.staged(job.outputs) if hosts.is_first() else nullcontext() as outputs:

        def write(frames: np.ndarray, begun: float | None) -> dict[str, Any]:
            own = sum(reel.seconds.values())
            reel.seconds["total"] = own if begun is None else time.perf_counter() - begun
            told = marks.marked(report(job, reel.seconds))
            if outputs is not None:
                video.write(outputs.video, frames, job.fps, job.scale)
                sheet = video.contact_sheet(frames, _keyframes(job), at=film.places(job.spans), columns=9, rows=3)
                video.write_png(outputs.sheet, sheet)
                video.write_json(outputs.settings, told)
            return told

        yield write


def encode(model: checkpoint.Model, reels: Sequence[Reel]) -> None:
    """What the transformer is told of all films that need it; a stage at a time for all clips of them.

    Raises:
      FloatingPointError: NaN or inf; names the stage.
    """
    timings, needed = Timings(), [reel for reel in reels if reel.done < reel.job.steps]
    mesh = reels[0].job.clips[0].devices
    with timings.stage("encode"), on(mesh):
        for reel in needed:
            reel.encoded = _kept_encoded(reel.job)
        waiting = [reel for reel in needed if reel.encoded is None]
        clips = [clip for reel in waiting for clip in reel.job.clips]
        inputs, prompts = [clip.inputs for clip in clips], [[clip.settings.prompt] for clip in clips]
        made = iter(film.encode(model, [clip.plan for clip in clips], inputs, prompts) if clips else ())
        for reel in waiting:
            reel.encoded = list(islice(made, len(reel.job.clips)))
            if reel.job.kept is not None:
                reel.job.kept.keep(ENCODED, [(one.conditions, one.negative) for one in reel.encoded])
        for reel in needed:
            reel.encoded = [pipeline.place(one, mesh) for one in reel.encoded]
    share(timings, reels)


def denoise(model: checkpoint.Model, reel: Reel, progress: str | None = None) -> None:
    """Denoises a film's clips in step.

    Args:
      progress: what the bar says; None draws none.

    Raises:
      FloatingPointError: NaN or inf; names the step. OSError: a full disk.
    """
    job, timings = reel.job, Timings()
    if reel.done == job.steps:
        return
    mesh = job.clips[0].devices
    with timings.stage("denoise"), on(mesh), bar(job.steps, progress or "", progress is not None) as shown:
        noises = [pipeline.noise(*one, mesh) for one in zip(job.plans, job.seeds, strict=True)]
        film.denoise(model, job.plans, reel.encoded, noises, job.shared, seeds=job.seeds, carries=reel.carries,
                     first=reel.done, on_step=_keeping(reel, shown))  # fmt: skip
    reel.encoded = None
    share(timings, [reel])


def decode(model: checkpoint.Model, reel: Reel) -> np.ndarray:
    """The film uint8 [T, H, W, 3]. FloatingPointError on NaN or inf."""
    timings = Timings()
    with timings.stage("decode"), on(reel.job.clips[0].devices):
        videos = [pipeline.decode(model, plan, carry.sample)
                  for plan, carry in zip(reel.job.plans, reel.carries, strict=True)]  # fmt: skip
    share(timings, [reel])
    return film.join(videos, reel.job.spans)[0]


def _kept_encoded(job: FilmJob) -> list[Encoded] | None:
    """From the run folder."""
    found = None if job.kept is None else job.kept.read(ENCODED, [ahead.encoded(plan) for plan in job.plans])
    return None if found is None else [Encoded(*one) for one in found]


def _keeping(reel: Reel, shown: OnStep) -> film.OnStep:
    """Moves the bar, takes the carries, and keeps them every few steps and after the last."""
    kept, steps, begun = reel.job.kept, reel.job.steps, reel.done

    def on_step(done: int, carries: Sequence[Carry]) -> None:
        shown(done, carries[0])
        due = kept is not None and done > begun and (done == steps or done % kept.every == 0)
        if due:
            kept.keep(CARRY, (np.array(done, np.int32), list(carries)), step=done)
        if due or done == steps:
            reel.done, reel.carries = done, list(carries)

    return on_step


def _keyframes(job: FilmJob) -> list[np.ndarray]:
    """uint8 [H, W, 3], each once."""
    return [job.clips[0].inputs.pixels[0, 0], *(clip.inputs.pixels[0, -1] for clip in job.clips)]


def report(job: FilmJob, seconds: dict[str, float]) -> dict[str, Any]:
    """What was made, how and where, as JSON beside the film."""
    first = job.clips[0]
    clips = [{"prompt": text, "frames": frames, "seed": clip.settings.seed}
             for text, frames, clip in zip(job.prompts, job.frames, job.clips, strict=True)]  # fmt: skip
    board = {"images": list(job.images), "places": list(film.places(job.spans)), "overlap": job.overlap, "clips": clips}
    return {"storyboard": board, "run": resume.digest(job.told)} | files.common(first, job.outputs, job.notes, seconds)
