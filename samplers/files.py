"""From files to files: keyframe images in; a video, its contact sheet and its settings out.

Everything that can be wrong is found in `prepare`, before any computing; `make` then runs the pipeline.
"""

import dataclasses
import hashlib
import math
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from PIL import Image

from samplers import explain, hints, memory, pipeline, skipping, video
from samplers.ahead import compile_ahead
from samplers.pipeline import Batch, Inputs
from samplers.plan import Plan, Settings, check_settings
from samplers.run import bar
from samplers.sample import Carry
from wanjax import checkpoint, environment, hosts, keyframes, marks, sharding, streaming, writing
from wanjax.config import ModelConfig
from wanjax.method import describe
from wanjax.tokenizer import PromptCut, Tokenizer

NOTABLE = 4 << 30
"""Bytes: who runs a smaller model does not ask where it lies."""


@dataclass(frozen=True)
class Job:
    """A checked run: nothing about it is wrong any more that can be known without computing.

    Attributes:
      model: "tiny" or a path, as it was given; folder: what it is; config: of it, under the policy asked for.
      inputs: both keyframes as the models take them; paths: where they came from.
      plan: what to make; dtype: policy, None for the model's own.
      outputs: where to write; fps, scale: of the video file, scale a whole factor.
      mesh: axis -> devices, empty for one device.
      memory: how the model is to lie in memory.
      weights: what `checkpoint.load` is asked for; None for weights as they are stored.
      notes: lines that the user should see.
      explain: layer and step of the plots; None for none.
    """

    model: str
    folder: checkpoint.Folder
    config: ModelConfig
    inputs: Inputs
    paths: tuple[str, str]
    plan: Plan
    dtype: str | None
    outputs: video.Outputs
    fps: float
    scale: int
    mesh: dict[str, int]
    memory: memory.Choice
    weights: str | None
    notes: tuple[str, ...]
    explain: tuple[int, int] | None = None

    @property
    def settings(self) -> Settings:
        """Of the plan."""
        return self.plan.settings

    @cached_property
    def digest(self) -> str:
        """Of all that the hosts of a run must have in common: settings, keyframes, model, versions."""
        hashed = hashlib.sha256(repr((self.config, self.settings, self.mesh, self.explain)).encode())
        for pixels in (self.inputs.pixels, self.inputs.vision):
            hashed.update(pixels.tobytes())
        manifest = self.folder.path / checkpoint.MANIFEST
        hashed.update(manifest.read_bytes() if manifest.is_file() else b"")
        return f"{hashed.hexdigest()} {environment.versions(('wanjax', 'jax', 'jaxlib', 'flax'))}"

    @cached_property
    def devices(self) -> Mesh | None:
        """The mesh; None for one device."""
        return sharding.make_mesh(self.mesh, jax.devices()[: math.prod(self.mesh.values())]) if self.mesh else None


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
    devices: int | str | None = None,
    mesh: dict[str, int] | None = None,
    memory: str = "auto",
    weights: str = "auto",
    vae_memory: int | None = None,
    size: tuple[int, int] | str | None = None,
    preset: str | None = None,
    explain: str | Path | None = None,
    explain_layer: int | None = None,
    explain_step: int | None = None,
    **settings: Any,
) -> Job:
    """Reads and checks everything a run needs; computes nothing.

    Args:
      first, last: image files, or FILE@N for a frame of a video.
      out: video file or folder, see `video.write`; contact sheet and JSON go beside it.
      model: "tiny" or a model folder.
      dtype: "float32", "bfloat16", or None for the model's own.
      fps, scale: of the file; default the model's, and what brings the shorter side to 256 pixels.
      overwrite: whether existing outputs of wanjax may be replaced.
      devices: how many share the work, or "all"; the mesh is then `sharding.choose_mesh`'s.
      mesh: by hand, axis -> number of devices.
      memory, weights: how the model is to lie in memory, see `memory.choose`; "auto" takes the first that fits.
      vae_memory: bytes that encoding keyframes and decoding may take besides the weights.
      size: (height, width), or "auto" for the first keyframe's aspect at the model's usual area.
      preset: a name in `plan.PRESETS`.
      explain: folder for plots of the method, see `samplers.explain`.
      explain_layer, explain_step: whose attention is plotted, from 0; None takes one that KAB acts on.
      settings: fields of `Settings`; what is None or absent takes the model's default.

    Raises:
      ValueError: one clear line (`KeyframeError`, `OutputError`, `CheckpointError` among them).
    """
    folder = checkpoint.open_folder(model)
    config = folder.config if dtype is None else checkpoint.with_dtype(folder.config, dtype)
    given = {name: value for name, value in settings.items() if value is not None}
    if size not in (None, "auto"):
        given["size"] = size
    chosen = skipping.settled(Settings.of(config, preset, **given), folder.path)
    check_settings(config, chosen)
    images, notes = _read_keyframes((first, last), chosen.matte)
    notes += folder.notes
    if size == "auto":
        chosen = dataclasses.replace(chosen, size=_fitting_size(images[0], config))
    mesh = _mesh(devices, mesh or {}, config.dit.num_heads)
    hosts.check_mesh(math.prod(mesh.values()))
    config, choice, asked = _memory(config, chosen, mesh, memory, weights, vae_memory)
    notes += [choice.why] if _worth_saying(choice, (memory, weights, vae_memory)) else []
    plan = Plan.of(config, chosen)
    inputs = Inputs.prepare([images], plan)
    notes += _about_sizes(images, chosen)
    notes += _about_prompts(folder.tokenizer, chosen, config)
    notes += hints.about(folder.path, chosen.prompt, list(inputs.pixels[0]))
    fps = config.sampling.fps if fps is None else fps
    video.check_fps(fps)
    scale = video.enlarge_factor(*chosen.size) if scale is None else scale
    if scale < 1:
        raise ValueError(f"scale {scale}: give a whole number of at least 1")
    notes += _about_repeats(mesh, chosen)
    looked_at = _looked_at(explain, explain_layer, explain_step, plan)
    sources = (keyframes.split(path)[0] for path in (first, last))
    outputs = video.name_outputs(out)  # of the other hosts, which write nothing
    if hosts.is_first():
        outputs = video.check_output(out, overwrite, inputs=(*sources, folder.path), also=_plots(explain))
    video.check_sides(out, *(side * scale for side in chosen.size))
    notes += outputs.notes
    paths = str(first), str(last)
    return Job(str(model), folder, config, inputs, paths, plan, dtype, outputs, fps, scale, mesh, choice, asked,
               tuple(notes), looked_at)  # fmt: skip


