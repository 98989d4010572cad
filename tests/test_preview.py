"""Pictures of a clip while it is denoised, against the map in float64 and against what the VAE decodes."""

import dataclasses
import json
import os
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from nano import NANO, write_model
from PIL import Image

from benchmarks.tiny import fit_preview
from samplers import pipeline, preview, sample, video
from samplers.plan import Plan, Settings
from wanjax import checkpoint, config, manifest, marks
from wanjax.latent_rgb import WAN_RGB, LatentRGB

PLAIN = LatentRGB(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), *((0.0, 0.0, 0.0),) * 13), (0.0, 0.5, -0.5))
OWN = dataclasses.replace(NANO, vae=dataclasses.replace(NANO.vae, latent_rgb=PLAIN))
WITHOUT = dataclasses.replace(NANO, vae=dataclasses.replace(NANO.vae, latent_std=(1.0,) * 16))
LATENTS = np.random.default_rng(0).normal(size=(2, 4, 6, 16)).astype(np.float32)


def carry_of(latents, done=True):
    made = sample.start(np.zeros_like(latents))
    return made.replace(data_1=latents) if done else made


def read(path, factor=1):
    with Image.open(path) as image:
        return np.asarray(image)[::factor, ::factor]


@pytest.mark.parametrize("a_config", [OWN, config.preset("flf2v_14b"), config.preset("i2v_14b")])
def test_pictures_are_the_map(a_config):
    rgb = a_config.vae.preview_rgb
    exact = LATENTS.astype(np.float64) @ np.array(rgb.factors) + rgb.bias
    wanted = np.clip((exact + 1) * 127.5, 0, 255)
    made = preview.picture(a_config, LATENTS)
    assert made.dtype == np.uint8 and made.shape == (2, 4, 6, 3)
    assert np.abs(made - wanted).max() <= 0.5 + 1e-3


def test_whose_colours_a_model_has():
    assert all(config.preset(name).vae.preview_rgb == WAN_RGB for name in config.PRESETS if name != "tiny")
    assert OWN.vae.preview_rgb == PLAIN
    assert WITHOUT.vae.preview_rgb is None
    assert preview.missing(OWN) is None
    assert preview.missing(WITHOUT).startswith("no previews: model nano has no colours for its latents; fit ")
    with pytest.raises(ValueError, match="no previews: model nano"):
        preview.picture(WITHOUT, LATENTS)


