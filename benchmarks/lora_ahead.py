"""A LoRA step of a large transformer compiled for TPUs that are not there: what it takes of a device's memory.

    python -m benchmarks.lora_ahead --target v6e:2x4 --mesh tensor=8 --size 480x864 --frames 17 --out runs/ahead

The step is `benchmarks.lora_14b.update`, from shapes; one JSON a run, as `benchmarks/aot` writes them.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import lora_14b, measure
from benchmarks.aot import report
from benchmarks.aot.__main__ import environment
from benchmarks.aot.targets import GIB, TARGETS, Target
from benchmarks.lora_14b import Batch, Recipe
from benchmarks.steps import Shape
from samplers import flops
from wanjax import checkpoint, rope, shapes, sharding
from wanjax.config import PRESETS, DiTConfig, preset
from wanjax.dit import token_grid
from wanjax.types import Conditions


def lower(config: DiTConfig, recipe: Recipe, grid: tuple[int, int, int], batch: int, mesh: Mesh) -> jax.stages.Lowered:
    """The step for latents (F, h, w) on a mesh: weights by `sharding.specs`, the batch over `data`, all else whole."""
    params, whole = shapes.dit(config), NamedSharding(mesh, P())
    state = jax.eval_shape(partial(lora_14b.new_state, recipe), params, np.uint32(0))
    arrays = jax.eval_shape(partial(_zeros, config, grid, batch))
    table = rope.table(token_grid(config, (batch, *grid)), config.head_dim)
    rows = NamedSharding(mesh, P("data") if batch % dict(mesh.shape)["data"] == 0 else P())
    arguments = (
        jax.tree.map(
            lambda leaf, spec: _on(leaf, NamedSharding(mesh, spec)), params, sharding.specs(params, mesh=mesh)
        ),
        jax.tree.map(lambda leaf: _on(leaf, whole), state),
        Batch(
            *jax.tree.map(lambda leaf: _on(leaf, rows), (arrays.latents, arrays.conditions)), _on(arrays.empty, whole)
        ),
        jax.tree.map(lambda leaf: _on(leaf, whole), table),
        jax.ShapeDtypeStruct((), np.uint32, sharding=whole),
    )
    with jax.set_mesh(mesh):
        return lora_14b.update.lower(config, recipe, *arguments)


def _zeros(config: DiTConfig, grid: tuple[int, int, int], batch: int) -> Batch:
    text = (config.text_length, config.text_dim)
    images = (batch, config.num_images, config.image_tokens, config.image_dim)
    conditions = Conditions(
        jax.numpy.zeros((batch, *text)),
        jax.numpy.zeros(images) if config.num_images else None,
        jax.numpy.zeros((batch, *grid, config.condition_channels)) if config.condition_channels else None,
    )
    return Batch(jax.numpy.zeros((batch, *grid, config.out_channels)), conditions, jax.numpy.zeros(text))


def _on(leaf: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser("python -m benchmarks.lora_ahead", description=__doc__.split("\n", 1)[0])
    line.add_argument("--target", choices=TARGETS, default="v6e:2x4")
    line.add_argument("--mesh", type=lora_14b.mesh_sizes, default={"tensor": 8}, metavar="AXIS=N,...")
    line.add_argument("--preset", choices=sorted(PRESETS), default="flf2v_14b")
    line.add_argument("--layers", type=measure.positive, help="fewer than the transformer has, at its full width")
    line.add_argument("--weights", choices=checkpoint.WEIGHTS, help="of the frozen kernels (default: bf16)")
    line.add_argument("--size", type=measure.parse_size, default=(480, 864), metavar="HxW")
    line.add_argument("--frames", type=measure.positive, default=17)
    line.add_argument("--batch", type=measure.positive, default=1)
    line.add_argument("--rank", type=measure.positive, default=Recipe().rank)
    line.add_argument("--out", type=Path, metavar="FOLDER", help="one JSON file a run, named after it")
    return line


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles the step and reads what came of it."""
    target = Target(args.target)
    target.prepare()  # before anything asks JAX for devices
    about, devices = environment(), target.devices()
    model = checkpoint.with_dtype(preset(args.preset), "bfloat16")
    model = checkpoint.with_weights(model, args.weights) if args.weights else model
    if args.layers:
        model = dataclasses.replace(model, dit=dataclasses.replace(model.dit, num_layers=args.layers))
    config = lora_14b.training_config(model, target.platform, devices[0].device_kind)
    recipe, mesh = Recipe(rank=args.rank), sharding.make_mesh(args.mesh, devices)
    grid = Shape(args.batch, args.frames, args.size).latent_grid(model.vae)
    start = time.perf_counter()
    lowered = lower(config, recipe, grid, args.batch, mesh)
    traced, used = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    state = jax.eval_shape(partial(lora_14b.new_state, recipe), shapes.dit(config), np.uint32(0))
    forward = flops.total(flops.dit(config, grid, batch=args.batch))
    found = report.describe(compiled.as_text(), target.chip, 1, len(devices), None)
    return {
        "part": "lora step",
        "target": target.name,
        "devices": len(devices),
        "mesh": args.mesh,
        "settings": {name: getattr(args, name) for name in ("preset", "size", "frames", "batch", "rank", "weights")}
        | {"layers": config.num_layers, "attention": config.attention, "remat": config.remat},
        "adapters": {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.adapters)),
                     "bytes": _bytes(state.adapters), "bytes_of_moments": _bytes(state.moments)},
        "seconds": {"trace": traced - start, "compile": time.perf_counter() - traced,
                    "compile_cpu": time.process_time() - used},
        "memory_bytes": report.memory(compiled),
        "forward_operations_by_formula": forward,
        **{name: found[name] for name in ("operations", "collectives") if name in found},
        "environment": about,
    }  # fmt: skip


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    measure.check_clip(line, preset(args.preset), args.size, args.frames)

    def measured() -> bool:
        try:
            found = run(args)
        except ValueError as error:
            line.error(" ".join(str(error).split()))
        for name, size in found["memory_bytes"].items():
            print(f"memory, {name}: {size / GIB:.2f} GiB")
        print(f"adapters: {found['adapters']['parameters'] / 1e6:.1f} million parameters")
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            mesh = "-".join(f"{axis}{size}" for axis, size in args.mesh.items())
            fields = ["lora", args.preset, args.target.replace(":", "-"), mesh, "x".join(map(str, args.size)),
                      f"{args.frames}f", f"{args.layers}layers" if args.layers else "", args.weights or "",
                      f"rank{args.rank}"]  # fmt: skip
            measure.write(args.out / ("_".join(filter(None, fields)) + ".json"), found)
        return True

    return measure.guarded(line, measured)


if __name__ == "__main__":
    sys.exit(main())
