"""How time, memory and the machine are measured, and how results are shown and written."""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from wanjax.config import BFLOAT16, FLOAT32, Precision
from wanjax.layers import dot

POLICIES = {"float32": FLOAT32, "bfloat16": BFLOAT16}
ATTENTIONS = ("auto", "xla", "chunked", "cudnn")
CONV3D_FORMS = ("auto", "conv3d", "taps")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "diffusers")


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
    """Compiles for the arguments (arrays or shapes); also the seconds of tracing and of compiling."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
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


def peak_memory() -> dict[str, int]:
    """Highest memory of this process so far: of the device where it keeps count, else resident on the host."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return {"device_peak_bytes": statistics["peak_bytes_in_use"]}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def program_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """XLA's own plan of a program's memory, in bytes; empty where the backend gives none."""
    plan = compiled.memory_analysis()
    if plan is None:
        return {}
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return {name: getattr(plan, name) for name in names}


@contextmanager
def forced(attention: str = "auto", conv3d: str = "auto") -> Iterator[None]:
    """While tracing: all of the transformer's attention, and all 3D convolutions, in one implementation.

    The package chooses these by itself; only measurements override the choice, which is why it is done from
    outside.
    """
    with ExitStack() as stack:
        if attention != "auto":
            # By module, not by dotted name: the package gives out the function under the module's name.
            module = importlib.import_module("wanjax.attention")
            stack.enter_context(mock.patch.object(module, "_choose", lambda *_: attention))
        if conv3d != "auto":
            stack.enter_context(mock.patch("wanjax.layers.conv3d_form", lambda: conv3d))
        yield


def environment() -> dict[str, Any]:
    """Device, versions, command and date, to stand beside every figure."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Writes beside and renames, so that a stopped run leaves what it had."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.part")
    hidden.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(hidden, path)


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
        height, width = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give HEIGHTxWIDTH, such as 480x864") from None
    return height, width


def positive(text: str) -> int:
    """A whole number of at least 1; a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)
