"""The page's layout: what is on it and where. `events` says what happens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from samplers import solvers, video
from samplers.studio import draw, events, fields, views
from samplers.studio.draw import EXAMPLES
from samplers.studio.fields import Field
from samplers.studio.line import Line
from samplers.studio.make import Studio
from wanjax import kab
from wanjax.config import ModelConfig
from wanjax.method import METHODS

FRAMES = (9, 17, 25, 33, 49, 65, 81)
"""Lengths that are offered beside the model's usual one: each compiles once."""
INNER = 3
"""Keyframes between the first and the last."""
FIRST_METHOD = "paper"


@dataclass(frozen=True)
class Page:
    """The components by name.

    Attributes:
      values: what a clip is made of, in the order in which handlers get them.
      drawing: of the editor. others: everything else.
    """

    values: dict[str, Any]
    drawing: dict[str, Any]
    others: dict[str, Any]


def build(studio: Studio, line: Line, folder: Path) -> tuple[gr.Blocks, tuple[Field, ...]]:
    """The page, and the fields whose sliders it has.

    Args:
      folder: of the run.
    """
    config = studio.config
    known = fields.fields(config, config.sampling.frames)
    with gr.Blocks(title="wanjax studio", analytics_enabled=False, fill_width=True, delete_cache=(600, 7200)) as blocks:
        gr.HTML(_header(config), elem_id="header")
        values: dict[str, Any] = {}
        drawing: dict[str, Any] = {}
        others: dict[str, Any] = {"base": gr.State(None), "last": gr.State(None), "pinned": gr.State(None)}
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=4, min_width=340, elem_id="controls"):
                values |= _keyframes(studio)
                drawing |= _editor(studio)
                others |= _more_keyframes(values, config)
                values["prompt"] = gr.Textbox(label="What happens between", lines=2, max_lines=4, elem_id="prompt",
                                              value=_first_prompt(studio))  # fmt: skip
                with gr.Row(elem_id="go"):
                    others["make"] = gr.Button("Make", variant="primary", elem_id="make", scale=3)
                    others["stop"] = gr.Button("Stop", elem_id="stop", scale=1)
                _clip(values, config)
                others |= _method(values, known)
            with gr.Column(scale=8, min_width=340, elem_id="results"):
                others |= _results(studio)
        events.connect(studio, line, folder, blocks, values, drawing, others)
    blocks.queue(max_size=64, default_concurrency_limit=32)
    return blocks, known


def first_values(studio: Studio, folder: Path) -> dict[str, Any]:
    """What the page shows at first, as `Studio.job` takes it; drawn keyframes are written into the run's folder."""
    config, s = studio.config, studio.config.sampling
    paths = []
    for number, one in enumerate(EXAMPLES[0][:2]):
        paths.append(folder / f"warm{number}.png")
        video.write_png(paths[-1], draw.draw(one, *s.size))
    own = {"first": paths[0], "last": paths[1], "prompt": _first_prompt(studio), "frames": s.frames, "seed": 0,
           "steps": s.steps, "guidance": s.guidance, "shift": s.shift, "solver": s.solver, "method": FIRST_METHOD}  # fmt: skip
    return own | fields.of_method(METHODS[FIRST_METHOD], config, s.frames)


def _first_prompt(studio: Studio) -> str:
    return draw.prompt(*EXAMPLES[0]) if studio.bundled else ""


def _header(config: ModelConfig) -> str:
    return ('<div class="wj-head"><h1>wanjax <em>studio</em></h1><p>Two keyframes, a sentence, and the motion between. '
            f"Sliders of the method compile nothing.</p><span class='wj-model'>{views.text(config.name)}</span></div>")  # fmt: skip


def _image(label: str, name: str, value: Any = None) -> gr.Image:
    return gr.Image(value=value, label=label, type="filepath", image_mode=None, format="png", elem_id=name, height=190,
                    sources=["upload", "clipboard"], buttons=[], elem_classes=["wj-drop"])  # fmt: skip


