"""What a clip was made of goes into every kind of file and comes back exactly; what cannot is told in one line."""

import dataclasses
import json
import re

import nano
import numpy as np
import pytest
from PIL import Image
from test_video import moving_disc

from samplers import pipeline, recall, video
from samplers.plan import Settings
from samplers.recall import Keyframe
from wanjax import checkpoint, marks
from wanjax.kab import KAB
from wanjax.method import METHODS, Isolation, Method
from wanjax.retro import ReTRo

CLIP = moving_disc(3, 16, 16)
KINDS = (".mp4", ".webm", ".gif", ".webp", "", ".png")
ODD = 'a "red" circle; a = #1 \\ back\n\tnew line\0 – ünïcödé 红色的圆 🔴👩‍🚀 {"json": [1, 2]} <xml/> \udcff'
CASES = {
    "defaults": Settings(),
    "odd text": Settings(prompt=ODD, negative_prompt="镜头切换, " + ODD),
    "long": Settings(prompt="🔴 very long, " * 2000, negative_prompt="x" * 20_000),
    "numbers": Settings(frames=33, size=(480, 832), steps=7, guidance=1.1, shift=1 / 3, seed=2**32 - 1, fit="pad",
                        matte=(1, 2, 255), guidance_interval=(0.1, 0.7), timesteps="truncated", resample="lanczos",
                        clip_fit="crop", solver="euler", schedule="linear", guidance_mode="batched"),
    **{name: Settings(method=name) for name in METHODS},
    "own": Settings(method=Method(
        Isolation((1.0, 0.25, 1 / 3)), KAB(0.1, 0.9, 1e-3, (0, 1), (0.2, 0.9), (0.0, 0.1, 1 / 3, 1.0)),
        ReTRo("position", 1.2, 0.8, 3.5, 1))),
    "curve by name": Settings(method=Method(kab=KAB(curve="ease-in-out"))),
}  # fmt: skip


def text_of(settings, **more):
    given = {"model": "nano", "fps": 12.5, "scale": 2, "keyframes": CLIP[[0, -1]], "at": (0, 2)} | more
    return recall.to_text(settings, **given)


def written(folder, suffix, text):
    path = folder / f"clip{suffix}"
    if suffix == ".png":
        video.write_png(path, CLIP[0], text)
    else:
        video.write(path, CLIP, 12, 2, text)
    return path


def report(path, settings, **more):
    """A run's JSON, as the sampler writes it beside a clip."""
    value = {
        "keyframes": ["/films/a.png", "b.png"],
        "video": "clip.mp4",
        "model": {"name": "nano", "source": "/models/nano", "precision": {}},
        "settings": settings | {"fps": 12, "scale": 8, "mesh": {"data": 2}},
        "versions": {"wanjax": "0.1.0"},
    } | more
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_settings_come_back_exactly_from_every_kind_of_file(tmp_path, suffix, case):
    settings = CASES[case]
    path = written(tmp_path, suffix, text_of(settings))
    found = recall.read(path)
    assert found.settings == settings
    assert (found.model, found.source, found.fps, found.scale) == ("nano", None, 12.5, 2)
    assert found.keyframes == (Keyframe(0, recall.digest(CLIP[0])), Keyframe(2, recall.digest(CLIP[2])))
    assert found.written_by == marks.mark()
    assert marks.foreign(path) is None
    video.write_png(path, CLIP[0]) if suffix == ".png" else video.write(path, CLIP, 12)  # may be replaced
    with pytest.raises(ValueError, match="holds no settings; give a clip or contact sheet that wanjax wrote"):
        recall.read(path)
    assert marks.foreign(path) is None


@pytest.mark.parametrize("suffix", KINDS)
def test_pictures_are_those_without_the_text(tmp_path, suffix):
    plain, told = (written(tmp_path, suffix, text) for text in (None, text_of(CASES["long"])))  # replaces the first
    assert plain == told
    frame = told / "00000.png" if told.is_dir() else told
    if suffix in ("", ".png"):
        assert np.array_equal(np.asarray(Image.open(frame)), video.enlarge(CLIP[0], 2 if suffix == "" else 1))


