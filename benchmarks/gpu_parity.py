"""Does an accelerator compute what it should: float32 against the CPU, and bfloat16 against float32.

    python -m benchmarks.gpu_parity --preset flf2v_14b --layers 2 --size 480x864 --frames 9

Weights and inputs are random; the transformer has the preset's true width and few layers. Exits with 1 if
any relative error, norm(a - b) / norm(b), is over its limit.
"""

import argparse
import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flops, measure, random_model
from wanjax import keyframes, rope, vae
from wanjax.config import BFLOAT16, FLOAT32, PRESETS, DiTConfig, ModelConfig, Precision, VAEConfig, preset
from wanjax.dit import WanDiT

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

    def __init__(self, out: str | None) -> None:
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
        if self.out:
            measure.write_json(self.out, self.report)

    @property
    def passed(self) -> bool:
        return all(row["passed"] for row in self.report["checks"])


def against_cpu(checks: Checks) -> None:
    """The tiny preset in float32 here and on the host's CPU: float32 must not become TF32."""
    model, kind = preset("tiny"), "float32, device against CPU"
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    params = random_model.params(random_model.dit_shapes(model.dit))
    both = [dit(model.dit, FLOAT32, jax.device_put(params, device), (7, 8, 8)) for device in (here, cpu)]
    checks.add("tiny transformer", kind, *both)
    params, latents = _vae_inputs(model.vae, (3, 4, 4))
    both = [decode(model.vae, FLOAT32, jax.device_put(params, device), latents) for device in (here, cpu)]
    checks.add("tiny vae decode", kind, *both)


def policies(checks: Checks, model: ModelConfig, grid: tuple[int, int, int]) -> None:
    """bfloat16 against float32 at the preset's width."""
    config = model.dit
    name = f"{model.name} transformer, {config.num_layers} layers, {flops.tokens(config, grid)} tokens"
    params = random_model.params(random_model.dit_shapes(config))
    exact = np.asarray(dit(config, FLOAT32, params, grid))
    checks.add(name, "bfloat16 against float32", dit(config, BFLOAT16, params, grid), exact)


def autoencoder(checks: Checks, model: ModelConfig) -> None:
    """The preset's autoencoder, a small video, in both forms of the convolution and both policies."""
    config, results = model.vae, {}
    params, latents = _vae_inputs(config, (3, 4, 4))
    for form in ("conv3d", "taps"):
        with measure.forced(conv3d=form):
            results[form] = decode(config, FLOAT32, params, latents)
    checks.add(f"{model.name} vae decode", "taps against conv3d", results["taps"], results["conv3d"])
    half = decode(config, BFLOAT16, params, latents)
    checks.add(f"{model.name} vae decode", "bfloat16 against float32", half, results["conv3d"])


def _vae_inputs(config: VAEConfig, grid: tuple[int, int, int]) -> tuple[Any, np.ndarray]:
    params = random_model.params(random_model.vae_shapes(config))
    # Smaller at the end, so that hardly any pixel is cut to [-1, 1], which would hide errors.
    params["decoder"]["head"]["conv"]["kernel"] *= 0.3
    latents = np.random.default_rng(3).normal(size=(1, *grid, config.latent_channels))
    return params, latents.astype(np.float32)


def main(argv: list[str] | None = None) -> int:
    line = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_parity", description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    line.add_argument("--preset", choices=sorted(PRESETS), default="flf2v_14b")
    line.add_argument("--layers", type=measure.positive, default=2)
    line.add_argument("--size", type=measure.parse_size, default=(480, 864), help="HEIGHTxWIDTH in pixels")
    line.add_argument("--frames", type=measure.positive, default=9)
    line.add_argument("--out", help="JSON file")
    arguments = line.parse_args(argv)
    model = preset(arguments.preset)
    try:
        keyframes.check_size(*arguments.size, model.size_multiple)
        keyframes.check_frames(arguments.frames, model.vae.temporal_stride)
    except ValueError as error:
        line.error(str(error))
    model = dataclasses.replace(model, dit=dataclasses.replace(model.dit, num_layers=arguments.layers))
    height, width = (side // model.vae.spatial_stride for side in arguments.size)
    checks = Checks(arguments.out)
    if jax.default_backend() == "cpu":
        print("float32, device against CPU: left out, the device is the CPU", flush=True)
    else:
        against_cpu(checks)
    policies(checks, model, (model.vae.latent_frames(arguments.frames), height, width))
    autoencoder(checks, model)
    return 0 if checks.passed else 1


if __name__ == "__main__":
    sys.exit(main())
