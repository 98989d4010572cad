"""The page's layout: what is on it and where. `events` says what happens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from samplers import solvers
from samplers.studio import draw, events, fields, views
from samplers.studio.draw import EXAMPLES
from samplers.studio.fields import Field
from samplers.studio.line import Line
from samplers.studio.make import FIRST_METHOD, Studio
from wanjax import kab
from wanjax.config import ModelConfig

FRAMES = (9, 17, 25, 33, 49, 65, 81)
"""Lengths that are offered beside the model's usual one: each compiles once."""
INNER = 3
"""Keyframes between the first and the last."""


def build(studio: Studio, line: Line, folder: Path) -> tuple[gr.Blocks, tuple[Field, ...]]:
    """The page, and the fields whose sliders it has.

    Args:
      folder: of the run.
    """
    config = studio.config
    known = fields.fields(config, config.sampling.frames)
    with gr.Blocks(title="wanjax studio", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(_header(config), elem_id="header")
        values: dict[str, Any] = {}
        drawing: dict[str, Any] = {}
        others: dict[str, Any] = {"base": gr.State(None), "last": gr.State(None), "pinned": gr.State(None)}
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=4, min_width=330, elem_id="controls"):
                values |= _keyframes(studio)
                values["prompt"] = gr.Textbox(label="What happens between", lines=2, max_lines=4, elem_id="prompt",
                                              value=studio.first_prompt)  # fmt: skip
                with gr.Row(elem_id="go"):
                    others["make"] = gr.Button("Make", variant="primary", elem_id="make", scale=3, min_width=120)
                    others["stop"] = gr.Button("Stop", elem_id="stop", scale=1, min_width=70)
                with gr.Tabs(elem_id="sources"):
                    with gr.Tab("Draw"):
                        drawing |= _editor(studio)
                    with gr.Tab("Clip"):
                        _clip(values, config)
                    with gr.Tab("Time line"):
                        others |= _more_keyframes(values, config)
            with gr.Column(scale=8, min_width=340, elem_id="results"):
                others |= _results(studio)
            with gr.Column(scale=3, min_width=290, elem_id="method_box"):
                others |= _method(values, known)
        events.connect(studio, line, folder, blocks, values, drawing, others)
    blocks.queue(max_size=64, default_concurrency_limit=32)
    return blocks, known


def _header(config: ModelConfig) -> str:
    name = f'<span class="wj-model">{views.text(config.name)}</span>'
    told = "<p>Two keyframes, a sentence, and the motion between.</p>"
    return f'<div class="wj-head"><h1>wanjax <em>studio</em></h1>{told}{name}</div>'


def _image(label: str, name: str, value: Any = None) -> gr.Image:
    return gr.Image(
        value=value, label=label, type="filepath", image_mode=None, format="png", elem_id=name, height=190, buttons=[],
        sources=["upload", "clipboard"], placeholder="Drop, paste or click", elem_classes=["wj-drop"],
    )  # fmt: skip


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
    with gr.Column(elem_id="draw"):
        if studio.bundled:
            found["gallery"] = gr.Gallery(
                [draw.strobe(*one) for one in EXAMPLES], columns=6, rows=1, height=None, allow_preview=False,
                show_label=False, object_fit="cover", elem_id="gallery", interactive=False, buttons=[],
            )  # fmt: skip
        found["shape"] = gr.Radio(list(draw.SHAPES), value=first.shape, label="Shape", elem_id="shape")
        for name, label in (("colour", "Colour"), ("ground", "Ground")):
            found[name] = gr.Radio(list(draw.COLOURS), value=getattr(first, name), label=label, elem_id=name,
                                   elem_classes=["wj-swatches"])  # fmt: skip
        for pair in ((("x1", "First, across", first.x), ("y1", "First, down", first.y)),
                     (("x2", "Last, across", last.x), ("y2", "Last, down", last.y))):  # fmt: skip
            with gr.Row():
                found |= {name: _slim(name, label, 0, 1, value, 0.01) for name, label, value in pair}
        with gr.Row():
            found["size"] = _slim("size", "Size", draw.LEAST, draw.MOST, first.size, 0.01)
            found["path"] = gr.Radio(list(draw.PATHS), value=path, label="Path", elem_id="path")
    return found