def test_the_map_is_kept_in_the_configuration():
    assert config.from_json(config.to_json(OWN)) == OWN
    with pytest.raises(ValueError, match="latent_rgb needs 16 rows of factors"):
        dataclasses.replace(NANO.vae, latent_rgb=LatentRGB(((0.0, 0.0, 0.0),), (0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match="latent_rgb needs three numbers"):
        LatentRGB(((0.0, 0.0),), (0.0, 0.0, 0.0))


def test_what_is_not_a_number_is_dark_and_what_is_too_much_is_full():
    rows = np.zeros((1, 1, 3, 16), np.float32)
    rows[0, 0, :, 0] = np.nan, 1e30, -1e30
    assert preview.picture(OWN, rows)[0, 0, :, 0].tolist() == [128, 255, 0]


def test_a_strip_has_every_frame_at_its_place():
    frames = np.random.default_rng(0).integers(0, 256, (9, 2, 3, 3), np.uint8)
    picture = preview.strip(frames, columns=4)
    assert picture.shape == (3 * 3 - 1, 4 * 4 - 1, 3)
    for n, frame in enumerate(frames):
        row, column = divmod(n, 4)
        assert np.array_equal(picture[3 * row : 3 * row + 2, 4 * column : 4 * column + 3], frame)
    assert (picture[6:, 4:] == 24).all()
    assert preview.strip(frames[:1]).shape == (2, 3, 3)


@pytest.mark.parametrize("suffix, frames", [(".png", 1), (".gif", 2)])
def test_previews_of_a_run(tmp_path, suffix, frames):
    """Each K steps and after the last; the file is ours and replaced, and nothing else is left."""
    plan = Plan.of(OWN, Settings.of(OWN, steps=5))
    path, times = tmp_path / f"clip.preview{suffix}", []
    on_step = preview.previews(plan, path, every=2)
    for done in range(6):
        before = path.stat().st_ino if path.exists() else None
        on_step(done, carry_of(LATENTS[None] + done / 10, done > 0))
        if path.exists() and path.stat().st_ino != before:
            times.append(done)
    assert times == [2, 4, 5]
    assert os.listdir(tmp_path) == [path.name] and marks.foreign(path) is None
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == frames
        assert image.size == ((24 * (6 + 1 + 6), 24 * 4) if suffix == ".png" else (24 * 6, 24 * 4))
        if suffix == ".png":
            shown = np.asarray(image)[::24, ::24]
            assert np.array_equal(shown, preview.strip(preview.picture(OWN, LATENTS + 0.5)))


def test_clips_of_a_batch_lie_below_each_other(tmp_path):
    plan = Plan.of(OWN, Settings.of(OWN))
    preview.previews(plan, tmp_path / "p.png")(1, carry_of(np.stack([LATENTS, -LATENTS, LATENTS])))
    shown = read(tmp_path / "p.png", 16)
    stacked = np.concatenate([preview.picture(OWN, one) for one in (LATENTS, -LATENTS, LATENTS)], 1)
    assert np.array_equal(shown, preview.strip(stacked))


def test_large_latents_are_not_enlarged(tmp_path):
    preview.write(tmp_path / "a.png", np.zeros((2, 60, 108, 3), np.uint8), 4)
    assert read(tmp_path / "a.png").shape == (60, 217, 3)


@pytest.mark.parametrize("change, told", [
    ({"path": "clip.mp4"}, "preview clip.mp4: give a name that ends in .png"),
    ({"path": "clip"}, "preview clip: give a name that ends in .png"),
    ({"every": 0}, "preview every 0 steps: give a whole number of at least 1"),
])  # fmt: skip
def test_what_cannot_be_a_preview(change, told):
    with pytest.raises(ValueError, match=told):
        preview.previews(Plan.of(OWN, Settings.of(OWN)), **{"path": "p.png"} | change)


def test_a_model_without_colours_has_no_previews():
    with pytest.raises(ValueError, match="no previews: model nano"):
        preview.previews(Plan.of(WITHOUT, Settings.of(WITHOUT)), "p.png")


def test_what_others_wrote_stays_and_the_run_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    Image.new("RGB", (4, 4)).save(path)
    kept = path.read_bytes()
    on_step = preview.previews(Plan.of(OWN, Settings.of(OWN)), path)
    with pytest.warns(preview.PreviewWarning, match=r"preview .*p.png.*wanjax did not write it.*no more are written"):
        on_step(1, carry_of(LATENTS[None]))
    fetched = []
    monkeypatch.setattr(preview.hosts, "fetch", lambda x: fetched.append(x) or np.asarray(x))
    with warnings.catch_warnings(action="error"):
        on_step(2, carry_of(LATENTS[None]))
    assert path.read_bytes() == kept
    assert len(fetched) == 1  # other hosts would wait for ever


def test_previews_beside_an_output_that_is_being_made(tmp_path):
    outputs = video.check_output(tmp_path / "clip.gif")
    show = preview.previews(Plan.of(OWN, Settings.of(OWN)), tmp_path / "clip.preview.png")
    with video.staged(outputs) as parts:
        for done in (1, 2):
            show(done, carry_of(LATENTS[None] / done))
        video.write(parts.video, np.zeros((2, 8, 8, 3), np.uint8), 8)
        video.write_png(parts.sheet, np.zeros((8, 8, 3), np.uint8))
        video.write_json(parts.settings, {})
    assert sorted(os.listdir(tmp_path)) == ["clip.gif", "clip.json", "clip.preview.png", "clip.sheet.png"]


def test_latents_that_lie_on_several_devices(tmp_path):
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    where = jax.NamedSharding(mesh, jax.P(None, None, "a", "b"))
    plan, whole = Plan.of(OWN, Settings.of(OWN)), carry_of(LATENTS[None])
    preview.previews(plan, tmp_path / "one.png")(1, whole)
    shared = whole.replace(data_1=jax.device_put(LATENTS[None], where))
    preview.previews(plan, tmp_path / "four.png")(1, shared)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "four.png").read_bytes()


def test_the_pipeline_calls_it(tmp_path):
    model = checkpoint.load(write_model(tmp_path / "nano", OWN))
    seen = []
    plan = Plan.of(model.config, Settings.of(model.config))
    show = preview.previews(plan, tmp_path / "p.png")
    result = pipeline.inbetween(
        model, np.zeros((16, 24, 3), np.uint8), np.full((16, 24, 3), 200, np.uint8), "a red circle",
        on_step=lambda done, carry: (show(done, carry), seen.append(carry.data_1)),
    )  # fmt: skip
    shown = read(tmp_path / "p.png")
    last = preview.strip(preview.picture(OWN, seen[-1][0]))
    factor = shown.shape[0] // last.shape[0]
    assert np.array_equal(shown[::factor, ::factor], last)
    assert len(seen) == OWN.sampling.steps + 1
    np.testing.assert_allclose(seen[-1], result.latents, atol=1e-5)  # the last step ends at sigma 0


def test_the_bundled_models_colours_are_those_of_clips_that_it_was_not_fitted_on():
    model = checkpoint.load("tiny")
    own = model.config.for_platform("cpu").vae
    assert own.latent_rgb is not None
    latents, colours = fit_preview.pairs(own, model.part("vae"), range(900, 908), 25)
    assert min(fit_preview.quality(own.preview_rgb, latents, colours)["r2"]) > 0.85
    shown = preview.picture(model.config, latents)
    truth = np.clip((colours + 1) * 127.5, 0, 255)
    assert np.abs(shown - truth).mean() < 0.25 * np.abs(truth - truth.mean((0, 1, 2, 3))).mean()


def test_a_fit_finds_the_map_that_made_the_colours():
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(3, 4, 5, 6, 16))
    colours = latents @ np.array(WAN_RGB.factors) + WAN_RGB.bias
    assert fit_preview.fit(latents, colours) == WAN_RGB
    noisy = colours + 0.1 * rng.normal(size=colours.shape)
    found = fit_preview.quality(WAN_RGB, latents, noisy)
    assert abs(found["rmse"] - 0.1) < 0.01
    assert abs(found["std"] - np.sqrt(noisy.reshape(-1, 3).var(0).mean())) < 1e-3
    assert np.allclose(found["r2"], 1 - 0.01 / noisy.reshape(-1, 3).var(0), atol=0.01)


