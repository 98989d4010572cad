"""What a run will take of memory, operations and time, by formula: no weights, no device, no array."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.families import SLOTS
from convert.hub import HUB, NotGiven, Unreachable, parse, sizes
from samplers import estimate, flops, memory, schedule, skipping
from samplers.chips import Chip, Devices
from samplers.plan import Settings, check_settings
from wanjax import checkpoint, sharding
from wanjax.config import PRESETS, ModelConfig, preset
from wanjax.precision import BFLOAT16, Precision
from wanjax.residency import POLICIES

REACHED = (0.3, 0.65)
"""Of the published peak, what such programs reach: one H200 0.59 denoising, 0.44 of float32's in the VAE, 0.33 of
bfloat16's (benchmarks/results/h200-2026-11-28)."""
UNKNOWN_HOST = 2**60
"""Bytes of host memory of a machine that nobody has seen: what a run needs is told instead."""
PREALLOCATED = 0.75
"""Of a GPU's memory JAX takes so much at once and no more, unless XLA_PYTHON_CLIENT_MEM_FRACTION says another share."""

NAMES = (
    (r"flf2v.*14b", "flf2v_14b"), (r"i2v.*14b", "i2v_14b"), (r"t2v.*1\.?3b", "t2v_1_3b"),
    (r"fun.*1\.?3b.*inp", "fun_inp_1_3b"), (r"fun.*14b.*inp", "fun_inp_14b"),
)  # fmt: skip
"""Presets by what repositories of their weights are called."""


@dataclass(frozen=True)
class Source:
    """A model as it was named.

    Attributes:
      config: as it will run.
      disk: bytes by part where they are known: of a folder, or on the hub.
      download: bytes to fetch; None where nothing is known or needed.
      notes: lines for a user.
    """

    config: ModelConfig
    disk: Mapping[str, int]
    download: int | None = None
    notes: tuple[str, ...] = ()


def source(model: str, dtype: str | None = None) -> Source:
    """The model of a preset's name, a model folder, or an address on the hub, of which only the sizes are asked.

    Args:
      dtype: policy as `checkpoint.with_dtype`; None is a folder's own, and else what `convert --dtype bf16` makes.

    Raises:
      ValueError: one line: no such model or policy, or a repository that is none.
    """
    if model.startswith(HUB):
        found = _on_hub(model)
    elif model in PRESETS and model != "tiny":
        found = Source(preset(model).with_precision(BFLOAT16), {})
    else:
        folder = checkpoint.open_folder(model, whole=False)
        found = Source(folder.config, {part: _bytes(folder.path, part) for part in SLOTS})
    return found if dtype is None else dataclasses.replace(found, config=checkpoint.with_dtype(found.config, dtype))


def _on_hub(model: str) -> Source:
    address = parse(model)
    names = [name for pattern, name in NAMES if re.search(pattern, str(address).lower())]
    if not names:
        raise ValueError(f"model {model}: its name does not tell which model it is; give one of {', '.join(PRESETS)} "
                         "instead, without a download size")  # fmt: skip
    config = preset(names[0]).with_precision(BFLOAT16)
    wanted = SLOTS if config.clip is not None else tuple(part for part in SLOTS if part != "clip")
    note = f"{model}: taken to be {names[0]} by its name, and to be converted with --dtype bf16"
    try:
        found = sizes(address, wanted)
    except NotGiven:
        raise
    except Unreachable as error:
        return Source(config, {}, None, (f"{error}; sizes are by formula", note))
    return Source(config, {part: n for part, n in found.items() if part in wanted}, sum(found.values()), (note,))


def _bytes(folder: Path, part: str) -> int:
    """Of one part in a model folder of either form."""
    file = folder / f"{part}.safetensors"
    files = [file] if file.is_file() else [one for one in (folder / part).rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)


def report(
    found: Source,
    devices: Devices,
    overrides: Mapping[str, Any],
    policy: str = "auto",
    weights: str = "auto",
    vae_memory: int | None = None,
) -> dict[str, Any]:
    """Everything that the command prints, in bytes, operations and seconds; `choice` is None where nothing fits.

    Args:
      overrides: fields of `Settings` that are not the model's own.
      policy, weights, vae_memory: as `memory.choose`.

    Raises:
      ValueError: settings that the model cannot run.
    """
    config = checkpoint.with_weights(found.config, weights) if weights == "bf16" else found.config
    settings = Settings.of(config, **overrides)
    check_settings(config, settings)
    schedule.sigmas(settings.schedule, settings.steps, settings.shift)
    chip = devices.chip
    mesh = sharding.choose_mesh(devices.count, config.dit.num_heads) if devices.count > 1 else {}
    host = UNKNOWN_HOST if devices.host is None else devices.host
    own = memory.preferred(config, policy, weights, devices.count)
    narrow = weights if weights not in ("auto", "bf16") else "int8"
    kinds = ("bf16",) if config.dit.precision.kernel else ("bf16", narrow)
    policies = [one for one in POLICIES if one != "stream" or devices.count == 1]
    pairs = [(one, kind) for one in policies for kind in kinds]
    found_ways = memory.ways(config, settings, pairs, mesh, chip.memory, vae_memory, chip.platform, host)
    estimate.estimate(config, settings, mesh, *own[0], platform=chip.platform)  # may refuse what was asked for
    try:
        choice = memory.choose(
            config, settings, mesh, chip.memory, policy, weights, vae_memory, chip.platform, host=host
        )
        refusal = None
    except ValueError as error:
        choice, refusal = None, str(error)
    taken = choice or next((way for way in found_ways if (way.policy, way.weights) == own[-1]), found_ways[-1])
    work = operations(config, settings)
    return {
        "model": {"name": config.name, "transformer": dataclasses.asdict(config.dit.precision),
                  "vae": dataclasses.asdict(config.vae.precision)},
        "settings": {"size": list(settings.size), "frames": settings.frames, "steps": settings.steps,
                     "guidance": settings.guidance, "guidance_mode": settings.guidance_mode,
                     "skip_passes": settings.skip_passes},
        "devices": {"name": devices.name, "count": devices.count, "mesh": mesh, "host_memory_bytes": devices.host,
                    **{name: getattr(chip, name) for name in ("platform", "memory", "peak", "source")}},
        "parts": parts(config, found.disk, narrow),
        "download_bytes": found.download,
        "ways": [_way(way) for way in found_ways],
        "choice": None if choice is None else _way(choice) | {"why": choice.why},
        "refusal": refusal,
        "operations": work,
        "seconds": seconds(config, settings, devices, taken, work),
        "notes": [*found.notes, *_about_fraction(chip, taken)],
    }  # fmt: skip