def _memory(
    config: ModelConfig, settings: Settings, mesh: dict[str, int], policy: str, weights: str, vae_memory: int | None
) -> tuple[ModelConfig, memory.Choice, str | None]:
    """How the model is to lie in memory: its configuration then, the choice, and the weights to ask for.

    Raises:
      ValueError: nothing fits; 8-bit weights that are stored as others; streaming on several devices.
    """
    if policy == "stream":
        streaming.check_mesh(mesh or None)
    choice = memory.choose(config, settings, mesh, policy=policy, weights=weights, vae_memory=vae_memory)
    asked = None if weights == "auto" and choice.weights == "bf16" else choice.weights
    config = config if asked is None else checkpoint.with_weights(config, asked)
    config = streaming.with_stream(config) if choice.policy == "stream" else config
    return dataclasses.replace(config, vae=dataclasses.replace(config.vae, tiles=choice.tiles)), choice, asked


def _worth_saying(choice: memory.Choice, asked: tuple[str, str, int | None]) -> bool:
    """Whether a choice was asked for, gives something up, or is of a model that fills a good part of a device."""
    plain = (choice.policy, choice.weights, choice.tiles) == ("keep", "bf16", 1)
    return asked != ("auto", "auto", None) or not plain or choice.estimate.peak > NOTABLE