def test_patches_are_means_of_what_a_latent_stands_for():
    clip = np.random.default_rng(0).integers(0, 256, (2, 9, 8, 12, 3), np.uint8)
    made = fit_preview.patches(clip, NANO.vae)
    assert made.shape == (2, 3, 2, 3, 3)
    unit = clip / 127.5 - 1
    np.testing.assert_allclose(made[1, 0, 1, 2], unit[1, 0, 4:, 8:].mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(made[1, 2, 0, 1], unit[1, 5:9, :4, 4:8].mean((0, 1, 2)), atol=1e-6)


def test_a_fit_is_kept_and_signed(tmp_path):
    folder = write_model(tmp_path / "nano")
    fit_preview.keep(folder, PLAIN)
    assert checkpoint.read_config(folder)[1] == OWN
    assert checkpoint.open_folder(folder).notes == ()
    assert set(manifest.read_manifest(folder).files) >= {"config.json"}
    assert Path(folder / "config.json").read_text().endswith("}\n")


def test_the_fits_command_line(tmp_path, capsys):
    folder = write_model(tmp_path / "nano", WITHOUT)
    told = ["--model", str(folder), "--clips", "2", "--checked", "1", "--frames", "9"]
    assert fit_preview.main([*told, "--out", str(tmp_path / "fit.json")]) == 0
    assert checkpoint.read_config(folder)[1] == WITHOUT  # only looked
    assert "1 other clips: R^2" in capsys.readouterr().out
    assert fit_preview.main([*told, "--write"]) == 0
    kept, report = checkpoint.read_config(folder)[1].vae.latent_rgb, json.loads((tmp_path / "fit.json").read_text())
    assert [list(row) for row in kept.factors] == report["latent_rgb"]["factors"]
    with pytest.raises(SystemExit) as caught:
        fit_preview.main(["--model", str(tmp_path / "gone")])
    assert caught.value.code == 2
