"""How time, memory and the machine are measured, how results are shown and written, and what command lines share."""

import argparse
import dataclasses
import datetime
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wanjax import settings, writing
from wanjax.config import ModelConfig
from wanjax.environment import peak_memory, report, versions
from wanjax.layers import dot
from wanjax.manifest import first_line
from wanjax.precision import BFLOAT16, FLOAT32, Precision

POLICIES = {"float32": FLOAT32, "bfloat16": BFLOAT16}
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "diffusers")
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every repeat, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def report(self) -> dict[str, Any]:
        return {"median_seconds": self.median, "spread": self.spread, "seconds": list(self.seconds)}


def interleave(functions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Times functions in turn, A B A B ..., so that a drift of the machine meets all alike.

    Args:
      functions: by name; each must return only when its work is done, or return JAX arrays.
      repeats: timed rounds, at least 1.
      warmup: untimed rounds before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def compile_timed(function: Callable[..., Any], *arguments: Any) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """Compiles for the arguments (arrays or shapes); also the seconds of tracing and of compiling.

    A function that is jitted already keeps its trace.
    """
    start = time.perf_counter()
    lowered = (function if hasattr(function, "lower") else jax.jit(function)).lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return compiled, {"trace_seconds": traced - start, "compile_seconds": time.perf_counter() - traced}


class Matmul:
    """A large square matrix product by the models' own `layers.dot`: the yardstick of a run.

    Several dependent products run in one program, so that launching costs nothing next to them.
    """

    def __init__(self, precision: Precision, size: int | None = None) -> None:
        self.size = size or (8192 if jax.default_backend() != "cpu" else 1024)
        self.products = 10 if jax.default_backend() != "cpu" else 2
        self._seconds: list[float] = []
        dtype = jnp.dtype(precision.compute)
        keys = jax.random.split(jax.random.key(0))
        x, kernel = (jax.random.normal(key, (self.size, self.size), dtype) for key in keys)
        kernel = kernel / jnp.asarray(self.size**0.5, dtype)

        @jax.jit
        def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return lax.fori_loop(0, self.products, lambda _, x: dot(x, kernel, precision), x)

        self._run = lambda: run(x, kernel)

    def measure(self, repeats: int = 3) -> None:
        """Adds repeats; call it before and after what it is compared with."""
        self._seconds += interleave({"matmul": self._run}, repeats)["matmul"].seconds

    @property
    def flops_per_second(self) -> float:
        return self.products * 2 * self.size**3 / median(self._seconds)

    def report(self) -> dict[str, Any]:
        timing = Timing(tuple(self._seconds))
        return {"size": self.size, "flops_per_second": self.flops_per_second, "spread": timing.spread}


def program_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """XLA's own plan of a program's memory, in bytes; empty where the backend gives none."""
    plan = compiled.memory_analysis()
    if plan is None:
        return {}
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return {name: getattr(plan, name) for name in names}


def peak() -> dict[str, dict[str, int]]:
    """Highest memory of this process and of its device so far, bytes."""
    return {"peak_memory_bytes": peak_memory()}


def memory(compiled: jax.stages.Compiled) -> dict[str, dict[str, int]]:
    """Peak memory so far, and the plan of one program."""
    return peak() | {"program": program_memory(compiled)}


def environment() -> dict[str, Any]:
    """Device, versions, command and date, to stand beside every figure."""
    device = report()["device"]
    return {
        "device": device["kind"],
        "backend": device["platform"],
        "devices": device["count"],
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(PACKAGES),
        "commit": _commit(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _module() -> str:
    """What was run with `python -m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).stem if spec is None else spec.name.removesuffix(".__main__")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """Of the clone, where there is one and git is at hand; with "-dirty" if tracked files are not as committed."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path | None, report: Mapping[str, Any]) -> None:
    """Writes a report, whole or not at all, in the place of an earlier one; without a path nothing.

    Raises:
      ValueError: something stands there that wanjax did not write.
    """
    if path is not None:
        writing.write_json(path, _finite(report), overwrite=True, indent=1)


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as their entries: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]), flush=True)


def relative_error(a: Any, b: Any) -> float:
    """norm(a - b) / norm(b) of two arrays in float32; b is the reference; nan where a is not finite."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


def parse_size(text: str) -> tuple[int, int]:
    """ "480x864" -> (480, 864): height, then width; a type for argparse."""
    try:
        height, width = map(positive, text.lower().split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r}: give HEIGHTxWIDTH, such as 480x864") from None
    return height, width


def positive(text: str) -> int:
    """A whole number from 1 to a million; a type for argparse."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= 10**6):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1, at most a million")
    return int(text)


def output(text: str) -> Path:
    """A JSON file that can be written: not there, or an earlier report; a type for argparse."""
    try:
        path = writing.absolute(text)
        writing.check([writing.Target(path)], overwrite=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def check_clip(line: argparse.ArgumentParser, model: ModelConfig, size: tuple[int, int], *frames: int) -> None:
    """Ends the program as for a bad argument unless the model takes this size and each of these frame counts."""
    try:
        settings.check_size(*size, model.size_multiple)
        for count in frames:
            settings.check_frames(count, model.vae.temporal_stride)
    except ValueError as error:
        line.error(str(error))


def backend(line: argparse.ArgumentParser) -> str:
    """JAX's platform; ends the program as for a bad argument where JAX_PLATFORMS asks for what is not there."""
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # an assertion of JAX's where it knows no such platform
        asked = os.environ.get("JAX_PLATFORMS", "")
        line.error(
            f"devices: JAX has none of JAX_PLATFORMS={asked} ({first_line(error)}); install JAX for them or unset it"
        )


def guarded(line: argparse.ArgumentParser, run: Callable[[], bool]) -> int:
    """The exit code of a run that says whether all went well; what a user may meet ends in one line.

    That is an interruption, too little memory or disk, a result that is not finite, an output that somebody changed.
    """
    try:
        with writing.terminate_as_interrupt():
            return 0 if run() else FAILED
    except KeyboardInterrupt:
        print(f"{line.prog}: interrupted; a report, if asked for, has what was measured before", file=sys.stderr)
        return INTERRUPTED
    except (FloatingPointError, MemoryError, OSError, writing.OutputError, jax.errors.JaxRuntimeError) as error:
        print(f"{line.prog}: error: {first_line(error)}", file=sys.stderr)
        return FAILED


def checked(line: argparse.ArgumentParser, run: Callable[[], None]) -> int:
    """`guarded`, of a run that finds bad input itself: a ValueError ends in its message, a line for each thing that is
    wrong, and exit code 2."""

    def told() -> bool:
        try:
            run()
        except ValueError as error:
            line.error(str(error))
        return True

    return guarded(line, told)
