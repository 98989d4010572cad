"""The kernels of attention: do they agree, and how long do they take at a model's shapes.

    python -m benchmarks.attention --preset flf2v_14b --size 480x864 --frames 81

Agreement is measured at fewer frames, in bfloat16 against float32; exits with 1 where a kernel that should run does
not, or is off. Cases: self-attention, and cross-attention to the text and to one image, which also gives its softmax's
residual; in agreement, at the end, also with an additive bias. Axis letters: B batch, S queries, K keys.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from samplers import flops
from wanjax.attention import KERNELS, attention
from wanjax.config import PRESETS, ModelConfig, preset
from wanjax.manifest import first_line
from wanjax.precision import BFLOAT16, FLOAT32, Precision

LIMIT = 1e-2
"""Relative error in bfloat16 against float32."""

ERRORS = (RuntimeError, ValueError, NotImplementedError)
"""What JAX raises for a shape or type that a kernel does not take."""


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
    residual: bool = False

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
    branches = {"text": config.text_length} | ({"image": config.image_tokens} if config.num_images else {})
    found = [Case("self", batch, length, length, heads, width)]
    for name, keys in branches.items():
        found += [Case(name, batch, length, keys, heads, width, bias, residual=True) for bias in ("", *biases)]
    return found


def agreement(case: Case) -> list[dict[str, Any]]:
    """Relative error of every kernel in bfloat16 against float32 on the same numbers; of its log-sum-exp too."""
    arrays = case.arrays(jnp.bfloat16)
    reference = _jitted(case, "chunked", FLOAT32)(*(x if x is None else x.astype(jnp.float32) for x in arrays))
    rows = []
    for name in KERNELS:
        row = {"case": case.name, "bias": case.bias, "kernel": name}
        refusal = why_not(case, name)
        if refusal is None:
            try:
                pairs = zip(_jitted(case, name, BFLOAT16)(*arrays), reference, strict=True)
                errors = [measure.relative_error(*pair) for pair in pairs]
                passed = all(error <= LIMIT for error in errors)
                row |= {"relative_error": errors[0], "residual_error": max(errors[1:], default=None), "passed": passed}
            except ERRORS as raised:
                row |= {"error": first_line(raised), "passed": False}
        else:
            row |= {"skipped": refusal, "passed": True}
        outcome = row.get("skipped") or row.get("error") or f"{row['relative_error']:.3g} (limit {LIMIT:g})"
        print(f"{'ok  ' if row['passed'] else 'FAIL'} {_label(row)}: {outcome}", flush=True)
        rows.append(row)
    return rows


def timing(case: Case, repeats: int, matmul: measure.Matmul) -> list[dict[str, Any]]:
    """Interleaved times of the kernels that can run, in bfloat16."""
    arrays, rows, programs = case.arrays(jnp.bfloat16), [], {}
    for name in KERNELS:
        row = {"case": case.name, "bias": case.bias, "kernel": name}
        refusal = why_not(case, name)
        if refusal is None:
            try:
                programs[name], compiling = measure.compile_timed(_jitted(case, name, BFLOAT16), *arrays)
                row |= compiling
            except ERRORS as raised:
                row["error"] = first_line(raised)
        else:
            row["skipped"] = refusal
        rows.append(row)
    times = measure.interleave({name: lambda p=p: p(*arrays) for name, p in programs.items()}, repeats)
    for row in rows:
        if row["kernel"] in times:
            one = times[row["kernel"]]
            rate = case.flops / one.median
            row |= one.report() | {"flops": case.flops, "flops_per_second": rate,
                                   "share_of_matmul": rate / matmul.flops_per_second}  # fmt: skip
    return rows


def why_not(case: Case, kernel: str) -> str | None:
    """Why a kernel is not tried on this machine, or None."""
    if kernel == "cudnn" and jax.default_backend() != "gpu":
        return "cudnn runs on NVIDIA GPUs only"
    if kernel == "cudnn" and case.bias:
        return "cudnn leaves a bias to xla"
    if kernel.startswith("splash") and jax.default_backend() != "tpu":
        return "splash runs on TPUs only"
    statistics = jax.local_devices()[0].memory_stats() or {}
    limit = statistics.get("bytes_limit", 4 * 2**30)
    # Logits, probabilities and one temporary.
    if kernel == "xla" and 3 * case.logit_bytes > limit:
        return f"logits of {case.logit_bytes / 2**30:.0f} GiB do not fit"
    return None


def _jitted(case: Case, kernel: str, precision: Precision) -> Any:
    """(q, k, v, bias) -> [output], and of a case with residual the log-sum-exp."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> list[jax.Array]:
        found = attention(q, k, v, bias, precision=precision, kernel=kernel, residual=case.residual)
        return [found[0], sum(found[1])] if case.residual else [found]

    return jax.jit(run)


def _label(row: dict[str, Any]) -> str:
    bias = f", bias [{', '.join(row['bias'])}]" if row["bias"] else ""
    return f"{row['case']}{bias}, {row['kernel']}"


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
    """Agreement, times, agreement with a bias; True if all that should agree does."""
    report: dict[str, Any] = {
        "benchmark": "attention", "environment": measure.environment(), "preset": model.name,
        "size": arguments.size, "frames": arguments.frames, "agreement": [], "timing": [],
    }  # fmt: skip

    def agree(of: list[Case]) -> None:
        for case in of:
            report["agreement"] += agreement(case)
            measure.write(arguments.out, report)

    def grid(frames: int) -> tuple[int, int, int]:
        height, width = (side // model.vae.spatial_stride for side in arguments.size)
        return model.vae.latent_frames(frames), height, width

    few = cases(model, grid(arguments.agreement_frames), 2, ("11SK", "B1SK", "B11K"))
    agree([case for case in few if not case.bias])
    matmul = measure.Matmul(BFLOAT16, arguments.matmul)
    matmul.measure()
    for case in cases(model, grid(arguments.frames), 1, ()):
        rows = timing(case, arguments.repeats, matmul)
        report["timing"] += rows
        report["matmul"] = matmul.report()
        _show(rows)
        measure.write(arguments.out, report)
    agree([case for case in few if case.bias])  # the most programs by far, and no kernel is fused there
    return all(row["passed"] for row in report["agreement"])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    out.add_argument("--preset", choices=sorted(PRESETS), default="flf2v_14b")
    out.add_argument("--size", type=measure.parse_size, default=(480, 864), help="HEIGHTxWIDTH in pixels")
    out.add_argument("--frames", type=measure.positive, default=81)
    out.add_argument("--agreement-frames", type=measure.positive, default=5)
    out.add_argument("--repeats", type=measure.positive, default=5)
    out.add_argument("--matmul", type=measure.positive, help="size of the product compared with")
    out.add_argument("--out", type=measure.output, help="JSON file, written anew after every case")
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    arguments = line.parse_args(argv)
    model = preset(arguments.preset)
    measure.check_clip(line, model, arguments.size, arguments.frames, arguments.agreement_frames)
    measure.backend(line)
    return measure.guarded(line, lambda: run(arguments, model))


if __name__ == "__main__":
    sys.exit(main())
