"""Does an accelerator compute what it should: float32 against the CPU, and bfloat16 against float32.

    python -m benchmarks.gpu_parity --preset flf2v_14b --layers 2 --size 480x864 --frames 9

Weights and inputs are random; the transformer has the preset's true width and few layers. Exits with 1 if
any relative error, norm(a - b) / norm(b), is over its limit.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, random_model
from samplers import flops
from wanjax import rope, shapes, vae
from wanjax.config import PRESETS, DiTConfig, ModelConfig, VAEConfig, preset
from wanjax.dit import WanDiT
from wanjax.precision import BFLOAT16, FLOAT32, Precision

LIMITS = {"float32, device against CPU": 2e-5, "bfloat16 against float32": 2e-2, "taps against conv3d": 2e-5}


def dit(config: DiTConfig, precision: Precision, params: Any, grid: tuple[int, int, int]) -> jax.Array:
    """One evaluation on seeded inputs, where `params` are (cast to the policy's dtype)."""
    config = dataclasses.replace(config, precision=precision)
    (device,) = jax.tree.leaves(params)[0].devices()
    latents, conditions, _ = random_model.inputs(config, grid, 1, 1)
    tokens = tuple(n // size for n, size in zip(grid, config.patch_size, strict=True))
    table = rope.table(tokens, config.head_dim)

    @jax.jit
    def run(params, latents, timestep, conditions):
        return WanDiT(config).apply({"params": params}, latents, timestep, conditions, table)

    params = _cast(params, precision)
    return run(params, *jax.device_put((latents, np.float32([873.5]), conditions), device))


def decode(config: VAEConfig, precision: Precision, params: Any, latents: np.ndarray) -> jax.Array:
    """The video of `latents`, where `params` are."""
    config = dataclasses.replace(config, precision=precision)
    (device,) = jax.tree.leaves(params)[0].devices()
    run = jax.jit(lambda params, x: vae.decode(config, params, x))
    return run(_cast(params, precision), jax.device_put(latents, device))


def _cast(params: Any, precision: Precision) -> Any:
    dtype = jnp.dtype(precision.param)
    return jax.jit(lambda params: jax.tree.map(lambda x: x.astype(dtype), params))(params)


class Checks:
    """Collects relative errors; every one is shown and written as soon as it is known."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.report: dict[str, Any] = {
            "benchmark": "gpu_parity", "environment": measure.environment(), "checks": []
        }  # fmt: skip

    def add(self, what: str, kind: str, ours: jax.Array, reference: jax.Array) -> None:
        # On the host, since the two may lie on different devices.
        error = measure.relative_error(np.asarray(ours), np.asarray(reference))
        passed = bool(error <= LIMITS[kind])
        row = {"what": what, "kind": kind, "relative_error": error, "limit": LIMITS[kind], "passed": passed}
        self.report["checks"].append(row)
        print(f"{'ok  ' if passed else 'FAIL'} {what}: {kind}: {error:.3g} (limit {LIMITS[kind]:g})", flush=True)
        measure.write(self.out, self.report)

    @property
    def passed(self) -> bool:
        return all(row["passed"] for row in self.report["checks"])


def against_cpu(checks: Checks) -> None:
    """The tiny preset in float32 here and on the host's CPU: float32 must not become TF32."""
    kind, params = "float32, device against CPU", {}
    params["dit"] = random_model.params(shapes.dit(preset("tiny").dit))
    params["vae"], latents = _vae_inputs(preset("tiny").vae, (3, 4, 4))
    transformers, videos = [], []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        model, own = preset("tiny").for_platform(device.platform), jax.device_put(params, device)
        transformers.append(dit(model.dit, FLOAT32, own["dit"], (7, 8, 8)))
        videos.append(decode(model.vae, FLOAT32, own["vae"], latents))
    checks.add("tiny transformer", kind, *transformers)
    checks.add("tiny vae decode", kind, *videos)


def policies(checks: Checks, model: ModelConfig, grid: tuple[int, int, int]) -> None:
    """bfloat16 against float32 at the preset's width."""
    config = model.dit
    name = f"{model.name} transformer, {config.num_layers} layers, {flops.tokens(config, grid)} tokens"
    params = random_model.params(shapes.dit(config))
    exact = np.asarray(dit(config, FLOAT32, params, grid))
    checks.add(name, "bfloat16 against float32", dit(config, BFLOAT16, params, grid), exact)


def autoencoder(checks: Checks, model: ModelConfig) -> None:
    """The preset's autoencoder, a small video, in both forms of the convolution and both policies."""
    config, results = model.vae, {}
    params, latents = _vae_inputs(config, (3, 4, 4))
    for form in ("conv3d", "taps"):
        results[form] = decode(dataclasses.replace(config, conv3d=form), FLOAT32, params, latents)
    checks.add(f"{model.name} vae decode", "taps against conv3d", results["taps"], results["conv3d"])
    half = decode(config, BFLOAT16, params, latents)
    checks.add(f"{model.name} vae decode", "bfloat16 against float32", half, results["conv3d"])


def _vae_inputs(config: VAEConfig, grid: tuple[int, int, int]) -> tuple[Any, np.ndarray]:
    params = random_model.params(shapes.vae(config))
    # Smaller at the end, so that hardly any pixel is cut to [-1, 1], which would hide errors.
    params["decoder"]["head"]["conv"]["kernel"] *= 0.3
    latents = np.random.default_rng(3).normal(size=(1, *grid, config.latent_channels))
    return params, latents.astype(np.float32)


def run(arguments: argparse.Namespace, model: ModelConfig) -> bool:
    """All checks; True if all are within their limits."""
    height, width = (side // model.vae.spatial_stride for side in arguments.size)
    checks = Checks(arguments.out)
    if jax.default_backend() == "cpu":
        print("float32, device against CPU: left out, the device is the CPU", flush=True)
    else:
        against_cpu(checks)
    policies(checks, model, (model.vae.latent_frames(arguments.frames), height, width))
    autoencoder(checks, model)
    return checks.passed


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_parity", description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    out.add_argument("--preset", choices=sorted(PRESETS), default="flf2v_14b")
    out.add_argument("--layers", type=measure.positive, default=2)
    out.add_argument("--size", type=measure.parse_size, default=(480, 864), help="HEIGHTxWIDTH in pixels")
    out.add_argument("--frames", type=measure.positive, default=9)
    out.add_argument("--out", type=measure.output, help="JSON file")
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    arguments = line.parse_args(argv)
    model = preset(arguments.preset)
    measure.check_clip(line, model, arguments.size, arguments.frames)
    model = dataclasses.replace(model, dit=dataclasses.replace(model.dit, num_layers=arguments.layers))
    model = model.for_platform(measure.backend(line))
    return measure.guarded(line, lambda: run(arguments, model))


if __name__ == "__main__":
    sys.exit(main())
