"""What KAB, isolation and ReTRo cost: time and memory of one guided step with and without them, random weights.

All arms but `plain`, which has no code of the methods in it, are one compiled program with other inputs. Times are
taken in turn, A B A B ..., and compared within each round:

    python -m benchmarks.method_cost                 all layers at 480x864x81 on a GPU, two at a small size on a CPU
    python -m benchmarks.method_cost --layers 10     2 layers of 10 have KAB, the same share as 8 of 40
    python -m benchmarks.method_cost --preset tiny --layers 6 --size 32x32 --frames 25

Axis letters as in `wanjax.types`.
"""

import argparse
import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, steps
from benchmarks.method_report import STEPS, formula, show, show_formula, summary
from benchmarks.steps import Shape
from samplers import flops
from samplers.plan import Plan, Settings
from samplers.run import check
from samplers.sample import Carry, Row
from wanjax import kab
from wanjax.config import PRESETS, DiTConfig, ModelConfig, preset
from wanjax.cross import cross_attention
from wanjax.kab import KAB
from wanjax.method import Isolation, Method, MethodArrays
from wanjax.retro import ReTRo
from wanjax.types import Branches, CrossBias, CrossControl

ARMS: MappingProxyType[str, Method | None] = MappingProxyType(
    {
        "plain": None,
        "wan": Method(),
        "retro": Method(retro=ReTRo()),
        "isolation": Method(Isolation()),
        "kab_inactive": Method(Isolation(), KAB()),
        "kab": Method(Isolation(), KAB()),
        "kab_joint": Method(kab=KAB()),
    }
)
"""What is timed. `plain` is Wan2.1 without a control; `kab_inactive` is a step after KAB's window."""

EFFECTS = (("retro", "wan"), ("isolation", "wan"), ("kab", "kab_inactive"), ("kab_joint", "wan"))
"""Arms that must give another velocity than another arm."""

SIZES = ((480, 864, 81), (720, 1280, 81))
"""Height, width and frames in pixels that the formulas are shown for, besides the measured size."""

SMALL = {"layers": 2, "size": (64, 64), "frames": 17, "dtype": "float32"}
"""Defaults on a CPU: the preset's width and numbers of keys, one layer with KAB and one without."""

CLOCKS = MappingProxyType({"wall": time.perf_counter, "processor": time.process_time})
"""The processor's seconds of this process, on a CPU, do not grow with what else runs there."""


def inputs(model: ModelConfig, shape: Shape) -> dict[str, tuple[Row, MethodArrays]]:
    """By arm but `plain`, on the device: the table of a run, whose row `steps.STEP` is timed, and the method."""
    found = {}
    for name, method in ARMS.items():
        if method is not None:
            settings = Settings.of(model, frames=shape.frames, size=shape.size, steps=STEPS, method=method,
                                   guidance=steps.GUIDANCE_SCALE)  # fmt: skip
            plan = Plan.of(model, settings)
            strength = plan.table.strength.copy()
            if name == "kab_inactive":
                strength[steps.STEP] = strength[STEPS - 1]
            found[name] = jax.device_put((plan.table.replace(strength=strength), plan.method))
    return found


