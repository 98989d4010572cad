"""The arms of a comparison: the method's variants, the paper's ablation rows, controls, and baselines.

An arm is a name and plain numbers, so that a results file can say exactly what it holds. Arms that only change
`Method` share one compiled program of the sampler.

The paper's ablation names its rows in words; the numbers of "too large" and "too small" are ours, chosen before any
result was seen.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tgi.two_way import Options
from wanjax.kab import KAB
from wanjax.method import METHODS, Isolation, Method
from wanjax.retro import ReTRo
from wanjax.settings import renamed

BASELINE = "wan"
"""The arm that every other one is compared with."""


@dataclass(frozen=True)
class Chain:
    """How two clips that share a keyframe are joined: `overlap` pixel frames beyond it, see `samplers.film`."""

    overlap: int = 0


@dataclass(frozen=True)
class Arm:
    """One way of making the video.

    Attributes:
      name: unique, fit for a file name.
      group: "profile", "ablation", "mode", "control", "baseline", "bound" or "three keyframes".
      about: one line for the report.
      kind: a name in `generate.KINDS`: "method" samples the model with `method`; the others are described there.
      method: of the kinds that sample the model once.
      options: of kinds "two-way" and "chain".
    """

    name: str
    group: str
    about: str
    kind: str = "method"
    method: Method = Method()
    options: Options | Chain | None = None

    @property
    def seedless(self) -> bool:
        """Whether no noise enters, so that one video says it all."""
        return self.kind in SEEDLESS

    def plain(self) -> dict[str, Any]:
        """What decides its videos, as JSON: not the words of the report."""
        method = {name: part and dataclasses.asdict(part) for name, part in vars(self.method).items()}
        options = {} if self.options is None else dataclasses.asdict(self.options)
        return {"kind": self.kind, "method": method, "options": options}


SEEDLESS = ("latent-interpolation", "cross-fade", "three-cross-fade", "nearest", "vae", "truth")


PAPER = METHODS["paper"]


def _varied(**retro: Any) -> Method:
    return dataclasses.replace(PAPER, retro=dataclasses.replace(PAPER.retro, **retro))


ARMS: tuple[Arm, ...] = (
    Arm("wan", "profile", "Wan2.1 as it is"),
    Arm("paper", "profile", "KAB, isolation and ReTRo (frequency): the paper's text", method=PAPER),
    Arm("release", "profile", "KAB, isolation and ReTRo (magnitude): the released code", method=METHODS["release"]),
    Arm("kab", "ablation", "KAB with isolation, no ReTRo", method=Method(Isolation(), KAB())),
    Arm("retro", "ablation", "ReTRo (frequency) alone", method=Method(retro=ReTRo())),
    Arm("kab-joint", "ablation", "KAB without isolation", method=Method(kab=KAB())),
    Arm("isolation", "ablation", "isolation alone", method=Method(Isolation())),
    Arm("retro-uniform", "ablation", "KAB and ReTRo with s = 1 everywhere (the same as KAB)",
        method=_varied(s_edge=1.0, s_mid=1.0)),
    Arm("retro-edge-large", "ablation", "KAB and ReTRo with s_edge 1.3", method=_varied(s_edge=1.3)),
    Arm("retro-mid-small", "ablation", "KAB and ReTRo with s_mid 0.7", method=_varied(s_mid=0.7)),
    Arm("retro-magnitude", "mode", "ReTRo alone, magnitude", method=Method(retro=ReTRo("magnitude"))),
    Arm("retro-position", "mode", "ReTRo alone, position", method=Method(retro=ReTRo("position"))),
    Arm("shuffled-anchors", "control", "as kab, with the anchors' mixture permuted over the frames",
        "shuffled-anchors", Method(Isolation(), KAB())),
    Arm("random-bias", "control", "isolation, and a random bias of the size, layers and steps of KAB's",
        "random-bias", Method(Isolation(), KAB())),
    Arm("uniform-0.94", "control", "ReTRo alone, s = 0.94 everywhere",
        method=Method(retro=ReTRo(s_edge=0.94, s_mid=0.94))),
    Arm("uniform-1.06", "control", "ReTRo alone, s = 1.06 everywhere",
        method=Method(retro=ReTRo(s_edge=1.06, s_mid=1.06))),
    Arm("wan-euler", "control", "Wan2.1 by Euler steps, as the two-way schemes take them", "euler"),
    Arm("empty-caption", "control", "Wan2.1 without the caption", "empty-caption"),
    Arm("mask-only", "baseline", "keyframes by mask and latent alone, no image tokens (the SEINE family)",
        method=Method(Isolation((1.0, 0.0, 0.0)))),
    Arm("random-mask", "baseline", "as mask-only, the last keyframe hidden in a random half of the steps",
        "random-mask", Method(Isolation((1.0, 0.0, 0.0)))),
    Arm("trf", "baseline", "time-reversal fusion on first-frame conditioning, latents flipped", "two-way",
        options=Options("trf", "latent")),
    Arm("trf-pixel", "baseline", "time-reversal fusion, pixels flipped", "two-way", options=Options("trf", "pixel")),
    Arm("vibid", "baseline", "ViBiDSampler's sequential two-way sampling, latents flipped", "two-way",
        options=Options("vibid", "latent")),
    Arm("vibid-pixel", "baseline", "ViBiDSampler, pixels flipped", "two-way", options=Options("vibid", "pixel")),
    Arm("latent-interpolation", "baseline", "straight line between the latents of the keyframes held still",
        "latent-interpolation"),
    Arm("cross-fade", "baseline", "straight line between the keyframes' pixels", "cross-fade"),
    Arm("nearest", "baseline", "the nearer keyframe", "nearest"),
    Arm("truth", "bound", "the true video, for its own pace and flicker", "truth"),
    Arm("vae", "bound", "the true video through the VAE: the ceiling of every latent method", "vae"),
)  # fmt: skip
"""All arms of two keyframes in the report's order."""