def _about_repeats(mesh: dict[str, int], settings: Settings) -> list[str]:
    """A line for a mesh whose devices do the same work."""
    passes = 2 if settings.guidance_mode == "batched" and settings.guidance != 1 else 1
    copies = sharding.repeats(mesh, passes)
    mend = "use --guidance-mode batched or --devices" if passes == 1 else "use --devices"
    what = f"mesh data={copies}: {copies} times the same work, for there is {passes} clip or pass to divide; {mend}"
    return [what] if copies > 1 else []


def _mesh(devices: int | str | None, mesh: dict[str, int], heads: int) -> dict[str, int]:
    """Axis sizes. ValueError for devices that are not there, and for a mesh that does not divide the heads."""
    if devices is None:
        if mesh:
            sharding.make_mesh(mesh)
            sharding.check_mesh(mesh, heads)
        return mesh
    if mesh:
        raise ValueError("devices and mesh: a mesh says already how many devices; give one of them")
    there = len(jax.devices())
    count = there if devices == "all" else devices
    if not 1 <= count <= there:
        raise ValueError(f"devices {devices}: there are {there}; give a number from 1 to {there}, or all")
    return {} if count == 1 else sharding.choose_mesh(count, heads)


def _plots(folder: str | Path | None) -> list[writing.Target]:
    """Where plots go, if any are wanted."""
    return [] if folder is None else [explain.target(folder)]


def _looked_at(folder: str | Path | None, layer: int | None, step: int | None, plan: Plan) -> tuple[int, int] | None:
    """Which layer and step are plotted. ValueError as `explain.check`, for a layer without a folder, or for a model of
    which only single layers are there."""
    if folder is not None and plan.config.dit.stream != "no":
        raise ValueError("--explain looks into the whole transformer, which is never there with --memory stream; "
                         "use --memory stage, or leave one of them away")  # fmt: skip
    if folder is not None:
        return explain.check(plan, layer, step)
    if layer is not None or step is not None:
        raise ValueError("--explain-layer and --explain-step choose what --explain DIR plots; give a folder")
    return None


def _read_keyframes(paths: tuple[str | Path, str | Path], matte: Sequence[int]) -> tuple[list[Image.Image], list[str]]:
    """The images, and what there is to say of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", keyframes.KeyframeWarning)
        images = [keyframes.read(path, matte) for path in paths]
    return images, [str(warning.message) for warning in caught]


def _fitting_size(image: Image.Image, config: ModelConfig) -> tuple[int, int]:
    """(height, width) of the image's aspect at the model's usual area."""
    return keyframes.area_size((image.height, image.width), math.prod(config.sampling.size), config.size_multiple)


def _about_sizes(images: Sequence[Image.Image], settings: Settings) -> list[str]:
    """A line for each keyframe that is not of the video's size."""
    height, width = settings.size
    return [f"{name} keyframe {image.height}x{image.width} is brought to {height}x{width} by {settings.fit}"
            for name, image in zip(("first", "last"), images, strict=True)
            if (image.height, image.width) != settings.size]  # fmt: skip


def _about_prompts(tokenizer: Tokenizer, settings: Settings, config: ModelConfig) -> list[str]:
    """A line for each prompt that the model cannot take whole."""
    lines = []
    for name, text in (("prompt", settings.prompt), ("negative prompt", settings.negative_prompt)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptCut)
            tokenizer.encode([text], config.dit.text_length)
        lines += [str(warning.message).replace("prompt 1", name, 1) for warning in caught]
    return lines


