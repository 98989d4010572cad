"""Foreign weights into wanjax: the original Wan2.1 files, diffusers folders, ComfyUI's files, GGUF.

`python -m convert SRC DST` writes a model folder, `load(SRC)` gives parameters without one.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import families, lora, sources, write
from wanjax.config import ModelConfig

__all__ = ["load"]


def load(
    source: str | Path | None,
    dtype: str = "keep",
    only: Iterable[str] = families.SLOTS,
    loras: Sequence[str] = (),
    files: Mapping[str, str | Path] = sources.NOTHING,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads foreign weights into memory, without an intermediate copy on disk.

    Args:
      source: a weight file, or a folder of the original repository, of diffusers or of ComfyUI; None where `files` are
        all.
      dtype: "bf16", "f32" or "keep" (as `python -m convert`).
      only: the parts that are wanted: "dit", "vae", "umt5", "clip".
      loras: "FILE" or "FILE:scale" each, merged into the transformer.
      files: part -> the file to take it from, among many or without a source.

    Returns:
      (config, params): config of the whole model, parts that are not there as published; params by part, nested
      dicts of numpy arrays.

    Raises:
      ValueError: not a usable source; one clear line, or one list of every difference.
    """
    found = sources.find(source, only, files)
    planned = write.plan(lora.merge(found, loras) if loras else found, dtype)
    return planned.config, write.load(planned)
