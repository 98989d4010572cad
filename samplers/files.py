"""From files to files: keyframe images in; a video, its contact sheet and its settings out.

Everything that can be wrong is found in `prepare`, before any computing; `make` then runs the pipeline.
"""

import dataclasses
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from samplers import explain as explaining
from samplers import pipeline, video
from samplers.pipeline import Settings
from samplers.sample import Progress
from wanjax import checkpoint, keyframes, sharding
from wanjax import method as methods
from wanjax.config import ModelConfig
from wanjax.tokenizer import PromptCut, Tokenizer

try:
    import resource
except ImportError:  # Windows has no such module, and then no peak memory in the report
    resource = None

VERSIONED = ("wanjax", "jax", "jaxlib", "flax", "numpy", "pillow", "imageio", "av", "tokenizers")


@dataclass(frozen=True)
class Job:
    """A checked run: nothing about it is wrong any more that can be known without computing.

    Attributes:
      model: "tiny" or a model folder; config: what is in it.
      first, last: RGB images of any size; paths: where they came from.
      settings: what to make; dtype: policy, None for the model's own.
      outputs: where to write; fps, scale: of the video file, scale a whole factor.
      mesh: axis -> devices, empty for one device.
      notes: lines that the user should see.
      explain: folder, layer and step of the plots; None for none.
    """

    model: str
    config: ModelConfig
    first: Image.Image
    last: Image.Image
    paths: tuple[str, str]
    settings: Settings
    dtype: str | None
    outputs: video.Outputs
    fps: float
    scale: int
    mesh: dict[str, int]
    notes: tuple[str, ...]
    explain: tuple[Path, int, int] | None = None


def prepare(
    first: str | Path,
    last: str | Path,
    out: str | Path,
    *,
    model: str | Path = "tiny",
    dtype: str | None = None,
    fps: float | None = None,
    scale: int | None = None,
    overwrite: bool = False,
    mesh: dict[str, int] | None = None,
    size: tuple[int, int] | str | None = None,
    explain: str | Path | None = None,
    explain_layer: int | None = None,
    explain_step: int | None = None,
    **settings: Any,
) -> Job:
    """Reads and checks everything a run needs; computes nothing.

    Args:
      first, last: image files.
      out: video file or folder, see `video.write`; contact sheet and JSON go beside it.
      model: "tiny" or a model folder.
      dtype: "float32", "bfloat16", or None for the model's own.
      fps, scale: of the file; default the model's, and what brings the shorter side to 256 pixels.
      overwrite: whether existing outputs may be replaced.
      mesh: axis -> number of devices.
      size: (height, width), or "auto" for the first keyframe's aspect at the model's usual area.
      explain: folder for plots of the method, see `samplers.explain`.
      explain_layer, explain_step: whose attention is plotted, from 0; None takes one that KAB acts on.
      settings: fields of `Settings`; what is None or absent takes the model's default.

    Raises:
      ValueError: one clear line (`KeyframeError`, `OutputError`, `CheckpointError` among them).
    """
    folder, config = checkpoint.read_config(model)
    if dtype is not None:
        checkpoint.policy(dtype)
    given = {name: value for name, value in settings.items() if value is not None}
    if size not in (None, "auto"):
        given["size"] = size
    chosen = Settings.of(config, **given)
    chosen.check(config)
    images, notes = _read_keyframes((first, last), chosen.matte)
    if size == "auto":
        area = config.sampling.size[0] * config.sampling.size[1]
        fitting = keyframes.area_size((images[0].height, images[0].width), area, config.size_multiple)
        chosen = dataclasses.replace(chosen, size=fitting)
    for name, image in zip(("first", "last"), images, strict=True):
        if (image.height, image.width) != chosen.size:
            notes.append(f"{name} keyframe {image.height}x{image.width} is brought to "
                         f"{chosen.size[0]}x{chosen.size[1]} by {chosen.fit}")  # fmt: skip
    notes += _cut_prompts(Tokenizer(folder / checkpoint.TOKENIZER), chosen, config.dit.text_length)
    fps = config.sampling.fps if fps is None else fps
    video.check_fps(fps)
    scale = video.enlarge_factor(*chosen.size) if scale is None else scale
    if scale < 1:
        raise ValueError(f"scale {scale}: give a whole number of at least 1")
    if mesh:
        sharding.make_mesh(mesh)
    outputs = video.check_output(out, overwrite)
    for path in (first, last):
        if any(target.exists() and target.samefile(path) for target in (outputs.video, outputs.sheet)):
            raise ValueError(f"output {out}: is the keyframe {path}; choose another name")
    video.check_sides(out, *(side * scale for side in chosen.size))
    plots = _plots(explain, out, explain_layer, explain_step, chosen, config, overwrite)
    return Job(
        str(model),
        config,
        *images,
        (str(first), str(last)),
        chosen,
        dtype,
        outputs,
        fps,
        scale,
        mesh or {},
        tuple(notes),
        plots,
    )


