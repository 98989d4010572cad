"""Time, operations and memory of one denoising step, and of the autoencoder, with random weights.

One step is one guided evaluation of the transformer, through the functions that the pipeline uses. Weights
are made on the device, so that any preset can be measured without a checkpoint:

    python -m benchmarks.throughput --preset flf2v_14b --dtype bfloat16 --guidance sequential batched
    python -m benchmarks.throughput --preset flf2v_14b --layers 2 --size 128x128 --frames 9 --steps 3
    python -m benchmarks.throughput --preset flf2v_14b --no-dit --vae
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flops, measure, random_model
from wanjax import keyframes, rope, vae
from wanjax.config import PRESETS, DiTConfig, ModelConfig, VAEConfig, preset
from wanjax.dit import WanDiT
from wanjax.guidance import guided
from wanjax.types import Conditions, RopeTable

GUIDANCE = ("none", "sequential", "batched")
GUIDANCE_SCALE = 5.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is computed: batch, pixel frames, and (height, width) in pixels."""

    batch: int
    frames: int
    size: tuple[int, int]

    def latent_grid(self, config: VAEConfig) -> tuple[int, int, int]:
        height, width = (side // config.spatial_stride for side in self.size)
        return config.latent_frames(self.frames), height, width


def guided_step(config: DiTConfig, mode: str) -> Callable[..., jax.Array]:
    """(params, latents, timestep [], conditions, negative text, scale, rope table) -> velocity."""

    def step(
        params: Any,
        latents: jax.Array,
        timestep: jax.Array,
        conditions: Conditions,
        negative: jax.Array,
        scale: jax.Array,
        table: RopeTable,
    ) -> jax.Array:
        def model(latents: jax.Array, timestep: jax.Array, conditions: Conditions, *_: None) -> jax.Array:
            return WanDiT(config).apply({"params": params}, latents, timestep, conditions, table)

        return guided(model, conditions, negative, scale, mode)(latents, timestep)

    return step


class DiTBenchmark:
    """The transformer with its random weights and inputs, measured one guidance mode at a time."""

    def __init__(self, config: DiTConfig, grid: tuple[int, int, int], batch: int) -> None:
        self.config, self.grid, self.batch = config, grid, batch
        shapes = random_model.dit_shapes(config)
        self.parameters = random_model.count(shapes)
        self.params = jax.block_until_ready(random_model.params(shapes))
        inputs = jax.device_put(random_model.inputs(config, grid, batch, 1))
        self.latents, self.conditions, self.negative = inputs
        tokens = tuple(n // size for n, size in zip(grid, config.patch_size, strict=True))
        self.table = jax.device_put(rope.table(tokens, config.head_dim))

    def run(self, guidance: str, repeats: int, matmul: measure.Matmul) -> dict[str, Any]:
        """Compiles and times one guidance mode. FloatingPointError if the result is not finite."""
        scale = np.float32(1 if guidance == "none" else GUIDANCE_SCALE)
        mode = "sequential" if guidance == "none" else guidance
        arguments = (
            self.params, self.latents, np.float32(900), self.conditions, self.negative, scale, self.table
        )  # fmt: skip
        compiled, report = measure.compile_timed(guided_step(self.config, mode), *arguments)
        velocity = compiled(*arguments)
        if not jnp.isfinite(velocity).all():
            raise FloatingPointError(f"step with guidance {guidance}: NaN or inf in the velocity")
        matmul.measure()
        timing = measure.interleave({"step": lambda: compiled(*arguments)}, repeats, warmup=0)["step"]
        matmul.measure()
        passes = 1 if guidance == "none" else 2
        parts = {part: passes * n for part, n in flops.dit(self.config, self.grid, self.batch).items()}
        return report | _rates(timing, parts, matmul) | {"passes": passes} | _memory(compiled)


def vae_run(config: VAEConfig, shape: Shape, kind: str, repeats: int, matmul: measure.Matmul) -> dict[str, Any]:
    """Compiles and times "encode" or "decode" of the whole video. FloatingPointError if not finite."""
    params = random_model.params(random_model.vae_shapes(config))
    if kind == "encode":
        x = jax.random.uniform(jax.random.key(2), (shape.batch, shape.frames, *shape.size, 3), minval=-1)
    else:
        x = jax.random.normal(jax.random.key(2), (shape.batch, *shape.latent_grid(config), config.latent_channels))
    function = {"encode": vae.encode, "decode": vae.decode}[kind]
    compiled, report = measure.compile_timed(lambda params, x: function(config, params, x), params, x)
    if not jnp.isfinite(compiled(params, x)).all():
        raise FloatingPointError(f"vae {kind}: NaN or inf in the result")
    matmul.measure()
    timing = measure.interleave({kind: lambda: compiled(params, x)}, repeats, warmup=0)[kind]
    matmul.measure()
    formula = {"encode": flops.vae_encode, "decode": flops.vae_decode}[kind]
    parts = formula(config, shape.frames, shape.size, shape.batch)
    return report | _rates(timing, parts, matmul) | _memory(compiled)


def _rates(timing: measure.Timing, parts: flops.Count, matmul: measure.Matmul) -> dict[str, Any]:
    rate = flops.total(parts) / timing.median
    return timing.report() | {
        "flops": flops.total(parts),
        "flops_by_part": parts,
        "flops_per_second": rate,
        "share_of_matmul": rate / matmul.flops_per_second,
        "matmul": matmul.report(),
    }


def _memory(compiled: jax.stages.Compiled) -> dict[str, Any]:
    return measure.peak_memory() | {"program": measure.program_memory(compiled)}


def run(arguments: argparse.Namespace, model: ModelConfig, shape: Shape) -> None:
    """All that the command line asks for; writes what there is after every measurement."""
    grid = shape.latent_grid(model.vae)
    report: dict[str, Any] = {
        "benchmark": "throughput",
        "environment": measure.environment(),
        "preset": model.name,
        "layers": model.dit.num_layers,
        "shape": dataclasses.asdict(shape),
        "tokens": flops.tokens(model.dit, grid),
        "runs": {},
    }

    def add(name: str, result: dict[str, Any]) -> None:
        report["runs"][name] = result
        _show(name, result)
        if arguments.out:
            measure.write_json(arguments.out, report)

    print(f"{report['environment']['device']}: {model.name}, {model.dit.num_layers} layers, "
          f"{shape.frames} frames of {shape.size[0]}x{shape.size[1]}, {report['tokens']} tokens, "
          f"batch {shape.batch}", flush=True)  # fmt: skip
    if arguments.dit:
        benchmark = DiTBenchmark(model.dit, grid, shape.batch)
        report["parameters"] = benchmark.parameters
        matmul = measure.Matmul(model.dit.precision, arguments.matmul)
        for guidance in arguments.guidance:
            with measure.forced(arguments.attention):
                result = benchmark.run(guidance, arguments.steps, matmul)
            settings = {"dtype": arguments.dtype, "attention": arguments.attention}
            add(f"step, guidance {guidance}", settings | result)
        del benchmark
    if arguments.vae:
        matmul = measure.Matmul(model.vae.precision, arguments.matmul)
        for form in arguments.conv3d:
            for kind in ("encode", "decode"):
                with measure.forced(conv3d=form):
                    result = vae_run(model.vae, shape, kind, arguments.steps, matmul)
                add(f"vae {kind}, conv3d {form}", {"dtype": arguments.vae_dtype, "conv3d": form} | result)


def _show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name} ({result['dtype']})", flush=True)
    total = result["flops"]
    rows = [[part, f"{n / 1e12:.4g}", f"{n / total:.1%}"] for part, n in result["flops_by_part"].items()]
    measure.print_table(("part", "TFLOP", "share"), [*rows, ["all", f"{total / 1e12:.4g}", ""]])
    memory = {key: value for key, value in result.items() if key.endswith("_peak_bytes")}
    memory |= result["program"]
    rows = [
        ("trace, compile", f"{result['trace_seconds']:.2f} s, {result['compile_seconds']:.2f} s"),
        ("median of " + str(len(result["seconds"])), f"{result['median_seconds']:.4g} s"),
        ("spread", f"{result['spread']:.1%}"),
        ("rate", f"{result['flops_per_second'] / 1e12:.4g} TFLOP/s"),
        ("matmul", f"{result['matmul']['flops_per_second'] / 1e12:.4g} TFLOP/s"),
        ("share of matmul", f"{result['share_of_matmul']:.1%}"),
        *((key.replace("_in_bytes", "").replace("_", " "), f"{n / 2**30:.3f} GiB") for key, n in memory.items()),
    ]
    measure.print_table(("measured", ""), rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = out.add_argument_group("what is measured")
    what.add_argument("--preset", choices=sorted(PRESETS), default="flf2v_14b")
    what.add_argument("--layers", type=measure.positive, help="transformer layers; default all of the preset's")
    what.add_argument("--size", type=measure.parse_size, help="HEIGHTxWIDTH in pixels; default the preset's")
    what.add_argument("--frames", type=measure.positive, help="pixel frames; default the preset's")
    what.add_argument("--batch", type=measure.positive, default=1)
    what.add_argument("--dtype", choices=tuple(measure.POLICIES), default="bfloat16", help="of the transformer")
    what.add_argument("--guidance", nargs="+", choices=GUIDANCE, default=["sequential"])
    what.add_argument("--attention", choices=measure.ATTENTIONS, default="auto")
    what.add_argument("--dit", action=argparse.BooleanOptionalAction, default=True, help="measure a step")
    what.add_argument("--vae", action="store_true", help="measure encoding and decoding the video as well")
    what.add_argument("--vae-dtype", choices=tuple(measure.POLICIES), default="float32")
    what.add_argument("--conv3d", nargs="+", choices=measure.CONV3D_FORMS, default=["auto"], help="of the VAE")
    how = out.add_argument_group("how")
    how.add_argument("--steps", type=measure.positive, default=5, help="timed repeats")
    how.add_argument("--matmul", type=measure.positive, help="size of the product compared with; default by backend")
    how.add_argument("--out", help="JSON file, written anew after every measurement")
    return out


def main(argv: list[str] | None = None) -> None:
    line = parser()
    arguments = line.parse_args(argv)
    model = preset(arguments.preset)
    layers = arguments.layers or model.dit.num_layers
    shape = Shape(arguments.batch, arguments.frames or model.sampling.frames, arguments.size or model.sampling.size)
    try:
        keyframes.check_size(*shape.size, model.size_multiple)
        keyframes.check_frames(shape.frames, model.vae.temporal_stride)
    except ValueError as error:
        line.error(str(error))
    dit = dataclasses.replace(model.dit, num_layers=layers, precision=measure.POLICIES[arguments.dtype])
    autoencoder = dataclasses.replace(model.vae, precision=measure.POLICIES[arguments.vae_dtype])
    run(arguments, dataclasses.replace(model, dit=dit, vae=autoencoder), shape)


if __name__ == "__main__":
    main()
