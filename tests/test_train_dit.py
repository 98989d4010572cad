"""Training of the tiny transformer on a model smaller still: conditions, batches, learning, resume, the result."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from nano import NANO
from reference import relative_error

from benchmarks.tiny import build_tokenizer, evaluate, latents, torch_vae, train_dit
from benchmarks.tiny.clips import clip
from samplers import pipeline
from samplers.pipeline import Inputs
from samplers.plan import Plan, Settings
from wanjax import checkpoint, keyframes, vae
from wanjax.latent_rgb import LatentRGB
from wanjax.tokenizer import Tokenizer

CLIPS, SIZE, FRAMES = 8, 16, 9


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A random VAE of nano's sizes in the diffusers layout, as train_vae writes it."""
    torch.manual_seed(0)
    sizes = {"base_dim": NANO.vae.base_dim, "dim_mult": list(NANO.vae.dim_mult)}
    stats = {"latents_mean": [0.1 * i for i in range(16)], "latents_std": [1.0 + 0.1 * i for i in range(16)]}
    folder = tmp_path_factory.mktemp("vae")
    torch_vae.AutoencoderKLWan(**torch_vae.CONFIG | sizes | stats).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def setup(vae_folder, tmp_path_factory):
    """Config, VAE parameters, tokenizer and data of a few short, small clips."""
    patch = pytest.MonkeyPatch()
    patch.setattr(latents, "SHARD", CLIPS)
    patch.setattr(torch_vae, "_fused_norm_silu", lambda: torch_vae.norm_silu)

    patch.setattr(latents, "training_clip", lambda number, variety, frames: clip(number, "train", frames, SIZE))
    folder = tmp_path_factory.mktemp("run")
    build_tokenizer.main([str(folder / "tokenizer.json")])
    vae_config, vae_params = latents.load_vae(vae_folder, NANO.vae)
    dit = dataclasses.replace(NANO.dit, text_length=32)
    umt5 = dataclasses.replace(NANO.umt5, vocab_size=768)
    config = dataclasses.replace(NANO, vae=vae_config, dit=dit, umt5=umt5)
    encode = latents.encoder(vae_folder, vae_config, vae_params)
    data = latents.build(vae_folder, encode, folder / "latents9", CLIPS, "plain", FRAMES)
    yield config, vae_params, Tokenizer(folder / "tokenizer.json"), data, folder
    patch.undo()


def test_channels_weigh_what_they_change_in_the_video(setup, vae_folder):
    """Beside differences of what diffusers decodes."""
    config, vae_params, _, data, _ = setup
    z = data.latents[:2].astype(np.float32)
    weights = train_dit.channel_weights(config.vae, vae_params, z)
    assert (
        weights.shape == (16,) and weights.mean() == pytest.approx(1, rel=1e-6) and weights.max() > 1.5 * weights.min()
    )
    model = torch_vae.AutoencoderKLWan.from_pretrained(vae_folder).double()
    mean, std = np.array(config.vae.latent_mean), np.array(config.vae.latent_std)

    @torch.no_grad()
    def decode(normalised):
        return model.decode(torch.tensor(normalised * std + mean).permute(0, 4, 1, 2, 3)).sample.numpy()

    changes = []
    for channel in range(16):
        step = np.zeros(z.shape)
        step[..., channel] = 1e-3 * np.asarray(jax.random.normal(jax.random.key(channel), z.shape[:-1]))
        changes.append(np.square(decode(z + step) - decode(z - step)).mean())
    np.testing.assert_allclose(weights, changes / np.mean(changes), rtol=3e-4)


@pytest.mark.slow
def test_loss_of_weighted_channels(setup):
    """Channels alone, in their proportions, are the loss; ones are the loss without weights."""
    config, vae_params, tokenizer, data, _ = setup
    batch = train_dit.Batches(data, tokenizer, config, 4, seed=0).draw(0)
    batch = batch.replace(latents=batch.latents.astype(np.float32), condition=batch.condition.astype(np.float32))
    params = train_dit.new_state(config, 0).params
    loss = jax.jit(lambda weights: train_dit.loss_of(config, params, batch, jax.random.key(0), weights))
    alone = np.array([loss(row) for row in np.eye(16, dtype=np.float32)])
    weights = np.linspace(0.2, 1.8, 16, dtype=np.float32)
    np.testing.assert_allclose(loss(weights), weights @ alone, rtol=1e-5)
    plain = jax.jit(lambda: train_dit.loss_of(config, params, batch, jax.random.key(0)))()
    np.testing.assert_allclose(loss(np.ones(16, np.float32)), plain, rtol=1e-6)


