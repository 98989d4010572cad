"""How fast weights are converted and loaded, against reading the same bytes from a safetensors file.

    python -m benchmarks.load_time                     four layers of FLF2V-14B's transformer in bfloat16 (4.4 GB)
    python -m benchmarks.load_time --preset tiny --layers 2

A source of random weights is written first; then, in turn: `safetensors.numpy.load_file` of it (the floor),
`python -m convert`'s writing of a folder (hashing the source, transposing, checking, hashing and writing with fsync),
and `wanjax.store`'s loading of that folder onto the default device. All files stay in the page cache, so that a
disk's speed is not what is measured, but for what fsync waits for.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks import measure, random_model
from convert import dit, sources, write
from convert.keymap import invert
from wanjax import shapes, store
from wanjax.config import PRESETS, DiTConfig, preset
from wanjax.manifest import read_manifest

SOURCE = "source/diffusion_pytorch_model.safetensors"


def make_source(config: DiTConfig, folder: Path) -> int:
    """Writes a transformer with random weights in the original layout; bytes of the file."""
    params = jax.device_get(random_model.params(shapes.dit(config)))
    (folder / SOURCE).parent.mkdir()
    save_file(invert(dit.original(config), params), folder / SOURCE)
    told = {"num_heads": config.num_heads, "text_len": config.text_length}  # what shapes do not tell
    (folder / SOURCE).with_name("config.json").write_text(json.dumps(told), encoding="utf-8")
    return (folder / SOURCE).stat().st_size


def run(config: DiTConfig, folder: Path, repeats: int) -> dict[str, Any]:
    """All three, in turn.

    Args:
      folder: empty, with room for twice the weights.
    """
    size = make_source(config, folder)
    dtype = {"bfloat16": "bf16", "float32": "f32"}[config.precision.param]
    target = folder / "model"

    def convert() -> None:
        shutil.rmtree(target, ignore_errors=True)
        write.write(write.plan(sources.find((folder / SOURCE).parent), dtype), target, dtype)

    def load() -> Any:
        tree = shapes.dit(config)
        store.check(target, "dit", tree, read_manifest(target))
        return jax.block_until_ready(store.restore(target, "dit", tree, None))

    functions = {"load_file": lambda: load_file(folder / SOURCE), "convert": convert, "load": load}
    times = measure.interleave(functions, repeats)
    _same(load(), load_file(folder / SOURCE), config)
    floor = times["load_file"].median
    return {
        "bytes": size,
        "runs": {
            name: timing.report() | {"bytes_per_second": size / timing.median, "ratio": timing.median / floor}
            for name, timing in times.items()
        },
    } | measure.peak()


def _same(params: Any, tensors: dict[str, np.ndarray], config: DiTConfig) -> None:
    """AssertionError unless what was loaded is what was in the source."""
    back = invert(dit.original(config), jax.device_get(params))
    wrong = [name for name, tensor in tensors.items() if not np.array_equal(back[name], tensor)]
    if wrong:
        raise AssertionError(f"{len(wrong)} tensors changed on the way, {wrong[0]} among them")


def _show(report: dict[str, Any]) -> None:
    print(f"{report['bytes'] / 1e9:.3f} GB, {report['layers']} layers of {report['preset']}, {report['dtype']}")
    rows = [
        [
            name,
            f"{entry['median_seconds']:.3f} s",
            f"{entry['bytes_per_second'] / 1e9:.2f} GB/s",
            f"{entry['ratio']:.2f}",
        ]
        for name, entry in report["runs"].items()
    ]
    measure.print_table(("", "time", "rate", "to load_file"), rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.load_time", description=__doc__.splitlines()[0])
    out.add_argument("--preset", choices=sorted(PRESETS), default="flf2v_14b", help="default flf2v_14b")
    out.add_argument("--layers", type=measure.positive, default=4, help="transformer layers; default 4")
    out.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    out.add_argument("--repeats", type=measure.positive, default=3, help="rounds; default 3")
    out.add_argument("--folder", type=Path, help="where to put the files; default the system's temporary folder")
    out.add_argument("--out", type=measure.output, help="JSON file")
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    arguments = line.parse_args(argv)
    policy = measure.POLICIES[arguments.dtype]
    config = dataclasses.replace(preset(arguments.preset).dit, num_layers=arguments.layers, precision=policy)
    measure.backend(line)
    try:
        folder = tempfile.TemporaryDirectory(prefix="wanjax-", dir=arguments.folder)
    except OSError as error:
        line.error(f"folder {arguments.folder}: cannot write in it ({error.strerror}); choose another")

    def measured() -> bool:
        with folder:
            report = run(config, Path(folder.name), arguments.repeats)
        report |= {"benchmark": "load_time", "environment": measure.environment(), "preset": arguments.preset,
                   "layers": arguments.layers, "dtype": arguments.dtype}  # fmt: skip
        _show(report)
        measure.write(arguments.out, report)
        return True

    return measure.guarded(line, measured)


if __name__ == "__main__":
    sys.exit(main())
