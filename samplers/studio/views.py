"""What the page shows, as HTML: the player in each of its states, and what is under it; page.css, page.js go with it.

The player has one place for the message, the preview and the clip, of the clip's shape, so that nothing jumps.
"""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from samplers.studio.make import GAIN, Made, Progress

_MARKUP = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})


def text(value: object) -> str:
    """Text for HTML, also inert in templates of the browser's side."""
    return html.escape(str(value), quote=True).translate(_MARKUP)


def png(pixels: np.ndarray) -> str:
    """A data URI of uint8 [H, W, 3]."""
    return _uri("png", lambda file: Image.fromarray(pixels).save(file, "PNG", compress_level=3))


def moving(frames: np.ndarray, fps: float) -> str:
    """A data URI of uint8 [T, H, W, 3], as a looped WebP."""
    first, *rest = map(Image.fromarray, frames)
    duration = max(20, round(1000 / fps))
    return _uri("webp", lambda file: first.save(file, "WEBP", save_all=True, append_images=rest, duration=duration,
                                                loop=0, quality=70, method=0))  # fmt: skip


def _uri(kind: str, save) -> str:
    file = io.BytesIO()
    save(file)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def idle(size: tuple[int, int], line: str = "") -> str:
    """Before the first clip."""
    told = line or "Two keyframes in, the motion between them out."
    return _stage(size, f'<div class="wj-hint"><b>Press Make</b><span>{text(told)}</span></div>', "idle")


def waiting(size: tuple[int, int], ahead: int, warming: bool = False) -> str:
    """While others are computed."""
    if warming:
        told = "The model is warming up: it is read, and its programs are compiled, once."
    else:
        told = f"{ahead} {'clip is' if ahead == 1 else 'clips are'} before yours."
    inner = f'<div class="wj-hint"><i class="wj-pulse"></i><b>In line</b><span>{text(told)}</span></div>'
    return _stage(size, inner, "waiting")


def working(size: tuple[int, int], progress: Progress | None, fps: float, stride: int) -> str:
    """While it is computed: the preview in the clip's place."""
    if progress is None:
        return _stage(size, '<div class="wj-hint"><i class="wj-pulse"></i><b>Reading keyframes</b></div>', "working")
    label = f"{progress.label} · " if progress.label else ""
    told = f"{label}step {progress.done} of {progress.steps}"
    told += ": compiling, as this is the first clip of its kind" if progress.fresh else ""
    share = 100 * progress.done / progress.steps
    if progress.frames is None:
        inner = '<div class="wj-hint"><i class="wj-pulse"></i></div>'
    else:
        inner = f'<img class="wj-preview" alt="preview" src="{moving(progress.frames, fps / stride)}">'
    inner += f'<div class="wj-progress"><i style="width:{share:.0f}%"></i></div><div class="wj-told">{text(told)}</div>'
    return _stage(size, inner, "working")


def failed(size: tuple[int, int], line: str) -> str:
    """The line that says what is wrong."""
    inner = f'<div class="wj-hint wj-error" role="alert"><b>That did not work</b><span>{text(line)}</span></div>'
    return _stage(size, inner, "failed")


def stopped(size: tuple[int, int]) -> str:
    """After a stop."""
    return _stage(size, '<div class="wj-hint"><b>Stopped</b><span>Nothing was written.</span></div>', "stopped")