THREE: tuple[Arm, ...] = (
    Arm("three", "three keyframes", "Wan2.1 with the middle frame as a third keyframe, one clip", "three"),
    Arm("three-chain", "three keyframes", "the same keyframes, two clips one after the other", "chain",
        options=Chain()),
    Arm("three-overlap", "three keyframes", "the same chain, its clips blended 4 frames to either side of the middle",
        "chain", options=Chain(4)),
    Arm("three-cross-fade", "three keyframes", "straight lines between the three keyframes' pixels",
        "three-cross-fade"),
)  # fmt: skip
"""Arms that are given the middle frame too, so that they are no rivals of the others; run by their names alone."""

KNOWN = (*ARMS, *THREE)


@dataclass(frozen=True)
class Claim:
    """That `arm` is "better" or "worse" than `against` in interior PSNR; `source` says who expects it."""

    arm: str
    against: str
    expected: str
    source: str


_CLAIMS = {
    "paper": """paper > wan; release > wan; kab > wan; retro > wan; paper > kab; paper > retro; kab-joint < kab;
        retro-uniform < paper; retro-edge-large < paper; retro-mid-small < paper; trf < paper""",
    "tuned": """kab-tuned > wan; retro-tuned > wan; both-tuned > wan""",
    "tuned control": """kab-tuned-isolation < kab-tuned; kab-tuned-shuffled < kab-tuned; kab-tuned-random < kab-tuned;
        retro-tuned-uniform < retro-tuned""",
    "control": """isolation < kab; shuffled-anchors < kab; random-bias < kab; uniform-0.94 < retro;
        uniform-1.06 < retro; empty-caption < wan""",
    "three keyframes": """three > wan; three > three-chain; three-overlap > three-chain""",
}
CLAIMS = tuple(
    Claim(arm, against, "better" if sign == ">" else "worse", source)
    for source, text in _CLAIMS.items()
    for arm, sign, against in (claim.split() for claim in text.split(";"))
)
"""The arrows of the paper's tables ("paper"), the same of settings that `tune` chose ("tuned"), and what must hold if
the reasons given for them do ("control"); and of a third keyframe what one would expect."""


ALL = "all"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # as it becomes the name of files and folders


def choose(names: Sequence[str], own: Sequence[Arm] = ()) -> tuple[Arm, ...]:
    """Arms by name, in the order of KNOWN, then `own`; "all" takes ARMS and `own`.

    Raises:
      ValueError: an unknown or repeated name.
    """
    known = {arm.name: arm for arm in (*KNOWN, *own)}
    if list(names) == [ALL]:
        return (*ARMS, *own)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"arm {unknown[0]!r}: choose from {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ValueError("arms: one is named twice; name each once")
    return tuple(arm for name, arm in known.items() if name in names)


OWN_KINDS = {"method": (), "shuffled-anchors": ("kab",), "random-bias": ("kab",), "uniform-scale": ("retro",),
             "three": (), "chain": ()}  # fmt: skip
"""Kinds that a file of arms may name, and the parts that they need."""


def read_own(path: Path) -> tuple[Arm, ...]:
    """A caller's arms from JSON: {name: {"kind": text, "isolation": {...}, "kab": {...}, "retro": {...}}}.

    A part that is left out is off; {} takes its defaults. "kind" is a name in OWN_KINDS, "method" where it is left out.
    "about" may say something. `tune` writes such a file.

    Raises:
      ValueError: not such a file, or settings that a part refuses.
    """
    parts = {"isolation": Isolation, "kab": KAB, "retro": ReTRo}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        arms = []
        for name, fields in told.items():
            fields = dict(fields)
            about, kind = fields.pop("about", "settings of one's own"), fields.pop("kind", "method")
            made = {
                part: parts[part](**{k: _frozen(v) for k, v in renamed(given).items()})
                for part, given in fields.items()
            }
            if kind not in OWN_KINDS or not all(part in made for part in OWN_KINDS[kind]):
                known = (f"{one} with {', '.join(needs)}" if needs else one for one, needs in OWN_KINDS.items())
                raise ValueError(f"{name}: kind {kind!r}; take {'; '.join(known)}")
            arms.append(Arm(name, "own", about, kind, Method(**made)))
            if not NAME.fullmatch(name) or name == ALL:
                raise ValueError(f"{name!r}: name an arm by letters, digits, '.', '_' and '-', and not {ALL!r}")
    except (OSError, AttributeError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a file of arms ({type(error).__name__}: {error}); "
            'write {"name": {"kab": {"strength_mid": 0.5}, "isolation": {}}}'
        ) from error
    taken = {arm.name for arm in KNOWN} & {arm.name for arm in arms}
    if taken:
        raise ValueError(f"{path}: the name {sorted(taken)[0]!r} is taken; choose another")
    return tuple(arms)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def shuffled_curve(frames: int, seed: int) -> tuple[float, ...]:
    """KAB's linear anchor curve with its inner frames permuted so that none keeps its place (where it can)."""
    curve = np.linspace(0, 1, frames)
    inner = curve[1:-1]
    order = np.random.default_rng(seed).permutation(len(inner))
    shift = np.roll(order, 1)  # a cycle through all inner frames moves every one of them
    mixed = inner.copy()
    mixed[order] = inner[shift]
    return (0.0, *map(float, mixed), 1.0)
