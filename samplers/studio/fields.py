"""The method's settings that the page has a slider for, with the paper's values and where they lie on the slider."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from wanjax import kab, retro
from wanjax.config import ModelConfig
from wanjax.kab import CURVES, KAB
from wanjax.method import METHODS, OVERRIDES, Isolation, Method
from wanjax.retro import ReTRo
from wanjax.rope import MODES


@dataclass(frozen=True)
class Field:
    """One slider or choice.

    Attributes:
      name: of the page's value; part: "isolation", "kab" or "retro".
      label: what is written over it; low, high, step: of a slider.
      paper: the paper's value.
      choices: of a choice; empty for a slider.
    """

    name: str
    part: str
    label: str
    paper: Any
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01
    choices: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Where the paper's value lies on the slider, 0..1."""
        return (self.paper - self.low) / (self.high - self.low)


def fields(config: ModelConfig, frames: int) -> tuple[Field, ...]:
    """All of them, for a model and its usual number of frames."""
    own, scaling, isolation = KAB(), ReTRo(), Isolation()
    first, last = kab.layer_window(own, config.dit.num_layers)
    most = config.dit.num_layers - 1
    branches = zip(("text", "first", "last"), isolation.weights, strict=True)
    return (
        Field("strength_end", "kab", "Strength at keyframes", own.strength_end, 0, 3, 0.05),
        Field("strength_mid", "kab", "Strength half-way", own.strength_mid, 0, 3, 0.05),
        Field("kab_until", "kab", "Until this share of steps", own.steps[1], 0, 1, 0.05),
        Field("kab_first", "kab", "First layer", first, 0, most, 1),
        Field("kab_last", "kab", "Last layer", last, 0, most, 1),
        Field("anchor_curve", "kab", "Curve", own.curve, choices=tuple(CURVES)),
        Field("s_edge", "retro", "Scale at keyframes", scaling.s_edge, 0.5, 1.5, 0.01),
        Field("s_mid", "retro", "Scale between", scaling.s_mid, 0.5, 1.5, 0.01),
        Field("w_edge", "retro", "Edge, frames", retro.edge_width(scaling, frames), 1, frames // 2, 1),
        Field("retro_mode", "retro", "Scales", scaling.mode, choices=MODES),
        *(Field(f"weight_{name}", "isolation", f"Weight of {name}", weight, 0, 3, 0.05) for name, weight in branches),
    )


PARTS: MappingProxyType[str, str] = MappingProxyType({"kab": "KAB", "retro": "ReTRo", "isolation": "Isolated branches"})


def of_method(method: Method, config: ModelConfig, frames: int) -> dict[str, Any]:
    """The page's values of a method: switches by part, and every field; of a part that is off the paper's."""
    paper = METHODS["paper"]
    values: dict[str, Any] = {part: getattr(method, part) is not None for part in PARTS}
    own, scaling, isolation = (getattr(method, part) or getattr(paper, part) for part in PARTS)
    first, last = kab.layer_window(own, config.dit.num_layers)
    text, one, other = isolation.weights
    curve = own.curve if isinstance(own.curve, str) else KAB().curve
    return values | {
        "strength_end": own.strength_end, "strength_mid": own.strength_mid, "kab_until": own.steps[1],
        "kab_first": first, "kab_last": last, "anchor_curve": curve, "s_edge": scaling.s_edge, "s_mid": scaling.s_mid,
        "w_edge": retro.edge_width(scaling, frames), "retro_mode": scaling.mode, "weight_text": text,
        "weight_first": one, "weight_last": other,
    }  # fmt: skip


def profile(method: Method) -> str:
    """The profile that a method is nearest to, for the page's choice: "wan" if nothing is on."""
    if method == METHODS["wan"]:
        return "wan"
    magnitude = method.retro is not None and method.retro.mode == "magnitude"
    return "release" if magnitude else "paper"


OPTIONS: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {
        "kab_steps": ("kab_until",),
        "kab_layers": ("kab_first", "kab_last"),
        "branch_weights": ("weight_text", "weight_first", "weight_last"),
    }
    | {name: (name,) for name in ("strength_end", "strength_mid", "anchor_curve", "s_edge", "s_mid", "w_edge",
                                  "retro_mode")}
)  # fmt: skip
"""Options of the command line by the page's values that they are made of."""


def options(values: Mapping[str, Any], base: Method, config: ModelConfig, frames: int) -> dict[str, Any]:
    """What the page changes of a method, as options of the command line: switches, and settings of parts that are on.

    Args:
      values: of the page, by the names of `of_method`.
      base: what is changed; the page cannot show all of it, and what it does not show stays.
      frames: of the clip.
    """
    shown = of_method(base, config, frames)
    found: dict[str, Any] = {part: bool(values[part]) for part in PARTS if bool(values[part]) != shown[part]}
    for option, names in OPTIONS.items():
        if values[OVERRIDES[option][0]] and any(values[name] != shown[name] for name in names):
            own = [values[name] for name in names]
            found[option] = own[0] if names == (option,) else own
    if "kab_steps" in found:
        found["kab_steps"] = [0.0 if base.kab is None else base.kab.steps[0], *found["kab_steps"]]
    if "kab_layers" in found:
        found["kab_layers"] = [round(layer) for layer in found["kab_layers"]]
    return found
