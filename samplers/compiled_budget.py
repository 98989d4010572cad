"""The compiler's own word on a stage's memory, by reports of `benchmarks.aot`, and the estimate beside it."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from samplers import estimate
from samplers.chips import CHIPS, Devices
from samplers.plan import Settings
from wanjax import checkpoint, sharding
from wanjax.config import PRESETS, ModelConfig, preset

LAYERS = 2
"""Of the transformer that are compiled: the loop over them has one body, and its temporaries are those of all."""
TARGETS: Mapping[tuple[str, int], str] = MappingProxyType(
    {
        ("h100", 1): "h100x1", ("h100", 2): "h100x2", ("h100", 4): "h100x4", ("h100", 8): "h100x8",
        ("v6e", 1): "v6e:1x1", ("v6e", 8): "v6e:2x4", ("v5e", 1): "v5e:1x1", ("v5e", 8): "v5e:2x4",
        ("v5e", 16): "v5e:4x4", ("v5p", 4): "v5p:2x2x1",
    }
)  # fmt: skip
"""What `benchmarks.aot` calls so many devices."""
PICTURES = MappingProxyType({"keyframes": ("encoder/", "quant/"), "decode": ("decoder/", "post_quant/")})
"""What of the VAE a program takes."""


def compare(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report of `benchmarks.aot` with the estimate of the same program, in bytes of one device.

    Returns:
      "weights", by formula for both; "estimated" and "compiled" for all else that the program takes.
    """
    own, stage, mesh = report["settings"], report["part"], report["mesh"]
    config = checkpoint.with_dtype(preset(own["preset"]), own["dtype"])
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, num_layers=own["layers"]))
    fields = {name: own[name] for name in ("frames", "steps", "guidance_mode")} | {"size": tuple(own["size"])}
    weights, tiles, policy = own.get("weights") or "bf16", own.get("tiles", 1), own.get("memory", "keep")
    settings, kind = Settings.of(config, **fields), platform(report["target"])
    tree = estimate.stored(config, weights)[estimate.STAGES[stage]]
    names = {name for name in tree if name.startswith(PICTURES.get(stage, ""))}
    sizes = estimate.split_sizes(tree, mesh)
    found = estimate.temporary(config, settings, mesh, policy, weights, tiles, kind)[stage]
    streams = sum(n for name, n in sizes.items() if estimate.streamed(name)) if policy == "stream" else 0
    one = streams // config.dit.num_layers
    if streams and kind == "gpu":  # a program is one layer, with its kernels, and the blocks' other weights
        names = {name for name in names if name.startswith("blocks/")}
        used = one - streams
    else:
        used = -streams
        found += min(streams, estimate.ABREAST[kind] * one)
    used += sum(n for name, n in sizes.items() if name in names)
    return {"stage": stage, "weights_bytes": used, "estimated_bytes": found,
            "compiled_bytes": report["memory_bytes"]["total"] - used}  # fmt: skip


def platform(target: str) -> str:
    """ "gpu" or "tpu", of a target of `benchmarks.aot`."""
    return "gpu" if target.startswith("h100") else "tpu"


def compiled(
    config: ModelConfig,
    settings: Mapping[str, Any],
    devices: Devices,
    stages: Sequence[str],
    policy: str = "keep",
    weights: str = "bf16",
) -> list[dict[str, Any]]:
    """What each stage takes besides weights, estimated and compiled, as `compare`.

    Args:
      settings: "size", "frames", "steps", "guidance_mode".
      policy, weights: as `estimate.estimate`.

    Raises:
      ValueError: one line: a machine or a model that cannot be compiled for here, or what the compiler said.
    """
    names = {chip: name for name, chip in CHIPS.items()}
    target = TARGETS.get((names.get(devices.chip, ""), devices.count))
    if target is None:
        raise ValueError(f"--compile: not for {devices.name}; for {', '.join(f'{n}-{k}' for n, k in TARGETS)}")
    if config.name not in PRESETS or preset(config.name).dit.dim != config.dit.dim:
        raise ValueError(f"--compile: for the published models alone, {', '.join(PRESETS)}")
    found = importlib.util.find_spec("benchmarks")
    if found is None or not found.submodule_search_locations:
        raise ValueError("--compile: needs benchmarks/aot of a source checkout; run it from there")
    root = Path(next(iter(found.submodule_search_locations))).parent
    mesh = sharding.choose_mesh(devices.count, config.dit.num_heads) if devices.count > 1 else {}
    own = {kind: name for name, kind in checkpoint.WEIGHTS.items()}
    way = policy, own[config.dit.precision.kernel] if weights == "bf16" else weights
    return [compare(_asked(root, _arguments(config, settings, target, mesh, stage, *way))) for stage in stages]


def _arguments(
    config: ModelConfig, settings: Mapping[str, Any], target: str, mesh: Mapping[str, int], stage: str, policy: str,
    weights: str,
) -> list[str]:  # fmt: skip
    """Of `python -m benchmarks.aot`."""
    precision = getattr(config, estimate.STAGES[stage]).precision
    found = {"target": target, "part": stage, "preset": config.name, "size": "x".join(map(str, settings["size"])),
             "frames": settings["frames"], "steps": settings["steps"], "guidance-mode": settings["guidance_mode"],
             "dtype": "float32" if precision.compute == "float32" else "bfloat16"}  # fmt: skip
    if mesh:
        found["mesh"] = ",".join(f"{axis}={n}" for axis, n in mesh.items())
    if stage == "denoise":
        found["layers"] = min(LAYERS, config.dit.num_layers)
        found |= {"memory": "stream"} if policy == "stream" else {}
        found |= {} if weights == "bf16" else {"weights": weights}
    return [text for name, value in found.items() for text in (f"--{name}", str(value))]


def _asked(root: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The report of one run of `benchmarks.aot`. ValueError with its last line if it fails."""
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    with tempfile.TemporaryDirectory() as folder:
        # A process of its own: a compiler reads the environment once, and has its own threads.
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.aot", *arguments, "--out", folder], cwd=root, text=True,
            env=environment | {"PYTHONPATH": path}, capture_output=True,
        )  # fmt: skip
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            raise ValueError(f"--compile: {said.rpartition('error: ')[2][:300]}")
        (file,) = Path(folder).glob("*.json")
        return json.loads(file.read_text(encoding="utf-8"))