def make(job: Job, progress: bool = False, programs: Path | None = None) -> dict[str, Any]:
    """Runs a job and writes its three outputs, all or none of them; of several hosts the first writes.

    Args:
      progress: draws a bar while denoising.
      programs: folder where compiled programs are kept (`samplers.kept`); None for nowhere.

    Returns:
      The report, as it is written to the JSON file.

    Raises:
      ValueError: damaged weights, or a file that came to the output's name meanwhile. FloatingPointError: NaN or inf;
      names the stage. OSError: a full disk.
    """
    start = time.perf_counter()
    # From here on nobody else can begin on these names.
    with video.staged_also(job.outputs) if hosts.is_first() else nullcontext((None, ())) as (outputs, plots):
        model, result, latents, seconds = _compute(job, progress, programs)
        if outputs is None:
            if job.explain is not None:  # the first host draws, all of them compute
                explain.observe(model, job.plan, result.encoded, latents, *job.explain, mesh=job.devices)
            return _report(job, seconds)
        begun = time.perf_counter()
        frames = result.video[0]
        video.write(outputs.video, frames, job.fps, job.scale)
        video.write_png(outputs.sheet, video.contact_sheet(frames, list(job.inputs.pixels[0])))
        seconds["write"] = time.perf_counter() - begun
        for folder in plots:
            begun = time.perf_counter()
            seen = explain.observe(model, job.plan, result.encoded, latents, *job.explain, mesh=job.devices)
            explain.draw(folder, model, job.plan, seen, *job.explain)
            seconds["explain"] = time.perf_counter() - begun
        seconds["total"] = time.perf_counter() - start
        report = marks.marked(_report(job, seconds))
        video.write_json(outputs.settings, report)
    return report


def _compute(
    job: Job, progress: bool, programs: Path | None
) -> tuple[checkpoint.Model, pipeline.Result, jax.Array | None, dict[str, float]]:
    """The model, its result, the latents that enter the step which is to be explained, and seconds by stage."""
    start = time.perf_counter()
    plan, mesh, seen = job.plan, job.devices, []
    # A mesh changes where arguments lie, and so the programs.
    with nullcontext() if mesh else compile_ahead(plan, folder=programs) as ready:
        model = checkpoint.load(job.folder, job.dtype, mesh, policy=job.memory.policy, weights=job.weights)
        loaded = time.perf_counter() - start
        with bar(job.settings.steps) if progress else nullcontext() as shown:

            def on_step(done: int, carry: Carry) -> None:
                if shown is not None:
                    shown(done, carry)
                if job.explain is not None and done == job.explain[1]:
                    seen.append(carry.sample)

            batch = Batch(job.inputs, [job.settings.prompt], [job.settings.seed])
            (result,) = pipeline.make(model, plan, [batch], mesh=mesh, ready=ready, on_step=on_step)
    return model, result, seen[0] if seen else None, {"load": loaded, **result.seconds}


def inbetween_files(first: str | Path, last: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Makes the video between two image files and writes it; `options` are those of `prepare`.

    Returns:
      The report that is also written beside the video.

    Raises:
      ValueError: bad input, before any computing. FloatingPointError: NaN or inf; names the stage.
    """
    return make(prepare(first, last, out, **options))


def _report(job: Job, seconds: dict[str, float]) -> dict[str, Any]:
    config = job.config
    return {
        "keyframes": list(job.paths),
        "video": str(job.outputs.video),
        "model": {"name": config.name, "source": job.model,
                  "precision": dataclasses.asdict(config.dit.precision)},
        "method": describe(job.settings.method, config, job.settings.frames),
        "settings": dataclasses.asdict(job.settings) | {"fps": job.fps, "scale": job.scale, "mesh": job.mesh},
        "memory": job.memory.report(),
        "notes": list(job.notes),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        **environment.report(),
        "command": sys.argv,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def example() -> dict[str, Any]:
    """Keyframes and prompt that come with the package: {"first", "last", "prompt"}."""
    folder = checkpoint.bundled().parent / "example"
    prompt = (folder / "prompt.txt").read_text(encoding="utf-8").strip()
    return {"first": folder / "first.png", "last": folder / "last.png", "prompt": prompt}
