"""Runs of a wide model under a limit on memory: which ways to run fit, what they take, and whose clips are the same.

    python -m benchmarks.fits --limit 9 --out fits.json

FLF2V-14B at its full width with few layers and random weights, in float32 (of bfloat16 kernels a CPU makes float32
copies), is written to a folder as by `python -m convert`. Then `python -m samplers.inbetween` makes one clip from it in
a process of its own, once for each way: first without a limit, whose clip the others are compared with, and then in a
control group with `--limit`, which has to be allowed to make one (root is).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image

from benchmarks import measure, random_model
from samplers.estimate import GIB
from wanjax import checkpoint, manifest, shapes, store
from wanjax.config import ModelConfig, preset, to_json

WAYS = {
    "keep": ["--memory", "keep"],
    "stage": ["--memory", "stage"],
    "stream": ["--memory", "stream"],
    "stage, int8": ["--memory", "stage", "--weights", "int8"],
    "stream, int8": ["--memory", "stream", "--weights", "int8"],
    "auto": [],
}

GROUPS = (("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory"), ("sys/fs/cgroup", "memory.max", ""))
"""Of both versions of control groups: where they are, the file of the limit, their name in /proc/self/cgroup."""
INSIDE = """
import os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Enters a control group and becomes another program."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser("python -m benchmarks.fits", description=__doc__.split("\n", 1)[0])
    line.add_argument("--layers", type=measure.positive, default=3, help="of the transformer (default: %(default)s)")
    line.add_argument("--encoder-layers", type=measure.positive, default=1, help="of UMT5 and CLIP")
    line.add_argument("--size", type=measure.parse_size, default=(64, 96), metavar="HEIGHTxWIDTH")
    line.add_argument("--limit", type=float, required=True, metavar="GIB", help="of memory for a run")
    line.add_argument("--folder", type=Path, help="where the model is, or is to be kept (default: thrown away)")
    line.add_argument("--out", type=measure.output, metavar="FILE", help="JSON of all results")
    return line


def model_of(layers: int, encoder_layers: int) -> ModelConfig:
    """FLF2V-14B with so many layers, in float32."""
    full = checkpoint.with_dtype(preset("flf2v_14b"), "float32")
    return dataclasses.replace(
        full,
        name=f"flf2v_14b_{layers}_layers",
        dit=dataclasses.replace(full.dit, num_layers=layers),
        umt5=dataclasses.replace(full.umt5, num_layers=encoder_layers),
        clip=dataclasses.replace(full.clip, num_layers=encoder_layers),
    )


def write_model(folder: Path, config: ModelConfig) -> None:
    """Writes a model of random weights in the form of `python -m convert`."""
    folder.mkdir(parents=True)
    entries = {}
    for part, tree in shapes.param_shapes(config).items():
        for path, leaf in flatten_dict(jax.device_get(random_model.params(tree)), sep="/").items():
            name, array = f"{part}/{path}", np.asarray(leaf)
            stored = store.create(store.place(folder, name), array.shape, array.dtype, path.startswith("blocks/"))
            stored.write(array).result()
            entries[name] = manifest.entry_of(array)
    (folder / checkpoint.CONFIG).write_text(to_json(config), encoding="utf-8")
    shutil.copyfile(checkpoint.bundled() / checkpoint.TOKENIZER, folder / checkpoint.TOKENIZER)
    (folder / checkpoint.MANIFEST).write_text(manifest.Manifest(entries, {}, "benchmarks.fits", "f32").dumps())
    checkpoint.sign(folder)


@contextlib.contextmanager
def group(limit: float | None) -> Iterator[Path]:
    """A control group with a limit in GiB. OSError where none can be made."""
    for top, name, kind in GROUPS:  # noqa: B007
        own = [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
               if line.split(":", 2)[1] == kind]  # fmt: skip
        folder = Path("/") / top / (own[0].lstrip("/") if own else "") / f"wanjax-fits-{os.getpid()}"
        if (folder.parent / "cgroup.procs").is_file():
            break
    folder.mkdir()
    try:
        if limit is not None:
            (folder / name).write_text(str(int(limit * GIB)))
        yield folder
    finally:
        folder.rmdir()


def run(folder: Path, out: Path, size: tuple[int, int], way: list[str], limit: float | None) -> dict[str, Any]:
    """One clip in a process of its own: exit code, last line, seconds, the most memory that was taken."""
    command = [sys.executable, "-m", "samplers.inbetween", "--model", str(folder), "--out", str(out), "--quiet",
               "--frames", "5", "--size", "x".join(map(str, size)), "--steps", "2", "--scale", "1", *way]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    begun = time.perf_counter()
    with group(limit) as own, tempfile.TemporaryFile("w+") as told:
        inside = [sys.executable, "-c", INSIDE, str(own / "cgroup.procs"), *command]
        with subprocess.Popen(inside, env=environment, stdout=subprocess.DEVNULL, stderr=told) as process:
            peak = 0
            while process.poll() is None:
                peak = max(peak, taken(own))
                time.sleep(0.05)
        told.seek(0)
        said = told.read().strip().splitlines()[-1:]
    return {"exit": process.returncode, "said": said, "seconds": time.perf_counter() - begun, "peak_bytes": peak}


def taken(own: Path) -> int:
    """Bytes of a control group's processes; files that the system keeps in its cache are not in it."""
    fields = dict(line.split() for line in (own / "memory.stat").read_text().splitlines())
    return int(fields.get("anon", fields.get("rss", 0)))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    measure.backend(line)
    config = model_of(args.layers, args.encoder_layers)

    def measured() -> bool:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model" if args.folder is None else args.folder.absolute()
            if not folder.exists():
                write_model(folder, config)
            found = {}
            for name, way in ({"keep, no limit": WAYS["keep"]} | WAYS).items():
                limit = args.limit if found else None
                clip = Path(temporary) / f"{len(found)}"
                found[name] = run(folder, clip, args.size, way, limit)
                found[name]["clip"] = digest(clip) if clip.is_dir() else None
                print(name, found[name], flush=True)
        wanted = found["keep, no limit"]["clip"]
        rows = [[name, one["exit"], f"{one['peak_bytes'] / GIB:.2f}", f"{one['seconds']:.0f}",
                 "-" if one["clip"] is None else "same" if one["clip"] == wanted else "another", *one["said"]]
                for name, one in found.items()]  # fmt: skip
        measure.print_table(("way", "exit", "GiB at the peak", "seconds", "clip", "last line"), rows)
        sizes = {part: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
                 for part, tree in shapes.param_shapes(config).items()}  # fmt: skip
        measure.write(args.out, {"layers": args.layers, "encoder_layers": args.encoder_layers, "size": args.size,
                                 "limit_gib": args.limit, "weights_bytes": sizes, "ways": found,
                                 "environment": measure.environment()})  # fmt: skip
        return True

    return measure.guarded(line, measured)


def digest(folder: Path) -> str:
    """Of a clip written as a folder of frames."""
    hashed = hashlib.sha256()
    for file in sorted(folder.glob("*.png")):
        hashed.update(np.asarray(Image.open(file)))
    return hashed.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
