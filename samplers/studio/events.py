"""What happens on the page: handlers, and which component calls which."""

import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import jax

from samplers import command
from samplers.studio import draw, fields, heat, views
from samplers.studio.line import Line, Stopped
from samplers.studio.make import PLAIN, Made, Progress, Studio, shown_method
from samplers.studio.safety import tidy, uploaded
from wanjax import keyframes, method, retro
from wanjax.method import METHODS

USUAL = (ValueError, FloatingPointError, OSError, MemoryError, jax.errors.JaxRuntimeError)
SIDE = 48
"""Pixels of a thumbnail on the time line."""
QUICK = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "preprocess": False}
SLOW = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False, "concurrency_limit": 32}


class Handlers:
    """The handlers of one page; what differs between its visitors comes with each call.

    Args:
      names: of the values, in the order of the components.
      parts: the other components by name.
    """

    def __init__(self, studio: Studio, line: Line, folder: Path, names: Sequence[str], parts: dict[str, Any]) -> None:
        self.studio, self.line, self.folder, self.names, self.parts = studio, line, folder, list(names), parts
        self.size, self.begun = studio.config.sampling.size, time.time()

    def values(self, given: Sequence[Any], base: Any = None) -> dict[str, Any]:
        """The page's values as `Studio.job` takes them. ValueError for an upload that is not here."""
        own = dict(zip(self.names, given, strict=True))
        uploads = self.folder / "uploads"
        own["first"], own["last"] = (uploaded(own[name], uploads) for name in ("first", "last"))
        given = [name for name in own if name.startswith("inner") and own[name] is not None]
        own["inner"] = [
            (uploaded(own[name], uploads), _whole("keyframe in frame", own[f"at{name[5:]}"])) for name in given
        ]
        for name in ("seed", "frames", "steps"):
            own[name] = _whole(name, own[name])
        if own["method"] not in METHODS:
            raise ValueError(f"method {own['method']!r}: choose {', '.join(METHODS)}")
        return own | {"base": base}

    def line_of(self, error: Exception) -> str:
        """One line on what went wrong, without this machine's paths; what nobody could cause goes to the terminal."""
        if not isinstance(error, USUAL):
            traceback.print_exception(error)
            return f"failed ({type(error).__name__}); the studio's terminal says more"
        told = " ".join(command.reason(error).split())
        return re.sub(rf"{re.escape(str(self.folder))}/(?:[^\s:]*/)?", "", told)

    def make(self, request: gr.Request, base: Any, *given: Any) -> Iterator[dict[Any, Any]]:
        """Makes a clip."""
        yield from self._follow(request, lambda: self._one(base, given))

    def _one(self, base: Any, given: Sequence[Any]) -> Callable[[Any], Made]:
        job = self.studio.job(self.values(given, base), self.studio.place())
        return lambda ticket: self.studio.make(job, ticket)

    def compare(
        self, request: gr.Request, base: Any, pinned: Any, against: str, *given: Any
    ) -> Iterator[dict[Any, Any]]:
        """Makes a clip by two settings, and their difference."""
        yield from self._follow(request, lambda: self._two(base, pinned, against, given))

    def _two(self, base: Any, pinned: Any, against: str, given: Sequence[Any]) -> Callable[[Any], Made]:
        values, place = self.values(given, base), self.studio.place()
        if against == "pinned":
            if pinned is None:
                raise ValueError("A: nothing is pinned; pin the present settings first, or choose another A")
            same = {name: values[name] for name in ("first", "last", "inner", "prompt", "frames", "seed")}
            other = pinned | same
        else:
            if against not in METHODS:
                raise ValueError(f"A {against!r}: choose {', '.join(METHODS)} or pinned")
            shown = fields.of_method(METHODS[against], self.studio.config, values["frames"])
            other = values | shown | {"method": against, "exact": True}
        jobs = [self.studio.job(one, place, name) for name, one in (("a", other), ("b", values))]
        return lambda ticket: self.studio.compare(*jobs, ticket)

    def _follow(self, request: gr.Request, prepare: Callable[[], Callable[[Any], Made]]) -> Iterator[dict[Any, Any]]:
        """The player's states, until the clip is there."""
        stage, told = self.parts["stage"], self.parts["told"]
        tidy(self.folder / "uploads", self.begun)
        config = self.studio.config
        fps, stride = config.sampling.fps, config.vae.temporal_stride
        yield {stage: views.working(self.size, None, fps, stride), told: ""}
        try:
            ticket = self.line.join(request.session_hash, prepare())
            for kind, value in self.line.follow(ticket):
                if kind == "waiting":
                    yield {stage: views.waiting(self.size, value, self.line.warming())}
                elif kind == "progress":
                    yield {stage: self._progress(value)}
                else:
                    yield self._made(value)
        except Stopped:
            yield {stage: views.stopped(self.size)}
        except Exception as error:
            yield {stage: views.failed(self.size, self.line_of(error))}

    def _progress(self, value: Progress) -> str:
        config = self.studio.config
        return views.working(self.size, value, config.sampling.fps, config.vae.temporal_stride)

    def _made(self, made: Made) -> dict[Any, Any]:
        parts = self.parts
        return {parts["stage"]: views.done(made), parts["told"]: views.told(made), parts["sheet"]: views.sheet(made),
                parts["last"]: made}  # fmt: skip

    def stop(self, request: gr.Request) -> None:
        """Stops whatever this visitor waits for."""
        self.line.stop(request.session_hash)

    def look(self, request: gr.Request, last: Made | None, layer: int, step: int) -> Iterator[str]:
        """Where the last clip's frames look."""
        yield '<p class="wj-quiet">Looking …</p>'
        try:
            if last is None:
                raise ValueError("attention: there is no clip yet; make one first")
            where = _whole("layer", layer), _whole("step", step)
            ticket = self.line.join(request.session_hash, lambda one: self.studio.look(last.job, *where, one))
            for kind, value in self.line.follow(ticket):
                if kind == "done":
                    yield heat.html(value, self._seen(last))
        except Stopped:
            yield '<p class="wj-quiet">Stopped.</p>'
        except Exception as error:
            yield _line(self.line_of(error))

    @staticmethod
    def _seen(last: Made) -> list[Any]:
        """The keyframes that the model is shown: the outermost."""
        pixels = list(last.job.inputs.pixels[0])
        return [pixels[0], pixels[-1]]

    def check(self, given: Any) -> tuple[Any, str]:
        """Reads an upload as a run would, at once; an image that cannot be used goes."""
        try:
            path = uploaded(given, self.folder / "uploads")
            if path is not None:
                self.studio.picture(path)
        except Exception as error:
            return None, views.failed(self.size, self.line_of(error))
        return gr.skip(), gr.skip()

    def drawn(self, *given: Any) -> tuple[Any, Any, str]:
        """Both keyframes of the editor, and the prompt."""
        shape, colour, ground, x1, y1, x2, y2, size, path = given
        first = draw.Drawing(shape, colour, ground, x1, y1, size)
        last = draw.Drawing(shape, colour, ground, x2, y2, size)
        height, width = self.size
        return (*(draw.draw(one, height, width) for one in (first, last)), draw.prompt(first, last, path))

    def example(self, event: gr.SelectData) -> tuple[Any, ...]:
        """An example's drawing into the editor, its keyframes and prompt into the page."""
        first, last, path = draw.EXAMPLES[event.index]
        own = (first.shape, first.colour, first.ground, first.x, first.y, last.x, last.y, first.size, path)
        return (*own, *self.drawn(*own))

    def chosen(self, name: str, frames: Any) -> list[Any]:
        """The switches and fields of a profile; none of them can be touched where it changes nothing."""
        on = name != "wan"
        shown = fields.of_method(METHODS[name if on else "paper"], self.studio.config, _whole("frames", frames))
        shown |= {} if on else dict.fromkeys(fields.PARTS, False)
        return [gr.update(value=value, interactive=on) for value in shown.values()]

    def lengths(self, frames: Any) -> Any:
        """The edge width that belongs to a length."""
        frames = _whole("frames", frames)
        return gr.update(value=retro.edge_width(retro.ReTRo(), frames), maximum=frames // 2)

    def curves(self, *given: Any) -> str:
        """KAB's strength and ReTRo's factor by frame, of the values as they stand."""
        try:
            own = dict(zip(self.names, given, strict=True))
            frames, steps = _whole("frames", own["frames"]), _whole("steps", own["steps"])
            config = self.studio.config
            chosen = shown_method(own | {"frames": frames}, self.studio)
            made = method.arrays(chosen, config, frames, self.size, steps)
            count = made.strength.shape[-1]
            scale = [1.0] * count if chosen.retro is None else retro.scale_vector(chosen.retro, frames, count).tolist()
        except USUAL as error:
            return _line(self.line_of(error))
        return views.curves(made.strength.max((0, 1)).tolist(), scale)

    def timeline(self, *given: Any) -> str:
        """Where the keyframes lie."""
        try:
            own = self.values(given)
            last = own["frames"] - 1
            places = [(at, path) for at, path in ((0, own["first"]), (last, own["last"])) if path is not None]
            places += [(at, path) for path, at in own["inner"]]
            drawn = [
                (at, views.png(keyframes.fit(self.studio.picture(path), SIDE, SIDE, "crop")))
                for at, path in sorted(places)
            ]
        except USUAL as error:
            return _line(self.line_of(error))
        return views.timeline(drawn, own["frames"])

    def pin(self, base: Any, *given: Any) -> tuple[Any, str, str]:
        """Keeps the present settings as A."""
        try:
            own = self.values(given, base)
        except ValueError as error:
            return None, _line(self.line_of(error)), "wan"
        told = f"A is {own['method']}, {own['steps']} steps, guidance {own['guidance']:g}"
        return own, f'<p class="wj-quiet">{views.text(told)}</p>', "pinned"

    def load(self, given: Any) -> tuple[Any, ...]:
        """The settings of a clip into the page."""
        try:
            path = uploaded(given[0] if isinstance(given, list) and given else given, self.folder / "uploads")
            if path is None:
                raise ValueError("settings: no file came; give a clip that wanjax wrote")
            base, found = self.studio.recalled(path)
        except Exception as error:
            return (_line(self.line_of(error)), gr.skip(), *(gr.skip() for _ in SET))
        on = found["method"] != "wan"
        told = f'<p class="wj-quiet">Set as {views.text(path.name)} was made; keyframes stay as they are here.</p>'
        sliders = {*fields.of_method(METHODS["wan"], self.studio.config, found["frames"])}
        return (told, str(base), *(gr.update(value=found[name], **({"interactive": on} if name in sliders else {}))
                                   for name in SET))  # fmt: skip


SET = (*PLAIN, "method", *fields.PARTS, *(name for names in fields.OPTIONS.values() for name in names))
"""Values that are loaded from a clip."""


def _whole(name: str, value: Any) -> int:
    """A whole number of a value that a browser sent. ValueError: none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"{name} {value!r}: give a whole number")
    return int(value)


def _line(told: str) -> str:
    return f'<p class="wj-line-error" role="alert">{views.text(told)}</p>'


def connect(
    studio: Studio, line: Line, folder: Path, blocks: gr.Blocks, values: dict[str, Any], drawing: dict[str, Any],
    parts: dict[str, Any],
) -> None:  # fmt: skip
    """Gives the page its handlers."""
    own, every = Handlers(studio, line, folder, list(values), parts), list(values.values())
    results = [parts[name] for name in ("stage", "told", "sheet", "last")]
    parts["make"].click(own.make, [parts["base"], *every], results, **SLOW)
    parts["compare"].click(own.compare, [parts["base"], parts["pinned"], parts["against"], *every], results, **SLOW)
    parts["stop"].click(own.stop, None, None, **QUICK)
    blocks.unload(own.stop)
    parts["look"].click(own.look, [parts["last"], parts["layer"], parts["step"]], parts["heat"], **SLOW)
    parts["pin"].click(
        own.pin, [parts["base"], *every], [parts["pinned"], parts["pin_told"], parts["against"]], **QUICK
    )
    parts["load"].upload(own.load, parts["load"],
                         [parts["loaded"], parts["base"], *(values[name] for name in SET)], **QUICK)  # fmt: skip
    images = [name for name in values if name in ("first", "last") or name.startswith("inner")]
    for name in images:
        values[name].upload(own.check, values[name], [values[name], parts["stage"]], **QUICK)
    _connect_drawing(own, values, drawing)
    sliders = list(fields.of_method(METHODS["wan"], studio.config, studio.config.sampling.frames))
    touched = [values[name] for name in sliders]
    values["method"].input(own.chosen, [values["method"], values["frames"]], touched, **QUICK)
    values["frames"].input(own.lengths, values["frames"], values["w_edge"], **QUICK)
    shown = [values[name].change for name in (*sliders, "method", "frames", "steps")]
    gr.on([*shown, blocks.load], own.curves, every, parts["curves"], trigger_mode="always_last", **QUICK)
    placed = [values[name].change for name in (*images, "frames", *(one for one in values if one.startswith("at")))]
    gr.on([*placed, blocks.load], own.timeline, every, parts["timeline"], trigger_mode="always_last", **QUICK)


def _connect_drawing(own: Handlers, values: dict[str, Any], drawing: dict[str, Any]) -> None:
    """The editor and its gallery."""
    pen = [drawing[name] for name in ("shape", "colour", "ground", "x1", "y1", "x2", "y2", "size", "path")]
    outputs = [values["first"], values["last"], values["prompt"]]
    gr.on([one.input for one in pen], own.drawn, pen, outputs, trigger_mode="always_last", **QUICK)
    if "gallery" in drawing:
        drawing["gallery"].select(own.example, None, [*pen, *outputs], **QUICK)
