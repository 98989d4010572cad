"""The README's first picture: held-out clips that the model makes, in a loop, between their keyframes.

    python -m benchmarks.tiny.animation --out docs/example.webp

The first six held-out clips, whichever they are, by the model's own settings: captions and keyframes are all it is
given. Each stands between its first and its last keyframe over its caption; the last frame stays a moment.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from benchmarks import measure
from benchmarks.tiny import evaluate
from benchmarks.tiny.clips import Clip, clip
from benchmarks.tiny.sheets import FAINT, GROUND, INK, LINE, letters, wrapped
from samplers import video
from samplers.plan import Plan, Settings
from wanjax import checkpoint

SUFFIXES = (".webp", ".gif")
CLIP, KEYFRAME = 160, 96
"""Pixels a side, about: whole enlargements."""
MARGIN, COLUMNS, CAPTION_LINES = 12, 2, 2
REST = 9  # frames that the last one stays
SMALL = 12  # pixels of a letter


def animation(clips: Sequence[Clip], videos: np.ndarray) -> np.ndarray:
    """Pictures uint8 [T + REST, height, width, 3] of clips and what was made of them, uint8 [N, T, H, W, 3]."""
    side = videos.shape[2]
    large, small = max(1, CLIP // side), max(1, KEYFRAME // side)
    big, key = side * large, side * small
    cell_x, cell_y = big + 2 * (key + MARGIN), big + CAPTION_LINES * LINE + 4
    columns = min(COLUMNS, len(clips))
    rows = -(-len(clips) // columns)
    ground = Image.new("RGB", (columns * (cell_x + MARGIN) + MARGIN, rows * (cell_y + MARGIN) + MARGIN), GROUND)
    draw, corners = ImageDraw.Draw(ground), []
    for place, one in enumerate(clips):
        left = MARGIN + place % columns * (cell_x + MARGIN)
        top = MARGIN + place // columns * (cell_y + MARGIN)
        lower = top + (big - key) // 2
        for x, name, frame in ((left, "first", one.video[0]), (left + cell_x - key, "last", one.video[-1])):
            ground.paste(Image.fromarray(video.enlarge(frame, small)), (x, lower))
            draw.text((x, lower - LINE), f"{name} keyframe", fill=FAINT, font=letters(SMALL))
        draw.multiline_text((left, top + big + 4), wrapped(one.caption, cell_x), fill=INK, font=letters(), spacing=4)
        corners.append((top, left + key + MARGIN))
    pictures = np.repeat(np.asarray(ground)[None], videos.shape[1], 0)
    for (top, left), made in zip(corners, videos, strict=True):
        pictures[:, top : top + big, left : left + big] = video.enlarge(made, large)
    return np.concatenate([pictures, np.repeat(pictures[-1:], REST, 0)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.tiny.animation", description=__doc__.split("\n")[0])
    p.add_argument("--model", default="tiny", help="'tiny' or a model folder (default %(default)s)")
    p.add_argument("--numbers", type=int, nargs="+", default=list(range(6)), metavar="N", help="held-out clips "
                   "(default 0 1 2 3 4 5)")  # fmt: skip
    p.add_argument("--out", type=measure.output, required=True, metavar="FILE", help="a .webp or .gif to write")
    return p


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    measure.backend(line)
    try:
        if args.out.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--out {args.out}: give a name that ends in {' or '.join(SUFFIXES)}")
        model = checkpoint.load(args.model)
        settings = Settings.of(model.config)
        Plan.of(model.config, settings)
        clips = [clip(number, "heldout", settings.frames, settings.size[0]) for number in args.numbers]
    except (ValueError, OSError) as error:
        line.error(str(error))

    def made() -> bool:
        videos = evaluate.generate(model, clips, [one.caption for one in clips], settings)
        video.write(args.out, animation(clips, videos), fps=model.config.sampling.fps)
        return True

    return measure.guarded(line, made)


if __name__ == "__main__":
    raise SystemExit(main())