def test_latents_are_those_of_the_jax_vae(setup):
    config, vae_params, _, data, _ = setup
    videos = np.stack([clip(seed, "train", FRAMES, SIZE).video for seed in range(CLIPS)])
    expected = jax.jit(lambda x: vae.encode(config.vae, vae_params, x))(keyframes.to_unit(videos))
    assert relative_error(data.latents.astype(np.float32), expected) < 1e-3  # kept in float16
    np.testing.assert_array_equal(data.images[:, 0, 1], videos[:, -1])


def test_latents_are_read_again_and_guarded(setup, vae_folder):
    *_, data, folder = setup
    again = latents.build(vae_folder, None, folder / "latents9", CLIPS, "plain", FRAMES)
    np.testing.assert_array_equal(again.condition, data.condition)
    for variety, frames in (("rich", FRAMES), ("plain", 13)):
        with pytest.raises(ValueError, match="another VAE, --variety or length"):
            latents.build(vae_folder, None, folder / "latents9", CLIPS, variety, frames)


def test_lengths_share_the_steps(setup, vae_folder):
    config, vae_params, tokenizer, data, folder = setup
    encode = latents.encoder(vae_folder, config.vae, vae_params)
    longer = latents.build(vae_folder, encode, folder / "latents17", CLIPS, "plain", 17)
    sets = [train_dit.Batches(one, tokenizer, config, 4, seed=0) for one in (data, longer, longer)]
    mixed, again = (train_dit.MixedLengths(sets, seed=0) for _ in range(2))
    frames = [mixed.draw(step).latents.shape[1] for step in range(200)]
    assert 80 < frames.count(3) < 120 and set(frames) == {3, 5}
    jax.tree.map(np.testing.assert_array_equal, mixed.draw(7), again.draw(7))
    assert {train_dit.MixedLengths(sets[:1], 0).draw(step).latents.shape[1] for step in range(5)} == {3}


def test_drawn_places():
    """All kinds of DRAWN come up, in their shares; places ascend within the clip, and a single one may lie anywhere."""
    rng = np.random.default_rng(0)
    drawn = [latents.drawn_places(rng, FRAMES) for _ in range(2000)]
    assert all(at == tuple(sorted(set(at))) and at[0] >= 0 and at[-1] < FRAMES for at in drawn)
    kinds = [(at[0] == 0, len(set(at) - {0, FRAMES - 1}), at[-1] == FRAMES - 1) for at in drawn]
    for share, kind in latents.DRAWN:
        assert abs(kinds.count(kind) / len(drawn) - share) < 0.03, kind
    assert sum(share for share, _ in latents.DRAWN) == pytest.approx(1)
    assert {at[0] for at in drawn if len(at) == 1} == set(range(FRAMES))


@pytest.mark.slow
def test_training_sees_what_sampling_sees(setup):
    """The conditions of both views of a clip equal those that the pipeline makes from keyframes and caption."""
    config, vae_params, tokenizer, data, _ = setup
    state = train_dit.new_state(config, 0)
    batch = next(one for one in map(train_dit.Batches(data, tokenizer, config, 16, seed=0).draw, range(9))
                 if {int(n) for n in one.given.any(2).sum(1)} >= {1, 2, 3})  # fmt: skip
    conditions = jax.jit(lambda p, b: train_dit.encode_conditions(config, p, b))(state.params, batch)
    model = checkpoint.Model(config, {**state.params, "vae": vae_params}, tokenizer)
    videos = np.stack([clip(seed, "train", FRAMES, SIZE).video for seed in range(CLIPS)])
    rows = [int(np.flatnonzero((data.latents == one).all((1, 2, 3, 4)))[0]) for one in batch.latents]
    for at in {tuple(np.flatnonzero(one.reshape(-1)[3:])) for one in batch.given}:
        same = [n for n in range(16) if tuple(np.flatnonzero(batch.given[n].reshape(-1)[3:])) == at]
        plan = Plan.of(config, Settings.of(config, frames=FRAMES, size=(SIZE, SIZE)), [int(place) for place in at])
        inputs = Inputs.prepare([[videos[rows[n]][place] for place in plan.at] for n in same], plan)
        texts = [data.captions[rows[n]] if batch.ids[n, 1] != 0 else "" for n in same]
        expected = pipeline.encode(model, plan, [inputs], [texts])[0].conditions
        for name in ("text", "images", "latent"):
            found = np.asarray(getattr(conditions, name))[same]
            assert relative_error(found, getattr(expected, name)) < 1e-3, (at, name)


