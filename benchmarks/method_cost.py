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
import time
from collections.abc import Callable, Mapping
from statistics import median
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flops, measure
from benchmarks.throughput import GUIDANCE_SCALE, DiTBenchmark, Shape, guided_step
from wanjax import kab as kabs
from wanjax import keyframes
from wanjax.config import PRESETS, DiTConfig, ModelConfig, preset
from wanjax.cross import cross_attention
from wanjax.dit import WanDiT
from wanjax.guidance import guided
from wanjax.kab import KAB
from wanjax.method import Isolation, Method, MethodArrays, arrays
from wanjax.retro import ReTRo
from wanjax.types import Branches, Conditions, CrossControl

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

STEPS = 50
GOALS = MappingProxyType({"step": 1.02, "run": 1.004, "retro": 1.0})
"""Highest ratio wanted: of a step with KAB to one without, of a whole run likewise, of ReTRo to none."""

SIZES = ((480, 864, 81), (720, 1280, 81))
"""Height, width and frames in pixels that the formulas are shown for, besides the measured size."""

SMALL = {"layers": 2, "size": (64, 64), "frames": 17, "dtype": "float32"}
"""Defaults on a CPU: the preset's width and numbers of keys, one layer with KAB and one without."""

CLOCKS = MappingProxyType({"wall": time.perf_counter, "processor": time.process_time})
"""The processor's seconds of this process, on a CPU, do not grow with what else runs there."""


def method_step(config: DiTConfig) -> Callable[..., jax.Array]:
    """(params, latents, timestep [], conditions, negative text, scale, method of one step) -> velocity."""

    def step(
        params: Any,
        latents: jax.Array,
        timestep: jax.Array,
        conditions: Conditions,
        negative: jax.Array,
        scale: jax.Array,
        method: MethodArrays,
    ) -> jax.Array:
        def model(latents: jax.Array, timestep: jax.Array, conditions: Conditions, control, bias) -> jax.Array:
            return WanDiT(config).apply({"params": params}, latents, timestep, conditions, method.table, bias, control)

        denoise = guided(model, conditions, negative, scale, "sequential", method.control)
        return denoise(latents, timestep, method.strength)

    return step


def active_steps(latent_frames: int) -> np.ndarray:
    """Which steps of a run KAB touches: bool [STEPS]."""
    return kabs.strength(KAB(), STEPS, 1, latent_frames).any((1, 2))


def active_layers(layers: int) -> int:
    """How many layers of a model with `layers` KAB touches."""
    first, last = kabs.layer_window(KAB(), layers)
    return last - first + 1


def inputs(model: ModelConfig, shape: Shape) -> dict[str, MethodArrays]:
    """By arm, on the device: its method with the strength [L, F] of one step."""
    active = active_steps(model.vae.latent_frames(shape.frames))
    found = {}
    for name, method in ARMS.items():
        if method is not None:
            whole = arrays(method, model, shape.frames, shape.size, STEPS)
            step = STEPS - 1 if name == "kab_inactive" else int(active.argmax())
            found[name] = jax.device_put(whole.replace(strength=whole.strength[step]))
    return found


class Steps:
    """Both programs, with every arm as a function without arguments.

    Attributes:
      programs: of "plain" and "method": seconds to compile, memory.
      functions: arm -> velocity.
    """

    def __init__(self, model: ModelConfig, shape: Shape) -> None:
        benchmark = DiTBenchmark(model.dit, shape.latent_grid(model.vae), shape.batch)
        common = (
            benchmark.params, benchmark.latents, np.float32(900), benchmark.conditions, benchmark.negative,
            np.float32(GUIDANCE_SCALE),
        )  # fmt: skip
        methods, step = inputs(model, shape), method_step(model.dit)
        plain, plain_report = measure.compile_timed(guided_step(model.dit, "sequential"), *common, benchmark.table)
        method, method_report = measure.compile_timed(step, *common, methods["wan"])
        texts = {name: jax.jit(step).lower(*common, arrays).as_text() for name, arrays in methods.items()}
        if len(set(texts.values())) != 1:
            raise AssertionError(f"arms {', '.join(texts)}: not one program")
        digest = hashlib.sha256(texts["wan"].encode()).hexdigest()
        self.programs = {
            "plain": plain_report | {"program": measure.program_memory(plain)},
            "method": method_report | {"program": measure.program_memory(method), "lowered_sha256": digest},
        }
        self.functions: dict[str, Callable[[], jax.Array]] = {"plain": lambda: plain(*common, benchmark.table)}
        # The compiled program itself: it takes other values, and refuses what would need another program.
        self.functions |= {name: lambda arrays=arrays: method(*common, arrays) for name, arrays in methods.items()}

    def check(self) -> dict[str, float]:
        """Runs every arm once, `plain` first; notes peak memory. Relative distance of every velocity to wan's.

        Raises:
          FloatingPointError: NaN or inf.
          AssertionError: an arm that should change the velocity and does not.
        """
        velocities = {}
        for name, function in self.functions.items():
            velocities[name] = jax.block_until_ready(function())
            self.programs["plain" if name == "plain" else "method"] |= measure.peak_memory()
            if not jnp.isfinite(velocities[name]).all():
                raise FloatingPointError(f"arm {name}: NaN or inf in the velocity")
        for name, other in EFFECTS:
            if (velocities[name] == velocities[other]).all():
                raise AssertionError(f"arm {name}: the same velocity as {other}")
        return {name: measure.relative_error(velocity, velocities["wan"]) for name, velocity in velocities.items()}