def _way(way: memory.Choice) -> dict[str, Any]:
    one = way.estimate
    return {"memory": way.policy, "weights": way.weights, "tiles": way.tiles, "fits": way.fits, "stages": one.stages,
            "peak_bytes": one.peak, "host_bytes": one.host}  # fmt: skip


def parts(config: ModelConfig, disk: Mapping[str, int], narrow: str) -> dict[str, dict[str, int | None]]:
    """Bytes of each part: on disk where that is known, in memory as stored, and with 8-bit kernels."""
    kinds = {"memory": "bf16"} | ({} if config.dit.precision.kernel else {narrow: narrow})
    found = {part: {"disk": disk.get(part)} for part in estimate.stored(config)}
    for name, kind in kinds.items():
        for part, tree in estimate.stored(config, kind).items():
            found[part][name] = sum(estimate.split_sizes(tree, {}).values())
    return found


def operations(config: ModelConfig, settings: Settings) -> dict[str, int]:
    """Matrix products and convolutions of a whole run; the encoders' are not worth counting, nor is a guess."""
    c, s, stride = config, settings, config.vae.spatial_stride
    grid = (c.vae.latent_frames(s.frames), s.size[0] // stride, s.size[1] // stride)
    step = flops.total(flops.dit(c.dit, grid, batch=1 if s.guidance == 1 else 2))
    encode, decode = (flops.total(of(c.vae, s.frames, s.size)) for of in (flops.vae_encode, flops.vae_decode))
    return {"encode": encode, "step": step, "denoise": round(s.steps * step * _run(s)), "decode": decode}


def _run(settings: Settings) -> float:
    """The share of passes that is run and not guessed."""
    scale = np.full(settings.steps, settings.guidance)
    skipped = skipping.chosen(settings.skip_passes, settings.steps)
    flags = skipping.flags(skipped, scale, settings.guidance_mode == "batched")
    guessed, whole = skipping.passes(flags, scale)
    return 1 - guessed / whole


def seconds(
    config: ModelConfig, settings: Settings, devices: Devices, way: memory.Choice, work: Mapping[str, int]
) -> dict[str, list[float]] | None:
    """[least, most] by stage and in total, by roofline and estimated: REACHED of the peak, weights read once a pass,
    streamed ones over the link. None for a device whose peak is not known.

    Not in it: reading the weights, compiling, what travels between devices, the encoders.
    """
    chip = devices.chip
    if not chip.peak or not chip.single:
        return None
    overlap = {
        stage: way.tiles * estimate.window_share(config.vae, settings.size, stage, way.tiles)
        for stage in estimate.REACH
    }
    passes = 1 if settings.guidance == 1 or settings.guidance_mode == "batched" else 2
    moved = max(way.estimate.weights["dit"] / chip.bandwidth, way.estimate.host / devices.count / chip.link)
    found = {}
    for stage, part, extra in (("encode", "vae", overlap["keyframes"]), ("denoise", "dit", 1),
                               ("decode", "vae", overlap["decode"])):  # fmt: skip
        peak = _peak(chip, getattr(config.for_platform(chip.platform), part).precision)
        least = settings.steps * passes * _run(settings) * moved if stage == "denoise" else 0
        found[stage] = [max(least, work[stage] * extra / devices.count / peak / share) for share in REACHED[::-1]]
    return found | {"total": [sum(own[end] for own in found.values()) for end in (0, 1)]}


def _peak(chip: Chip, precision: Precision) -> float:
    """Operations a second: of half precision, of float32, or of what stands in for it, TF32 or three passes."""
    if precision.compute != "float32":
        return chip.peak
    if getattr(precision, "passes", "exact") == "exact":
        return chip.single
    return chip.peak / (2 if chip.platform == "gpu" else 3)


def _about_fraction(chip: Chip, way: memory.Choice) -> list[str]:
    """A line where JAX would not take enough of a GPU's memory by itself."""
    share = way.estimate.peak * memory.SPARE / chip.memory
    if chip.platform != "gpu" or not PREALLOCATED < share <= 1:
        return []
    return [f"JAX takes {PREALLOCATED:.0%} of a GPU's memory; set XLA_PYTHON_CLIENT_MEM_FRACTION=.95 for this run"]
