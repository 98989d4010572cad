"""wanjax beside diffusers: the same weights, inputs, device, dtype and threads, timed in turn.

    python -m benchmarks.vs_diffusers                                   # small: two CPU cores are enough
    python -m benchmarks.vs_diffusers --preset flf2v_14b --layers 1     # 14B width, 7 GB
    python -m benchmarks.vs_diffusers --preset flf2v_14b --layers 4 --size 480x864 --frames 33 \\
        --dtype bfloat16 --vae-base 96 --vae-size 480x864 --vae-frames 9

The transformer has the preset's true width and few layers. Outputs are compared before anything is timed;
where they differ, the run ends with 1. diffusers runs eagerly, as it does by default, and with --torch-compile its
transformer also compiled. Without torch or diffusers there is nothing to compare with: the run says so and ends with 0.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert.dit
import convert.keymap
import convert.vae
from benchmarks import measure, random_model
from samplers import flops
from wanjax import rope, settings, shapes, vae
from wanjax.config import PRESETS, DiTConfig, VAEConfig, preset
from wanjax.dit import WanDiT
from wanjax.manifest import first_line

LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}
"""Relative error up to which outputs count as the same."""

Pair = dict[str, Callable[[], Any]]
"""The sides by name, "wanjax" and "diffusers" and maybe COMPILED; each returns its output, channels last, when the work
is done."""

COMPILED = "diffusers, compiled"


def missing() -> list[str]:
    """Which of torch and diffusers are not installed."""
    return [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]


def limit_threads(threads: int) -> None:
    """Binds this process to `threads` cores and torch to as many threads; before JAX starts its backend."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if threads > len(cores):
            raise ValueError(f"threads {threads}: this process may use {len(cores)} cores; give at most these")
        os.sched_setaffinity(0, cores[:threads])
    torch.set_num_threads(threads)


def check_device(platform: str) -> None:
    """Raises ValueError where torch cannot compute on what JAX does."""
    import torch

    if platform not in ("cpu", "gpu"):
        raise ValueError(f"devices: torch has no {platform}; set JAX_PLATFORMS=cpu")
    if platform == "gpu" and not torch.cuda.is_available():
        raise ValueError("torch: JAX sees a GPU and torch does not; install torch for CUDA, or set JAX_PLATFORMS=cpu")