class Steps:
    """Both programs, with every arm as a function without arguments.

    Attributes:
      programs: of "plain" and "method": seconds to compile, memory.
      functions: arm -> carry after the step.
    """

    def __init__(self, model: ModelConfig, shape: Shape) -> None:
        random = steps.RandomModel(model.dit, shape.latent_grid(model.vae), shape.batch)
        step, common, methods = jax.jit(steps.part(model.dit)), random.arguments, inputs(model, shape)
        self._before, (self._table, _) = random.carry, methods["wan"]
        bare = (self._table.replace(strength=None), random.plain())
        plain, plain_report = measure.compile_timed(step, *common, *bare)
        method, method_report = measure.compile_timed(step, *common, *methods["wan"])
        texts = {name: step.lower(*common, *own).as_text() for name, own in methods.items()}
        if len(set(texts.values())) != 1:
            raise AssertionError(f"arms {', '.join(texts)}: not one program")
        digest = hashlib.sha256(texts["wan"].encode()).hexdigest()
        self.programs = {
            "plain": plain_report | measure.memory(plain),
            "method": method_report | measure.memory(method) | {"lowered_sha256": digest},
        }
        self.functions: dict[str, Callable[[], Carry]] = {"plain": lambda: plain(*common, *bare)}
        # The compiled program itself: it takes other values, and refuses what would need another program.
        self.functions |= {name: lambda own=own: method(*common, *own) for name, own in methods.items()}

    def check(self) -> dict[str, float]:
        """Runs every arm once, `plain` first; notes peak memory. Relative distance of every velocity to wan's.

        Raises:
          FloatingPointError: NaN or inf.
          AssertionError: an arm that should change the velocity and does not.
        """
        velocities = {}
        for name, function in self.functions.items():
            after = function()
            check(after)
            self.programs["plain" if name == "plain" else "method"] |= measure.peak()
            velocities[name] = steps.velocity(self._before, after, self._table)
        for name, other in EFFECTS:
            if (velocities[name] == velocities[other]).all():
                raise AssertionError(f"arm {name}: the same velocity as {other}")
        return {name: measure.relative_error(velocity, velocities["wan"]) for name, velocity in velocities.items()}