def done(made: Made) -> str:
    """The clip in a loop, its keyframes beside it, and what scrubs it."""
    job, size = made.job, made.job.settings.size
    if made.against is not None:
        size = (size[0], 3 * size[1] + 2 * max(1, size[1] // 48))
    base = f"clips/{made.folder.name}"
    player = f'<video src="{base}/clip.mp4" autoplay loop muted playsinline preload="auto"></video>'
    names = ""
    if made.against is not None:
        captions = _captions(made)
        names = f'<div class="wj-ab">{"".join(f"<span>{text(one)}</span>" for one in captions)}</div>'
    keys = [_key(f"{base}/key{i}.png", at, job.settings.frames) for i, at in enumerate(job.plan.at)]
    left, right = (keys[:1], keys[1:]) if len(keys) > 1 else (keys, [])
    return _stage(size, player, "done", names, left, right,
                  f'data-clip="{made.folder.name}" data-fps="{job.fps:g}" data-frames="{job.settings.frames}"',
                  _scrub(job.settings.frames))  # fmt: skip


def _captions(made: Made) -> tuple[str, str, str]:
    names = []
    for job in (made.against, made.job):
        m = job.settings.method
        parts = [name for name, part in (("KAB", m.kab), ("ReTRo", m.retro), ("isolated", m.isolation)) if part]
        names.append(" + ".join(parts) or "wan")
    return f"A: {names[0]}", f"B: {names[1]}", f"difference × {GAIN}"


def _key(source: str, at: int, frames: int) -> str:
    name = {0: "first", frames - 1: "last"}.get(at, f"frame {at}")
    picture = f'<img src="{source}" alt="{name} keyframe">'
    return f'<figure class="wj-key" data-at="{at}">{picture}<figcaption>{name}</figcaption></figure>'


def _scrub(frames: int) -> str:
    buttons = [("prev", "Frame back", "‹"), ("play", "Play or pause", "Ⅱ"), ("next", "Frame on", "›")]
    drawn = "".join(f'<button type="button" class="wj-{name}" aria-label="{told}">{sign}</button>'
                    for name, told, sign in buttons)  # fmt: skip
    return (f'<div class="wj-scrub">{drawn}<input class="wj-seek" type="range" min="0" max="{frames - 1}" value="0" '
            f'step="1" aria-label="Frame"><output class="wj-frame">0</output></div>')  # fmt: skip


def _stage(
    size: tuple[int, int], inner: str, state: str, above: str = "", left: Sequence[str] = (),
    right: Sequence[str] = (), data: str = "", below: str = "",
) -> str:  # fmt: skip
    height, width = size
    small = " wj-pixels" if max(size) <= 128 else ""
    sides = [f'<div class="wj-side">{"".join(one)}</div>' for one in (left, right)]
    below = below or '<div class="wj-scrub wj-off"></div>'
    row = "wj-row wj-alone" if width > 2 * height else "wj-row"  # keyframes beside would leave a wide clip no room
    shape = f"--wj-w:{width};--wj-h:{height}"
    middle = f'<div class="wj-mid"><div class="wj-screen">{inner}</div>{above}</div>'
    return (f'<div class="wj-stage wj-{state}{small}" data-state="{state}" style="{shape}" {data}>'
            f'<div class="{row}">{sides[0]}{middle}{sides[1]}</div>{below}</div>')  # fmt: skip


def told(made: Made) -> str:
    """Lines under the player: seconds, programs, notes."""
    job = made.job
    compiled = "nothing compiled" if not made.compiled else f"{made.compiled} programs compiled or read"
    facts = [f"{job.settings.frames} frames of {job.settings.size[0]}×{job.settings.size[1]}",
             f"{job.settings.steps} steps", f"seed {job.settings.seed}", f"{made.seconds:.1f} s", compiled]  # fmt: skip
    if made.against is not None:
        facts.append(f"A and B differ by {made.apart:.2f} of 255")
    lines = "".join(f"<li>{text(note)}</li>" for note in job.notes)
    links = _links(made)
    return (f'<div class="wj-facts" data-compiled="{made.compiled}" data-seconds="{made.seconds:.2f}">'
            f'{"".join(f"<span>{text(one)}</span>" for one in facts)}{links}</div>'
            + (f'<ul class="wj-notes">{lines}</ul>' if lines else ""))  # fmt: skip


def _links(made: Made) -> str:
    base = f"clips/{made.folder.name}"
    return f'<a href="{base}/clip.mp4" download="wanjax.mp4" title="The settings are in the file">save clip</a>'


def sheet(made: Made) -> str:
    """The contact sheet."""
    return f'<img class="wj-sheet" alt="contact sheet" src="clips/{made.folder.name}/clip.sheet.png">'


def timeline(places: Sequence[tuple[int, str]], frames: int) -> str:
    """Where keyframes lie in the clip.

    Args:
      places: pixel frame and data URI or address of each.
    """
    dots = "".join(
        f'<figure style="left:{100 * at / max(1, frames - 1):.2f}%"><img src="{source}" alt="">'
        f"<figcaption>{at}</figcaption></figure>"
        for at, source in places
    )
    return f'<div class="wj-line"><i></i>{dots}</div>'


def curves(strength: Sequence[float], scale: Sequence[float], usual: float = 1.0) -> str:
    """Two small plots over the latent frames: KAB's strength, and ReTRo's factor."""
    most = max(usual, *strength)
    spread = max(0.1, *(abs(one - 1) for one in scale))
    drawn = [
        _plot("KAB: strength by frame", [one / most for one in strength], strength, "wj-a", 0.0),
        _plot("ReTRo: scale by frame", [0.5 + (one - 1) / (2 * spread) for one in scale], scale, "wj-b", 0.5),
    ]
    return f'<div class="wj-curves">{"".join(drawn)}</div>'


def _plot(title: str, heights: Sequence[float], values: Sequence[float], kind: str, zero: float) -> str:
    wide, high = 200, 54
    xs = [8 + i * (wide - 16) / max(1, len(heights) - 1) for i in range(len(heights))]
    ys = [high - 6 - one * (high - 12) for one in heights]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    line = high - 6 - zero * (high - 12)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>latent frame {i}: {value:.3g}</title></circle>'
                   for i, (x, y, value) in enumerate(zip(xs, ys, values, strict=True)))  # fmt: skip
    drawn = (f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{text(title)}"><line x1="0" x2="{wide}" '
             f'y1="{line:.1f}" y2="{line:.1f}"/><polyline points="{points}"/>{dots}</svg>')  # fmt: skip
    spread = f"<b>{min(values):.2f} – {max(values):.2f}</b>"
    return f'<figure class="wj-plot {kind}"><figcaption>{text(title)}{spread}</figcaption>{drawn}</figure>'