def test_numbers_of_numpy_and_a_model_that_was_given_by_a_path():
    settings = Settings(steps=np.int64(3), size=np.array([16, 24]), shift=np.float32(0.5))
    found = recall.from_text(text_of(settings, model="/films/models/wan-flf2v/"), "here")
    assert found.settings == Settings(steps=3, size=(16, 24), shift=0.5)
    assert found.model == "wan-flf2v"


def test_nothing_of_the_machine_is_told():
    text = text_of(Settings(), model="C:\\Users\\me\\model")
    assert text.isascii() and "\n" not in text
    value = json.loads(text)
    assert set(value) == {"written_by", "model", "settings", "keyframes"}
    assert set(value["settings"]) == {field.name for field in dataclasses.fields(Settings)} | {"fps", "scale"}
    assert value["model"] == {"name": "model"}
    assert "/" not in text and "Users" not in text


def test_digests_tell_pixels_and_size_apart():
    grey = np.full((4, 6, 3), 9, np.uint8)
    assert recall.digest(grey) == recall.digest(grey.copy(order="F")) != recall.digest(grey + 1)
    assert recall.digest(grey) != recall.digest(grey.reshape(6, 4, 3))


def test_other_keyframes_are_noticed(tmp_path):
    clip = recall.from_text(text_of(Settings()), "clip")
    assert recall.about_keyframes(clip, "clip.mp4", CLIP[[0, -1]], (0, 2)) == []
    (line,) = recall.about_keyframes(clip, "clip.mp4", CLIP[[0, 1]], (0, 2))
    assert line.startswith("keyframe at 2 is not the picture that clip.mp4 was made of")
    assert recall.about_keyframes(clip, "clip.mp4", CLIP[:1], (0,)) == [
        "keyframes at 0, where clip.mp4 had them at 0, 2"
    ]
    told_nothing = recall.read(report(tmp_path / "clip.json", {}))
    assert recall.about_keyframes(told_nothing, "clip.json", CLIP[[0, 1]], (0, 2)) == []


@pytest.mark.parametrize("case", [case for case in CASES if case != "odd text"])
def test_a_run_is_read_from_its_report(tmp_path, case):
    found = recall.read(report(tmp_path / "clip.json", dataclasses.asdict(CASES[case])))
    assert found.settings == CASES[case]
    assert (found.model, found.source, found.fps, found.scale) == ("nano", "/models/nano", 12, 8)
    assert found.keyframes == (Keyframe(path="/films/a.png"), Keyframe(path="b.png"))
    assert found.written_by == "wanjax 0.1.0"


def test_reports_of_earlier_versions(tmp_path):
    fields = dataclasses.asdict(Settings(schedule="linear", method=Method(Isolation(), KAB(0.4, 0.2, 1e-3), ReTRo())))
    for new in ("guidance_interval", "timesteps", "resample", "clip_fit"):
        del fields[new]
    fields["grid"] = fields.pop("schedule")
    kab = fields["method"]["kab"]
    for old, new in (("beta_end", "strength_end"), ("beta_mid", "strength_mid"), ("eps", "floor")):
        kab[old] = kab.pop(new)
    found = recall.read(report(tmp_path / "clip.json", fields, versions={}))
    assert found.settings == Settings(schedule="linear", method=Method(Isolation(), KAB(0.4, 0.2, 1e-3), ReTRo()))
    assert found.written_by == "an unknown version"
    del fields["method"]  # from before there were any
    assert recall.read(report(tmp_path / "clip.json", fields)).settings.method == Method()


def test_a_method_may_be_named_in_a_report(tmp_path):
    assert recall.read(report(tmp_path / "a.json", {"method": "release"})).settings.method == METHODS["release"]


def test_a_setting_that_is_added_later_needs_nothing_here(monkeypatch):
    more = [("later_share", float | str | None, None), ("rows", tuple[int, ...], ())]
    Later = dataclasses.make_dataclass("Later", more, bases=(Settings,), frozen=True)
    monkeypatch.setattr(recall, "Settings", Later)
    for skip in (None, 0.3, "auto"):
        settings = Later(prompt="a", later_share=skip, rows=(1, 2))
        assert recall.from_text(text_of(settings), "here").settings == settings
    assert recall.from_text(text_of(Settings(prompt="a")), "here").settings == Later(prompt="a")


