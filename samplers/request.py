"""What a run is asked for, checked: nothing about a `Job` is wrong any more that can be known without computing."""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from PIL import Image

from samplers import explain, hints, memory, preview, recall, skipping, video
from samplers.pipeline import Inputs
from samplers.plan import Plan, Settings, check_settings, pixel_places
from samplers.resume import EVERY, RunFolder, digest
from wanjax import checkpoint, environment, hosts, sharding, streaming, writing
from wanjax.config import ModelConfig
from wanjax.keyframes import KeyframeWarning, area_size, read, split
from wanjax.method import Method
from wanjax.settings import check_mesh, refuse, whole
from wanjax.tokenizer import PromptCut, Tokenizer

NOTABLE = 4 << 30
"""Bytes: who runs a smaller model does not ask where it lies."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One clip that is asked for: nothing about it is wrong any more that can be known without computing.

    Attributes:
      model: "tiny" or a path, as it was given; folder: what it is; config: of it, under the policy asked for.
      inputs: the keyframes as the models take them, in the order of `plan.at`; paths: where they came from.
      plan: what to make; dtype: policy, None for the model's own.
      fps, scale: of the video file, scale a whole factor.
      mesh: axis -> devices, empty for one device.
      memory: how the model is to lie in memory.
      weights: what `checkpoint.load` is asked for; None for weights as they are stored.
      notes: lines that the user should see.
      auto: whether the method is to be chosen by trying (`samplers.auto`); that of the settings stands in for it.
    """

    model: str
    folder: checkpoint.Folder
    config: ModelConfig
    inputs: Inputs
    paths: tuple[str, ...]
    plan: Plan
    dtype: str | None
    fps: float
    scale: int
    mesh: dict[str, int]
    memory: memory.Choice
    weights: str | None
    notes: tuple[str, ...]
    auto: bool = False

    @property
    def settings(self) -> Settings:
        """Of the plan."""
        return self.plan.settings

    @cached_property
    def told(self) -> dict[str, Any]:
        """What decides the clip, see `identity`."""
        return identity(self.folder, self.config, self.plan, self.inputs, self.auto)

    @cached_property
    def devices(self) -> Mesh | None:
        """The mesh; None for one device."""
        return sharding.make_mesh(self.mesh, jax.devices()[: math.prod(self.mesh.values())]) if self.mesh else None


@dataclass(frozen=True, kw_only=True)
class Job(Asked):
    """A clip and where it goes.

    Attributes:
      outputs: where to write.
      explain: layer and step of the plots; None for none.
      kept: where the run keeps what it has, to go on from; None for nowhere.
      preview: where pictures of the clip go while it is made; None for none. preview_every: steps between two.
      keep_latents: whether the latents are written beside the video.
      finished: whether this very clip is there already; then nothing was looked at but that.
    """

    outputs: video.Outputs
    explain: tuple[int, int] | None = None
    kept: RunFolder | None = None
    preview: Path | None = None
    preview_every: int = 0
    keep_latents: bool = False
    finished: bool = False

    @cached_property
    def digest(self) -> str:
        """What the hosts of a run must have in common: what decides the clip, the mesh, the step that is plotted."""
        return hashlib.sha256(repr((self.told, self.mesh, self.explain)).encode()).hexdigest()


def identity(
    folder: checkpoint.Folder, config: ModelConfig, plan: Plan, inputs: Inputs, auto: bool = False
) -> dict[str, Any]:
    """What decides a clip, as JSON: settings, keyframes, model, versions; not where and how it is computed."""
    hashed = hashlib.sha256()
    for pixels in (inputs.pixels, inputs.vision):
        hashed.update(f"{pixels.shape}".encode())
        hashed.update(pixels.tobytes())
    plain = dataclasses.replace(config, dit=dataclasses.replace(config.dit, stream="no"),
                                vae=dataclasses.replace(config.vae, tiles=1))  # fmt: skip
    manifest = folder.path / checkpoint.MANIFEST
    files = manifest.read_bytes() if manifest.is_file() else b""
    told = {
        "settings": dataclasses.asdict(plan.settings) | ({"method": "auto"} if auto else {}),
        "keyframes": {"at": list(plan.at), "digest": hashed.hexdigest()},
        "model": {"name": config.name, "digest": hashlib.sha256(files + repr(plain).encode()).hexdigest()},
        "versions": environment.versions(("wanjax", "jax", "jaxlib", "flax")),
    }
    return json.loads(json.dumps(told, default=str))


