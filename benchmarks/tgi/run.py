"""Runs arms over data sets and writes their scores: `python -m benchmarks.tgi run`.

Clip lengths one after the other, as each is a program of its own; within a length batch by batch, every arm on a
batch before the next, so that what the arms share is made once and a run cut short has all arms on fewer clips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.tgi import generate, metrics
from benchmarks.tgi.arms import Arm
from benchmarks.tgi.data import DataSet, Item
from benchmarks.tgi.generate import Batch, Clips
from benchmarks.tgi.neural import Neural
from benchmarks.tgi.scores import Key, Scores, by_clip
from samplers import video
from samplers.pipeline import Settings
from wanjax.checkpoint import Model
from wanjax.config import ModelConfig

STRIP_FRAMES = 9


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
      sets: one for each length.
      arms: in the order of the lines.
      seeds: of the noise.
      settings: of the sampler; length and size are the set's and the model's.
      batch: clips at once; a short last batch is filled up, so that it needs no program of its own.
      strips: of so many first clips of each length a strip of frames is kept for the report.
      videos: whether every video is kept, as VBench wants them.
    """

    sets: tuple[DataSet, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    settings: Settings
    batch: int = 12
    strips: int = 12
    videos: bool = False

    def describe(self, model: Mapping[str, str], neural: Neural) -> dict[str, Any]:
        """Everything that decides the scores, as JSON."""
        settings = dataclasses.asdict(dataclasses.replace(self.settings, prompt="", seed=0))
        for name in ("prompt", "seed", "frames", "method"):  # the clip's, the noise's, the set's, the arm's
            settings.pop(name)
        return {
            "model": dict(model),
            "sets": {str(one.length): dict(one.identity) for one in self.sets},
            "settings": settings,
            "batch": self.batch,
            "metrics": metrics.policy() | neural.policy(),
            "arms": {arm.name: arm.plain() for arm in self.arms},
            "seeds": sorted(self.seeds),
        }

    def check(self, config: ModelConfig, image_config: ModelConfig | None) -> None:
        """Raises ValueError for what these models cannot run, before anything is computed."""
        for one in self.sets:
            for arm in self.arms:
                settings = dataclasses.replace(self.settings, frames=one.length, method=arm.method)
                settings.check(config)
                if arm.kind in ("trf", "vibid") and image_config is None:
                    raise ValueError(
                        f"arm {arm.name}: needs a model conditioned on the first frame alone; give --image-model"
                    )


def first(one: DataSet, count: int | None) -> DataSet:
    """The set with its first `count` items alone; its identity says so. None or too many leave it whole."""
    if count is None or count >= len(one.items):
        return one
    items = one.items[:count]
    return dataclasses.replace(one, items=items, identity={**one.identity, "ids": [item.id for item in items]})


def run(
    plan: Plan, model: Model, image_model: Model | None, scores: Scores, neural: Neural, quiet: bool = False
) -> None:
    """Makes and scores what `scores` lacks.

    Raises:
      FloatingPointError: NaN or inf in some arm's latents. OSError: a full disk.
    """
    keys = [(one, item, key) for one in plan.sets for item in one.items for key in _keys(plan, one, item)]
    missing = sum(key not in scores.done for *_, key in keys)
    with tqdm(total=len(keys), initial=len(keys) - missing, unit="clip", disable=quiet, smoothing=0.05) as bar:
        for one in plan.sets:
            for start in range(0, len(one.items), plan.batch):
                _run_batch(plan, one, start, model, image_model, scores, neural, bar)


def _keys(plan: Plan, one: DataSet, item: Item) -> list[Key]:
    return [Key(one.length, item.id, arm.name, seed) for arm in plan.arms for seed in _seeds(plan, arm)]


def _seeds(plan: Plan, arm: Arm) -> tuple[int, ...]:
    return plan.seeds[:1] if arm.kind in generate.SEEDLESS else plan.seeds


def _run_batch(plan, one: DataSet, start: int, model, image_model, scores: Scores, neural: Neural, bar: tqdm) -> None:
    items = one.items[start : start + plan.batch]
    if all(key in scores.done for item in items for key in _keys(plan, one, item)):
        return
    settings = dataclasses.replace(plan.settings, frames=one.length)
    filled = [items[min(n, len(items) - 1)] for n in range(plan.batch)]
    read = {item.id: item.frames(settings.size) for item in items}
    clips = Clips([i.id for i in filled], [i.caption for i in filled], np.stack([read[i.id] for i in filled]))
    batch = Batch(model, image_model, settings, clips)
    for arm in plan.arms:
        for seed in _seeds(plan, arm):
            wanted = [n for n, item in enumerate(items) if Key(one.length, item.id, arm.name, seed) not in scores.done]
            if not wanted:
                continue
            bar.set_postfix_str(f"{one.length} frames, {arm.name}", refresh=False)
            made = generate.make(arm, batch, seed)
            lines = []
            for n in wanted:
                key = Key(one.length, items[n].id, arm.name, seed)
                lines.append(_line(key, items[n], made[n], clips.truth[n], scores.folder, neural))
                _keep(plan, key, start + n, made[n], scores.folder)
            scores.append(lines)
            bar.update(len(wanted))


def _line(key: Key, item: Item, made: np.ndarray, truth: np.ndarray, folder: Path, neural: Neural) -> dict[str, Any]:
    figures = metrics.measure(made, truth)
    figures["metrics"] |= neural.measure(key, made, truth, folder)
    return {**dataclasses.asdict(key), "challenge": item.challenge, **figures}


def _keep(plan: Plan, key: Key, number: int, made: np.ndarray, folder: Path) -> None:
    """The pictures and videos of a clip; they are written again if its line was lost."""
    if number < plan.strips and key.seed == plan.seeds[0]:
        strip = folder / "strips" / str(key.length) / key.clip / f"{key.arm}.png"
        strip.parent.mkdir(parents=True, exist_ok=True)
        times = np.linspace(0, len(made) - 1, min(STRIP_FRAMES, len(made))).round().astype(int)
        video.write_png(strip, np.concatenate(list(made[times]), axis=1))
    if plan.videos:
        file = folder / "videos" / key.arm / str(key.length) / f"{key.clip}-{key.seed}.mp4"
        file.parent.mkdir(parents=True, exist_ok=True)
        video.write(file, made, 15, video.enlarge_factor(*made.shape[1:3]))


def summary(scores: Scores, lengths: Sequence[int]) -> list[tuple[int, str, int, float]]:
    """(length, arm, clips, mean interior PSNR) of what there is, for the screen."""
    rows = []
    for length in lengths:
        for arm in scores.config["arms"]:
            values = by_clip(scores.lines, length, arm, "psnr_interior")
            if values:
                rows.append((length, arm, len(values), float(np.mean(list(values.values())))))
    return rows