def _keyframes(studio: Studio) -> dict[str, Any]:
    """First and last."""
    shown = [None, None]
    if studio.bundled:
        shown = [draw.draw(one, *studio.config.sampling.size) for one in EXAMPLES[0][:2]]
    with gr.Row(elem_id="keys", equal_height=True):
        return {"first": _image("First keyframe", "first", shown[0]), "last": _image("Last keyframe", "last", shown[1])}


def _editor(studio: Studio) -> dict[str, Any]:
    """The editor of shapes, and the gallery of examples for the bundled model."""
    first, last, path = EXAMPLES[0]
    found: dict[str, Any] = {}
    with gr.Accordion("Draw the keyframes", open=studio.bundled, elem_id="draw"):
        if studio.bundled:
            found["gallery"] = gr.Gallery(
                [draw.strobe(*one) for one in EXAMPLES], columns=6, rows=1, height="auto", allow_preview=False,
                show_label=False, object_fit="cover", elem_id="gallery", interactive=False, buttons=[],
            )  # fmt: skip
        found["shape"] = gr.Radio(list(draw.SHAPES), value=first.shape, label="Shape", elem_id="shape")
        for name, label in (("colour", "Colour"), ("ground", "Ground")):
            found[name] = gr.Radio(list(draw.COLOURS), value=getattr(first, name), label=label, elem_id=name,
                                   elem_classes=["wj-swatches"])  # fmt: skip
        with gr.Row():
            for name, label, value in (("x1", "First: across", first.x), ("y1", "down", first.y),
                                       ("x2", "Last: across", last.x), ("y2", "down", last.y)):  # fmt: skip
                found[name] = gr.Slider(0, 1, value, step=0.01, label=label, elem_id=name, min_width=120, buttons=[],
                                        elem_classes=["wj-slim"])  # fmt: skip
        with gr.Row():
            found["size"] = gr.Slider(draw.LEAST, draw.MOST, first.size, step=0.01, label="Size", elem_id="size",
                                      buttons=[], elem_classes=["wj-slim"])  # fmt: skip
            found["path"] = gr.Radio(list(draw.PATHS), value=path, label="Path, as the prompt says it", elem_id="path")
    return found


