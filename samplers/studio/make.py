"""From the page's values to checked jobs, and through the stages: what the command line does, with a model that stays.

`Studio.job` may be called by any thread; what computes (`load`, `make`, `compare`, `look`) by the line's alone.
"""

import json
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from samplers import asked, explain, files, pipeline, preview, recall, video
from samplers.options import argument, parser
from samplers.programs import Programs
from samplers.request import Job
from samplers.run import OnStep
from samplers.sample import Carry
from samplers.studio import draw, fields
from samplers.studio.line import Ticket
from samplers.work import Clip
from wanjax import checkpoint, hosts, keyframes
from wanjax.method import METHODS, Method

KEPT = 48
"""Clips that stay on disk; the oldest go."""
GAIN = 4
"""How much a difference of two clips is brightened."""
EVERY = 0.15
"""Seconds between two previews."""
FIRST_METHOD = "paper"
PLAIN = ("prompt", "frames", "seed", "steps", "guidance", "shift", "solver")
"""Values of the page that are options of the command line as they are."""


@dataclass(frozen=True)
class Progress:
    """How far a clip is.

    Attributes:
      done, steps: of the denoising. label: which of several clips; empty for one.
      fresh: whether no clip of this length, size and places of keyframes was made before, so that it compiles.
      frames: uint8 [F, h, w, 3], a picture of each latent frame as it is estimated; None where there is none.
    """

    done: int
    steps: int
    label: str = ""
    fresh: bool = False
    frames: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Made:
    """A finished clip, or a comparison of two.

    Attributes:
      job: of the clip; of a comparison B's.
      folder: where its files are: clip.mp4, clip.sheet.png, key0.png, ...
      seconds: of wall time. compiled: programs that were compiled (or read from disk) for it.
      against: of a comparison, A's job. apart: mean difference of the two in levels of 255.
    """

    job: Job
    folder: Path
    seconds: float
    compiled: int
    against: Job | None = None
    apart: float = 0.0


