"""Says what a path holds, in seconds: family, dtypes, counts, sizes, what is missing; reads no tensor."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert import families, sources, write
from convert.tensors import SourceError
from wanjax import checkpoint, store
from wanjax.manifest import MANIFEST, CheckpointError, read_manifest, size


def describe(path: str | Path | None, files: Mapping[str, str | Path] = sources.NOTHING) -> str:
    """Text of several lines on a source or a wanjax folder, or on picked files (as of `sources.find`).

    Raises:
      ValueError: nothing there that is known, or damaged files.
    """
    if path is not None and (Path(path) / MANIFEST).is_file():
        return _folder(Path(path))
    source = sources.find(path, files=files) if path is not None else sources.find(None, tuple(files), files)
    lines = [f"{path or ', '.join(map(str, files.values()))}:"]
    for name, part in source.parts.items():
        dtypes = Counter()
        for tensor in part.tensors.named.values():
            dtypes[tensor.stored] += math.prod(tensor.shape)
        where = f"{part.tensors.size / 1e9:.3f} GB in {len(part.tensors.files)} files"
        kind = f"{families.describe(part.config)}, {part.family.layout} layout"
        lines.append(f"  {name}: {kind}, {_numbers(dtypes)}, {where}")
    absent = [name for name in families.SLOTS if name not in source.parts]
    lines.append(f"  tokenizer: {source.tokenizer or 'none'}")
    lines.append(f"  absent: {', '.join(absent) or 'nothing'}")
    notes = source.notes
    try:
        planned = write.plan(source)
        notes = planned.notes
        lines.append(f"  {planned.config.name}: {', '.join(source.parts)} complete, every tensor of the right shape")
    except SourceError as error:
        lines.append(f"  not usable: {error}")
    lines += [f"  note: {note}" for note in notes]
    return "\n".join(lines)


def _folder(path: Path) -> str:
    """A converted folder, from its manifest."""
    _, config = checkpoint.read_config(path, whole=False)
    manifest = read_manifest(path)
    lines = [f"{path}: wanjax folder of {config.name}, by {manifest.tool}, dtype {manifest.dtype}, "
             f"{size(manifest) / 1e9:.3f} GB"]  # fmt: skip
    shapes = checkpoint.param_shapes(config)
    for part in shapes:
        own = {name: entry for name, entry in manifest.arrays.items() if name.startswith(f"{part}/")}
        if not own:
            lines.append(f"  {part}: absent")
            continue
        dtypes: Counter[str] = Counter()
        for entry in own.values():
            dtypes[entry["dtype"]] += math.prod(entry["shape"])
        try:
            store.check(path, part, shapes[part], manifest)
            state = "complete"
        except CheckpointError as error:
            state = str(error)
        lines.append(f"  {part}: {_numbers(dtypes)} in {len(own)} arrays; {state}")
    lines.append("  made from: " + ", ".join(manifest.sources))
    return "\n".join(lines)


def _numbers(dtypes: Mapping[str, int]) -> str:
    total = int(np.sum(list(dtypes.values())))
    return f"{total:,} numbers ({', '.join(f'{name} {count / total:.0%}' for name, count in dtypes.items())})"
