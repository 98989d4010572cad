"""Time, operations and memory of one denoising step, and of the autoencoder, with random weights.

One step is one guided evaluation of the transformer in the sampler's own program (`benchmarks.steps`). Weights are
made on the device, so that any preset can be measured without a checkpoint:

    python -m benchmarks.throughput --preset flf2v_14b --dtype bfloat16 --guidance sequential batched
    python -m benchmarks.throughput --preset flf2v_14b --layers 2 --size 128x128 --frames 9 --steps 3
    python -m benchmarks.throughput --preset flf2v_14b --no-dit --vae
"""

import argparse
import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure, random_model, steps
from benchmarks.steps import Shape
from samplers import flops
from samplers.run import check
from wanjax import shapes, vae
from wanjax.attention import KERNELS
from wanjax.config import PRESETS, ModelConfig, VAEConfig, preset

GUIDANCE = ("none", "sequential", "batched")
CONV3D_FORMS = ("auto", "conv3d", "taps")


def step_run(
    inputs: steps.RandomModel, model: ModelConfig, guidance: str, repeats: int, matmul: measure.Matmul
) -> dict[str, Any]:
    """Compiles and times a step in one guidance mode. FloatingPointError if the result is not finite."""
    mode = "sequential" if guidance == "none" else guidance
    table = steps.rows(model, 1.0 if guidance == "none" else steps.GUIDANCE_SCALE)
    arguments = (*inputs.arguments, jax.device_put(table), inputs.plain())
    compiled, report = measure.compile_timed(steps.part(inputs.config, mode), *arguments)
    check(compiled(*arguments))
    matmul.measure()
    timing = measure.interleave({"step": lambda: compiled(*arguments)}, repeats, warmup=0)["step"]
    matmul.measure()
    passes = 1 if guidance == "none" else 2
    parts = {part: passes * n for part, n in flops.dit(inputs.config, inputs.grid, inputs.batch).items()}
    return report | _rates(timing, parts, matmul) | {"passes": passes} | measure.memory(compiled)


def vae_run(config: VAEConfig, shape: Shape, kind: str, repeats: int, matmul: measure.Matmul) -> dict[str, Any]:
    """Compiles and times "encode" or "decode" of the whole video. FloatingPointError if not finite."""
    params = random_model.params(shapes.vae(config))
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
    return report | _rates(timing, parts, matmul) | measure.memory(compiled)


def _rates(timing: measure.Timing, parts: flops.Count, matmul: measure.Matmul) -> dict[str, Any]:
    rate = flops.total(parts) / timing.median
    return timing.report() | {
        "flops": flops.total(parts),
        "flops_by_part": parts,
        "flops_per_second": rate,
        "share_of_matmul": rate / matmul.flops_per_second,
        "matmul": matmul.report(),
    }


def run(arguments: argparse.Namespace, model: ModelConfig, shape: Shape) -> bool:
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
        measure.write(arguments.out, report)

    print(f"{report['environment']['device']}: {model.name}, {model.dit.num_layers} layers, "
          f"{shape.frames} frames of {shape.size[0]}x{shape.size[1]}, {report['tokens']} tokens, "
          f"batch {shape.batch}", flush=True)  # fmt: skip
    if arguments.dit:
        inputs = steps.RandomModel(model.dit, grid, shape.batch)
        report["parameters"] = inputs.parameters
        matmul = measure.Matmul(model.dit.precision, arguments.matmul)
        for guidance in arguments.guidance:
            result = step_run(inputs, model, guidance, arguments.steps, matmul)
            settings = {"dtype": arguments.dtype, "attention": model.dit.attention}
            add(f"step, guidance {guidance}", settings | result)
        del inputs
    if arguments.vae:
        matmul = measure.Matmul(model.vae.precision, arguments.matmul)
        for form in arguments.conv3d:
            config = model.vae if form == "auto" else dataclasses.replace(model.vae, conv3d=form)
            for kind in ("encode", "decode"):
                result = vae_run(config, shape, kind, arguments.steps, matmul)
                add(f"vae {kind}, conv3d {form}", {"dtype": arguments.vae_dtype, "conv3d": config.conv3d} | result)
    return True


def _show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name} ({result['dtype']})", flush=True)
    total = result["flops"]
    rows = [[part, f"{n / 1e12:.4g}", f"{n / total:.1%}"] for part, n in result["flops_by_part"].items()]
    measure.print_table(("part", "TFLOP", "share"), [*rows, ["all", f"{total / 1e12:.4g}", ""]])
    memory = {f"{name} peak": n for name, n in result["peak_memory_bytes"].items()} | result["program"]
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
    what.add_argument("--attention", choices=("auto", *KERNELS), default="auto", help="kernel")
    what.add_argument("--dit", action=argparse.BooleanOptionalAction, default=True, help="measure a step")
    what.add_argument("--vae", action="store_true", help="measure encoding and decoding the video as well")
    what.add_argument("--vae-dtype", choices=tuple(measure.POLICIES), default="float32")
    what.add_argument("--conv3d", nargs="+", choices=CONV3D_FORMS, default=["auto"], help="of the VAE")
    how = out.add_argument_group("how")
    how.add_argument("--steps", type=measure.positive, default=5, help="timed repeats")
    how.add_argument("--matmul", type=measure.positive, help="size of the product compared with; default by backend")
    how.add_argument("--out", type=measure.output, help="JSON file, written anew after every measurement")
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    arguments = line.parse_args(argv)
    model = preset(arguments.preset)
    shape = Shape(arguments.batch, arguments.frames or model.sampling.frames, arguments.size or model.sampling.size)
    measure.check_clip(line, model, shape.size, shape.frames)
    if not (arguments.dit or arguments.vae):
        line.error("--no-dit: nothing to measure; add --vae")
    dit = dataclasses.replace(
        model.dit, num_layers=arguments.layers or model.dit.num_layers, attention=arguments.attention,
        precision=measure.POLICIES[arguments.dtype],
    )  # fmt: skip
    autoencoder = dataclasses.replace(model.vae, precision=measure.POLICIES[arguments.vae_dtype])
    model = dataclasses.replace(model, dit=dit, vae=autoencoder).for_platform(measure.backend(line))
    return measure.guarded(line, lambda: run(arguments, model, shape))


if __name__ == "__main__":
    sys.exit(main())
