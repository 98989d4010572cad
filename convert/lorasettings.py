"""PEFT's settings of a LoRA: by what a product of matrices is multiplied where the tensors tell no alpha."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from convert.tensors import SourceError

FILE = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""diffusers' key in a safetensors file's metadata; the settings' names there are prefixed with the model's."""

_TRANSFORMER = "transformer."
# These begin with other base weights than the published ones, or change the forward pass further.
_OTHER_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_MORE = ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "trainable_token_indices")


@dataclass(frozen=True)
class Settings:
    """How PEFT scales.

    Attributes:
      path: of the LoRA, for messages.
      alpha, rank: of every module, None if not told.
      alphas, ranks: of modules whose name a pattern matches, instead.
      root: divide by the rank's square root (rsLoRA).
      file: where it was read from if that is a file of its own.
    """

    path: Path
    alpha: float | None = None
    rank: int | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    root: bool = False
    file: Path | None = None

    def factor(self, module: str, rank: int) -> float:
        """What B A of a module is multiplied by; 1 where nothing is told, as in PEFT and diffusers.

        Args:
          module: its name as the file spells it, without prefix.
          rank: of its matrices.

        Raises:
          SourceError: the settings tell another rank.
        """
        told = _matching(self.ranks, module, self.rank)
        if told is not None and told != rank:
            raise SourceError(f"{self.path}: its PEFT settings say rank {told} for {module}, its matrices have {rank}; "
                              "settings and matrices belong to two files")  # fmt: skip
        alpha = _matching(self.alphas, module, self.alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.root else rank)


def read(path: Path) -> Settings:
    """Settings from `adapter_config.json` beside an `adapter_model` file, else from the metadata that diffusers writes.

    Raises:
      SourceError: unreadable settings, or some that change more than the factor.
    """
    beside = path.with_name(FILE)
    file = beside if beside.is_file() and path.stem.startswith("adapter_model") else None
    try:
        told = json.loads(file.read_text(encoding="utf-8")) if file else _metadata(path)
        if not isinstance(told, dict):
            raise ValueError(f"a {type(told).__name__}, not an object")
        _check_kind(path, told)
        return Settings(
            path,
            _number("lora_alpha", told.get("lora_alpha")),
            _number("r", told.get("r")),
            _patterns("alpha_pattern", told.get("alpha_pattern")),
            _patterns("rank_pattern", told.get("rank_pattern")),
            bool(told.get("use_rslora")),
            file,
        )
    except SourceError:
        raise
    except (OSError, ValueError, RecursionError, re.error) as error:
        raise SourceError(f"{path}: its PEFT settings cannot be read ({error})") from error


def _metadata(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="np") as opened:
        told = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    if isinstance(told, dict) and any(key.startswith(_TRANSFORMER) for key in told):
        return {key.removeprefix(_TRANSFORMER): told[key] for key in told if key.startswith(_TRANSFORMER)}
    return told


def _check_kind(path: Path, told: Mapping[str, Any]) -> None:
    """Refuses settings under which more than a product is added, or to other weights."""
    kind = str(told.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind != "LORA":
        raise SourceError(f"{path}: a {kind} by its PEFT settings, which cannot be merged here; merge it with PEFT and "
                          "convert the result")  # fmt: skip
    begun = told.get("init_lora_weights")
    odd = [key for key in told if key.startswith("use_") and key != "use_rslora" and told[key]]
    odd += [key for key in _MORE if told.get(key)]
    if isinstance(begun, str) and begun.lower().startswith(_OTHER_BASE):
        odd.append(f"init_lora_weights={begun}")
    if odd:
        raise SourceError(f"{path}: made with {', '.join(odd)}, which cannot be merged here; merge it with PEFT and "
                          "convert the result")  # fmt: skip


def _patterns(name: str, told: Any) -> dict[str, float]:
    if told is None:
        return {}
    if not isinstance(told, dict):
        raise ValueError(f"{name} is a {type(told).__name__}, not an object")
    for pattern in told:
        re.compile(_whole(pattern))
    return {pattern: _number(f"{name} {pattern!r}", value) for pattern, value in told.items() if value is not None}


def _number(name: str, value: Any) -> Any:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ):
        raise ValueError(f"{name} is {value!r}, not a number")
    return value


def _whole(pattern: str) -> str:
    """PEFT's rule: a pattern is a regular expression for the end of a module's name, from a dot on."""
    return rf"(.*\.)?({pattern})$"


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Of the first pattern that matches."""
    return next((value for key, value in patterns.items() if re.match(_whole(key), module)), default)
