"""Clips of the studio: made, compared, stopped, looked into, remembered; what the page shows of them."""

import dataclasses
import json
import os
import stat

import imageio.v3 as iio
import jax
import numpy as np
import pytest
from nano import NANO, write_place
from PIL import Image

from samplers import explain, recall
from samplers.studio import fields, heat, views
from samplers.studio.line import Stopped
from samplers.studio.make import GAIN, PLAIN, Made, Progress, Studio, side_by_side
from samplers.studio.options import MODEL
from samplers.studio.options import parser as command
from wanjax.method import METHODS, Method, override


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("studio"))


# ---- making


class Told:
    """A ticket that nobody waits for; stops after so many steps."""

    def __init__(self, stop_after=None):
        self.heard, self.stop_after = [], stop_after

    def tell(self, value):
        self.heard.append(value)

    def check(self):
        if self.stop_after is not None and sum(one.done > 0 for one in self.heard) >= self.stop_after:
            raise Stopped


@pytest.fixture(scope="module")
def first_told():
    """What was told of the first clip."""
    return Told()


@pytest.fixture(scope="module")
def made(room, first_told):
    """A studio with its first clip, that clip, and its values: three latent frames, so that KAB has one to act on."""
    (room / "warm").mkdir()
    how = {name: getattr(command().parse_args(["--model", str(room / "nano")]), name) for name in MODEL}
    own = Studio(how, room / "warm")
    s = NANO.sampling
    given = {"prompt": "a red circle", "seed": 3} | {name: getattr(s, name) for name in PLAIN if hasattr(s, name)}
    given |= {"first": room / "a.png", "last": room / "b.png", "method": "paper", "frames": 9}
    given |= fields.of_method(METHODS["paper"], NANO, 9)
    jax.clear_caches()  # another file's tests may have compiled the same
    return own, own.make(own.job(given, own.place()), first_told), given


def test_a_clip_and_what_lies_beside_it(made):
    own, clip, given = made
    names = {path.name for path in clip.folder.iterdir()}
    assert names == {"clip.mp4", "clip.sheet.png", "clip.json", "key0.png", "key1.png"}
    assert recall.read(clip.folder / "clip.mp4").settings == clip.job.settings
    key = np.asarray(Image.open(clip.folder / "key1.png"))
    assert np.array_equal(key, clip.job.inputs.pixels[0, 1])
    assert stat.S_IMODE(os.stat(clip.folder).st_mode) == 0o700


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [["--memory", "stage"], ["--memory", "stream"], ["--devices", "all"], ["--devices", "4", "--memory", "stage"]],
    ids=" ".join,
)
def test_wherever_the_model_lies(made, room, tmp_path, how):
    """The clip is the same to a rounding of its pixels, and a slider compiles nothing."""
    _, clip, given = made
    options = {name: getattr(command().parse_args(["--model", str(room / "nano"), *how]), name) for name in MODEL}
    own = Studio(options, tmp_path)
    own.first()
    again = own.make(own.job(given, own.place()), Told())
    there, here = (iio.imread(one.folder / "clip.mp4").astype(int) for one in (again, clip))
    assert there.shape == here.shape and np.abs(there - here).max() <= 2
    assert own.make(own.job(given | {"strength_mid": 1.5}, own.place()), Told()).compiled == 0


@pytest.mark.parametrize(
    "change",
    [
        {"strength_end": 2.0, "strength_mid": 1.5, "kab_until": 1.0},
        {"kab_first": 0, "kab_last": 1, "anchor_curve": "ease-out"},
        {"s_edge": 1.3, "s_mid": 0.7, "w_edge": 2, "retro_mode": "position"},
        {"weight_text": 2.0, "weight_first": 0.5},
        {"kab": False, "retro": False, "isolation": False},
        {"method": "wan"},
        {"seed": 11, "steps": 4, "guidance": 1.0, "shift": 5.0, "prompt": "a blue square"},
        {"solver": "euler"},
    ],
)
def test_no_slider_compiles(made, change):
    own, first, given = made
    told = Told()
    clip = own.make(own.job(given | change, own.place()), told)
    assert clip.compiled == 0
    steps = change.get("steps", 3)
    assert [one.done for one in told.heard] == list(range(steps + 1)) and not any(one.fresh for one in told.heard)