@pytest.mark.slow
def test_an_image_that_is_not_there_leaves_no_trace(setup):
    config, _, tokenizer, data, _ = setup
    batch = train_dit.Batches(data, tokenizer, config, 64, seed=1).draw(0)
    absent = ~batch.seen
    assert 0 < absent.sum() < 40 and not absent.all(1).any()
    altered = batch.replace(images=np.where(absent[..., None, None, None], 255 - batch.images, batch.images))
    params = train_dit.new_state(config, 0).params
    run = jax.jit(lambda p, b: train_dit.encode_conditions(config, p, b))
    plain, other = run(params, batch), run(params, altered)
    np.testing.assert_array_equal(plain.images, other.images)
    assert not np.asarray(plain.images)[absent].any() and np.asarray(plain.images)[~absent].any()
    assert (batch.attention_mask.sum(1) == 1).any(), "some captions are dropped"


def test_batches_depend_on_seed_and_step_alone(setup):
    config, _, tokenizer, data, _ = setup
    one, two = (train_dit.Batches(data, tokenizer, config, 4, seed=5) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one.draw(7), two.draw(7))
    assert not np.array_equal(one.draw(7).latents, one.draw(8).latents)


@pytest.mark.slow
def test_steps_lower_the_loss(setup):
    config, _, tokenizer, data, _ = setup
    state = train_dit.new_state(config, 0)
    batches = train_dit.Batches(data, tokenizer, config, 8, seed=0)
    losses = []
    for step in range(60):
        state, loss = train_dit.update(
            config, state, batches.draw(step), np.float32(3e-3), np.uint32(0), np.ones(16, np.float32)
        )
        losses.append(float(loss))
    assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:5])
    assert int(state.step) == 60
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), train_dit.new_state(config, 0).params, state.params)
    assert all(jax.tree.leaves(moved)), "every parameter of all three models learns"


def test_rate():
    rates = [train_dit.rate_at(1000, share) for share in (0.0, 0.35, 0.675, 1.0)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 0.505e-3, 1e-5], rtol=1e-6)
    assert train_dit.rate_at(0, 0.0) == pytest.approx(1e-5)


@pytest.mark.slow
def test_train_resume_and_result(setup, vae_folder, monkeypatch, capsys):
    """The command, from latents to a model folder that loads; then a refusal to overwrite it."""
    config, _, _, _, folder = setup
    monkeypatch.setattr(train_dit, "preset", lambda name: config)
    measured = []

    def measure(model, clips, guidance, sheet):
        shapes = checkpoint.param_shapes(config)
        assert jax.tree.map(lambda leaf: leaf.shape, model.params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
        measured.append(sheet)
        return {"interior": 20.0}

    monkeypatch.setattr(evaluate, "measure", measure)
    arguments = ["--vae", str(vae_folder), "--out", str(folder), "--clips", str(CLIPS), "--batch", "8",
                 "--variety", "plain", "--lengths", "9", "13"]  # fmt: skip
    train_dit.main([*arguments, "--minutes", "0.001"])
    model = checkpoint.load(folder / "model")
    assert model.config.vae.latent_std == config.vae.latent_std
    first = (folder / "log.jsonl").read_text().splitlines()
    assert measured == [folder / "sheet.png"]

    with pytest.raises(SystemExit):
        train_dit.main(arguments)
    assert "exists already" in capsys.readouterr().err
    (folder / "model").rename(folder / "first")
    longer = str(json.loads(first[-1])["minutes"] + 0.001)  # than the first run took, on whatever machine
    with pytest.raises(SystemExit):
        train_dit.main([*arguments, "--minutes", longer])
    assert "holds checkpoints; add --resume" in capsys.readouterr().err
    train_dit.main([*arguments, "--minutes", longer, "--resume"])
    second = (folder / "log.jsonl").read_text().splitlines()
    assert len(second) > len(first)
    steps = [int(line.split('"step": ')[1].split(",")[0]) for line in second]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_going_on_from_a_model(setup, tmp_path, monkeypatch):
    """All four models come from the folder: a run of a few steps at the warm-up's rate stays next to them."""
    config, vae_params, _, _, folder = setup
    params = {**train_dit.new_state(config, 3).params, "vae": vae_params}
    checkpoint.save(tmp_path / "start", config, params, folder / "tokenizer.json")
    monkeypatch.setattr(evaluate, "measure", lambda *_, **__: {"interior": 20.0})
    out = tmp_path / "out"
    line = ["--from-model", str(tmp_path / "start"), "--out", str(out), "--clips", str(CLIPS), "--batch", "8",
            "--variety", "plain", "--lengths", "9"]  # fmt: skip
    train_dit.main([*line, "--minutes", "0.001"])
    model, start = checkpoint.load(out / "model"), checkpoint.load(tmp_path / "start")
    for part in train_dit.TRAINED:
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), model.params[part], start.params[part])
        assert 0 < max(jax.tree.leaves(moved)) < 0.05, part
    again, _ = latents.load_vae(out / "vae", config.vae)
    assert again == config.vae
    halves = jax.tree.map(lambda a, b: relative_error(a, b), model.params["vae"], start.params["vae"])
    assert max(jax.tree.leaves(halves)) < 5e-3  # stored in bfloat16


