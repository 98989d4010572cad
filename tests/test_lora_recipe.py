"""The recipe of a 14B LoRA, at the sizes of NANO: by the command line, resumed, and on a mesh of eight."""

import dataclasses

import imageio.v3 as iio
import jax
import numpy as np
import pytest
from nano import NANO, write_model
from reference import relative_error

from benchmarks import lora_14b, lora_clips, random_model
from benchmarks.tgi.videos import videos
from convert import loratree
from samplers import pipeline
from samplers.pipeline import Inputs
from samplers.plan import Plan, Settings
from wanjax import checkpoint, keyframes, lora, sharding, vae

LINE = ("--dtype", "float32", "--rank", "2", "--rate", "1e-2", "--every", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and three clips that fit it."""
    folder = tmp_path_factory.mktemp("recipe")
    write_model(folder / "model")
    (folder / "clips").mkdir()
    for seed in range(3):
        latents, conditions, text = random_model.inputs(NANO.dit, (2, 4, 4), 1, seed)
        np.savez(folder / "clips" / f"{seed}.npz", latents=latents[0], text=conditions.text[0],
                 images=conditions.images[0], condition=conditions.latent[0])  # fmt: skip
    np.savez(folder / "clips" / "empty.npz", text=text[0])
    return folder


def command(folders, out, *more):
    line = ["--model", str(folders / "model"), "--clips", str(folders / "clips"), "--out", str(out), *LINE, *more]
    return lora_14b.main(line)


def losses(text):
    return [float(line.split("loss ")[1].split()[0]) for line in text.splitlines() if line.startswith("step ")]


@pytest.mark.slow
def test_a_resumed_run_is_the_run_in_one_piece(folders, tmp_path, capsys, monkeypatch):
    assert command(folders, tmp_path / "whole", "--steps", "4") == 0
    whole = losses(capsys.readouterr().out)
    assert len(whole) == 4 and np.isfinite(whole).all()

    real = lora_14b.update
    calls = iter(range(3))
    monkeypatch.setattr(
        lora_14b, "update", lambda *a: real(*a) if next(calls) < 2 else (_ for _ in ()).throw(OSError("gone"))
    )
    assert command(folders, tmp_path / "cut", "--steps", "4") == 1
    monkeypatch.setattr(lora_14b, "update", real)
    first = losses(capsys.readouterr().out)
    with pytest.raises(SystemExit) as stop:
        command(folders, tmp_path / "cut", "--steps", "4")
    assert stop.value.code == 2 and "add --resume" in capsys.readouterr().err
    assert command(folders, tmp_path / "cut", "--steps", "4", "--resume") == 0
    assert first + losses(capsys.readouterr().out) == whole

    made, again = (loratree.read(tmp_path / name / "lora.safetensors", NANO.dit) for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, made, again)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(made.weights)), "ups have left zero"
    with pytest.raises(SystemExit):
        command(folders, tmp_path / "cut", "--steps", "6", "--resume", "--rank", "3")
    assert "another --rank" in capsys.readouterr().err


@pytest.mark.slow
def test_on_a_mesh_with_random_weights(tmp_path, capsys, monkeypatch):
    """bfloat16, as the 14B is trained; the loss falls on one clip, and eight devices make the one device's adapters."""
    monkeypatch.setattr(lora_14b, "preset", lambda name: NANO)
    line = ["--preset", "flf2v_14b", "--size", "16x32", "--frames", "5", "--steps", "3", "--rank", "2"]
    assert lora_14b.main([*line, "--out", str(tmp_path / "a")]) == 0
    one = losses(capsys.readouterr().out)
    assert lora_14b.main([*line, "--out", str(tmp_path / "b"), "--mesh", "fsdp=4,sequence=2"]) == 0
    eight = losses(capsys.readouterr().out)
    np.testing.assert_allclose(eight, one, rtol=0.02)
    found = [loratree.read(tmp_path / name / "lora.safetensors", NANO.dit) for name in "ab"]
    downs = [one.weights["blocks"]["ffn_in"][lora.DOWN] for one in found]
    assert relative_error(downs[1], downs[0]) < 0.02


def test_states_lie_whole_on_every_device():
    mesh = sharding.make_mesh({"sequence": 2, "fsdp": 4})
    state = lora_14b.new_state(lora_14b.Recipe(rank=2), checkpoint.param_shapes(NANO)["dit"], 0)
    placed = lora_14b.place(mesh, state)
    assert all(
        leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(placed)
    )


def test_the_learning_rate_and_the_configuration():
    config = lora_14b.training_config(
        dataclasses.replace(NANO, dit=dataclasses.replace(NANO.dit)), "tpu", "TPU v6 lite"
    )
    assert config.remat and config.attention == "xla" and config.precision.product == "compute"


@pytest.mark.parametrize("more, message", [
    (("--mesh", "nowhere=8"), "mesh axis nowhere"), (("--mesh", "8"), "give AXIS=N"),
    (("--clips", "missing"), "needs empty.npz"), (("--targets", "nothing"), "match none of"),
])  # fmt: skip
def test_bad_arguments(folders, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        command(folders, tmp_path / "out", *more)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_clips_must_be_of_one_size(folders, tmp_path):
    for file in (folders / "clips").glob("*.npz"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    clips = lora_14b.Clips(tmp_path, 2, 0)
    jax.tree.map(np.testing.assert_array_equal, clips.draw(3), clips.draw(3))
    latents, conditions, _ = random_model.inputs(NANO.dit, (3, 4, 4), 1, 9)
    for seed in range(2):
        np.savez(tmp_path / f"{seed}.npz", latents=latents[0], text=conditions.text[0])
    with pytest.raises(ValueError, match="clips of several sizes"):
        for step in range(8):
            clips.draw(step)
    for file in tmp_path.glob("[0-9].npz"):
        np.savez(file, text=conditions.text[0])
    with pytest.raises(ValueError, match="npz: has no latents"):
        clips.draw(0)


@pytest.mark.slow
def test_videos_become_the_clips(folders, tmp_path, capsys):
    """As the sampler encodes their keyframes and caption; what is there is left alone, and a training step takes it."""
    rng = np.random.default_rng(0)
    (tmp_path / "videos").mkdir()
    frames = {name: rng.integers(0, 256, (5, 16, 24, 3)).astype(np.uint8) for name in ("a", "b")}
    for name, video in frames.items():
        iio.imwrite(tmp_path / "videos" / f"{name}.gif", video, loop=0)
    (tmp_path / "captions.json").write_text('{"a.gif": "red circle"}')
    line = ["--model", str(folders / "model"), "--videos", str(tmp_path / "videos"), "--dtype", "float32",
            "--captions", str(tmp_path / "captions.json"), "--out", str(tmp_path / "clips")]  # fmt: skip
    assert lora_clips.main(line) == 0
    assert "2 of 2 clips" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "clips").iterdir()} == {"a.npz", "b.npz", "empty.npz"}

    model = checkpoint.load(folders / "model")
    stored = videos(tmp_path / "videos", 5).items[0].read()
    plan = Plan.of(model.config, Settings.of(model.config, frames=5, size=(16, 24)))
    told = pipeline.encode(model, plan, [Inputs.prepare([[stored[0], stored[-1]]], plan)], [["red circle"]])[0]
    with np.load(tmp_path / "clips" / "a.npz") as held:
        latents = vae.encode(model.config.vae, model.params["vae"], keyframes.to_unit(stored[None]))[0]
        np.testing.assert_allclose(held["latents"], latents, rtol=1e-3, atol=1e-4)
        for name, expected in (("text", told.conditions.text), ("images", told.conditions.images),
                               ("condition", told.conditions.latent)):  # fmt: skip
            np.testing.assert_allclose(held[name], expected[0], rtol=1e-4, atol=1e-5, err_msg=name)
    assert lora_clips.main(line) == 0
    assert "clips" not in capsys.readouterr().out, "nothing is left to do"
    batch = lora_14b.Clips(tmp_path / "clips", 2, 0).draw(0)
    assert batch.latents.shape == (2, 2, 4, 6, 16) and batch.conditions.latent.shape[-1] == 20
    with pytest.raises(SystemExit) as stop:
        lora_clips.main([*line, "--frames", "9"])
    assert stop.value.code == 2 and "5 frames, 9 are needed" in capsys.readouterr().err