class Studio:
    """A model, and a folder of clips that are made with it.

    Args:
      how: options that say which model and where it computes: model, dtype, devices, memory, weights, vae_memory.
      folder: for the clips, this process's own.

    Raises:
      ValueError: as `checkpoint.open_folder`.
    """

    def __init__(self, how: Mapping[str, Any], folder: Path) -> None:
        self.how, self.folder = dict(how), folder
        opened = checkpoint.open_folder(how["model"])
        self.config = opened.config if how["dtype"] is None else checkpoint.with_dtype(opened.config, how["dtype"])
        self.bundled = opened.path == checkpoint.bundled()
        self._model: checkpoint.Model | None = None
        self._lies: tuple[str, str | None] | None = None
        self._checking = threading.Lock()
        self._known: set[tuple[Any, ...]] = set()

    def place(self) -> Path:
        """A new folder for a clip, with a name that nobody guesses; the oldest ones go."""
        old = sorted((one for one in self.folder.iterdir() if one.is_dir()), key=lambda one: one.stat().st_mtime)
        for one in old[: max(0, len(old) - KEPT)]:
            shutil.rmtree(one, ignore_errors=True)
        place = self.folder / secrets.token_hex(16)
        place.mkdir(mode=0o700)
        return place

    def picture(self, path: Path) -> Image.Image:
        """A keyframe as a run would read it; what there is to say of it a run will say. KeyframeError: unusable."""
        with self._checking, warnings.catch_warnings():
            warnings.simplefilter("ignore", keyframes.KeyframeWarning)
            return keyframes.read(path)

    def job(self, values: Mapping[str, Any], place: Path, name: str = "clip") -> Job:
        """A checked job of the page's values.

        Args:
          values: those of `PLAIN` and `fields.of_method`; "method", a profile; "first", "last": paths or None; "inner":
            pairs of path and pixel frame; "base": a clip whose settings were loaded, or None;
            "exact": whether the method is the profile and nothing of that clip's.
          place: folder of the clip. name: of its files.

        Raises:
          ValueError: one line, as on the command line.
        """
        first, last, inner = values.get("first"), values.get("last"), list(values.get("inner") or ())
        if first is None and last is None and not inner:
            raise ValueError("keyframes: there is none; drop a picture, draw one, or take an example")
        if (first is None) != (last is None) and not inner:
            inner, first, last = [(first, 0) if last is None else (last, -1)], None, None
        base, told = values.get("base"), {}
        method = METHODS[values["method"]]
        if base is not None:
            told["from"] = str(base)
            loaded = recall.read(base).settings.method
            same = fields.profile(loaded) == values["method"] and not values.get("exact")
            method, told = (loaded, told) if same else (method, told | {"method": values["method"]})
        else:
            told["method"] = values["method"]
        told |= {name: values[name] for name in PLAIN}
        if values["method"] != "wan":
            told |= fields.options(values, method, self.config, values["frames"])
        told |= {"out": str(place / f"{name}.mp4"), "save_every": 0}
        told |= {name: str(path) for name, path in (("first", first), ("last", last)) if path is not None}
        told |= {"keyframe": [f"{path}@{round(at)}" for path, at in inner]} if inner else {}
        with self._checking:
            return self._checked(told)

    def _checked(self, told: dict[str, Any]) -> Job:
        """A job of options by name."""
        p = parser()
        p.raises = True
        arguments = [text for name, value in told.items() for text in argument(p, name, value)]
        options = asked.parse(p, arguments) | self.how
        job = files.prepare(**asked.one(options))
        lies = job.memory.policy, job.weights
        if self._lies is not None and lies != self._lies:
            wanted = f"--memory {lies[0]} --weights {lies[1] or 'bf16'}"
            raise ValueError(f"memory: this clip fits only with {wanted}, and the model was loaded otherwise; start "
                             "with these, or make it smaller")  # fmt: skip
        return job

    @property
    def first_prompt(self) -> str:
        """The prompt that the page shows at first; other models get none, as what is drawn there is not theirs."""
        return draw.prompt(*draw.EXAMPLES[0]) if self.bundled else ""

    def first(self) -> Job:
        """A job of the values that the page shows at first. ValueError for a model that cannot make it here."""
        s, place = self.config.sampling, self.place()
        drawn = {"first": place / "first.png", "last": place / "last.png"}
        for path, one in zip(drawn.values(), draw.EXAMPLES[0][:2], strict=True):
            video.write_png(path, draw.draw(one, *s.size))
        own = drawn | {"prompt": self.first_prompt, "seed": 0, "method": FIRST_METHOD}
        own |= {name: getattr(s, name) for name in ("frames", "steps", "guidance", "shift", "solver")}
        return self.job(own | fields.of_method(METHODS[FIRST_METHOD], self.config, s.frames), place)

    def load(self, job: Job) -> checkpoint.Model:
        """The model, as the first job that is made wants it to lie in memory."""
        if self._model is None:
            self._model = checkpoint.load(job.folder, job.dtype, job.devices, policy=job.memory.policy,
                                          weights=job.weights)  # fmt: skip
            self._lies = job.memory.policy, job.weights
        return self._model

    def make(self, job: Job, ticket: Ticket) -> Made:
        """Makes a clip. Stopped within a step; else raises as `files.make`."""
        begun = time.perf_counter()
        with counted() as compiled:
            job, _ = self._through(job, ticket)
        self._keyframes(job)
        return Made(job, job.outputs.video.parent, time.perf_counter() - begun, compiled())

    def compare(self, one: Job, other: Job, ticket: Ticket) -> Made:
        """Makes two clips and a third of both side by side and their difference, clip.mp4 beside B's files."""
        begun, folder = time.perf_counter(), other.outputs.video.parent
        with counted() as compiled:
            one, first = self._through(one, ticket, "A")
            other, second = self._through(other, ticket, "B")
        both = side_by_side(first, second)
        text = json.loads(files.made_of(other)) | {"compared_with": json.loads(files.made_of(one))["settings"]}
        text = json.dumps(text)
        video.write(folder / "clip.mp4", both, other.fps, other.scale, text)
        video.write_png(folder / "clip.sheet.png", video.contact_sheet(both), text)
        self._keyframes(other)
        apart = float(np.abs(first.astype(int) - second).mean())
        return Made(other, folder, time.perf_counter() - begun, compiled(), one, apart)

    def look(self, job: Job, layer: int | None, step: int | None, ticket: Ticket) -> dict[str, Any]:
        """Where the frames look in one layer and step of a clip, as `explain.numbers`; None as in `explain.where`."""
        if job.plan.config.dit.stream != "no":
            raise ValueError("attention: the whole transformer is never there with --memory stream; use --memory stage")
        layer, step = explain.where(job.plan, layer, step)
        model, plan, programs = self.load(job), job.plan, Programs.of(job.plan)
        with jax.set_mesh(job.devices) if job.devices is not None else nullcontext():
            (encoded,) = pipeline.encode(model, plan, [job.inputs], [[job.settings.prompt]], programs)
            encoded = pipeline.place(encoded, job.devices)
            noise = pipeline.noise(plan, [job.settings.seed], job.devices, programs)
            latents = pipeline.denoise(model, plan, encoded, noise, seeds=[job.settings.seed], mesh=job.devices,
                                       until=step, on_step=lambda *_: ticket.check(), programs=programs)  # fmt: skip
        seen = explain.observe(model, plan, encoded, latents, layer, step, mesh=job.devices)
        return explain.numbers(model, plan, layer, step, seen)

    def _through(self, job: Job, ticket: Ticket, label: str = "") -> tuple[Job, np.ndarray]:
        """Makes one clip and writes it; the job as it was settled, and the frames."""
        begun, model, programs = time.perf_counter(), self.load(job), Programs.of(job.plan)
        kind = job.settings.frames, job.settings.size, job.plan.at
        fresh = kind not in self._known
        if fresh:
            ticket.tell(Progress(0, job.settings.steps, label, True))

        def ready(stage: str) -> Programs:
            ticket.check()
            return programs

        clip = Clip(job)
        with clip.opened(), files.written(clip) as write:
            frames = files.through(model, clip, ready, on_step=watch(job, ticket, label, fresh))
            ticket.check()
            write(model, frames, begun)
        self._known.add(kind)
        return clip.job, frames

    def _keyframes(self, job: Job) -> None:
        """Writes the fitted keyframes beside the clip, for the page."""
        folder = job.outputs.video.parent
        for number, pixels in enumerate(job.inputs.pixels[0]):
            video.write_png(folder / f"key{number}.png", pixels)

    def recalled(self, path: Path) -> tuple[Path, dict[str, Any]]:
        """A copy of a clip whose settings are loaded, and they as the page's values.

        Raises:
          ValueError: as `recall.read`, or a clip of another model.
        """
        copy = self.place() / f"from{path.suffix.lower()}"
        shutil.copyfile(path, copy)
        found = recall.read(copy)
        if found.model != self.config.name:
            raise ValueError(f"{path.name}: was made by model {found.model}, and this page is of {self.config.name}; "
                             "start the studio with --model for it")  # fmt: skip
        s = found.settings
        values = {name: getattr(s, name) for name in PLAIN} | fields.of_method(s.method, self.config, s.frames)
        return copy, values | {"method": fields.profile(s.method)}