def test_the_first_of_its_kind_says_that_it_compiles(made, first_told):
    _, clip, _ = made
    assert first_told.heard[0].fresh and clip.compiled > 0
    assert [one.done for one in first_told.heard] == [0, 0, 1, 2, 3]


def test_comparing(made):
    own, _, given = made
    place = own.place()
    jobs = [own.job(one, place, name) for name, one in (("a", given | {"method": "wan"}), ("b", given))]
    told = Told()
    both = own.compare(*jobs, told)
    assert both.compiled == 0 and [one.label for one in told.heard] == 4 * ["A"] + 4 * ["B"]
    assert jobs[0].settings.seed == jobs[1].settings.seed and both.against.settings.method == Method()
    kept = recall._of_video(both.folder / "clip.mp4")
    assert recall.from_text(kept, "it").settings == both.job.settings
    assert json.loads(kept)["compared_with"]["method"] == dataclasses.asdict(Method())
    assert both.apart > 0
    same = own.compare(own.job(given, place, "c"), own.job(given, place, "d"), Told())
    assert same.apart == 0


def test_side_by_side():
    first, second = np.random.default_rng(0).integers(0, 255, (2, 4, 16, 24, 3), np.uint8)
    both = side_by_side(first, second)
    assert both.shape == (4, 16, 74, 3)
    assert np.array_equal(both[:, :, :24], first) and np.array_equal(both[:, :, 25:49], second)
    apart = np.minimum(GAIN * np.abs(first.astype(int) - second), 255)
    assert np.array_equal(both[:, :, 50:], apart)


def test_stopping_takes_at_most_a_step_and_leaves_nothing(made):
    own, _, given = made
    place, told = own.place(), Told(stop_after=2)
    with pytest.raises(Stopped):
        own.make(own.job(given | {"steps": 40}, place), told)
    assert max(one.done for one in told.heard) == 2 and list(place.iterdir()) == []
    assert own.make(own.job(given, own.place()), Told()).compiled == 0


def test_looking_into_a_clip(made):
    own, clip, given = made
    numbers = own.look(clip.job, None, None, Told())
    assert (numbers["layer"], numbers["step"]) == explain.where(clip.job.plan)
    strong = {"kab_first": 0, "kab_last": 1, "kab_until": 1.0, "strength_end": 2.0}
    with_kab = own.job(given | strong, own.place())
    one = own.look(with_kab, 1, 2, Told())
    assert one["kab"] and one["attention"]["text"]["plain"] != one["attention"]["text"]["biased"]
    shown = heat.html(one, list(with_kab.inputs.pixels[0]))
    words = one["attention"]["text"]["labels"]
    frames = len(one["pixel_frames"])
    assert shown.count("<td") == 3 * frames * (len(words) - 1) and shown.count("<img") == 2 * 3 * frames
    with pytest.raises(ValueError, match="layer 7"):
        own.look(clip.job, 7, 0, Told())


def test_settings_come_back_from_a_clip(made):
    own, clip, given = made
    method = override(METHODS["release"], {"kab_floor": 0.01, "strength_end": 1.25, "retro_smooth": 1})
    settings = dataclasses.replace(clip.job.settings, method=method, seed=77, prompt="a blue square")
    source = own.place() / "old.json"
    source.write_text(recall.to_text(settings, model="nano", fps=8, scale=1, keyframes=[], at=[]))
    base, found = own.recalled(source)
    assert (found["seed"], found["prompt"], found["method"], found["strength_end"]) == (
        77,
        "a blue square",
        "release",
        1.25,
    )
    again = own.job(given | found | {"base": base}, own.place())
    assert again.settings == settings  # also what the page does not show
    moved = own.job(given | found | {"base": base, "strength_end": 0.5}, own.place()).settings.method
    assert (moved.kab.strength_end, moved.kab.floor, moved.retro.smooth) == (0.5, 0.01, 1)
    plain = given | found | fields.of_method(METHODS["release"], NANO, 9) | {"base": base, "exact": True}
    assert own.job(plain, own.place()).settings == dataclasses.replace(settings, method=METHODS["release"])
    other = own.job(given | found | {"base": base} | {"method": "wan"}, own.place())
    assert other.settings.method == Method() and other.settings.seed == 77


