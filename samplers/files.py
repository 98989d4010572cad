"""From files to files: keyframe images in; a video, its contact sheet and its settings out.

Everything that can be wrong is found by `request.prepare`, before any computing; `make` then runs the stages.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from samplers import auto, explain, latents, recall, video, work
from samplers.plan import Plan
from samplers.request import Asked, Job, prepare
from samplers.resume import CHOSEN, digest
from samplers.run import OnStep
from samplers.work import Clip
from wanjax import checkpoint, environment, hosts, marks
from wanjax.method import describe

__all__ = ["Job", "prepare", "make", "written", "report", "inbetween_files", "example"]


def make(job: Job, progress: bool = False, programs: Path | None = None) -> dict[str, Any]:
    """Runs a job and writes its outputs, all or none of them; of several hosts the first writes.

    What is computed is kept in the job's run folder, and is not computed again: after a run that died the same job goes
    on, to the same bits.

    Args:
      progress: draws a bar while denoising.
      programs: folder where compiled programs are kept (`samplers.kept`); None for nowhere.

    Returns:
      The report, as it is written to the JSON file.

    Raises:
      ValueError: damaged weights, a damaged run folder, or a file that came to the output's name meanwhile.
      FloatingPointError: NaN or inf; names the stage. OSError: a full disk.
    """
    start, clip = time.perf_counter(), Clip(job)
    with clip.opened():
        # From here on nobody else can begin on these names.
        with written(clip) as write, work.loaded(job, programs) as (model, ready, seconds):
            clip.seconds["load"] = seconds
            told = write(model, through(model, clip, ready, "denoise" if progress else None), start)
        clip.finish()
    return told


def through(
    model: checkpoint.Model,
    clip: Clip,
    ready: work.Ready,
    progress: str | None = None,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Video uint8 [T, H, W, 3] of a clip, by all stages that it has not behind it; arguments as of `work.denoise`.

    Raises:
      OutputError: a damaged run folder. FloatingPointError: NaN or inf; names the stage. OSError: a full disk.
    """
    clip.restore()
    settle(clip, model)
    work.encode(model, [clip], ready)
    work.denoise(model, [clip], ready, progress, on_step)
    return work.decode(model, clip, ready)


def settle(clip: Clip, model: checkpoint.Model) -> None:
    """Chooses the clip's method by trying, where that is asked for. FloatingPointError as `auto.choose`."""
    job = clip.job
    if not job.auto:
        return
    with clip.timed("choose"):
        found = None if job.kept is None else job.kept.read(CHOSEN, np.zeros((), np.int32))
        if found is not None:  # not again: on other devices it might be another, and the carry is of this one
            name, chosen = list(auto.CANDIDATES.items())[int(found)]
            why = f"method auto: {name}, as it was chosen before the run was stopped"
        else:
            chosen, why = auto.choose(model, job.settings, list(job.inputs.pixels[0]), job.plan.at, config=job.config,
                                      mesh=job.devices)  # fmt: skip
            clip.keep(CHOSEN, np.array(list(auto.CANDIDATES.values()).index(chosen), np.int32))
    settings = dataclasses.replace(job.settings, method=chosen)
    plan = Plan.of(job.config, settings, job.plan.at)
    clip.job = dataclasses.replace(job, plan=plan, notes=(*job.notes, why))


Write = Callable[[checkpoint.Model, np.ndarray, float | None], dict[str, Any]]
"""(model, video uint8 [T, H, W, 3], when the clip was begun, or None where it was one of many) -> report."""


@contextmanager
def written(clip: Clip) -> Iterator[Write]:
    """The names of a clip's outputs are its own inside; they appear at the end, all or none.

    Yields:
      What writes them, on the first of several hosts.

    Raises:
      OutputError: another run is writing one of them, or something appeared or changed there since the check.
    """
    with video.staged_also(clip.job.outputs) if hosts.is_first() else nullcontext((None, ())) as (outputs, more):

        def write(model: checkpoint.Model, frames: np.ndarray, begun: float | None) -> dict[str, Any]:
            job = clip.job  # not before, as `settle` changes it
            sample = hosts.fetch(clip.carry.sample) if job.keep_latents else None  # all hosts have to ask
            if outputs is None:
                if job.explain is not None:  # the first host draws, all of them compute
                    _observed(model, clip)
                return {}
            plots = list(more)
            with clip.timed("write"):
                text = made_of(job)
                video.write(outputs.video, frames, job.fps, job.scale, text)
                sheet = video.contact_sheet(frames, list(job.inputs.pixels[0]), at=job.plan.at)
                video.write_png(outputs.sheet, sheet, text)
                if job.keep_latents:
                    own = sample, job.config.vae, text, job.inputs.pixels[0], job.plan.at
                    latents.write(plots.pop(), *own)
            for folder in plots:
                with clip.timed("explain"):
                    explain.draw(folder, model, job.plan, _observed(model, clip), *job.explain)
            own = sum(clip.seconds.values())
            clip.seconds["total"] = own if begun is None else time.perf_counter() - begun
            told = marks.marked(report(job, clip.seconds))
            video.write_json(outputs.settings, told)
            return told

        yield write


def made_of(job: Job) -> str:
    """What the clip is made of, for the file itself (`samplers.recall`)."""
    return recall.to_text(job.settings, model=job.config.name, fps=job.fps, scale=job.scale,
                          keyframes=job.inputs.pixels[0], at=job.plan.at)  # fmt: skip


def _observed(model: checkpoint.Model, clip: Clip) -> Any:
    """Attention of the step and layer that are to be explained."""
    job = clip.job
    return explain.observe(model, job.plan, clip.encoded, clip.explained, *job.explain, mesh=job.devices)


def inbetween_files(first: str | Path, last: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Makes the video between two image files and writes it; `options` are those of `prepare`.

    Returns:
      The report that is also written beside the video.

    Raises:
      ValueError: bad input, before any computing. FloatingPointError: NaN or inf; names the stage.
    """
    return make(prepare(first, last, out, **options))


def report(job: Job, seconds: dict[str, float]) -> dict[str, Any]:
    """What was made, how and where, as JSON beside the video."""
    images = [{"path": path, "frame": at, "sha256": recall.digest(pixels)}
              for path, at, pixels in zip(job.paths, job.plan.at, job.inputs.pixels[0], strict=True)]  # fmt: skip
    own = {"keyframes": images, "run": digest(job.kept.identity if job.kept is not None else job.told)}
    return own | common(job, job.outputs, job.notes, seconds)


def common(asked: Asked, outputs: video.Outputs, notes: Sequence[str], seconds: Mapping[str, float]) -> dict[str, Any]:
    """What a report says of a clip and of a film."""
    config = asked.config
    return {
        "video": str(outputs.video),
        "model": {"name": config.name, "source": asked.model, "precision": dataclasses.asdict(config.dit.precision)},
        "method": describe(asked.settings.method, config, asked.settings.frames),
        "settings": dataclasses.asdict(asked.settings) | {"fps": asked.fps, "scale": asked.scale, "mesh": asked.mesh},
        "memory": asked.memory.report(),
        "notes": list(notes),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        **environment.report(),
        "command": sys.argv,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def example() -> dict[str, Any]:
    """Keyframes and prompt that come with the package: {"first", "last", "prompt"}."""
    folder = checkpoint.bundled().parent / "example"
    prompt = (folder / "prompt.txt").read_text(encoding="utf-8").strip()
    return {"first": folder / "first.png", "last": folder / "last.png", "prompt": prompt}
