"""Which files of a repository will be read, decided from their names alone, as `convert.sources` reads a folder."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from convert.families import SLOTS
from convert.folders import INDEX, SHARD, Group
from convert.tensors import SUFFIXES, SourceError, some

SCHEDULER = "scheduler/scheduler_config.json"

TOKENIZERS = ("tokenizer.json", "tokenizer/tokenizer.json", "google/umt5-xxl/tokenizer.json")
"""Where a tokenizer may lie in a source, the likeliest first."""

TOKENIZER_MODELS = ("spiece.model", "tokenizer/spiece.model", "google/umt5-xxl/spiece.model", "tokenizer.model",
          "tokenizer/tokenizer.model", "sentencepiece.model", "tokenizer/sentencepiece.model")  # fmt: skip
"""Where a SentencePiece model may lie in a source without a tokenizer.json, the likeliest first."""

DIFFUSERS = MappingProxyType({"transformer": "dit", "vae": "vae", "text_encoder": "umt5", "image_encoder": "clip"})
"""diffusers' folders, of one model each."""

TREE = MappingProxyType(
    {
        "diffusion_models": "dit", "unet": "dit", "vae": "vae", "text_encoders": "umt5", "clip": "umt5",
        "clip_vision": "clip",
    }
)  # fmt: skip
"""ComfyUI's folders, of many models each."""

ROOTS = ("", "models/", "split_files/")
"""Where they lie: in what is given, in ComfyUI's own folder, in its repositories on the hub."""

EXACT = MappingProxyType(
    {"32": 23.0, "bf16": 7.0, "16": 10.0, "int8": 5.5, "scaled": 3.5, "e4m3fn": 3.0, "8": 3.0, "e5m2": 2.0}
)
"""Words of a file's name that tell how exact its numbers are, about in bits; a name without any has all of them."""

_WORD = re.compile(
    r"(?i)(?<![a-z0-9])(?:(?P<bf16>bf16)|b?f(?:p|loat)?(?P<bits>8|16|32)|(?P<e4m3fn>e4m3fn)|(?P<e5m2>e5m2)|"
    r"(?P<int8>int8)|"
    r"(?P<scaled>scaled)|i?q(?P<q>\d)(?:[_-](?:k(?:[_-](?:xxs|xs|s|m|l))?|[01]|nl|xxs|xs|s|m))?)(?![a-z0-9])"
)
_PARTS = (("vae", re.compile(r"vae")), ("umt5", re.compile(r"t5")), ("clip", re.compile(r"clip")))
_OTHERS = re.compile(r"lora|control|vace|upscale|taew")
"""Files that lie beside models and are none that is converted."""


@dataclass(frozen=True)
class Choice:
    """What to fetch of a repository.

    Attributes:
      small: settings and tokenizer.
      weights: files that are models each.
      indexes: of models in shards; the shards are what they name.
    """

    small: tuple[str, ...]
    weights: tuple[str, ...]
    indexes: tuple[str, ...]

    def under(self, prefix: str) -> "Choice":
        """The same with a folder's name and slash in front of every name."""
        small, weights, indexes = (
            tuple(prefix + name for name in names) for names in (self.small, self.weights, self.indexes)
        )
        return Choice(small, weights, indexes)


def choose(names: Iterable[str], only: Sequence[str], where: str) -> Choice:
    """The files to fetch.

    Args:
      names: of all files of the folder, relative to it.
      only: the parts that are wanted.
      where: what the folder is called, for messages and as the beginning of a path to one file.

    Raises:
      SourceError: none, or several models of one part; the line lists them and says how to choose.
    """
    names = sorted(names)
    small = [name for name in ("config.json", "model_index.json", SCHEDULER) if name in names]
    small += next(([name] for name in (*TOKENIZERS, *TOKENIZER_MODELS) if name in names), [])
    own = _wanjax(names, only)
    if own is not None:
        return Choice(tuple(dict.fromkeys([*small, *(name for name in names if name == "manifest.json")])), own, ())
    folders = _diffusers(names) or _tree(names)
    if folders:
        found = {folder: _models(names, folder, folder in DIFFUSERS) for folder in folders}
        own = {folder: models for folder, models in found.items() if folders[folder] in only}
        small += [f"{folder}/config.json" for folder in own if f"{folder}/config.json" in names]
        by_part = {slot: [name for folder, models in own.items() if folders[folder] == slot for name in models]
                   for slot in only}  # fmt: skip
        one_model = bool(_diffusers(names))
    else:
        found = {slot: [name for name in _models(names, "", False) if part(name) == slot] for slot in SLOTS}
        by_part, one_model = {slot: found[slot] for slot in only}, False
        if not by_part.get("dit") and sum(map(len, found.values())) > 1:
            small = [name for name in small if name != "config.json"]  # it is the transformer's
    taken = [_best(own, slot, where, one_model) for slot, own in by_part.items() if own]
    if only and not taken:
        held = some(names, 6) or "nothing"
        raise SourceError(f"{where}: no model files of {', '.join(only)} in it; it holds {held}")
    return Choice(tuple(small), tuple(name for name in taken if not INDEX.search(name)),
                  tuple(name for name in taken if INDEX.search(name)))  # fmt: skip


