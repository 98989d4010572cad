"""--memory, --weights and --vae-memory of the command line: what is chosen, said, refused and done."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from nano import NANO, write_model
from PIL import Image

from samplers import command, files, memory, pipeline
from samplers.plan import Settings
from wanjax import checkpoint, sharding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (16, 24, 3)).astype(np.uint8)).save(root / f"{name}.png")
    return root / "a.png", root / "b.png"


def prepared(folder, pictures, out, **options):
    return files.prepare(*pictures, out, model=folder, prompt="a red circle", **options)


def peaks(**options):
    """Bytes that each way of running the nano model takes."""
    pairs = memory.preferred(NANO, **options)
    found = memory.ways(NANO, Settings.of(NANO), pairs, {}, None, None, "cpu", 1 << 40)
    return {(one.policy, one.weights): one.estimate.peak for one in found}


def test_what_is_plain_is_not_said(folder, pictures, tmp_path):
    job = prepared(folder, pictures, tmp_path / "a.mp4")
    assert (job.memory.policy, job.memory.weights, job.memory.tiles, job.weights) == ("keep", "bf16", 1, None)
    assert not [note for note in job.notes if note.startswith("memory")]


@pytest.mark.parametrize("policy", ["keep", "stage", "stream"])
@pytest.mark.parametrize("weights", ["auto", "int8", "fp8"])
def test_what_is_asked_for_is_taken_and_said(folder, pictures, tmp_path, policy, weights):
    job = prepared(folder, pictures, tmp_path / "a.mp4", memory=policy, weights=weights)
    own = {"auto": "bf16"}.get(weights, weights)
    assert (job.memory.policy, job.memory.weights) == (policy, own)
    assert job.config.dit.stream == ("loop" if policy == "stream" else "no")
    assert job.config.dit.precision.kernel == {"int8": "int8", "fp8": "float8_e4m3fn"}.get(weights)
    (note,) = [note for note in job.notes if note.startswith("memory")]
    assert note.startswith(f"memory {policy}: ") and (weights == "auto" or weights in note)


def test_less_memory_less_in_it(folder, pictures, tmp_path, monkeypatch):
    """Of the ways in the order of preference the first is taken that fits; where none does, nothing is begun."""
    found = peaks()
    order = sorted(set(found.values()), reverse=True)
    for peak in order:
        monkeypatch.setattr(memory, "available", lambda peak=peak: int(peak * memory.SPARE) + 1)
        job = prepared(folder, pictures, tmp_path / "a.mp4")
        wanted = next(way for way, one in found.items() if one <= peak)
        assert (job.memory.policy, job.memory.weights) == wanted
        if wanted != ("keep", "bf16"):
            assert any(note.startswith(f"memory {wanted[0]}") for note in job.notes)
    monkeypatch.setattr(memory, "available", lambda: int(order[-1] * memory.MARGIN) - 1)
    with pytest.raises(ValueError, match="there are 0.0"):
        prepared(folder, pictures, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--memory", "stream"], ["--memory", "stage", "--weights", "int8"]])
def test_command_line(folder, pictures, tmp_path, options, capsys):
    line = ["--first", str(pictures[0]), "--last", str(pictures[1]), "--model", str(folder), "--prompt", "a red circle",
            "--no-compile-cache", "--quiet", "--scale", "1"]  # fmt: skip
    assert command.main([*line, "--out", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert command.main([*line, *options, "--out", str(tmp_path / "other")]) == 0
    assert f"note: memory {options[1]}: " in capsys.readouterr().err
    report = json.loads((tmp_path / "other.json").read_text())
    assert report["memory"]["policy"] == options[1]
    assert report["memory"]["weights"] == ("int8" if "int8" in options else "bf16")
    assert set(report["memory"]["estimated_stages"]) == {"text", "images", "keyframes", "denoise", "decode"}
    frames = [[np.asarray(Image.open(file)) for file in sorted((tmp_path / name).glob("*.png"))]
              for name in ("plain", "other")]  # fmt: skip
    same = [np.array_equal(one, other) for one, other in zip(*frames, strict=True)]
    assert all(same) if "int8" not in options else not all(same)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "stream", "devices": 2}, "policy 'stream': is for one device"),
        ({"memory": "stream", "mesh": {"sequence": 2, "fsdp": 4}}, "policy 'stream': is for one device"),
        ({"memory": "swap"}, "memory 'swap': choose auto or one of keep, stage, stream"),
        ({"weights": "int4"}, "weights 'int4': choose auto or one of bf16, int8, fp8"),
        ({"vae_memory": 1}, "vae memory 0.0 GiB: size 16x24 takes at least"),
    ],
)
def test_refused_before_any_work(folder, pictures, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        prepared(folder, pictures, tmp_path / "a.mp4", **options)
    assert not list(tmp_path.iterdir())


def test_explain_needs_the_whole_transformer(folder, pictures, tmp_path):
    with pytest.raises(ValueError, match="--explain looks into the whole transformer.*--memory stage"):
        prepared(folder, pictures, tmp_path / "a.mp4", memory="stream", explain=tmp_path / "plots", method="paper")


def test_stored_in_8_bits(folder, pictures, tmp_path):
    """What is stored in 8 bits is run so, is not asked for in more, and not in others."""
    model = checkpoint.load(folder, weights="int8")
    params = {part: {} for part in model.params} | dict(model.params)
    stored = tmp_path / "int8"
    checkpoint.save(stored, model.config, params, folder / checkpoint.TOKENIZER)
    for policy in ("auto", "stream"):
        job = prepared(stored, pictures, tmp_path / "a.mp4", memory=policy)
        assert job.weights is None and job.config.dit.precision.kernel == "int8"
    for weights in ("bf16", "fp8"):
        with pytest.raises(ValueError, match="int8.*convert"):
            prepared(stored, pictures, tmp_path / "a.mp4", weights=weights)


@pytest.mark.parametrize("policy", ["keep", "stage", "stream"])
def test_models_know_their_policy(folder, policy, monkeypatch):
    """The public function refuses by what the model was loaded for."""
    model, asked = checkpoint.load(folder, policy=policy), []
    assert model.policy == policy
    monkeypatch.setattr(memory, "check", lambda config, settings, mesh, own: asked.append(own) or _stop())
    with pytest.raises(InterruptedError):
        pipeline.inbetween(model, *np.zeros((2, 16, 24, 3), np.uint8))
    assert asked == [policy]


def _stop():
    raise InterruptedError


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a limit on a process is set by POSIX")
def test_a_limit_on_the_process_is_seen(folder, pictures, tmp_path):
    """What does not fit in what the process may map is refused before any work, in one line."""
    line = [sys.executable, "-c", LIMITED, str(16 << 30), sys.executable, "-m", "samplers.inbetween",
            "--first", str(pictures[0]), "--last", str(pictures[1]), "--model", str(folder), "--size", "32768x32768",
            "--out", str(tmp_path / "a.mp4")]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "there are 1" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_8_bits_on_a_mesh(folder):
    import jax

    mesh = sharding.make_mesh({"sequence": 2}, jax.devices()[:2])
    model = checkpoint.load(folder, weights="int8", mesh=mesh, policy="stage")
    assert model.policy == "stage" and model.part("dit")["blocks"]["ffn_in"]["kernel"].dtype == np.int8