def one_layer(
    config: DiTConfig, grid: tuple[int, int, int], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Isolated cross-attention of one layer in one pass, without its projections: KAB off, on, and the bias alone.

    Args:
      grid: latents (F, h, w).
    """
    kab, frames = KAB(), grid[0] // config.patch_size[0]
    sizes = {"text": config.text_length, "first": config.image_tokens, "last": config.image_tokens}
    keys = iter(jax.random.split(jax.random.key(3), 7))

    def normal(length: int) -> jax.Array:
        shape = (1, length, config.num_heads, config.head_dim)
        return jax.random.normal(next(keys), shape, jnp.dtype(config.precision.compute))

    q = normal(flops.tokens(config, grid))
    k, v = (Branches(**{name: normal(length) for name, length in sizes.items()}) for _ in range(2))
    on = CrossControl(
        strength=kabs.strength(kab, STEPS, 1, frames).max((0, 1))[None],
        curve=kabs.anchor_curve(kab, frames),
        floor=np.float32(kab.eps),
        isolated=np.bool_(True),
        weights=np.ones(3, np.float32),
    )
    on, off = (jax.device_put(control) for control in (on, on.replace(strength=0 * on.strength)))
    attend, _ = measure.compile_timed(
        lambda q, k, v, control: cross_attention(q, k, v, None, control, config.precision), q, k, v, on
    )
    bias, _ = measure.compile_timed(lambda q, k, control: kabs.bias(q, k, control, config.precision), q, k, on)
    functions = {"off": lambda: attend(q, k, v, off), "on": lambda: attend(q, k, v, on), "bias": lambda: bias(q, k, on)}
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


def compared(times: Mapping[str, measure.Timing], name: str, other: str) -> dict[str, Any]:
    """Ratio of two arms: the median over rounds of the ratio within a round, and its range."""
    rounds = [a / b for a, b in zip(times[name].seconds, times[other].seconds, strict=True)]
    return {"ratio": median(rounds), "ratio_range": [min(rounds), max(rounds)]}


def at_depth(ratio: float, measured: tuple[int, int], wanted: tuple[int, int], in_layers: float) -> float:
    """The ratio of a step with KAB to one without, at another depth: what it adds to a layer it adds to every one.

    Args:
      ratio: at the measured depth.
      measured, wanted: (layers with KAB, layers).
      in_layers: share of the time of a step without KAB that its layers have at the measured depth.
    """
    extra = (ratio - 1) / measured[0]
    return 1 + wanted[0] * extra / (1 - in_layers + in_layers * wanted[1] / measured[1])


def whole_run(ratio: float, active: int, steps: int) -> float:
    """The ratio of a run to one without KAB, where `active` of its `steps` take `ratio` times as long."""
    return 1 + active / steps * (ratio - 1)


def formula(config: DiTConfig, grid: tuple[int, int, int]) -> dict[str, Any]:
    """Operations and bytes of KAB by formula, beside the operations of guided steps without it.

    Args:
      grid: latents (F, h, w).
    """
    step, layers = 2 * flops.total(flops.dit(config, grid)), active_layers(config.num_layers)
    layer, steps = flops.total(flops.kab(config, grid)), int(active_steps(grid[0] // config.patch_size[0]).sum())
    return {
        "tokens": flops.tokens(config, grid),
        "layers": [layers, config.num_layers],
        "steps": [steps, STEPS],
        "guided_flops": {"step": step, "run": STEPS * step},
        # In the conditional pass alone.
        "kab_flops": {"layer": layer, "step": layers * layer, "run": steps * layers * layer},
        "kab_ratio": {"step": 1 + layers * layer / step, "run": whole_run(1 + layers * layer / step, steps, STEPS)},
        "kab_layer_bytes": flops.kab_bytes(config, grid),
        "isolation_flops": 0,
        "retro_flops": 0,
    }


def summary(
    times: Mapping[str, measure.Timing], layer_seconds: float, config: DiTConfig, depth: int, grid: tuple[int, int, int]
) -> dict[str, Any]:
    """All ratios.

    Args:
      times: of every arm.
      layer_seconds: what KAB adds to one layer measured alone.
      config: as measured.
      depth: layers of the full model.
      grid: latents (F, h, w).
    """
    parts, by_formula = flops.dit(config, grid), formula(config, grid)
    in_layers = 1 - (parts["embedders"] + parts["head"]) / flops.total(parts)
    measured, full = ((active_layers(n), n) for n in (config.num_layers, depth))

    def follows(step: float) -> dict[str, float]:
        scaled = at_depth(step, measured, full, in_layers)
        return {"step": step, "step_full_depth": scaled, "run_full_depth": whole_run(scaled, *by_formula["steps"])}

    def kab(name: str, other: str) -> dict[str, Any]:
        step = compared(times, name, other)
        middle, low, high = (follows(ratio) for ratio in (step["ratio"], *step["ratio_range"]))
        return {key: {"ratio": middle[key], "ratio_range": [low[key], high[key]]} for key in middle}

    arms = {
        name: timing.report() | {"to_plain": compared(times, name, "plain"), "to_wan": compared(times, name, "wan")}
        for name, timing in times.items()
    }
    isolated = kab("kab", "kab_inactive")
    return {
        "arms": arms,
        "kab": {
            "layers": measured,
            "full_layers": full,
            "steps": by_formula["steps"],
            "layers_share_of_flops": in_layers,
            "isolated": isolated,
            "joint": kab("kab_joint", "wan"),
            "from_one_layer": follows(1 + measured[0] * layer_seconds / times["kab_inactive"].median),
            "by_flops": follows(by_formula["kab_ratio"]["step"]),
            "goals": dict(GOALS),
        },
        # Isolation in every step, KAB in its own, against the program that knows neither.
        "run_to_plain": arms["kab_inactive"]["to_plain"]["ratio"] * isolated["run_full_depth"]["ratio"],
    }


def run(arguments: argparse.Namespace, model: ModelConfig, shape: Shape, depth: int) -> dict[str, Any]:
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
    _show_formula(report["formula"])
    report["one_layer"] = one_layer(model.dit, grid, arguments.layer_repeats, clock)
    steps = Steps(model, shape)
    report |= {"distance_to_wan": steps.check(), "programs": steps.programs}
    seconds: dict[str, tuple[float, ...]] = {name: () for name in steps.functions}
    for _ in range(arguments.repeats):
        for name, spent in one_round(steps.functions, clock).items():
            seconds[name] += (spent,)
        times = {name: measure.Timing(values) for name, values in seconds.items()}
        report |= summary(times, report["one_layer"]["extra_seconds"], model.dit, depth, grid)
        if arguments.out:
            measure.write_json(arguments.out, report)
    _show(report)
    return report


def _show_formula(formulas: Mapping[str, dict[str, Any]]) -> None:
    print("\nby formula", flush=True)
    rows = []
    for name, f in formulas.items():
        moved = f["kab_layer_bytes"]
        rows.append([
            name, f["tokens"], "{} of {}".format(*f["layers"]), f"{f['guided_flops']['step'] / 1e12:.5g}",
            f"{f['kab_flops']['layer'] / 1e12:.4g}", f"{f['kab_flops']['step'] / 1e12:.4g}",
            *(_percent(f["kab_ratio"][key], 3) for key in ("step", "run")),
            *(f"{moved[key] / 1e9:.4g}" for key in ("frame attention", "biased attention")),
        ])  # fmt: skip
    header = ("size", "tokens", "with KAB", "guided step TFLOP", "KAB layer", "KAB step", "of step", "of run",
              "frame attention GB a layer", "biased GB a layer")  # fmt: skip
    measure.print_table(header, rows)


def _show(report: Mapping[str, Any]) -> None:
    print("\nprograms; all arms but plain are one", flush=True)
    rows, names = [], []
    for name, p in report["programs"].items():
        memory = {key: n for key, n in (p["program"] | p).items() if key.endswith("_bytes")}
        names = [key.removesuffix("_in_bytes").removesuffix("_bytes").replace("_", " ") + ", GiB" for key in memory]
        rows.append([name, f"{p['trace_seconds']:.2f} s", f"{p['compile_seconds']:.2f} s",
                     *(f"{n / 2**30:.3f}" for n in memory.values())])  # fmt: skip
    measure.print_table(("program", "trace", "compile", *names), rows)

    print(f"\none guided step, median of {len(report['arms']['plain']['seconds'])}", flush=True)
    rows = [
        [name, f"{arm['median_seconds']:.4g} s", f"{arm['spread']:.1%}", _range(arm["to_plain"]), _range(arm["to_wan"]),
         f"{report['distance_to_wan'][name]:.2g}"]
        for name, arm in report["arms"].items()
    ]  # fmt: skip
    measure.print_table(("arm", "time", "spread", "to plain", "to wan", "velocity to wan's"), rows)

    kab, layer = report["kab"], report["one_layer"]
    off, on, bias = (f"{layer[name]['median_seconds'] * 1e3:.4g} ms" for name in ("off", "on", "bias"))
    print(
        f"\nisolated cross-attention of one layer alone: {off}; with KAB {on}, of which the bias {bias}\n", flush=True
    )
    labels = {
        "step": "active step, {} of {} layers".format(*kab["layers"]),
        "step_full_depth": "scaled to {} of {} layers".format(*kab["full_layers"]),
        "run_full_depth": "that in {} of {} steps".format(*kab["steps"]),
    }
    goals = {"step_full_depth": _percent(GOALS["step"]), "run_full_depth": _percent(GOALS["run"])}
    rows = [
        [label, _range(kab["isolated"][key]), _range(kab["joint"][key]), _percent(kab["from_one_layer"][key]),
         _percent(kab["by_flops"][key], 3), goals.get(key, "")]
        for key, label in labels.items()
    ]  # fmt: skip
    measure.print_table(("KAB adds", "isolated", "joint", "from one layer", "by operations", "goal"), rows)
    goal = _percent(GOALS["retro"], 0)
    print(f"ReTRo adds {_range(report['arms']['retro']['to_wan'])}: the same program, so 0 (goal {goal})")
    print(f"isolation and KAB against plain, whole run: {_percent(report['run_to_plain'])}", flush=True)


def _percent(ratio: float, digits: int = 2) -> str:
    return f"{100 * (ratio - 1):+.{digits}f} %"


def _range(compared: Mapping[str, Any]) -> str:
    low, high = (100 * (ratio - 1) for ratio in compared["ratio_range"])
    return f"{_percent(compared['ratio'])} ({low:+.2f} to {high:+.2f})"


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
    out.add_argument("--out", help="JSON file, written anew after every round")
    return out


def main(argv: list[str] | None = None) -> None:
    line = parser()
    arguments = line.parse_args(argv)
    model = preset(arguments.preset)
    depth, usual = model.dit.num_layers, model.sampling
    own = {"layers": depth, "size": usual.size, "frames": usual.frames, "dtype": "bfloat16"}
    for name, value in (SMALL if jax.default_backend() == "cpu" else own).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    try:
        keyframes.check_size(*arguments.size, model.size_multiple)
        keyframes.check_frames(arguments.frames, model.vae.temporal_stride)
    except ValueError as error:
        line.error(str(error))
    least = 2 * model.vae.temporal_stride + 1
    if arguments.frames < least:
        line.error(
            f"frames {arguments.frames}: KAB needs a latent frame between the keyframes, at least {least} frames"
        )
    if arguments.layers < 2:
        line.error(f"layers {arguments.layers}: give at least 2, one with KAB and one without")
    dit = dataclasses.replace(model.dit, num_layers=arguments.layers, precision=measure.POLICIES[arguments.dtype])
    run(arguments, dataclasses.replace(model, dit=dit), Shape(1, arguments.frames, arguments.size), depth)


if __name__ == "__main__":
    main()
