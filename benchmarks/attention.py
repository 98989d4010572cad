"""The implementations of attention: do they agree, and how long do they take at a model's shapes.

    python -m benchmarks.attention --preset flf2v_14b --size 480x864 --frames 81

Agreement is measured at fewer frames, in bfloat16 against float32; exits with 1 where an implementation that
should run does not, or is off. Cases: self-attention, and cross-attention to the text and to the keyframes,
the latter two also with an additive bias. Axis letters: B batch, S queries, K keys.
"""

import argparse
import importlib
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import flops, measure
from wanjax import keyframes
from wanjax.attention import attention
from wanjax.config import BFLOAT16, FLOAT32, PRESETS, ModelConfig, preset

LIMIT = 1e-2
"""Relative error in bfloat16 against float32."""

REFUSED = "B11K"
"""The bias that broadcasts over queries: cuDNN is known to refuse it, which is recorded and no failure."""

ERRORS = (RuntimeError, ValueError, NotImplementedError)
"""What JAX raises for a shape or type that an implementation does not take."""


@dataclass(frozen=True)
class Case:
    """One attention. `bias` is the shape of an additive bias, "" for none, e.g. "11SK" for [1, 1, S, K]."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    width: int
    bias: str = ""

    @property
    def logit_bytes(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys * self.width

    def arrays(self, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        """q, k, v and the bias (None for none); q is scaled so that the softmax is far from flat."""
        keys = jax.random.split(jax.random.key(0), 4)
        shape = (self.batch, self.queries, self.heads, self.width)
        other = (self.batch, self.keys, self.heads, self.width)
        q = 3 * jax.random.normal(keys[0], shape, dtype)
        k, v = (jax.random.normal(key, other, dtype) for key in keys[1:3])
        sizes = {"1": 1, "B": self.batch, "S": self.queries, "K": self.keys}
        bias = jax.random.normal(keys[3], [sizes[axis] for axis in self.bias], dtype) if self.bias else None
        return q, k, v, bias


def cases(model: ModelConfig, latent_grid: tuple[int, int, int], batch: int, biases: tuple[str, ...]) -> list[Case]:
    """The attentions of one block at these latents (F, h, w)."""
    config = model.dit
    length = flops.tokens(config, latent_grid)
    heads, width = config.num_heads, config.head_dim
    branches = {"text": config.text_length, "keyframes": config.num_images * config.image_tokens}
    found = [Case("self", batch, length, length, heads, width)]
    for name, keys in branches.items():
        if keys:
            found += [Case(name, batch, length, keys, heads, width, bias) for bias in ("", *biases)]
    return found


def agreement(case: Case) -> list[dict[str, Any]]:
    """Relative error of every implementation in bfloat16 against float32 on the same numbers."""
    arrays = case.arrays(jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    reference = jax.jit(lambda *x: attention(*x, precision=FLOAT32, implementation="chunked"))(*exact)
    rows = []
    for name in measure.ATTENTIONS:
        row = {"case": case.name, "bias": case.bias, "implementation": name}
        refusal = why_not(case, name)
        if refusal is None:
            try:
                error = measure.relative_error(_jitted(name)(*arrays), reference)
                row |= {"relative_error": error, "passed": bool(error <= LIMIT)}
            except ERRORS as raised:
                known = name == "cudnn" and case.bias == REFUSED
                row |= {"error": _first_line(raised), "passed": known}
        else:
            row |= {"skipped": refusal, "passed": True}
        outcome = row.get("skipped") or row.get("error") or f"{row['relative_error']:.3g} (limit {LIMIT:g})"
        print(f"{'ok  ' if row['passed'] else 'FAIL'} {_label(row)}: {outcome}", flush=True)
        rows.append(row)
    return rows


def timing(case: Case, repeats: int, matmul: measure.Matmul, chunk_mib: list[int]) -> list[dict[str, Any]]:
    """Interleaved times of the implementations that can run, in bfloat16; several chunk sizes for "self"."""
    arrays, rows, programs = case.arrays(jnp.bfloat16), [], {}
    module = importlib.import_module("wanjax.attention")
    default = module.CHUNK_BYTES >> 20
    variants = [(name, default) for name in ("xla", "cudnn")]
    variants += [("chunked", mib) for mib in (chunk_mib if case.name == "self" else [default])]
    for name, mib in variants:
        label = f"chunked {mib} MiB" if name == "chunked" else name
        row = {"case": case.name, "bias": case.bias, "implementation": label}
        refusal = why_not(case, name)
        if refusal is None:
            try:
                with mock.patch.object(module, "CHUNK_BYTES", mib << 20):
                    programs[label], compiling = measure.compile_timed(_jitted(name), *arrays)
                row |= compiling
            except ERRORS as raised:
                row["error"] = _first_line(raised)
        else:
            row["skipped"] = refusal
        rows.append(row)
    times = measure.interleave({label: lambda p=p: p(*arrays) for label, p in programs.items()}, repeats)
    for row in rows:
        if row["implementation"] in times:
            one = times[row["implementation"]]
            rate = case.flops / one.median
            row |= one.report() | {"flops": case.flops, "flops_per_second": rate,
                                   "share_of_matmul": rate / matmul.flops_per_second}  # fmt: skip
    return rows


def why_not(case: Case, implementation: str) -> str | None:
    """Why an implementation is not tried on this machine, or None."""
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        return "cudnn runs on NVIDIA GPUs only"
    statistics = jax.local_devices()[0].memory_stats() or {}
    limit = statistics.get("bytes_limit", 4 * 2**30)
    # Logits, probabilities and one temporary.
    if implementation == "xla" and 3 * case.logit_bytes > limit:
        return f"logits of {case.logit_bytes / 2**30:.0f} GiB do not fit"
    return None


def _jitted(implementation: str) -> Any:
    # A function of its own each time: jit caches by the function, and does not see a patched CHUNK_BYTES.
    return jax.jit(lambda *x: attention(*x, precision=BFLOAT16, implementation=implementation))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _label(row: dict[str, Any]) -> str:
    bias = f", bias [{', '.join(row['bias'])}]" if row["bias"] else ""
    return f"{row['case']}{bias}, {row['implementation']}"


def _show(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        if "median_seconds" in row:
            cells = [f"{row['median_seconds'] * 1e3:.4g} ms", f"{row['spread']:.0%}",
                     f"{row['flops_per_second'] / 1e12:.4g}", f"{row['share_of_matmul']:.1%}"]  # fmt: skip
        else:
            cells = [row.get("skipped") or row["error"], "", "", ""]
        table.append([_label(row), *cells])
    measure.print_table(("attention", "median", "spread", "TFLOP/s", "of matmul"), table)


def run(arguments: argparse.Namespace, model: ModelConfig) -> bool:
    """Agreement, then times; True if all that should agree does."""
    report: dict[str, Any] = {
        "benchmark": "attention", "environment": measure.environment(), "preset": model.name,
        "size": arguments.size, "frames": arguments.frames, "agreement": [], "timing": [],
    }  # fmt: skip

    def grid(frames: int) -> tuple[int, int, int]:
        height, width = (side // model.vae.spatial_stride for side in arguments.size)
        return model.vae.latent_frames(frames), height, width

    def write() -> None:
        if arguments.out:
            measure.write_json(arguments.out, report)

    for case in cases(model, grid(arguments.agreement_frames), 2, ("11SK", "B1SK", REFUSED)):
        report["agreement"] += agreement(case)
        write()
    matmul = measure.Matmul(BFLOAT16, arguments.matmul)
    matmul.measure()
    for case in cases(model, grid(arguments.frames), 1, ("11SK",)):
        rows = timing(case, arguments.repeats, matmul, arguments.chunk_mib)
        report["timing"] += rows
        report["matmul"] = matmul.report()
        _show(rows)
        write()
    return all(row["passed"] for row in report["agreement"])


def main(argv: list[str] | None = None) -> int:
    line = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    line.add_argument("--preset", choices=sorted(PRESETS), default="flf2v_14b")
    line.add_argument("--size", type=measure.parse_size, default=(480, 864), help="HEIGHTxWIDTH in pixels")
    line.add_argument("--frames", type=measure.positive, default=81)
    line.add_argument("--agreement-frames", type=measure.positive, default=5)
    line.add_argument("--chunk-mib", type=measure.positive, nargs="+", default=[64, 256, 1024])
    line.add_argument("--repeats", type=measure.positive, default=5)
    line.add_argument("--matmul", type=measure.positive, help="size of the product compared with")
    line.add_argument("--out", help="JSON file, written anew after every case")
    arguments = line.parse_args(argv)
    model = preset(arguments.preset)
    try:
        keyframes.check_size(*arguments.size, model.size_multiple)
        for frames in (arguments.frames, arguments.agreement_frames):
            keyframes.check_frames(frames, model.vae.temporal_stride)
    except ValueError as error:
        line.error(str(error))
    return 0 if run(arguments, model) else 1


if __name__ == "__main__":
    sys.exit(main())
