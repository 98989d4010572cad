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
from benchmarks.tgi.data import DataSet, Item, stretched
from benchmarks.tgi.generate import Batch, Clips
from benchmarks.tgi.neural import Neural
from benchmarks.tgi.scores import Key, Scores, ScoresError, by_clip
from samplers import plan, video
from samplers.plan import Settings
from wanjax.checkpoint import Model
from wanjax.config import ModelConfig

STRIP_FRAMES = 9
REMADE_DECIBEL = 0.1  # of any frame, between two makings of a video; rounding differs between machines and batches


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

    @property
    def two_way(self) -> bool:
        """Whether some arm needs a model conditioned on the first frame alone."""
        return any(arm.kind == "two-way" for arm in self.arms)

    def planned(self) -> dict[str, dict[str, list[int | None]]]:
        """Length -> arm -> seeds."""
        return {str(one.length): {arm.name: sorted(_seeds(self, arm)) for arm in self.arms} for one in self.sets}

    def describe(
        self, model: Mapping[str, str], neural: Neural, image_model: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Everything that decides the scores, as JSON. Models are their name and digest; `image_model`, if it is not
        `model`, decides the scores of the two-way arms alone."""
        settings = dataclasses.asdict(self.settings)
        for name in ("prompt", "seed", "frames", "method"):  # the clip's, the noise's, the set's, the arm's
            settings.pop(name)
        return {
            "model": dict(model),
            "sets": {str(one.length): dict(one.identity) for one in self.sets},
            "settings": settings,
            "batch": self.batch,
            "metrics": metrics.policy() | neural.policy(),
            "arms": {
                arm.name: arm.plain() | ({"image_model": image_model} if image_model and arm.kind == "two-way" else {})
                for arm in self.arms
            },
            "planned": self.planned(),
        }

    def check(self, config: ModelConfig, image_config: ModelConfig | None) -> None:
        """Raises ValueError for what these models cannot run, before anything is computed."""
        if image_config is not None and self.two_way:
            _check_image_model(config, image_config)
        if min(self.settings.size) < metrics.MIN_SIZE:
            height, width = self.settings.size
            raise ValueError(f"size {height}x{width}: the metrics need {metrics.MIN_SIZE} pixels on a side; take more")
        for one in self.sets:
            for arm in self.arms:
                settings = dataclasses.replace(self.settings, frames=one.length, method=arm.method)
                own = plan.Plan.of(config, settings)
                generate.check_three(arm, config, settings)
                if arm.kind == "two-way" and image_config is None:
                    raise ValueError(
                        f"arm {arm.name}: needs a model conditioned on the first frame alone; give --image-model"
                    )
                if arm.kind == "random-bias" and not len(own.kab_steps):
                    raise ValueError(
                        f"arm {arm.name}: KAB acts in none of {settings.steps} steps; take more steps, or leave it out"
                    )


def knows_one_keyframe(config: ModelConfig) -> bool:
    """Whether a model may be given the first keyframe alone: an image-to-video model, or one like the tiny model, which
    is trained with the last one withheld at times."""
    return config.dit.num_images == 1 or config.name == "tiny"


def _check_image_model(config: ModelConfig, image_config: ModelConfig) -> None:
    if not knows_one_keyframe(image_config):
        raise ValueError(
            f"--image-model: {image_config.name} takes {image_config.dit.num_images} keyframes; give an image-to-video "
            "model (i2v)"
        )
    sizes = [(one.vae.latent_channels, one.vae.spatial_stride, one.vae.temporal_stride, one.dit.patch_size,
              one.clip and one.clip.image_size) for one in (config, image_config)]  # fmt: skip
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"--image-model: {image_config.name} has latents, patches or CLIP images of other sizes than "
            f"{config.name}; give one of the same family"
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
      FloatingPointError: NaN or inf in some arm's latents.
      ScoresError: a video made once more, for a file that is not there, is another one.
      OSError: a full disk.
    """
    keys = [
        (key, number) for one in plan.sets for number, item in enumerate(one.items) for key in _keys(plan, one, item)
    ]
    missing = sum(_lacks(plan, scores, key, number) for key, number in keys)
    with tqdm(total=len(keys), initial=len(keys) - missing, unit="clip", disable=quiet, smoothing=0.05) as bar:
        for one in plan.sets:
            for start in range(0, len(one.items), plan.batch):
                _run_batch(plan, one, start, model, image_model, scores, neural, bar)


def _keys(plan: Plan, one: DataSet, item: Item) -> list[Key]:
    return [Key(one.length, item.id, arm.name, seed) for arm in plan.arms for seed in _seeds(plan, arm)]


def _seeds(plan: Plan, arm: Arm) -> tuple[int | None, ...]:
    return (None,) if arm.seedless else plan.seeds


def _lacks(plan: Plan, scores: Scores, key: Key, number: int) -> bool:
    """Whether a clip, by its number in the set, has no line yet, or not all the files that this run is to keep."""
    return key not in scores.done or not all(file.exists() for file in _kept(plan, key, number, scores))


def _kept(plan: Plan, key: Key, number: int, scores: Scores) -> list[Path]:
    """The files of a clip."""
    strip = number < plan.strips and key.seed in (None, min(plan.seeds))
    return [strip_file(scores.folder, key)] * strip + [video_file(scores.folder, key)] * plan.videos


def strip_file(folder: Path, key: Key) -> Path:
    return folder / "strips" / str(key.length) / key.arm / f"{key.name}.png"


def video_file(folder: Path, key: Key) -> Path:
    return folder / "videos" / key.arm / str(key.length) / f"{key.name}.mp4"


def _run_batch(plan, one: DataSet, start: int, model, image_model, scores: Scores, neural: Neural, bar: tqdm) -> None:
    items = one.items[start : start + plan.batch]
    numbers = range(start, start + len(items))
    if not any(_lacks(plan, scores, key, n) for n, item in zip(numbers, items, strict=True)
               for key in _keys(plan, one, item)):  # fmt: skip
        return
    settings = dataclasses.replace(plan.settings, frames=one.length)
    clips = clips_of([items[min(n, len(items) - 1)] for n in range(plan.batch)], settings.size)
    batch = Batch(model, image_model, settings, clips)
    for arm in plan.arms:
        for seed in _seeds(plan, arm):
            found = [Key(one.length, item.id, arm.name, seed) for item in items]
            wanted = [n for n, key in enumerate(found) if _lacks(plan, scores, key, start + n)]
            if not wanted:
                continue
            bar.set_postfix_str(f"{one.length} frames, {arm.name}", refresh=False)
            made = generate.make(arm, batch, 0 if seed is None else seed)
            new = [n for n in wanted if found[n] not in scores.done]
            for n in set(wanted) - set(new):
                _same(found[n], scores.done[found[n]], made[n], clips.truth[n])
            for n in wanted:
                _keep(_kept(plan, found[n], start + n, scores), made[n])
            scores.append([_line(found[n], items[n], made[n], clips.truth[n], scores.folder, neural) for n in new])
            bar.update(len(wanted))


def clips_of(items: Sequence[Item], size: tuple[int, int]) -> Clips:
    """The items' clips at a size (height, width), each read once however often it is there."""
    read = {item.id: item.read() for item in {item.id: item for item in items}.values()}
    truth = {name: stretched(frames, size) for name, frames in read.items()}
    # Copies, as views would keep every frame at its own size for as long as the batch is there.
    keyframes = [(read[item.id][0].copy(), read[item.id][-1].copy()) for item in items]
    return Clips([item.id for item in items], [item.caption for item in items], [item.backwards for item in items],
                 keyframes, np.stack([truth[item.id] for item in items]))  # fmt: skip


def _line(key: Key, item: Item, made: np.ndarray, truth: np.ndarray, folder: Path, neural: Neural) -> dict[str, Any]:
    figures = metrics.measure(made, truth)
    figures["metrics"] |= neural.measure(key, made, truth, folder)
    return {**dataclasses.asdict(key), "challenge": item.challenge, **figures}


def _same(key: Key, line: Mapping[str, Any], made: np.ndarray, truth: np.ndarray) -> None:
    """Raises ScoresError if a video that is made once more is not the one of its line."""
    again, then = metrics.psnr(made, truth), np.asarray(line["psnr_frames"])
    worst = int(np.argmax(np.abs(again - then)))
    if abs(again[worst] - then[worst]) > REMADE_DECIBEL:
        raise ScoresError(
            f"{key.arm}, clip {key.name}, {key.length} frames: made once more, frame {worst} has {again[worst]:.2f} dB "
            f"and not {then[worst]:.2f}, so this is another machine or version; make videos and strips in a new folder"
        )


def _keep(files: Sequence[Path], made: np.ndarray) -> None:
    """Writes a strip of frames or the video of a clip, whichever the files are."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png":
            times = np.linspace(0, len(made) - 1, min(STRIP_FRAMES, len(made))).round().astype(int)
            video.write_png(file, np.concatenate(list(made[times]), axis=1))
        else:
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