def _more_keyframes(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Keyframes between, and the time line."""
    with gr.Accordion("Keyframes between, on a time line", open=False, elem_id="between"):
        line = gr.HTML("", elem_id="timeline")
        with gr.Row():
            for i in range(INNER):
                with gr.Column(min_width=110):
                    values[f"inner{i}"] = _image(f"Keyframe {i + 1}", f"inner{i}")
                    place = (i + 1) * (config.sampling.frames - 1) // (INNER + 1)
                    values[f"at{i}"] = gr.Number(place, label="in frame", precision=0, minimum=0, elem_id=f"at{i}")
        gr.HTML(
            '<p class="wj-quiet">Another number of keyframes is another program: the first clip of it compiles.</p>'
        )
    return {"timeline": line}


def _clip(values: dict[str, Any], config: ModelConfig) -> None:
    """Settings of the clip and of sampling."""
    s = config.sampling
    stride = config.vae.temporal_stride
    lengths = sorted({s.frames, *(one for one in FRAMES if (one - 1) % stride == 0)})
    with gr.Accordion("Clip", open=True, elem_id="clip"):
        with gr.Row():
            values["steps"] = gr.Slider(
                1, max(60, s.steps), s.steps, step=1, label="Steps", elem_id="steps", buttons=[]
            )
            values["guidance"] = gr.Slider(
                0, 10, s.guidance, step=0.1, label="Guidance", elem_id="guidance", buttons=[]
            )
        with gr.Row():
            values["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=90)
            values["frames"] = gr.Dropdown(lengths, value=s.frames, label="Frames (compiles once)", elem_id="frames",
                                           min_width=120)  # fmt: skip
            values["solver"] = gr.Dropdown(list(solvers.SOLVERS), value=s.solver, label="Solver", elem_id="solver",
                                           min_width=110)  # fmt: skip
        values["shift"] = gr.Slider(0.5, 12, s.shift, step=0.1, label="Timestep shift", elem_id="shift", buttons=[])


def _method(values: dict[str, Any], known: Sequence[Field]) -> dict[str, Any]:
    """The method and its sliders."""
    with gr.Accordion("Method: what attention does", open=True, elem_id="method_box"):
        values["method"] = gr.Radio(
            [("Wan2.1 as it is", "wan"), ("the paper", "paper"), ("its released code", "release")], value=FIRST_METHOD,
            show_label=False, container=False, elem_id="method",
        )  # fmt: skip
        curves = gr.HTML("", elem_id="curves")
        for part, title in fields.PARTS.items():
            with gr.Group(elem_classes=["wj-part"]):
                values[part] = gr.Checkbox(True, label=title, elem_id=part, container=False)
                own = [one for one in known if one.part == part]
                for pair in (own[i : i + 2] for i in range(0, len(own), 2)):
                    with gr.Row():
                        for one in pair:
                            values[one.name] = _field(one)
    return {"curves": curves}


def _field(one: Field) -> Any:
    if one.choices:
        return gr.Dropdown(list(one.choices), value=one.paper, label=f"{one.label} · paper: {one.paper}",
                           elem_id=one.name, min_width=130)  # fmt: skip
    return gr.Slider(one.low, one.high, one.paper, step=one.step, label=f"{one.label} · paper {one.paper:g}",
                     elem_id=one.name, min_width=130, buttons=[], elem_classes=["wj-marked"])  # fmt: skip


def _results(studio: Studio) -> dict[str, Any]:
    """The player and what is under it."""
    config = studio.config
    found: dict[str, Any] = {
        "stage": gr.HTML(views.idle(config.sampling.size), elem_id="stage"),
        "told": gr.HTML("", elem_id="told"),
    }
    middle = sum(kab.layer_window(kab.KAB(), config.dit.num_layers)) // 2
    with gr.Tabs(elem_id="tabs"):
        with gr.Tab("Contact sheet"):
            found["sheet"] = gr.HTML(
                '<p class="wj-quiet">Frames of the clip beside its keyframes.</p>', elem_id="sheet"
            )
        with gr.Tab("Compare A and B"):
            gr.HTML(
                '<p class="wj-quiet">B is what the sliders say. Keyframes, prompt and seed are the same for both.</p>'
            )
            with gr.Row(elem_id="compare_row"):
                found["against"] = gr.Radio(
                    ["wan", "paper", "release", "pinned"], value="wan", label="A", elem_id="against"
                )
                found["pin"] = gr.Button("Pin these settings as A", elem_id="pin")
                found["compare"] = gr.Button("Make A and B", variant="primary", elem_id="compare")
            found["pin_told"] = gr.HTML("", elem_id="pin_told")
        with gr.Tab("What KAB does"):
            with gr.Row(elem_id="look_row"):
                found["layer"] = gr.Slider(0, config.dit.num_layers - 1, middle, step=1, label="Layer", elem_id="layer",
                                           buttons=[])  # fmt: skip
                found["step"] = gr.Slider(0, max(60, config.sampling.steps) - 1, 1, step=1, label="Step", elem_id="step",
                                          buttons=[])  # fmt: skip
                found["look"] = gr.Button("Look", variant="primary", elem_id="look")
            found["heat"] = gr.HTML(
                '<p class="wj-quiet">Make a clip, then look where its frames look.</p>', elem_id="heat"
            )
        with gr.Tab("Settings"):
            gr.HTML('<p class="wj-quiet">A saved clip holds its settings. Give one back, or its contact sheet, and the page '
                    "is set as it was made.</p>")  # fmt: skip
            found["load"] = gr.UploadButton("Load settings from a clip", elem_id="load", file_types=[
                ".mp4", ".webm", ".gif", ".webp", ".png", ".json"])  # fmt: skip
            found["loaded"] = gr.HTML("", elem_id="loaded")
    return found


def blank(size: tuple[int, int]) -> np.ndarray:
    """A dark picture."""
    return np.full((*size, 3), 24, np.uint8)
