"""Chooses settings of KAB and ReTRo for a model: random search on development clips, never on test clips.

The methods' defaults were made for 40 layers and 50 steps; a shallow model may want others. Candidates are drawn once
from fixed ranges with a fixed seed, scored like any arms, and the best mean gain over `wan` in interior PSNR wins,
the paper's own settings among the candidates. Both go into the final comparison: the search's winner as `kab-tuned`,
`retro-tuned` and `both-tuned` beside `paper`, and with them controls of the same settings, as what a search finds may
owe its gain to something else than the method's idea.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tgi.arms import ARMS, BASELINE, Arm
from benchmarks.tgi.compare import PRIMARY
from benchmarks.tgi.data import DataSet
from benchmarks.tgi.scores import Scores, pairs, unfinished
from wanjax.kab import KAB
from wanjax.method import Isolation, Method
from wanjax.retro import ReTRo
from wanjax.rope import MODES
from wanjax.writing import write_json

SEED = 7
ISOLATIONS = (None, Isolation(), Isolation((1.0, 0.5, 0.5)))
"""The last keeps the images' share: two softmaxes in the place of a joint one otherwise add up to twice as much."""
GROUPS = {"kab": "kab-tuned", "retro": "retro-tuned", "both": "both-tuned"}


def candidates(trials: int, layers: int) -> tuple[Arm, ...]:
    """`wan`, the paper's settings of each method, and `trials` drawn ones of each of KAB, ReTRo and both.

    Args:
      trials: at least 1.
      layers: of the model.
    """
    rng = np.random.default_rng(SEED)
    made = [arm for arm in ARMS if arm.name in (BASELINE, "kab", "retro", "paper", "release")]
    for number in range(trials):
        kab, retro = _kab(rng, layers), _retro(rng)
        isolation = ISOLATIONS[int(rng.integers(len(ISOLATIONS)))]
        for group, method in (
            ("kab", Method(isolation, kab)),
            ("retro", Method(retro=retro)),
            ("both", Method(isolation, kab, retro)),
        ):
            made.append(Arm(f"{group}-{number:03d}", group, "a candidate", method=method))
    return tuple(made)


def _kab(rng: np.random.Generator, layers: int) -> KAB:
    first = int(rng.integers(layers))
    last = int(rng.integers(first, layers))
    low = float(rng.choice([0.0, 0.2, 0.5]))
    high = float(rng.choice([share for share in (0.2, 0.4, 0.7, 1.0) if share > low]))
    end, mid = (round(float(value), 2) for value in rng.uniform(0.05, 1.0, 2))
    return KAB(strength_end=end, strength_mid=mid, layers=(first, last), steps=(low, high))


def _retro(rng: np.random.Generator) -> ReTRo:
    edge, mid = (round(float(value), 3) for value in (rng.uniform(0.95, 1.2), rng.uniform(0.85, 1.05)))
    return ReTRo(mode=str(rng.choice(MODES)), s_edge=edge, s_mid=mid, smooth=int(rng.integers(0, 3)))


def refuse_test_clips(sets: Sequence[DataSet]) -> None:
    """Raises ValueError for clips that published figures are of."""
    for one in sets:
        if one.identity["source"] == "tgi-bench" or one.identity.get("split") == "test":
            raise ValueError(f"--data {one.name}: settings are not chosen on test clips; take procedural-dev")


def best(
    scores: Scores, arms: Sequence[Arm], lengths: Sequence[int], seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """The best arm of each group: tuned name -> {"arm", "gain" in dB, "settings"}.

    The gain is the mean over lengths of the mean over clips, so that every length counts alike.

    Args:
      scores: with every clip of every arm.
      arms: what was tried, `wan` among them.
      lengths: of the clips.
      seeds: of the noise; lines of others do not count.

    Raises:
      ValueError: an arm that lacks clips, as a mean over easier ones would win.
    """
    planned = {str(length): {arm.name: list(seeds) for arm in arms} for length in lengths}
    for length, arm, done, clips in unfinished(scores.config | {"planned": planned}, scores.done):
        raise ValueError(f"{scores.folder}: {arm} has {done} of {clips} clips of {length} frames; run tune again")
    lines = [line for line in scores.lines if line["seed"] in seeds]
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        group = {"paper": "both", "release": "both"}.get(arm.name, arm.name.split("-")[0])
        if group not in GROUPS:
            continue
        gains = []
        for length in lengths:
            own, base = pairs(lines, length, arm.name, BASELINE, PRIMARY)
            gains.append(np.mean([own[clip] - base[clip] for clip in own]))
        gain, name = float(np.mean(gains)), GROUPS[group]
        if name not in found or gain > found[name]["gain"]:
            found[name] = {"arm": arm.name, "gain": gain, "settings": arm.plain()["method"]}
    return found


def write(found: Mapping[str, Mapping[str, Any]], data: str, file: Path) -> None:
    """A file of arms for `run --own-arms`: what `best` found on clips of the name `data`, and controls of KAB's and
    ReTRo's."""
    arms = {}
    for name, one in found.items():
        parts = {part: settings for part, settings in one["settings"].items() if settings is not None}
        arms[name] = {"about": f"the best on {data}: {one['gain']:+.3f} dB over wan there"} | parts
    write_json(file, arms | _controls(arms), overwrite=True, anything=True, mark=False)  # every key is an arm


def _controls(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    kab = {part: settings for part, settings in arms["kab-tuned"].items() if part != "about"}
    retro = arms["retro-tuned"]["retro"]
    made = {
        "kab-tuned-shuffled": {"about": "as kab-tuned, with the anchors' mixture permuted over the frames",
                               "kind": "shuffled-anchors"} | kab,
        "kab-tuned-random": {"about": "a random bias of the size, layers and steps of kab-tuned's",
                             "kind": "random-bias"} | kab,
    }  # fmt: skip
    if retro["mode"] != "position":  # there a uniform s changes nothing
        made["retro-tuned-uniform"] = {"about": "as retro-tuned, every s the mean of its factors",
                                       "kind": "uniform-scale", "retro": retro}  # fmt: skip
    if "isolation" in kab:
        made["kab-tuned-isolation"] = {"about": "kab-tuned's isolation alone", "isolation": kab["isolation"]}
    return made
