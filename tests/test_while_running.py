"""What the command line does while a clip is made: previews, a method chosen by trying, parts that cannot be loaded."""

import dataclasses
import json

import pytest
from nano import NANO, write_model, write_place
from PIL import Image
from test_resume import kept, line, stop_at

from samplers import auto, command, preview, run, work
from wanjax import marks


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


def interrupt(*_, **__):
    raise KeyboardInterrupt


def names(folder):
    return sorted(path.name for path in folder.iterdir())


WHOLE = ["clip.json", "clip.mp4", "clip.sheet.png"]


def test_a_preview_is_there_while_it_runs_and_gone_at_the_end(place, tmp_path, monkeypatch):
    shown, written = tmp_path / "clip.preview.png", []
    write, decode = preview.write, work.decode
    monkeypatch.setattr(preview, "write", lambda *a: (written.append(1), write(*a))[1])

    def looked(*arguments):
        assert shown.is_file() and marks.foreign(shown) is None
        return decode(*arguments)

    monkeypatch.setattr(work, "decode", looked)
    assert command.main([*line(place, tmp_path / "clip.mp4"), "--preview-every", "3"]) == 0
    assert len(written) == 2 and names(tmp_path) == WHOLE  # after step 3 and the last


def test_a_preview_stays_after_an_interrupt_and_goes_when_the_clip_is_done(place, tmp_path, monkeypatch):
    own = [*line(place, tmp_path / "clip.mp4"), "--preview-every", "1"]
    with monkeypatch.context() as patched:
        stop_at(patched, "step 3", interrupt)
        assert command.main(own) == 130
    assert names(tmp_path) == ["clip.preview.png", "clip.run"]
    assert command.main(own) == 0
    assert names(tmp_path) == WHOLE


def test_what_stands_in_a_previews_place_is_left_alone(place, tmp_path, capsys, monkeypatch):
    own, shown = [*line(place, tmp_path / "clip.mp4"), "--preview-every", "1"], tmp_path / "clip.preview.png"
    Image.new("RGB", (4, 4)).save(shown)
    before = shown.read_bytes()
    assert command.main(own) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert "clip.preview.png: wanjax did not write it; move it away" in message
    shown.unlink()
    encode = work.encode

    def meanwhile(*arguments):
        shown.write_bytes(before)
        return encode(*arguments)

    monkeypatch.setattr(work, "encode", meanwhile)
    assert command.main(own) == 0
    assert shown.read_bytes() == before and names(tmp_path) == sorted([*WHOLE, shown.name])
    (message,) = [said for said in capsys.readouterr().err.splitlines() if "no more are written" in said]
    assert message.startswith("note: preview ") and "Warning" not in message


def test_a_model_without_colours_says_so(place, tmp_path, capsys):
    without = dataclasses.replace(NANO, vae=dataclasses.replace(NANO.vae, latent_std=(1.0,) * 16))
    write_model(tmp_path / "plain", without)
    (tmp_path / "out").mkdir()
    own = [*line(place, tmp_path / "out" / "clip.mp4"), "--model", str(tmp_path / "plain"), "--preview-every", "1"]
    assert command.main(own) == 0
    assert "note: no previews: model nano has no colours for its latents" in capsys.readouterr().err
    assert names(tmp_path / "out") == WHOLE


def test_a_method_that_is_chosen_by_trying(place, tmp_path, monkeypatch, capsys):
    """The report names it and says why; a run that goes on takes the same, and does not try again."""
    own, out = [*line(place, tmp_path / "clip.mp4"), "--method", "auto"], tmp_path / "clip.mp4"
    tried, choose = [], auto.choose
    monkeypatch.setattr(auto, "choose", lambda *a, **o: (tried.append(1), choose(*a, **o))[1])
    assert command.main([*own, "--out", str(tmp_path / "whole.mp4")]) == 0
    told = json.loads((tmp_path / "whole.json").read_text())
    (why,) = [note for note in told["notes"] if note.startswith("method auto: ")]
    name = next(
        name for name in sorted(auto.CANDIDATES, key=len, reverse=True) if why.startswith(f"method auto: {name}, ")
    )
    assert told["settings"]["method"] == json.loads(json.dumps(dataclasses.asdict(auto.CANDIDATES[name])))
    assert told["seconds"]["choose"] > 0
    with monkeypatch.context() as patched:
        stop_at(patched, "encoded", interrupt)
        assert command.main(own) == 130
    assert kept(out) == ["chosen", "encoded"] and len(tried) == 2
    assert command.main(own) == 0
    assert len(tried) == 2 and out.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    again = json.loads(out.with_suffix(".json").read_text())
    assert again["settings"] == told["settings"]
    assert f"method auto: {name}, as it was chosen before the run was stopped" in again["notes"]
    capsys.readouterr()
    assert command.main([*own, "--kab", "--out", str(tmp_path / "x.mp4")]) == 2
    assert "--method auto: chooses all settings of the method" in capsys.readouterr().err
    assert command.main(["--from", str(tmp_path / "whole.json"), "--quiet", "--out", str(tmp_path / "from.mp4")]) == 0
    assert (tmp_path / "from.mp4").read_bytes() == out.read_bytes() and len(tried) == 2


def test_a_part_that_cannot_be_loaded_loses_nothing(place, tmp_path, monkeypatch, capsys):
    """The VAE's decoder is damaged while the transformer works; mended, the same command only decodes."""
    model, out = write_model(tmp_path / "model"), tmp_path / "clip.mp4"
    own = [*line(place, out), "--model", str(model), "--memory", "stage"]
    file = model / "vae.safetensors"
    good = file.read_bytes()
    denoise = work.denoise

    def damaging(*arguments):
        denoise(*arguments)
        bad = bytearray(good)
        bad[-20:] = bytes(20)
        file.write_bytes(bad)

    with monkeypatch.context() as patched:
        patched.setattr(work, "denoise", damaging)
        assert command.main(own) == 1
    (message,) = [said for said in capsys.readouterr().err.splitlines() if "error" in said]
    assert "vae" in message
    assert kept(out) == ["carry", "encoded"] and not out.exists()
    assert command.main(own) == 1  # still damaged
    assert kept(out) == ["carry", "encoded"]
    file.write_bytes(good)
    begun, original = [], run.run
    monkeypatch.setattr(run, "run", lambda *a, **o: (begun.append(o["first"]), original(*a, **o))[1])
    assert command.main(own) == 0
    assert begun == [] and not out.with_suffix(".run").exists()
    assert command.main([*line(place, tmp_path / "whole.mp4"), "--model", str(model)]) == 0
    assert out.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
