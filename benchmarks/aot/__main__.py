"""`python -m benchmarks.aot`: compile one program of the sampler for a machine that is not there, and say what it does.

python -m benchmarks.aot --target v6e:2x4 --mesh tensor=8 --size 480x864 --out runs/aot
"""

import argparse
import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.aot import programs, report
from benchmarks.aot.targets import GIB, TARGETS, Target
from samplers.plan import Plan, Settings
from wanjax import checkpoint, sharding, streaming, writing
from wanjax import environment as machine
from wanjax.attention import KERNELS
from wanjax.config import PRESETS, ModelConfig, preset
from wanjax.guidance import MODES
from wanjax.method import METHODS
from wanjax.settings import check_mesh

PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin", "nvidia-cudnn-cu13")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser("python -m benchmarks.aot", description=__doc__.split("\n", 1)[0])
    line.add_argument("--target", choices=TARGETS, required=True)
    line.add_argument("--part", choices=programs.PARTS, default="denoise", help="denoise is one guided step")
    line.add_argument("--preset", choices=sorted(PRESETS), default="flf2v_14b")
    line.add_argument("--size", type=measure.parse_size, default=(480, 864), metavar="HEIGHTxWIDTH")
    line.add_argument("--frames", type=measure.positive, default=81)
    line.add_argument("--steps", type=measure.positive, default=50, help="of the run; up to 64 are one program")
    line.add_argument("--method", choices=sorted(METHODS), default="paper")
    line.add_argument("--guidance-mode", choices=MODES, default="sequential")
    line.add_argument("--mesh", type=mesh_sizes, metavar="AXIS=N,...", help=f"over {', '.join(sharding.AXES)}")
    line.add_argument("--devices", action="store_true", help="instead: all of the target, as the sampler's option")
    line.add_argument("--layers", type=measure.positive, help="fewer than the transformer has, at its full width")
    line.add_argument("--attention", choices=("auto", *KERNELS), default="auto")
    line.add_argument("--dtype", choices=sorted(measure.POLICIES), default="bfloat16")
    line.add_argument("--memory", choices=("keep", "stream"), default="keep", help="stream: kernels in host memory")
    line.add_argument("--weights", choices=checkpoint.WEIGHTS, help="of the transformer (default: as --dtype says)")
    line.add_argument("--tiles", type=measure.positive, default=1, help="windows of a picture in the autoencoder")
    line.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the compiler, repeatable")
    line.add_argument("--hlo", type=writing.absolute, metavar="FILE", help="also keep the compiled module's text")
    line.add_argument("--out", type=writing.absolute, metavar="FOLDER", help="one JSON file a run, named after it")
    return line


def mesh_sizes(text: str) -> dict[str, int]:
    """ "data=2,tensor=4" -> sizes by axis; a type for argparse."""
    try:
        pairs = [item.split("=") for item in text.split(",")]
        return {axis: measure.positive(size) for axis, size in pairs}
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r}: give AXIS=N,... such as data=2,tensor=4") from None


def model_of(args: argparse.Namespace) -> ModelConfig:
    """The preset as the arguments change it."""
    model = checkpoint.with_dtype(preset(args.preset), args.dtype)
    model = checkpoint.with_weights(model, args.weights) if args.weights else model
    dit = dataclasses.replace(model.dit, attention=args.attention)
    if args.layers:
        dit = dataclasses.replace(dit, num_layers=args.layers)
    return dataclasses.replace(model, dit=dit, vae=dataclasses.replace(model.vae, tiles=args.tiles))


def name_of(args: argparse.Namespace) -> str:
    """Of the report's file: what was compiled for what, defaults left out but for the size."""
    usual, own = vars(parser().parse_args(["--target", args.target])), vars(args)
    mesh = "-".join(f"{axis}{size}" for axis, size in (args.mesh or {}).items())
    fields = [args.part, args.target.replace(":", "-"), mesh, "x".join(map(str, args.size)), f"{args.frames}f",
              f"{args.layers}layers" if args.layers else ""]  # fmt: skip
    for name in ("preset", "steps", "method", "guidance_mode", "attention", "dtype", "memory", "weights"):
        if own[name] != usual[name]:
            fields.append(f"{own[name]}steps" if name == "steps" else own[name])
    if args.tiles != 1:
        fields.append(f"{args.tiles}tiles")
    if args.option:
        fields.append("options-" + hashlib.sha256(" ".join(sorted(args.option)).encode()).hexdigest()[:6])
    return "_".join(filter(None, fields)) + ".json"


