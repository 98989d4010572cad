"""A film from files: keyframes in; a video through all of them, its contact sheet and its settings out.

`prepare` finds everything that can be wrong, `make` runs `samplers.film` and keeps what is computed, as
`samplers.files` does for one clip.
"""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

from samplers import ahead, files, film, pipeline, resume, video
from samplers.film import Span
from samplers.pipeline import Encoded, Timings
from samplers.request import Asked, ask
from samplers.resume import CARRY, ENCODED, EVERY, RunFolder
from samplers.run import OnStep, bar
from samplers.sample import Carry
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

    @property
    def shared(self) -> int:
        """Latent frames that neighbours share."""
        return film.shared_latents(self.spans, self.clips[0].config.vae.temporal_stride)

    @property
    def steps(self) -> int:
        """Of denoising."""
        return self.clips[0].settings.steps

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
    **how: Any,
) -> FilmJob:
    """Reads and checks everything a film needs; computes nothing.

    Args:
      images: of the keyframes, at least two, in order.
      out, overwrite, save_every, restart: as `request.prepare`.
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
    if hosts.is_first():
        sources = (split(path)[0] for path in images)
        outputs = video.check_output(out, overwrite, inputs=(*sources, folder.path))
        notes += [*outputs.notes, *(kept.check() if kept is not None else [])]
    return dataclasses.replace(job, outputs=outputs, kept=kept, notes=tuple(dict.fromkeys(notes)))


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
    start, first = time.perf_counter(), job.clips[0]
    held = job.kept is not None and hosts.is_first()
    with job.kept.opened() if held else nullcontext():
        with video.staged(job.outputs) if hosts.is_first() else nullcontext() as outputs:
            timings = Timings()
            with timings.stage("load"):
                model = checkpoint.load(first.folder, first.dtype, first.devices, policy=first.memory.policy,
                                        weights=first.weights)  # fmt: skip
            frames = _compute(job, model, timings, progress)
            told = marks.marked(report(job, timings.seconds | {"total": time.perf_counter() - start}))
            if outputs is not None:
                video.write(outputs.video, frames, first.fps, first.scale)
                sheet = video.contact_sheet(frames, _keyframes(job), at=film.places(job.spans), columns=9, rows=3)
                video.write_png(outputs.sheet, sheet)
                video.write_json(outputs.settings, told)
        if held:
            job.kept.empty()
    return told


def _compute(job: FilmJob, model: checkpoint.Model, timings: Timings, progress: bool) -> np.ndarray:
    """The film uint8 [T, H, W, 3]; a stage at a time for all clips."""
    plans, mesh, steps = [clip.plan for clip in job.clips], job.clips[0].devices, job.steps
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        done, carries = _carries(job)
        if done < steps:
            with timings.stage("encode"):
                told = [pipeline.place(one, mesh) for one in _encoded(job, model)]
            with timings.stage("denoise"), bar(steps, "denoise", progress) as shown:
                noises = [pipeline.noise(*one, mesh) for one in zip(plans, job.seeds, strict=True)]
                latents = film.denoise(model, plans, told, noises, job.shared, seeds=job.seeds, carries=carries,
                                       first=done, on_step=_keeping(job, done, shown))  # fmt: skip
        else:
            latents = [carry.sample for carry in carries]
        with timings.stage("decode"):
            videos = [pipeline.decode(model, *one) for one in zip(plans, latents, strict=True)]
    return film.join(videos, job.spans)[0]


def _carries(job: FilmJob) -> tuple[int, list[Carry] | None]:
    """Steps done and what the run folder has of them."""
    if job.kept is None:
        return 0, None
    like = [ahead.start(clip.plan, seeds, clip.devices) for clip, seeds in zip(job.clips, job.seeds, strict=True)]
    found = job.kept.read(CARRY, (np.zeros((), np.int32), like))
    return (0, None) if found is None else (int(found[0]), found[1])


def _encoded(job: FilmJob, model: checkpoint.Model) -> list[Encoded]:
    """From the run folder, or of the models."""
    plans = [clip.plan for clip in job.clips]
    like = [ahead.encoded(plan) for plan in plans]
    found = None if job.kept is None else job.kept.read(ENCODED, like)
    if found is not None:
        return [Encoded(*one) for one in found]
    inputs, prompts = [clip.inputs for clip in job.clips], [[clip.settings.prompt] for clip in job.clips]
    made = film.encode(model, plans, inputs, prompts)
    if job.kept is not None:
        job.kept.keep(ENCODED, [(one.conditions, one.negative) for one in made])
    return made


def _keeping(job: FilmJob, begun: int, shown: OnStep) -> film.OnStep:
    """Moves the bar, and keeps the carries every few steps and after the last."""
    steps = job.steps

    def on_step(done: int, carries: Sequence[Carry]) -> None:
        shown(done, carries[0])
        if job.kept is not None and done > begun and (done == steps or done % job.kept.every == 0):
            job.kept.keep(CARRY, (np.array(done, np.int32), list(carries)), step=done)

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