def watch(job: Job, ticket: Ticket, label: str = "", fresh: bool = False) -> OnStep:
    """An `OnStep` that tells a ticket how far a clip is, with a picture now and then; Stopped if it is to stop."""
    steps, shown = job.settings.steps, 0.0
    without = preview.missing(job.config) is not None

    def on_step(done: int, carry: Carry) -> None:
        nonlocal shown
        ticket.check()
        frames, now = None, time.perf_counter()
        if done and not without and (now - shown > EVERY or done == steps):
            shown = now
            frames = preview.picture(job.config, hosts.fetch(carry.data_1))[0]
        ticket.tell(Progress(done, steps, label, fresh and not done, frames))

    return on_step


def side_by_side(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two clips uint8 [T, H, W, 3] and, brightened, how far apart they are: [T, H, 3 W + 2 gap, 3]."""
    height, width = first.shape[1:3]
    gap = np.full((len(first), height, max(1, width // 48), 3), 16, np.uint8)
    apart = np.minimum(np.abs(first.astype(np.int16) - second) * GAIN, 255).astype(np.uint8)
    return np.concatenate([first, gap, second, gap, apart], axis=2)


@contextmanager
def counted() -> Iterator[Any]:
    """Yields a function that says how many programs were compiled, or read from disk, since."""
    count = 0

    def listen(event: str, duration: float, **_: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def shown_method(values: Mapping[str, Any], studio: Studio) -> Method:
    """The method that the page's values stand for, without keyframes. ValueError as the command line."""
    from samplers.options import method_of

    p = parser()
    p.raises = True
    told = {"method": values["method"]}
    if values["method"] != "wan":
        told |= fields.options(values, METHODS[values["method"]], studio.config, values["frames"])
    arguments = [text for name, value in told.items() for text in argument(p, name, value)]
    return method_of(vars(p.parse_args(arguments)))
