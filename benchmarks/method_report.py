"""What `method_cost` says: formulas, ratios of its arms, what they come to for a whole model and run, and tables."""

from collections.abc import Mapping
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks import measure
from samplers import flops
from wanjax import kab
from wanjax.config import DiTConfig
from wanjax.kab import KAB

STEPS = 50
GOALS = MappingProxyType({"step": 1.02, "run": 1.004, "retro": 1.0})
"""Highest ratio wanted: of a step with KAB to one without, of a whole run likewise, of ReTRo to none."""


def active_steps(latent_frames: int) -> np.ndarray:
    """Which steps of a run KAB touches: bool [STEPS]."""
    return kab.strength(KAB(), STEPS, 1, latent_frames).any((1, 2))


def active_layers(layers: int) -> int:
    """How many layers of a model with `layers` KAB touches."""
    first, last = kab.layer_window(KAB(), layers)
    return last - first + 1


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


def show_formula(formulas: Mapping[str, dict[str, Any]]) -> None:
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


def show(report: Mapping[str, Any]) -> None:
    print("\nprograms; all arms but plain are one", flush=True)
    rows, names = [], []
    for name, p in report["programs"].items():
        memory = p["program"] | {f"{key} peak": n for key, n in p["peak_memory_bytes"].items()}
        names = [key.removesuffix("_in_bytes").replace("_", " ") + ", GiB" for key in memory]
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
    off, on, given = (f"{layer[name]['median_seconds'] * 1e3:.4g} ms" for name in ("off", "on", "given"))
    print(
        f"\nisolated cross-attention of one layer alone: {off}; with KAB {on}; with a given bias {given}\n", flush=True
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