@pytest.mark.parametrize("what", ["model", "text"])
def test_settings_that_cannot_be_loaded(made, what):
    own, clip, _ = made
    source = own.place() / "old.json"
    told = recall.to_text(clip.job.settings, model="another", fps=8, scale=1, keyframes=[], at=[])
    source.write_text(told if what == "model" else "nothing")
    with pytest.raises(
        ValueError, match="old.json: was made by model another" if what == "model" else "holds no settings"
    ):
        own.recalled(source)


def test_old_clips_go(made, monkeypatch):
    studio, *_ = made
    monkeypatch.setattr("samplers.studio.make.KEPT", 3)
    places = [studio.place() for _ in range(6)]
    for number, place in enumerate(places):
        if place.exists():
            os.utime(place, (number, number))
    last = studio.place()
    left = {one.name for one in studio.folder.iterdir()}
    assert len(left) == 4 and last.name in left


# ---- what is shown


def test_text_cannot_become_markup():
    told = views.text("<b onclick='x'> {{y}} ${z} `w` & \"v\"")
    assert not set("<>{}$`'\"") & set(told)
    assert "<script>" not in views.failed((32, 32), "<script>alert(1)</script>: no such file")


def test_the_player_in_its_states(made):
    own, clip, _ = made
    size = (16, 24)
    states = {"idle": views.idle(size), "waiting": views.waiting(size, 2), "failed": views.failed(size, "seed -1: no"),
              "stopped": views.stopped(size), "working": views.working(size, Progress(2, 4), 8, 4),
              "done": views.done(clip)}  # fmt: skip
    for name, shown in states.items():
        assert shown.count(f'data-state="{name}"') == 1 and "--wj-w:24;--wj-h:16" in shown  # one place for all of them
    frames = np.zeros((3, 2, 3, 3), np.uint8)
    shown = views.working(size, Progress(2, 4, "A", False, frames), 8, 4)
    assert "data:image/webp;base64," in shown and "A · step 2 of 4" in shown and "width:50%" in shown
    assert states["done"].count("<figure") == 2 and 'data-at="8"' in states["done"]
    assert f'src="clips/{clip.folder.name}/clip.mp4"' in states["done"] and 'max="8"' in states["done"]
    assert "clips are before yours" in states["waiting"] and "warming up" in views.waiting(size, 1, True)


def test_what_is_told_of_a_clip(made):
    _, clip, _ = made
    told = views.told(Made(clip.job, clip.folder, 1.25, 0))
    assert "nothing compiled" in told and "seed 3" in told and "1.2 s" in told
    assert "7 programs compiled" in views.told(Made(clip.job, clip.folder, 1.25, 7))


def test_shades_of_attention():
    found = heat.views({"plain": [[0.1, 0.4]], "biased": [[0.2, 0.2]]})
    assert np.allclose(found["change"], [[0.1, -0.2]])
    shades = heat.scaled(found)
    assert shades["before"][0, 1] == 1 and np.allclose(shades["after"], np.sqrt(0.5))
    assert shades["change"][0, 1] == 0 and shades["change"][0, 0] == pytest.approx(0.5 + np.sqrt(0.5) / 2)
    assert np.all(np.diff(heat.colours(np.linspace(0, 1, 9)).sum(-1, dtype=int)) > 0)
