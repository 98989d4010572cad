"""The command line of `python -m samplers.plan`: what a run would take, before any download."""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from samplers import chips

BAD_INPUT, INTERRUPTED = 2, 130
GIB = 2**30
FITS = {"yes": "yes", "near": "perhaps", "no": "no"}


def size(text: str) -> tuple[int, int]:
    """(height, width) of HEIGHTxWIDTH, for argparse."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 480x864") from error
    return height, width


def _gib(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB above 0, such as 6")
    return int(value * GIB)


OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "model": {
            "default": "tiny", "metavar": "NAME|FOLDER|hf://OWNER/NAME",
            "help": "tiny, flf2v_14b, i2v_14b, fun_inp_1_3b, fun_inp_14b, a model folder, or a repository on the hub, "
            "which is asked for the sizes of its files (default: %(default)s)",
        },
        "size": {"type": size, "metavar": "HxW", "help": "height x width in pixels (default: the model's)"},
        "frames": {"type": int, "metavar": "N", "help": "4n+1, such as 81 (default: the model's)"},
        "steps": {"type": int, "metavar": "N", "help": "denoising steps (default: the model's)"},
        "guidance": {"type": float, "metavar": "G", "help": "scale; 1 halves the work (default: the model's)"},
        "skip-passes": {
            "type": float, "metavar": "SHARE",
            "help": "share of the steps, 0 to 0.6, whose passes are guessed instead of run (default: 0)",
        },
        "devices": {
            "default": "this", "metavar": "NAME[-N]",
            "help": f"this machine's, or so many of {', '.join(chips.CHIPS)}, such as v5e-8 or h100x8 (default: this)",
        },
        "memory": {
            "default": "auto", "choices": ("auto", "keep", "stage", "stream"),
            "help": "all parts resident, one at a time, or the transformer's kernels streamed from the host too "
            "(default: auto)",
        },
        "weights": {
            "default": "auto", "choices": ("auto", "bf16", "int8", "fp8"),
            "help": "the transformer's kernels as stored (bf16) or in 8 bits (default: auto)",
        },
        "vae-memory": {"type": _gib, "metavar": "GIB", "help": "what the VAE may take besides the weights"},
        "dtype": {"choices": ("float32", "bfloat16"), "help": "precision policy, as for samplers.inbetween"},
        "json": {"action": "store_true", "help": "print everything as JSON, in bytes, operations and seconds"},
        "compile": {
            "nargs": "*", "choices": ("text", "images", "keyframes", "denoise", "decode"), "metavar": "STAGE",
            "help": "also compile these stages (denoise) for the devices, without having them, and print both; minutes",
        },
    }
)  # fmt: skip
"""What argparse is told of each."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(
        "python -m samplers.plan",
        description="Say what a run takes of memory, operations and time, and how it would lie in memory: by formula, "
        "without weights and without a device.",
    )
    for name, options in OPTIONS.items():
        line.add_argument(f"--{name}", **options)
    return line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        devices = chips.parse(args.devices)
        from samplers import budget  # here: it takes a second, which --help and a wrong name need not wait for

        overrides = {name: getattr(args, name) for name in ("size", "frames", "steps", "guidance", "skip_passes")}
        given = {name: value for name, value in overrides.items() if value is not None}
        source = budget.source(args.model, args.dtype)
        found = budget.report(source, devices, given, args.memory, args.weights, args.vae_memory)
        if args.compile is not None:
            from samplers import compiled_budget

            stages = args.compile or ["denoise"]
            way = found["choice"] or found["ways"][-1]
            found["compiled"] = compiled_budget.compiled(
                source.config, found["settings"], devices, stages, way["memory"], way["weights"]
            )
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    try:
        print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at the end
    return 0


def lines(found: Mapping[str, Any]) -> list[str]:
    """The report as text."""
    s, devices, choice = found["settings"], found["devices"], found["choice"]
    many = f"{devices['count']} x " if devices["count"] > 1 else ""
    shown = [f"{found['model']['name']}, {s['size'][0]}x{s['size'][1]}, {s['frames']} frames, {s['steps']} steps, on "
             f"{devices['name']}: {many}{devices['memory'] / GIB:.1f} GiB", ""]  # fmt: skip
    kinds = [name for name in next(iter(found["parts"].values())) if name != "disk"]
    titles = {"memory": "in memory"}
    rows = [[part, *(_gibs(own[kind]) for kind in ("disk", *kinds))] for part, own in found["parts"].items()]
    shown += _table(["GiB", "on disk", *(titles.get(kind, kind) for kind in kinds)], rows)
    if found["download_bytes"] is not None:
        shown.append(f"download: {found['download_bytes'] / GIB:.2f} GiB")
    shown += ["", *_ways(found), ""]
    if choice is None:
        shown.append(f"nothing fits: {found['refusal']}")
    else:
        chosen = f"--memory {choice['memory']} --weights {choice['weights']}"
        shown.append(f"it would run with {chosen}: {choice['why'].partition(': ')[2]}")
    work, spent = found["operations"], found["seconds"]
    shown.append(f"operations: {work['denoise'] / 1e15:.1f} PFLOP to denoise ({work['step'] / 1e12:.1f} TFLOP a step), "
                 f"{work['encode'] / 1e12:.1f} TFLOP to encode, {work['decode'] / 1e12:.1f} to decode")  # fmt: skip
    if spent is None:
        shown.append("time: not known for such a device")
    else:
        each = ", ".join(f"{stage} {_span(own)}" for stage, own in spent.items() if stage != "total")
        shown.append(f"time, estimated: {_span(spent['total'])} ({each}), besides reading weights, compiling and what "
                     "travels between devices")  # fmt: skip
    if "compiled" in found:
        shown += ["", *_compiled(found["compiled"])]
    return shown + [f"note: {note}" for note in found["notes"]]


def _ways(found: Mapping[str, Any]) -> list[str]:
    """Peaks of each way, of one device."""
    ways = found["ways"]
    stages = list(ways[0]["stages"])
    rows = [[way["memory"], "as stored" if way["weights"] == "bf16" else way["weights"],
             *(_gibs(way["stages"][stage]) for stage in stages), _gibs(way["peak_bytes"]),
             _gibs(way["host_bytes"] or None), str(way["tiles"]), FITS[way["fits"]]] for way in ways]  # fmt: skip
    head = ["GiB of a device", "weights", *stages, "peak", "host", "VAE windows", "fits"]
    if found["devices"]["count"] == 1:
        head[0] = "GiB, estimated"
    return _table(head, rows)


def _compiled(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [[one["stage"], f"{one['estimated_bytes'] / GIB:.2f}", f"{one['compiled_bytes'] / GIB:.2f}",
             f"{one['estimated_bytes'] / one['compiled_bytes'] - 1:+.1%}"] for one in stages]  # fmt: skip
    return _table(["GiB besides weights", "estimated", "compiled", ""], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in (head, *rows)]  # fmt: skip


def _gibs(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def _span(seconds: Sequence[float]) -> str:
    """[least, most] seconds for a reader."""
    unit, scale = next((unit, scale) for unit, scale in (("h", 3600), ("min", 60), ("s", 1))
                       if seconds[1] >= 2 * scale or scale == 1)  # fmt: skip
    least, most = (f"{value / scale:.2g}" for value in seconds)
    return f"{least} to {most} {unit}"