def _plots(
    folder: str | Path | None,
    out: str | Path,
    layer: int | None,
    step: int | None,
    settings: Settings,
    config: ModelConfig,
    overwrite: bool,
) -> tuple[Path, int, int] | None:
    """Where plots go and of which layer and step. ValueError as `explain.check`, or for a layer without a folder."""
    if folder is None:
        if layer is not None or step is not None:
            raise ValueError("--explain-layer and --explain-step choose what --explain DIR plots; give a folder")
        return None
    if Path(folder).absolute() == Path(out).absolute():
        raise ValueError(f"--explain {folder}: is the output; choose another folder")
    return (Path(folder), *explaining.check(folder, settings, config, layer, step, overwrite))


def _read_keyframes(paths: tuple[str | Path, str | Path], matte: Sequence[int]) -> tuple[list[Image.Image], list[str]]:
    """The images, and what there is to say of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", keyframes.KeyframeWarning)
        images = [keyframes.read(path, matte) for path in paths]
    return images, [str(warning.message) for warning in caught]


def _cut_prompts(tokenizer: Tokenizer, settings: Settings, length: int) -> list[str]:
    """A line for each prompt that the model cannot take whole."""
    lines = []
    for name, text in (("prompt", settings.prompt), ("negative prompt", settings.negative_prompt)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptCut)
            tokenizer.encode([text], length)
        lines += [str(warning.message).replace("prompt 1", name, 1) for warning in caught]
    return lines


def make(job: Job, progress: Progress | None = None) -> dict[str, Any]:
    """Runs a job and writes its three outputs, all or none of them.

    Returns:
      The report, as it is written to the JSON file.

    Raises:
      ValueError: damaged weights. FloatingPointError: NaN or inf while denoising. OSError: a full disk.
    """
    start = time.perf_counter()
    mesh = sharding.make_mesh(job.mesh) if job.mesh else None
    model = checkpoint.load(job.model, job.dtype, mesh)
    loaded = time.perf_counter() - start
    result = pipeline.inbetween(model, job.first, job.last, job.settings, progress, mesh)
    frames = result.video[0]
    sheet = video.contact_sheet(frames, pipeline.fitted((job.first, job.last), job.settings))
    begun = time.perf_counter()
    with video.staged(job.outputs) as outputs:
        video.write_png(outputs.sheet, sheet)
        video.write(outputs.video, frames, job.fps, job.scale)
        seconds = {"load": loaded, **result.seconds, "write": time.perf_counter() - begun}
        if job.explain is not None:  # before the outputs get their names, so that a failure leaves none of them
            begun = time.perf_counter()
            explaining.explain(model, job.first, job.last, job.settings, *job.explain, mesh=mesh)
            seconds["explain"] = time.perf_counter() - begun
        seconds["total"] = time.perf_counter() - start
        report = _report(job, model.config, seconds)
        video.write_json(outputs.settings, report)
    return report


def inbetween_files(first: str | Path, last: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Makes the video between two image files and writes it; `options` are those of `prepare`.

    Returns:
      The report that is also written beside the video.

    Raises:
      ValueError: bad input, before any computing. FloatingPointError: NaN or inf while denoising.
    """
    return make(prepare(first, last, out, **options))


def _report(job: Job, config: ModelConfig, seconds: dict[str, float]) -> dict[str, Any]:
    devices = jax.devices()
    return {
        "keyframes": list(job.paths),
        "video": str(job.outputs.video),
        "model": {"name": config.name, "source": job.model,
                  "precision": dataclasses.asdict(config.dit.precision)},
        "method": methods.describe(job.settings.method, config, job.settings.frames),
        "settings": dataclasses.asdict(job.settings) | {"fps": job.fps, "scale": job.scale, "mesh": job.mesh},
        "notes": list(job.notes),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "peak_memory_bytes": _peak_memory(devices[0]),
        "device": {"kind": devices[0].device_kind, "count": len(devices), "platform": devices[0].platform},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONED},
        "command": sys.argv,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a clone without installing
        return "not installed"


def _peak_memory(device: jax.Device) -> dict[str, int]:
    """Bytes: the process on the host, and the device where it keeps count."""
    peak = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak["host"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        peak["device"] = int(stats["peak_bytes_in_use"])
    return peak


def example() -> dict[str, Any]:
    """Keyframes and prompt that come with the package: {"first", "last", "prompt"}."""
    folder = checkpoint.bundled().parent / "example"
    prompt = (folder / "prompt.txt").read_text(encoding="utf-8").strip()
    return {"first": folder / "first.png", "last": folder / "last.png", "prompt": prompt}