def run(args: argparse.Namespace, plan: Plan, target: Target) -> dict[str, Any]:
    """Compiles one program and reads what came of it."""
    about, devices = environment(), target.devices()  # before minutes in which the clone may change
    mesh = sharding.make_mesh(args.mesh, devices) if args.mesh else None
    start = time.perf_counter()
    lowered = programs.lower(args.part, plan, devices, mesh)
    traced, used = time.perf_counter(), time.process_time()
    compiled = lowered.compile(compiler_options=dict(item.split("=", 1) for item in args.option) or None)
    seconds = {"trace": traced - start, "compile": time.perf_counter() - traced,
               "compile_cpu": time.process_time() - used}  # fmt: skip
    text = compiled.as_text()
    if args.hlo:
        writing.write_text(args.hlo, text, overwrite=True)
    count = len(devices) if mesh is not None else 1
    whole = args.part == "denoise" and plan.config.dit.stream != "loop"
    passes = 2 if whole and args.guidance_mode == "sequential" else 1
    found = report.describe(text, target.chip, passes, count, programs.operations(args.part, plan))
    if whole and args.layers and "cycles" in found:
        layers = preset(args.preset).dit.num_layers
        found["cycles"]["all_layers"] = report.scaled(found["cycles"], args.layers, layers)
    return {
        "part": args.part,
        "target": target.name,
        "devices": count,
        "mesh": args.mesh or {},
        "settings": {name: getattr(args, name) for name in
                     ("preset", "size", "frames", "steps", "method", "guidance_mode", "dtype", "memory", "weights",
                     "tiles", "option")}
                    | {"layers": plan.config.dit.num_layers, "attention": plan.config.dit.attention},
        "seconds": seconds,
        "memory_bytes": report.memory(compiled),
        **found,
        "environment": about,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, commit, command and date; the machine is the one that compiled."""
    own = measure.environment() | {"versions": machine.versions(PACKAGES)}
    kept = ("processor", "cores", "versions", "commit", "xla_flags", "command", "date")
    return {name: own[name] for name in kept} | {"libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", "")}


def show(found: Mapping[str, Any]) -> None:
    """Prints the report as tables."""
    memory, own = found["memory_bytes"], found["operations"]
    rows = [[f"memory, {name}", f"{size / GIB:.2f} GiB"] for name, size in memory.items()]
    rows.append(["operations", f"{own['device'] / 1e12:.2f} TFLOP"])
    if own["times_an_even_share"] is not None:
        rows.append([f"that is, of a share of 1/{found['devices']}", f"{own['times_an_even_share']:.3f}"])
    rows += [[f"  {name}", f"{n / 1e12:.2f} TFLOP"] for name, n in own["parts"].items()]
    cycles = found.get("cycles")
    if cycles:
        rows += [[f"cycles, {name}", f"{n / 1e6:.1f} million"] for name, n in cycles["parts"].items()]
        rows += [[name.replace("_", " "), f"{cycles[name]:.3f} s"] for name in ("rest_seconds", "kernel_seconds")
                 if cycles[name] is not None]  # fmt: skip
        if whole := cycles.get("all_layers"):
            rows += [[f"  of {whole['layers']} layers, {name.replace('_', ' ')}", f"{whole[name]:.3f} s"]
                     for name in ("rest_seconds", "kernel_seconds")]  # fmt: skip
    rows += [[f"seconds, {name}", f"{n:.1f}"] for name, n in found["seconds"].items()]
    measure.print_table(("one device", f"{found['part']} on {found['target']} {found['mesh'] or ''}"), rows)
    if found["collectives_in_full"]:
        print()
        measure.print_table(
            ("collective", "part", "times", "MiB", "async", "shape"),
            [[r["kind"], r["part"], r["times"], f"{r['bytes'] / 2**20:.1f}", "yes" if r["asynchronous"] else "no",
              r["shape"][:90]] for r in found["collectives_in_full"][:20]],
        )  # fmt: skip
    if found["kernels"]:
        print()
        measure.print_table(
            ("kernel", "part", "times", "TFLOP", "shape"),
            [[r["name"], r["part"], r["times"], "?" if r["operations"] is None else f"{r['operations'] / 1e12:.3f}",
              r["shape"][:90]] for r in found["kernels"][:20]],
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    model, target = model_of(args), Target(args.target)
    measure.check_clip(line, model, args.size, args.frames)
    if any("=" not in item for item in args.option):
        line.error(f"--option {' '.join(args.option)}: give NAME=VALUE, such as xla_tpu_scoped_vmem_limit_kib=65536")
    try:
        target.prepare()
        model = model.for_platform(target.platform, target.devices()[0].device_kind)
        settings = Settings.of(model, frames=args.frames, size=args.size, steps=args.steps, method=args.method,
                               guidance_mode=args.guidance_mode)  # fmt: skip
        if args.memory == "stream":
            model = streaming.with_stream(model, target.platform)
            streaming.check_mesh(args.mesh or args.devices or None)
        plan = Plan.of(model, settings, platform=target.platform)
        if args.devices and args.mesh:
            raise ValueError("--devices and --mesh: give one of them")
        if args.devices:
            args.mesh = sharding.choose_mesh(len(target.devices()), model.dit.num_heads)
        if args.mesh:
            check_mesh(args.mesh, model.dit.num_heads)
            sharding.make_mesh(args.mesh, target.devices())
    except ValueError as error:
        line.error(str(error))
    path = output(line, args)

    def measured() -> bool:
        found = run(args, plan, target)
        show(found)
        measure.write(path, found)
        return True

    return measure.guarded(line, measured)


def output(line: argparse.ArgumentParser, args: argparse.Namespace) -> Path | None:
    """Where the report goes; ends the program as for a bad argument where it cannot be written."""
    if args.out is None:
        return None
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        return measure.output(str(args.out / name_of(args)))
    except (OSError, argparse.ArgumentTypeError) as error:
        line.error(f"--out {args.out}: {error}")


if __name__ == "__main__":
    sys.exit(main())
