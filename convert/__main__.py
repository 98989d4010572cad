"""`python -m convert`: foreign weights into a wanjax folder, and a look at any source. No logic lives here."""

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from convert import families, inspect, lora, sources, write
from wanjax import store
from wanjax.manifest import read_manifest, size
from wanjax.writing import terminate_as_interrupt

BAD_INPUT, INTERRUPTED = 2, 130

MODELS = {
    "auto": "auto",
    "flf2v-14b": "flf2v_14b",
    "i2v-14b": "i2v_14b",
    "t2v-1.3b": "t2v_1_3b",
    "fun-inp-1.3b": "fun_inp_1_3b",
    "fun-inp-14b": "fun_inp_14b",
}


def parser() -> argparse.ArgumentParser:
    """The command line of a conversion."""
    p = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert Wan2.1 weights to a wanjax folder, or inspect what a path holds.",
        epilog="python -m convert inspect PATH [--full]: family, sizes and dtypes of any source or wanjax folder; "
        "--full reads a wanjax folder once and compares it with its manifest.",
    )
    p.add_argument(
        "source",
        metavar="SRC",
        nargs="?",
        help="weight file, or folder of the original repository, diffusers, ComfyUI; may be left away where files are "
        "picked",
    )
    p.add_argument("target", metavar="DST", type=Path, help="folder to make")
    p.add_argument(
        "--model", type=_model, default="auto", help=f"what it must be: {', '.join(MODELS)} (default: %(default)s)"
    )
    p.add_argument(
        "--dtype", choices=write.DTYPES, default="keep", help="of transformer and encoders (default: %(default)s)"
    )
    p.add_argument(
        "--only", nargs="+", action="extend", choices=tuple(families.SLOTS), help="convert these parts alone"
    )
    _add_files(p)
    p.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE[:scale]",
        help="merge these into the transformer, in float32",
    )
    return p


def _add_files(p: argparse.ArgumentParser) -> None:
    for slot in families.SLOTS:
        title = families.TITLES[slot]
        p.add_argument(f"--{slot}", metavar="FILE", help=f"take the {title} from this file, whatever else lies in SRC")


def _files(options: argparse.Namespace) -> dict[str, str]:
    return {slot: file for slot in families.SLOTS if (file := getattr(options, slot)) is not None}


def _model(text: str) -> str:
    if text not in MODELS and text not in MODELS.values():
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(MODELS)}")
    return MODELS.get(text, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is as it should be here
    run = _inspect if arguments[:1] == ["inspect"] else _convert
    try:
        with terminate_as_interrupt():
            return run(arguments)
    except KeyboardInterrupt:
        print("python -m convert: interrupted; run it again to go on", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RecursionError) as error:
        print(f"python -m convert: error: {error}", file=sys.stderr)
        return BAD_INPUT


def _inspect(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m convert inspect", description="Say what a path holds.")
    p.add_argument("path", nargs="?", help="as SRC of a conversion, or a wanjax folder")
    _add_files(p)
    p.add_argument("--full", action="store_true", help="of a wanjax folder: read it all and compare with its manifest")
    options = p.parse_args(arguments[1:])
    print(inspect.describe(options.path, _files(options)))
    if options.full:
        if options.path is None:
            raise ValueError("--full reads a wanjax folder; give its path")
        manifest = read_manifest(Path(options.path))
        with _bar(size(manifest), "verify") as bar:
            store.verify(Path(options.path), manifest.arrays, bar.update)
        print("every array is the one of the manifest")
    return 0


def _convert(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    start = time.perf_counter()
    write.check_target(options.target)
    files = _files(options)
    wanted = options.only or (families.SLOTS if options.source is not None else files)
    source = sources.find(options.source, tuple(wanted), files)
    if options.lora:
        source = lora.merge(source, options.lora)
    planned = write.plan(source, options.dtype, options.model)
    only = options.only or (None if options.source is not None else _chosen(planned, files))
    for note in write.lacking(planned, only):
        _note(note)
    with _bar(write.work(planned), "convert") as bar:
        manifest = write.write(planned, options.target, options.dtype, bar.update, _note)
    print(f"{options.target}: {planned.config.name}, {', '.join(source.parts)}, {size(manifest) / 1e9:.3f} GB in "
          f"{time.perf_counter() - start:.1f} s{_peak_memory()}")  # fmt: skip
    return 0


def _chosen(planned: write.Plan, files: Mapping[str, str]) -> list[str] | None:
    """The picked parts as what is wanted, unless they make a whole model."""
    whole = {slot for slot in families.SLOTS if getattr(planned.config, slot) is not None}
    return None if whole <= set(files) else list(files)


def _peak_memory() -> str:
    """In words, where the system tells it; mapped pages of the source count while they are in memory."""
    try:
        import resource  # here: not on Windows
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", peak memory {unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9:.2f} GB"


def _note(text: str) -> None:
    tqdm.write(f"note: {text}", file=sys.stderr)  # above a bar that is being drawn


def _bar(size: int, description: str) -> tqdm:
    return tqdm(total=size, desc=description, unit="B", unit_scale=True, dynamic_ncols=True, smoothing=0.05)


if __name__ == "__main__":
    sys.exit(main())
