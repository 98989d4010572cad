"""How LoRA files spell what they change: keys to roles, and any spelling of a tensor to its name in the source.

A target may be named as in the original repository or as in diffusers, with dots or underscores, after any of the
usual prefixes; names are compared with dots as underscores and the prefixes taken off.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from convert import dit
from convert.sources import Part
from convert.tensors import SourceError, some

_PREFIX = re.compile(
    r"(?:base_model[._]model|(?:model[._])?diffusion[._]model|transformer|lora[._](?:unet|transformer)|lycoris"
    r"|(?:pipe[._])?dit|unet|model|module|_orig_mod)[._]|_"
)

# X.lora_A.weight, X.lora_down.weight, X.lora_A.NAME.weight, X.lora_B.bias, X.lora_A; of older diffusers also
# X.lora.down.weight, X_lora.down.weight, X.lora_linear_layer.down.weight.
_FACTOR = re.compile(
    r"(?P<target>.+?)[._](?:lora_(?P<role>A|B|down|up|mid)|lora(?:_linear_layer)?\.(?P<older>down|up))"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<kind>weight|bias))?"
)
_WHOLE = re.compile(r"(?P<target>.+?)\.(?P<role>alpha|diff|diff_b|diff_m|w_norm|b_norm)")

_ROLES = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}

_TEXT = re.compile(
    r"(?:lora_)?(?:te\d?[._]|text_encoders?(?:_\d)?[._]|text_model[._]|cond_stage_model\.|conditioner\.)"
)

_OTHER_KINDS = {
    "DoRA": r"\.dora_scale$|\.lora_magnitude_vector\b",
    "LoKr": r"[._]lokr_",
    "LoHa": r"[._]hada_",
    "IA3": r"[._]ia3_|\.on_input$",
    "GLoRA": r"[._]glora_|\.(?:a1|a2|b1|b2|bm)\.weight$",
    "OFT": r"[._]b?oft_",
    "VeRA": r"[._]vera_lambda_",
    "AdaLoRA": r"\.lora_E\b|\.ranknum\b",
    "patch that sets weights": r"\.(?:set|reshape)_weight$",
}


@dataclass(frozen=True)
class Key:
    """What one tensor of a LoRA file is.

    Attributes:
      target: what it changes, without prefixes, else as spelled in the file.
      role: "down", "up", "mid" (the factors), "up_bias", "alpha", or "diff", "diff_b", "diff_m" (added as they are).
      adapter: its name in PEFT, where the key tells one.
    """

    target: str
    role: str
    adapter: str | None = None


def parse(key: str) -> Key | None:
    """The parts of a key; None if it is not spelled as anything that a LoRA holds."""
    if match := _WHOLE.fullmatch(key):
        role = match["role"]
        return Key(bare(match["target"]), _ROLES.get(role, role))
    match = _FACTOR.fullmatch(key)
    if match is None:
        return None
    role = match["role"] or match["older"]
    role = _ROLES.get(role, role)
    if match["kind"] == "bias":
        return Key(bare(match["target"]), "up_bias", match["adapter"]) if role == "up" else None
    return Key(bare(match["target"]), role, match["adapter"])


def bare(name: str) -> str:
    """A name without the prefixes that trainers and programs put in front, and without diffusers' `.processor`."""
    while match := _PREFIX.match(name):
        name = name[match.end() :]
    return re.sub(r"[._]processor(?=[._])", "", name)


def plain(name: str) -> str:
    """A bare name as it is compared."""
    return name.replace(".", "_")


class Targets:
    """Every spelling of the transformer's tensors.

    Args:
      part: the transformer, in the original or in diffusers' layout.
    """

    def __init__(self, part: Part):
        ours = {rule.ours: rule.theirs for rule in part.family.rules(part.config)}
        self._names: dict[str, str] = {}
        for table in (dit.original(part.config), dit.diffusers(part.config)):
            for rule in table:
                for i in range(part.config.num_layers if rule.stacked else 1):
                    spelled, name = (text.replace("{i}", str(i)) for text in (rule.theirs, ours[rule.ours]))
                    self._names[plain(spelled)] = name
                    # Older attention processors of diffusers are named without the index of the output's linear.
                    self._names[plain(spelled.replace(".to_out.0.", ".to_out."))] = name

    def find(self, key: Key) -> str | None:
        """The source's name of the tensor that a key is about (of "up_bias": of the weight); None if there is none."""
        suffixes = {"diff": ("_weight", ""), "diff_b": ("_bias",), "diff_m": ("_modulation",)}
        named = (self._names.get(plain(key.target) + suffix) for suffix in suffixes.get(key.role, ("_weight",)))
        return next((name for name in named if name is not None), None)


def refuse_others(path: Path, keys: Iterable[str]) -> None:
    """Raises on what is not a LoRA of a transformer.

    Raises:
      SourceError: another kind of adapter; updates of a text encoder; several adapters in one file. One line each.
    """
    keys = list(keys)
    for kind, pattern in _OTHER_KINDS.items():
        if found := [key for key in keys if re.search(pattern, key)]:
            raise SourceError(f"{path}: a {kind} ({some(found, 1)}), which is not low-rank addition and cannot be "
                              "merged here; merge it with the program that trained it and convert that")  # fmt: skip
    if found := [key for key in keys if _TEXT.match(key) or _TEXT.match(bare(key))]:
        raise SourceError(f"{path}: changes a text encoder too ({some(found, 1)}), and --lora merges into the "
                          "transformer alone; give a file without those keys")  # fmt: skip
    adapters = {parsed.adapter for key in keys if (parsed := parse(key)) is not None} - {None}
    if len(adapters) > 1:
        raise SourceError(f"{path}: holds {len(adapters)} adapters ({', '.join(sorted(adapters))}); save one alone")