@pytest.mark.slow
def test_going_on_with_another_vae(setup, tmp_path, monkeypatch, capsys):
    """Its latents and weights are in the result, and the colours of the earlier one's previews are not."""
    config, vae_params, _, _, folder = setup
    fitted = LatentRGB(((0.1, 0.2, 0.3),) * 16, (0.0, 0.0, 0.0))
    before = dataclasses.replace(config, vae=dataclasses.replace(config.vae, latent_rgb=fitted))
    params = {**train_dit.new_state(config, 3).params, "vae": vae_params}
    checkpoint.save(tmp_path / "start", before, params, folder / "tokenizer.json")
    other = jax.tree.map(lambda leaf: leaf * 1.25, vae_params)
    latents.write_vae(tmp_path / "vae", dataclasses.replace(config.vae, latent_mean=(0.5,) * 16), other)
    monkeypatch.setattr(evaluate, "measure", lambda *_, **__: {"interior": 20.0})
    line = ["--vae", str(tmp_path / "vae"), "--out", str(tmp_path / "out"), "--clips", str(CLIPS), "--batch", "8",
            "--variety", "plain", "--lengths", "9", "--minutes", "0.001"]  # fmt: skip
    train_dit.main(["--from-model", str(tmp_path / "start"), *line])
    model = checkpoint.load(tmp_path / "out" / "model")
    assert model.config.vae.latent_mean == (0.5,) * 16 and model.config.vae.latent_rgb is None
    far = jax.tree.map(relative_error, model.params["vae"], other)
    assert max(jax.tree.leaves(far)) < 5e-3
    assert not model.config.dit.remat
    with pytest.raises(SystemExit):
        train_dit.main(["--out", str(tmp_path / "none")])
    assert "--vae: give a vae folder" in capsys.readouterr().err


@pytest.mark.parametrize("lengths", [["24"], ["25", "25"], ["1"]])
def test_bad_lengths(tmp_path, lengths, capsys):
    with pytest.raises(SystemExit):
        train_dit.main(["--from-model", "tiny", "--out", str(tmp_path / "out"), "--lengths", *lengths])
    assert "--lengths: give different lengths of 4n+1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line, told", [
    (["--vae", "no"], "config.json: no such file; run benchmarks.tiny.train_vae first"),
    (["--from-model", "no"], "model 'no': no such folder"),
    (["--from-model", "tiny", "--decoder", "no"], "config.json: no such file; run benchmarks.tiny.train_vae first"),
])  # fmt: skip
def test_what_is_missing_is_told_in_a_line(tmp_path, line, told, capsys):
    with pytest.raises(SystemExit) as ended:
        train_dit.main([*line, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_better_decoder_must_share_the_encoder(setup):
    _, params, *_ = setup
    better = jax.tree.map(np.copy, params)
    better["post_quant"]["bias"] = better["post_quant"]["bias"] + 1
    joined = train_dit.with_decoder(params, better)
    assert np.array_equal(joined["post_quant"]["bias"], params["post_quant"]["bias"] + 1)
    assert joined["encoder"] is params["encoder"]
    better["quant"]["bias"] = better["quant"]["bias"] + 1
    with pytest.raises(ValueError, match="--decoder-only"):
        train_dit.with_decoder(params, better)