def ask(
    first: str | Path | None,
    last: str | Path | None,
    *,
    keyframes: Mapping[int, str | Path] | None = None,
    model: str | Path = "tiny",
    dtype: str | None = None,
    fps: float | None = None,
    scale: int | None = None,
    devices: int | str | None = None,
    mesh: dict[str, int] | None = None,
    memory: str = "auto",
    weights: str = "auto",
    vae_memory: int | None = None,
    size: tuple[int, int] | str | None = None,
    preset: str | None = None,
    recalled: str | Path | None = None,
    **settings: Any,
) -> Asked:
    """Reads and checks everything that decides a clip and how it is computed; looks at no output.

    Args:
      first, last: image files, or FILE@N for a frame of a video; None leaves one out.
      keyframes: more of them, by pixel frame, negative ones counted from the end.
      model: "tiny" or a model folder.
      dtype: "float32", "bfloat16", or None for the model's own.
      fps, scale: of the file; default the model's, and what brings the shorter side to 256 pixels.
      devices: how many share the work, or "all"; the mesh is then `sharding.choose_mesh`'s.
      mesh: by hand, axis -> number of devices.
      memory, weights: how the model is to lie in memory, see `memory.choose`; "auto" takes the first that fits.
      vae_memory: bytes that encoding keyframes and decoding may take besides the weights.
      size: (height, width), or "auto" for the first keyframe's aspect at the model's usual area.
      preset: a name in `plan.PRESETS`.
      recalled: file of the clip that these are the settings of, to say where keyframes are others.
      settings: fields of `Settings`; what is None or absent takes the model's default; the method may be "auto".

    Raises:
      ValueError: one clear line (`KeyframeError`, `CheckpointError` among them).
    """
    folder = checkpoint.open_folder(model)
    config = folder.config if dtype is None else checkpoint.with_dtype(folder.config, dtype)
    given = {name: value for name, value in settings.items() if value is not None}
    auto = given.get("method") == "auto"
    given |= {"method": Method()} if auto else {}
    given |= {"size": size} if size not in (None, "auto") else {}
    chosen = skipping.settled(Settings.of(config, preset, **given), folder.path)
    check_settings(config, chosen)
    at, paths = _places(first, last, keyframes or {}, chosen.frames)
    images, notes = _read_keyframes(paths, chosen.matte)
    notes += folder.notes
    if size == "auto":
        chosen = dataclasses.replace(chosen, size=_fitting_size(images[0], config))
    mesh = _mesh(devices, mesh or {}, config.dit.num_heads)
    hosts.check_mesh(math.prod(mesh.values()))
    config, choice, asked = _memory(config, chosen, mesh, memory, weights, vae_memory)
    notes += [choice.why] if _worth_saying(choice, (memory, weights, vae_memory)) else []
    plan = Plan.of(config, chosen, at)
    inputs = Inputs.prepare([images], plan)
    notes += _about_sizes(images, plan)
    notes += _about_prompts(folder.tokenizer, chosen, config)
    notes += hints.about(folder.path, chosen.prompt, list(inputs.pixels[0]))
    notes += _about_repeats(mesh, chosen)
    if recalled is not None:
        notes += recall.about_keyframes(recall.read(recalled), str(recalled), inputs.pixels[0], plan.at)
    fps, scale = of_the_file(config, chosen, fps, scale)
    return Asked(model=str(model), folder=folder, config=config, inputs=inputs, paths=tuple(map(str, paths)), plan=plan,
                 dtype=dtype, fps=fps, scale=scale, mesh=mesh, memory=choice, weights=asked, notes=tuple(notes),
                 auto=auto)  # fmt: skip


def prepare(
    first: str | Path | None,
    last: str | Path | None,
    out: str | Path,
    *,
    overwrite: bool = False,
    explain: str | Path | None = None,
    explain_layer: int | None = None,
    explain_step: int | None = None,
    save_every: int | None = None,
    restart: bool = False,
    keep_latents: bool = False,
    preview_every: int | None = None,
    again: bool = False,
    **how: Any,
) -> Job:
    """Reads and checks everything a run needs; computes nothing.

    Args:
      first, last, how: as `ask`.
      out: video file or folder, see `video.write`; contact sheet and JSON go beside it.
      overwrite: whether existing outputs of wanjax may be replaced.
      explain: folder for plots of the method, see `samplers.explain`.
      explain_layer, explain_step: whose attention is plotted, from 0; None takes one that KAB acts on.
      save_every: steps between two states that are kept to go on from (`samplers.resume`); 0 keeps nothing at all.
      restart: whether what a stopped run kept is thrown away.
      keep_latents: whether the latents are written beside the video, see `samplers.latents`.
      preview_every: steps between two previews beside the output; None or 0 for none.
      again: whether a clip that is finished is no mistake, see `Job.finished`.

    Raises:
      ValueError: one clear line (`KeyframeError`, `OutputError`, `CheckpointError` among them).
    """
    asked = ask(first, last, **how)
    looked_at = _looked_at(explain, explain_layer, explain_step, asked.plan)
    video.check_sides(out, *(side * asked.scale for side in asked.settings.size))
    outputs = video.name_outputs(out)  # of the other hosts, which write nothing
    every = whole("save_every", EVERY if save_every is None else save_every, 0, 10**6)
    kept = RunFolder.of(outputs.video, asked.told, every, restart) if every else None
    latents = _latents(outputs, keep_latents)
    finished = again and not overwrite and is_finished(outputs, asked, [target.path for target in latents])
    preview_every = whole("preview_every", preview_every or 0, 0, 10**6)
    shown, notes = _preview(asked.config, outputs, preview_every)
    if hosts.is_first() and not finished:
        sources = (split(path)[0] for path in asked.paths)
        also = [*_plots(explain), *latents]
        outputs = video.check_output(out, overwrite, inputs=(*sources, asked.folder.path), also=also)
        notes += kept.check() if kept is not None else []
    own = vars(asked) | {"notes": (*asked.notes, *outputs.notes, *notes)}
    own = {field.name: own[field.name] for field in dataclasses.fields(Asked)}
    return Job(**own, outputs=outputs, explain=looked_at, kept=kept, preview=shown, preview_every=preview_every,
               keep_latents=keep_latents, finished=finished)  # fmt: skip