def _more_keyframes(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Keyframes between, and the time line."""
    with gr.Column(elem_id="between"):
        line = gr.HTML("", elem_id="timeline")
        with gr.Row():
            for i in range(INNER):
                with gr.Column(min_width=110):
                    values[f"inner{i}"] = _image(f"Keyframe {i + 1}", f"inner{i}")
                    place = (i + 1) * (config.sampling.frames - 1) // (INNER + 1)
                    values[f"at{i}"] = gr.Number(place, label="in frame", precision=0, minimum=0, elem_id=f"at{i}")
        gr.HTML(_quiet("Another number of keyframes is another program: the first clip of it compiles."))
    return {"timeline": line}


def _clip(values: dict[str, Any], config: ModelConfig) -> None:
    """Settings of the clip and of sampling."""
    s = config.sampling
    stride = config.vae.temporal_stride
    lengths = sorted({s.frames, *(one for one in FRAMES if (one - 1) % stride == 0)})
    with gr.Column(elem_id="clip"):
        with gr.Row():
            values["steps"] = _slim("steps", "Steps", 1, max(60, s.steps), s.steps, 1)
            values["guidance"] = _slim("guidance", "Guidance", 0, 10, s.guidance, 0.1)
        with gr.Row():
            values["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=90)
            values["frames"] = gr.Dropdown(lengths, value=s.frames, label="Frames", elem_id="frames", min_width=90)
        with gr.Row():
            known = list(solvers.SOLVERS)
            values["solver"] = gr.Dropdown(known, value=s.solver, label="Solver", elem_id="solver", min_width=110)
            values["shift"] = _slim("shift", "Timestep shift", 0.5, 12, s.shift, 0.1)
        gr.HTML(_quiet("Another number of frames is another program: its first clip compiles."))


def _slim(name: str, label: str, low: float, high: float, value: float, step: float) -> gr.Slider:
    return gr.Slider(low, high, value, step=step, label=label, elem_id=name, min_width=100, buttons=[],
                     elem_classes=["wj-slim"])  # fmt: skip


def _method(values: dict[str, Any], known: Sequence[Field]) -> dict[str, Any]:
    """The method and its sliders."""
    gr.HTML("<h3>Method</h3><p class='wj-quiet'>Nothing here compiles. Green: the paper's values.</p>")
    values["method"] = gr.Radio(
        [("Wan2.1", "wan"), ("paper", "paper"), ("its code", "release")], value=FIRST_METHOD, show_label=False,
        container=False, elem_id="method",
    )  # fmt: skip
    curves = gr.HTML("", elem_id="curves")
    for part, title in fields.PARTS.items():
        with gr.Column(elem_classes=["wj-part"]):
            values[part] = gr.Checkbox(True, label=title, elem_id=part, container=False)
            values |= {one.name: _field(one) for one in known if one.part == part}
    return {"curves": curves}


def _field(one: Field) -> Any:
    if one.choices:
        return gr.Dropdown(list(one.choices), value=one.paper, label=f"{one.label} (paper: {one.paper})",
                           elem_id=one.name, min_width=130)  # fmt: skip
    return gr.Slider(one.low, one.high, one.paper, step=one.step, label=one.label,
                     elem_id=one.name, min_width=130, buttons=[], elem_classes=["wj-marked"])  # fmt: skip


def _quiet(told: str) -> str:
    return f'<p class="wj-quiet">{views.text(told)}</p>'


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
            found["sheet"] = gr.HTML(_quiet("Frames of the clip beside its keyframes."), elem_id="sheet")
        with gr.Tab("Compare A and B"):
            gr.HTML(_quiet("B is what the sliders say. Keyframes, prompt and seed are the same for both."))
            with gr.Row(elem_id="compare_row"):
                found["against"] = gr.Radio(
                    ["wan", "paper", "release", "pinned"], value="wan", label="A", elem_id="against"
                )
                found["pin"] = gr.Button("Pin as A", elem_id="pin", scale=1, min_width=110)
                found["compare"] = gr.Button(
                    "Make A and B", variant="primary", elem_id="compare", scale=1, min_width=140
                )
            found["pin_told"] = gr.HTML("", elem_id="pin_told")
        with gr.Tab("What KAB does"):
            with gr.Row(elem_id="look_row"):
                found["layer"] = _slim("layer", "Layer", 0, config.dit.num_layers - 1, middle, 1)
                found["step"] = _slim("step", "Step", 0, max(60, config.sampling.steps) - 1, 1, 1)
                found["look"] = gr.Button("Look", variant="primary", elem_id="look", scale=0, min_width=120)
            found["heat"] = gr.HTML(_quiet("Make a clip, then look where its frames look."), elem_id="heat")
        with gr.Tab("Settings"):
            gr.HTML(_quiet("A saved clip holds its settings: give it back, and the page is set as it was made."))
            found["load"] = gr.UploadButton("Load settings from a clip", elem_id="load", file_types=[
                ".mp4", ".webm", ".gif", ".webp", ".png", ".json"])  # fmt: skip
            found["loaded"] = gr.HTML("", elem_id="loaded")
    return found