def one_file(names: Iterable[str], name: str, where: str) -> Choice:
    """One file by its name, with what is read beside it.

    Raises:
      SourceError: a shard alone.
    """
    if SHARD.search(name) and not INDEX.search(name):
        raise SourceError(f"{where}: one shard of several; give its folder, or its index.json")
    folder = name.rpartition("/")[0]
    beside = [other for other in names if other.rpartition("/")[0] == folder]
    alone = not INDEX.search(name) and sum(other.lower().endswith(SUFFIXES) for other in beside) == 1
    config = f"{folder}/config.json".lstrip("/")
    small = (config,) if alone and config in beside else ()
    return Choice(small, (), (name,)) if INDEX.search(name) else Choice(small, (name,), ())


def part(name: str) -> str:
    """Which part a weight file's name promises; the transformer where it says nothing."""
    own = name.rpartition("/")[2].lower()
    return next((slot for slot, pattern in _PARTS if pattern.search(own)), "dit")


def _wanjax(names: Sequence[str], only: Sequence[str]) -> tuple[str, ...] | None:
    """The weights of a wanjax model folder in either of its forms; None where it is none."""
    if not {"config.json", "tokenizer.json"} <= set(names):
        return None
    if sum(f"{slot}.safetensors" in names for slot in SLOTS) >= 3:
        return tuple(f"{slot}.safetensors" for slot in only if f"{slot}.safetensors" in names)
    stored = any(name.startswith(f"{slot}/") and name.endswith("/zarr.json") for name in names for slot in SLOTS)
    if "manifest.json" not in names or not stored:
        return None
    return tuple(name for name in names if "/" in name and name.partition("/")[0] in only)


def _diffusers(names: Sequence[str]) -> dict[str, str]:
    """diffusers' folders that are there; ComfyUI has a `vae` too, but no config.json in it."""
    own = {folder: slot for folder, slot in DIFFUSERS.items() if any(name.startswith(f"{folder}/") for name in names)}
    stated = any(f"{folder}/config.json" in names for folder in own)
    return own if own and (list(own) != ["vae"] or stated or "model_index.json" in names) else {}


def _tree(names: Sequence[str]) -> dict[str, str]:
    """ComfyUI's folders that are there, in the first place where any is."""
    for root in ROOTS:
        own = {f"{root}{folder}": slot for folder, slot in TREE.items()
               if any(name.startswith(f"{root}{folder}/") for name in names)}  # fmt: skip
        if own:
            return own
    return {}


def _models(names: Sequence[str], folder: str, one: bool) -> list[str]:
    """The models of a folder: files and indexes. Below it too, where it is not that of one model."""
    prefix = f"{folder}/" if folder else ""
    own = [name for name in names if name.startswith(prefix) and not _OTHERS.search(name[len(prefix) :].lower())]
    if one or not folder:
        own = [name for name in own if "/" not in name[len(prefix) :]]
    files = [name for name in own if name.lower().endswith(SUFFIXES) and not SHARD.search(name)]
    return files + [name for name in own if INDEX.search(name)]


def _exactness(name: str) -> float:
    found = [match.groupdict() for match in _WORD.finditer(name.rpartition("/")[2])]
    told = [value if key == "bits" else key for match in found for key, value in match.items() if value and key != "q"]
    ranks = [EXACT.get("32" if word == "32" else word, 0.0) for word in told]
    ranks += [float(match["q"]) * 0.7 for match in found if match["q"]]
    return max(ranks, default=EXACT["32"])


def _best(models: Sequence[str], slot: str, where: str, one_model: bool) -> str:
    """The one model, or the best of its copies."""
    if not one_model and len({Group(Path(name), open).model for name in models}) > 1:
        raise SourceError(
            f"{where}: {some(models, 8)} are each a {slot}; choose one by its path, such as {where}/{models[0]}"
        )
    return max(models, key=lambda name: (_exactness(name), ".safetensors" in name, name))