def is_finished(outputs: video.Outputs, asked: Any, also: Sequence[Path] = ()) -> bool:
    """Whether all outputs are there, and the report says that they are of this very clip, as fast and as large.

    Args:
      asked: a clip or a film, of which `told`, `fps` and `scale` are looked at.
      also: what else must be there.
    """
    if not all(path.exists() for path in (outputs.video, outputs.sheet, outputs.settings, *also)):
        return False
    try:
        found = json.loads(outputs.settings.read_text(encoding="utf-8"))
        made = found["run"], found["settings"]["fps"], found["settings"]["scale"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return made == (digest(asked.told), asked.fps, asked.scale)


def _places(
    first: str | Path | None, last: str | Path | None, more: Mapping[int, str | Path], frames: int
) -> tuple[list[int], list[str | Path]]:
    """Pixel frames of the keyframes, ascending, and their paths. ValueError for a place outside or given twice."""
    given = [(0, first), (-1, last), *more.items()]
    given = [(place, path) for place, path in given if path is not None]
    pixel_places([place for place, _ in given], frames)
    ordered = sorted((place % frames, path) for place, path in given)
    return [place for place, _ in ordered], [path for _, path in ordered]


def of_the_file(config: ModelConfig, settings: Settings, fps: float | None, scale: int | None) -> tuple[float, int]:
    """Frames per second and whole factor of the video file. ValueError for what no file can have."""
    fps = config.sampling.fps if fps is None else fps
    video.check_fps(fps)
    scale = video.enlarge_factor(*settings.size) if scale is None else scale
    refuse((scale < 1, f"scale {scale}: give a whole number of at least 1"))
    return fps, scale


def _latents(outputs: video.Outputs, wanted: bool) -> list[writing.Target]:
    """Where latents go, if they are wanted."""
    return [writing.Target(beside(outputs.video, ".latents.safetensors"))] if wanted else []


def _preview(config: ModelConfig, outputs: video.Outputs, every: int) -> tuple[Path | None, list[str]]:
    """Where previews go, if they are wanted, and a line where this model can have none. OutputError for what is in
    their way."""
    if not every:
        return None, []
    if (why := preview.missing(config)) is not None:
        return None, [why]
    path = beside(outputs.video, ".preview.png")
    if hosts.is_first():
        writing.check([preview.target(path)], overwrite=True)
    return path, []


def beside(output: Path, ending: str) -> Path:
    """A file beside a video, of its name."""
    return output.with_name(f"{output.stem if output.suffix else output.name}{ending}")


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
            check_mesh(mesh, heads)
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


def _read_keyframes(paths: Sequence[str | Path], matte: Sequence[int]) -> tuple[list[Image.Image], list[str]]:
    """The images, and what there is to say of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KeyframeWarning)
        images = [read(path, matte) for path in paths]
    return images, [str(warning.message) for warning in caught]


def _fitting_size(image: Image.Image, config: ModelConfig) -> tuple[int, int]:
    """(height, width) of the image's aspect at the model's usual area."""
    return area_size((image.height, image.width), math.prod(config.sampling.size), config.size_multiple)


def _about_sizes(images: Sequence[Image.Image], plan: Plan) -> list[str]:
    """A line for each keyframe that is not of the video's size."""
    height, width = plan.settings.size
    last = plan.settings.frames - 1
    names = [{0: "first keyframe", last: "last keyframe"}.get(place, f"keyframe {place}") for place in plan.at]
    return [f"{name} {image.height}x{image.width} is brought to {height}x{width} by {plan.settings.fit}"
            for name, image in zip(names, images, strict=True)
            if (image.height, image.width) != plan.settings.size]  # fmt: skip


def _about_prompts(tokenizer: Tokenizer, settings: Settings, config: ModelConfig) -> list[str]:
    """A line for each prompt that the model cannot take whole."""
    lines = []
    for name, text in (("prompt", settings.prompt), ("negative prompt", settings.negative_prompt)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptCut)
            tokenizer.encode([text], config.dit.text_length)
        lines += [str(warning.message).replace("prompt 1", name, 1) for warning in caught]
    return lines