class Torch:
    """Where and how the reference runs: JAX's kind of device, seeded, and float32 that is float32."""

    def __init__(self, dtype: str) -> None:
        import torch

        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False

    def place(self, model: Any) -> Any:
        """To the device and dtype; what diffusers keeps in float32 stays so."""
        keep = getattr(model, "_keep_in_fp32_modules", None) or []
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            kept = self.dtype != self.torch.float32 and any(part in name for part in keep)
            wanted = self.torch.float32 if kept else self.dtype
            tensor.data = tensor.data.to(self.device, wanted if tensor.is_floating_point() else tensor.dtype)
        return model.eval()

    def array(self, x: np.ndarray, dtype: Any = None) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(x)).to(self.device, dtype or self.dtype)

    def video(self, x: np.ndarray) -> Any:
        """[B, T, H, W, C] to their [B, C, T, H, W]."""
        return self.array(np.moveaxis(x, -1, 1))

    def side(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function without gradients, waiting for the device."""

        def run() -> Any:
            with self.torch.inference_mode():
                out = function()
                if self.device == "cuda":
                    self.torch.cuda.synchronize()
            return out

        return run

    def randomized(self, model: Any) -> dict[str, np.ndarray]:
        """Disturbs every parameter (zeros and ones hide mistakes); the state dict as float32 arrays."""
        generator = self.torch.Generator().manual_seed(0)
        with self.torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * self.torch.randn(parameter.shape, generator=generator))
        return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def to_device(params: Any, dtype: str) -> Any:
    """Float32 host arrays to JAX's device in the policy's parameter dtype."""
    return jax.tree.map(lambda x: jax.device_put(x.astype(jnp.dtype(dtype))), params)


def transformer(config: DiTConfig, grid: tuple[int, int, int], batch: int, backend: str | None = None) -> Pair:
    """Both transformers on one set of random weights and inputs, latents (F, h, w).

    Args:
      backend: of `torch.compile`, for a third side; None leaves it out.
    """
    from diffusers import WanTransformer3DModel

    side = Torch(config.precision.compute)
    model = WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim, in_channels=config.in_channels,
        out_channels=config.out_channels, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.num_layers, eps=config.eps, image_dim=config.image_dim,
        added_kv_proj_dim=config.dim if config.num_images else None,
        pos_embed_seq_len=2 * config.image_tokens if config.num_images == 2 else None,
    )  # fmt: skip
    state = side.randomized(model)
    params = convert.keymap.convert(convert.dit.diffusers(config), shapes.dit(_float32(config)), state)
    params = to_device(params, config.precision.param)
    del state
    model = side.place(model)

    latents, conditions, _ = random_model.inputs(config, grid, batch, 1)
    timestep = np.full(batch, 700, np.float32)
    tokens = tuple(n // size for n, size in zip(grid, config.patch_size, strict=True))
    arguments = jax.device_put((params, latents, timestep, conditions, rope.table(tokens, config.head_dim)))
    ours, _ = measure.compile_timed(lambda params, *rest: WanDiT(config).apply({"params": params}, *rest), *arguments)

    x = latents if conditions.latent is None else np.concatenate([latents, conditions.latent], -1)
    # The images of a sample follow each other on their batch axis.
    image = None if conditions.images is None else conditions.images.reshape(-1, *conditions.images.shape[2:])
    inputs = (side.video(x), side.array(timestep, side.torch.float32), side.array(conditions.text),
              None if image is None else side.array(image))  # fmt: skip
    sides = {"diffusers": model}
    if backend is not None:
        sides[COMPILED] = side.torch.compile(model, backend=backend)  # compiled when it is first called
    theirs = {name: side.side(lambda own=own: own(*inputs, return_dict=False)[0].movedim(1, -1))
              for name, own in sides.items()}  # fmt: skip
    return {"wanjax": lambda: ours(*arguments), **theirs}


def autoencoder(config: VAEConfig, grid: tuple[int, int, int]) -> Pair:
    """Both decoders on one set of random weights and latents (F, h, w)."""
    from diffusers import AutoencoderKLWan

    side = Torch(config.precision.compute)
    model = AutoencoderKLWan(
        base_dim=config.base_dim, dim_mult=list(config.dim_mult), num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    )  # fmt: skip
    state = side.randomized(model)
    params = convert.keymap.convert(convert.vae.diffusers(config), shapes.vae(_float32(config)), state)
    params = to_device(params, config.precision.param)
    model = side.place(model)

    latents = np.random.default_rng(1).standard_normal((1, *grid, config.latent_channels), np.float32)
    arguments = jax.device_put((params, latents))
    ours, _ = measure.compile_timed(lambda params, x: vae.decode(config, params, x), *arguments)
    raw = side.video(latents * np.float32(config.latent_std) + np.float32(config.latent_mean))
    theirs = side.side(lambda: model.decode(raw, return_dict=False)[0].movedim(1, -1))
    return {"wanjax": lambda: ours(*arguments), "diffusers": theirs}


def _float32(config: Any) -> Any:
    return dataclasses.replace(config, precision=measure.POLICIES["float32"])


def compare(pair: Pair, dtype: str, repeats: int) -> dict[str, Any]:
    """Agreement, then interleaved times and their ratios (above 1: wanjax is faster).

    What torch cannot compile is reported and left out.
    """
    ours, theirs = np.asarray(pair["wanjax"]()), pair["diffusers"]().float().cpu().numpy()
    error = measure.relative_error(ours, theirs)
    result: dict[str, Any] = {"relative_error": error, "limit": LIMITS[dtype], "agree": bool(error <= LIMITS[dtype])}
    if not result["agree"]:
        return result
    if COMPILED in pair:
        try:
            start = time.perf_counter()
            pair[COMPILED]()
            result["torch_compile_seconds"] = time.perf_counter() - start
        except RuntimeError as raised:  # dynamo's and the backends' own are of this kind
            result["torch_compile_error"] = first_line(raised)
            pair = {name: side for name, side in pair.items() if name != COMPILED}
    times = measure.interleave(pair, repeats)
    result |= {name: timing.report() for name, timing in times.items()}
    for name, ratio in (("diffusers", "ratio"), (COMPILED, "ratio_compiled")):
        if name in times:
            rounds = [b / a for a, b in zip(times["wanjax"].seconds, times[name].seconds, strict=True)]
            result[ratio] = times[name].median / times["wanjax"].median
            result[f"{ratio}_range"] = [min(rounds), max(rounds)]
    return result


def _show(results: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, result in results.items():
        cells = [f"{result['relative_error']:.2g}"]
        if result["agree"]:
            for side in ("wanjax", "diffusers"):
                cells.append(f"{result[side]['median_seconds']:.4g} s +-{result[side]['spread'] / 2:.0%}")
            for ratio in ("ratio", "ratio_compiled"):
                low, high = result.get(f"{ratio}_range", (0, 0))
                told = f"{result[ratio]:.2f} ({low:.2f} to {high:.2f})" if ratio in result else ""
                cells.append(told or result.get("torch_compile_error", ""))
        else:
            cells += ["outputs differ", f"limit {result['limit']:g}", "not timed", ""]
        rows.append([name, *cells])
    measure.print_table(("", "error", "wanjax", "diffusers", "diffusers / wanjax", "compiled / wanjax"), rows)


def run(arguments: argparse.Namespace) -> bool:
    """Both comparisons; writes after each; True if the outputs agree."""
    model = preset(arguments.preset).for_platform(jax.default_backend())
    report: dict[str, Any] = {
        "benchmark": "vs_diffusers", "environment": measure.environment(), "threads": arguments.threads,
        "preset": model.name, "layers": arguments.layers, "results": {},
    }  # fmt: skip

    def latent_grid(config: VAEConfig, size: tuple[int, int], frames: int) -> tuple[int, int, int]:
        height, width = (side // config.spatial_stride for side in size)
        return config.latent_frames(frames), height, width

    def add(name: str, pair: Pair, dtype: str) -> None:
        report["results"][f"{name}, {dtype}"] = compare(pair, dtype, arguments.repeats)
        measure.write(arguments.out, report)

    # diffusers finds the keyframes' tokens after the first 512, whatever the text encoder's length.
    config = dataclasses.replace(
        model.dit, num_layers=arguments.layers, precision=measure.POLICIES[arguments.dtype], text_length=512
    )
    grid = latent_grid(model.vae, arguments.size, arguments.frames)
    name = f"{model.name} transformer, {config.num_layers} layers, {flops.tokens(config, grid)} tokens"
    add(name, transformer(config, grid, arguments.batch, arguments.torch_compile), arguments.dtype)
    config = dataclasses.replace(
        VAEConfig(),
        base_dim=arguments.vae_base,
        conv3d=model.vae.conv3d,
        precision=measure.POLICIES[arguments.vae_dtype],
    )
    grid = latent_grid(config, arguments.vae_size, arguments.vae_frames)
    height, width = arguments.vae_size
    name = f"vae decode, base {config.base_dim}, {arguments.vae_frames} frames of {height}x{width}"
    add(name, autoencoder(config, grid), arguments.vae_dtype)
    _show(report["results"])
    return all(result["agree"] for result in report["results"].values())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.vs_diffusers", description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first = out.add_argument_group("transformer")
    first.add_argument("--preset", choices=sorted(PRESETS), default="t2v_1_3b")
    first.add_argument("--layers", type=measure.positive, default=2)
    first.add_argument("--size", type=measure.parse_size, default=(128, 128), help="HEIGHTxWIDTH in pixels")
    first.add_argument("--frames", type=measure.positive, default=17)
    first.add_argument("--batch", type=measure.positive, default=1)
    first.add_argument("--dtype", choices=tuple(LIMITS), default="float32")
    first.add_argument("--torch-compile", choices=("inductor", "eager"), help="backend; eager only traces")
    second = out.add_argument_group("autoencoder")
    second.add_argument("--vae-base", type=measure.positive, default=32, help="base width; the published is 96")
    second.add_argument("--vae-size", type=measure.parse_size, default=(64, 64), help="HEIGHTxWIDTH in pixels")
    second.add_argument("--vae-frames", type=measure.positive, default=9)
    second.add_argument("--vae-dtype", choices=tuple(LIMITS), default="float32")
    how = out.add_argument_group("how")
    how.add_argument("--repeats", type=measure.positive, default=7)
    how.add_argument("--threads", type=measure.positive, default=cores, help="of both, on a CPU")
    how.add_argument("--out", type=measure.output, help="JSON file, written after each comparison")
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    arguments = line.parse_args(argv)
    published = VAEConfig()
    measure.check_clip(line, preset(arguments.preset), arguments.size, arguments.frames)
    try:
        settings.check_size(*arguments.vae_size, published.spatial_stride)
        settings.check_frames(arguments.vae_frames, published.temporal_stride)
        if lacking := missing():
            reason = f"{' and '.join(lacking)} not installed: nothing to compare with, skipped"
            print(f"vs_diffusers: {reason}", flush=True)
            measure.write(arguments.out, {"benchmark": "vs_diffusers", "skipped": reason})
            return 0
        limit_threads(arguments.threads)
        # Both frameworks share one GPU: JAX must not take most of it in advance.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        check_device(measure.backend(line))
    except ValueError as error:
        line.error(str(error))
    return measure.guarded(line, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