@pytest.mark.parametrize("change, told", [
    ({"new": 1}, "setting new is unknown to wanjax.*, the file is by wanjax 9.9; update wanjax"),
    ({"method": {"kab": {"newer": 1}}}, "setting newer is unknown"),
    ({"steps": "10"}, 'settings: wrong value type for field "steps"'),
    ({"size": [1]}, 'settings: wrong value type for field "size"'),
    ({"size": 5}, "settings: wrong value type for field .size.*; mend the JSON"),
    ({"method": {"kab": {"strength_end": -1}}}, "settings: strength_end -1.0: give a number from 0 to 1000"),
    ({"method": "nonsense"}, "settings: unknown method 'nonsense': choose one of wan"),
    ({"method": None}, 'settings: wrong value type for field "method"'),
    ({"fps": "fast"}, "fps 'fast' is none"),
    ({"scale": True}, "scale True is none"),
])  # fmt: skip
def test_settings_that_this_version_cannot_have(tmp_path, change, told):
    path = report(tmp_path / "clip.json", {}, written_by="wanjax 9.9")
    value = json.loads(path.read_text())
    value["settings"] |= change
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {told}") as caught:
        recall.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, told", [
    (b"", "holds no settings"),
    (b"[1, 2]", "holds no settings"),
    (b"{}", "holds no settings"),
    (b'{"settings": 3}', "holds no settings"),
    (b'{"settings": {}, "model": {"name": "x"}, "written_by": "somebody"}', "was written by 'somebody'"),
    (b'{"settings": {}, "written_by": "wanjax 1"}', "model None is none"),
    (b'{"settings": {', "its settings are damaged"),
    (b"{" + b'"a":{' * 200_000, "its settings are damaged"),
    (b"\xff\xfe\xff", "cannot be read as json"),
])  # fmt: skip
def test_json_that_is_no_report(tmp_path, content, told):
    path = tmp_path / "clip.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {told}.*give a clip or contact sheet") as caught:
        recall.read(path)
    assert "\n" not in str(caught.value)


def test_files_without_settings(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.gif", comment=b"made by hand")
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.webp")
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip.mov").write_bytes(b"x")
    for name, told in [
        ("foreign.png", "holds no settings; give a clip"),
        ("foreign.gif", "holds no settings; give a clip"),
        ("foreign.webp", "holds no settings; give a clip"),
        ("empty", "a folder without PNG frames; give a clip"),
        ("clip.mov", "settings are not read from .mov; give .mp4"),
        ("gone.mp4", "no such file; give a clip"),
    ]:
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: {told}")):
            recall.read(tmp_path / name)


@pytest.mark.parametrize("suffix", [kind for kind in KINDS if kind])
def test_damaged_files_say_so_in_one_line(tmp_path, suffix):
    whole = written(tmp_path, suffix, text_of(CASES["odd text"])).read_bytes()
    rng, path = np.random.default_rng(0), tmp_path / f"damaged{suffix}"
    for case in range(40):
        data = bytearray(whole)
        if case < 10:
            data = data[: case * len(data) // 10]
        else:
            for place in rng.integers(0, len(data), 1 if case < 25 else 40):
                data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert isinstance(recall.read(path), recall.Recalled)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "give a clip" in str(error) and "\n" not in str(error)


def test_a_clip_is_made_again_from_itself(tmp_path):
    model = checkpoint.load(nano.write_model(tmp_path / "nano"))
    first, last = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    settings = Settings.of(nano.NANO, prompt="a red circle", seed=7, method="release", steps=2, shift=1 / 3)
    made = pipeline.inbetween(model, first, last, settings=settings).video[0]
    told = recall.to_text(settings, model="nano", fps=8, scale=1, keyframes=[first, last], at=(0, 4))
    video.write(tmp_path / "clip.webm", made, 8, 1, told)
    found = recall.read(tmp_path / "clip.webm")
    assert np.array_equal(pipeline.inbetween(model, first, last, settings=found.settings).video[0], made)