def one_layer(
    config: DiTConfig, grid: tuple[int, int, int], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Isolated cross-attention of one layer in one pass, without its projections: KAB "off" and "on"; and joint with a
    bias that is "given", which goes frame by frame as KAB does, but has no frame attention.

    Args:
      grid: latents (F, h, w).
    """
    anchoring, frames, images = KAB(), grid[0] // config.patch_size[0], config.num_images
    keys = iter(jax.random.split(jax.random.key(3), 5))

    def normal(*shape: int) -> jax.Array:
        dtype = jnp.dtype(config.precision.compute)
        return jax.random.normal(next(keys), (1, *shape, config.num_heads, config.head_dim), dtype)

    q = normal(flops.tokens(config, grid))
    k, v = (Branches(normal(config.text_length), normal(images, config.image_tokens)) for _ in range(2))
    control = CrossControl(
        anchors=np.int32([0, frames - 1]),
        curve=kab.anchor_curve(anchoring, frames),
        floor=np.float32(anchoring.floor),
        isolated=np.bool_(True),
        weights=np.ones(1 + images, np.float32),
    )
    zeros = CrossBias(jnp.zeros((1, frames, config.text_length)), jnp.zeros((1, frames, images, config.image_tokens)))
    strength = kab.strength(anchoring, STEPS, 1, frames).max((0, 1))[None]
    on, off = (jax.device_put((control, own)) for own in (strength, 0 * strength))

    def attend(q: jax.Array, k: Branches, v: Branches, bias: CrossBias | None, control, strength) -> jax.Array:
        return cross_attention(q, k, v, bias, control, strength, config.precision, config.attention)[0]

    own, _ = measure.compile_timed(attend, q, k, v, None, *on)
    given, _ = measure.compile_timed(attend, q, k, v, zeros, None, None)
    functions = {"off": lambda: own(q, k, v, None, *off), "on": lambda: own(q, k, v, None, *on),
                 "given": lambda: given(q, k, v, zeros, None, None)}  # fmt: skip
    rounds = [one_round(functions, clock) for _ in range(1 + repeats)][1:]
    times = {name: measure.Timing(tuple(spent[name] for spent in rounds)) for name in functions}
    extra = median(spent["on"] - spent["off"] for spent in rounds)
    return {name: timing.report() for name, timing in times.items()} | {"extra_seconds": extra}


def one_round(functions: Mapping[str, Callable[[], Any]], clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of every function, run in turn; as `measure.interleave`, by another clock."""
    spent = {}
    for name, function in functions.items():
        start = clock()
        jax.block_until_ready(function())
        spent[name] = clock() - start
    return spent


def run(arguments: argparse.Namespace, model: ModelConfig, shape: Shape, depth: int) -> bool:
    """Formulas, one layer, then rounds of all arms; writes what there is after every round.

    Args:
      depth: layers of the full model.
    """
    grid, clock = shape.latent_grid(model.vae), CLOCKS[arguments.clock]
    report: dict[str, Any] = {
        "benchmark": "method_cost",
        "environment": measure.environment(),
        "preset": model.name,
        "dtype": arguments.dtype,
        "attention": model.dit.attention,
        "clock": arguments.clock,
        "layers": model.dit.num_layers,
        "shape": dataclasses.asdict(shape),
        "formula": {"measured": formula(model.dit, grid)},
    }
    whole = dataclasses.replace(model.dit, num_layers=depth)
    for height, width, frames in SIZES:
        full = Shape(1, frames, (height, width)).latent_grid(model.vae)
        report["formula"][f"{height}x{width}x{frames}"] = formula(whole, full)
    (height, width), tokens = shape.size, report["formula"]["measured"]["tokens"]
    print(f"{report['environment']['device']}: {model.name}, {model.dit.num_layers} layers, {arguments.dtype}, "
          f"{arguments.clock} clock, {shape.frames} frames of {height}x{width}, {tokens} tokens in "
          f"{grid[0]} latent frames", flush=True)  # fmt: skip
    show_formula(report["formula"])
    report["one_layer"] = one_layer(model.dit, grid, arguments.layer_repeats, clock)
    both = Steps(model, shape)
    report |= {"distance_to_wan": both.check(), "programs": both.programs}
    seconds: dict[str, tuple[float, ...]] = {name: () for name in both.functions}
    for _ in range(arguments.repeats):
        for name, spent in one_round(both.functions, clock).items():
            seconds[name] += (spent,)
        times = {name: measure.Timing(values) for name, values in seconds.items()}
        report |= summary(times, report["one_layer"]["extra_seconds"], model.dit, depth, grid)
        measure.write(arguments.out, report)
    show(report)
    return True


def parser() -> argparse.ArgumentParser:
    """The command line; what depends on the backend is filled in by `main`."""
    pairs = [name for name, make in PRESETS.items() if make().dit.num_images == 2]
    small = ", ".join(f"{name} {value}" for name, value in SMALL.items()).replace("(64, 64)", "64x64")
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.method_cost",
        description=__doc__.splitlines()[0],
        epilog=f"On a CPU the defaults are {small}; else the preset's own and bfloat16.",
    )
    out.add_argument("--preset", choices=sorted(pairs), default="flf2v_14b", help="default flf2v_14b")
    out.add_argument("--layers", type=measure.positive, help="transformer layers, at least 2")
    out.add_argument("--size", type=measure.parse_size, help="HEIGHTxWIDTH in pixels")
    out.add_argument("--frames", type=measure.positive, help="pixel frames")
    out.add_argument("--dtype", choices=tuple(measure.POLICIES))
    out.add_argument("--repeats", type=measure.positive, default=3, help="timed rounds of all arms; default 3")
    out.add_argument("--layer-repeats", type=measure.positive, default=9, help="of one layer alone; default 9")
    out.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="processor: on a CPU with other work")
    out.add_argument("--out", type=measure.output, help="JSON file, written anew after every round")
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    arguments = line.parse_args(argv)
    model, platform = preset(arguments.preset), measure.backend(line)
    depth, usual = model.dit.num_layers, model.sampling
    own = {"layers": depth, "size": usual.size, "frames": usual.frames, "dtype": "bfloat16"}
    for name, value in (SMALL if platform == "cpu" else own).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    measure.check_clip(line, model, arguments.size, arguments.frames)
    least = 2 * model.vae.temporal_stride + 1
    if arguments.frames < least:
        line.error(
            f"frames {arguments.frames}: KAB needs a latent frame between the keyframes, at least {least} frames"
        )
    if arguments.layers < 2:
        line.error(f"layers {arguments.layers}: give at least 2, one with KAB and one without")
    dit = dataclasses.replace(model.dit, num_layers=arguments.layers, precision=measure.POLICIES[arguments.dtype])
    model = dataclasses.replace(model, dit=dit).for_platform(platform)
    shape = Shape(1, arguments.frames, arguments.size)
    return measure.guarded(line, lambda: run(arguments, model, shape, depth))


if __name__ == "__main__":
    sys.exit(main())
