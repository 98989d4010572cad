"""Arms of the TGI benchmark on a random model: paired noise, one program for all variants, what each kind changes."""

import dataclasses

import jax
import numpy as np
import pytest
from nano import NANO, write_model
from tgi_nano import CONFIG, FRAMES, NANO_METHOD

from benchmarks.tgi import generate, run
from benchmarks.tgi.arms import ARMS, CLAIMS, KNOWN, THREE, Arm, Chain, choose, read_own, shuffled_curve
from benchmarks.tgi.generate import Batch, Clips
from benchmarks.tgi.procedural import procedural
from samplers import pipeline
from samplers import plan as sampling
from samplers.pipeline import Inputs
from samplers.plan import Settings
from wanjax import checkpoint
from wanjax.kab import KAB
from wanjax.method import METHODS, Isolation, Method
from wanjax.retro import ReTRo, scale_vector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano", CONFIG)


@pytest.fixture(scope="module")
def model(folder):
    return checkpoint.load(folder)


VARIANTS = ("wan", "paper", "release", "kab", "retro", "kab-joint", "isolation", "retro-uniform", "retro-position",
            "shuffled-anchors", "mask-only")  # fmt: skip


@pytest.fixture(scope="module")
def batch(model):
    clips = run.clips_of(procedural("dev", FRAMES, 2).items, (16, 24))
    return Batch(model, model, Settings.of(NANO, frames=FRAMES, steps=3), clips)


def turned_round(clips):
    """The same clips in the other order."""
    return Clips(*(getattr(clips, field.name)[::-1] for field in dataclasses.fields(clips)))


@pytest.mark.slow
def test_wan_is_the_pipeline(model, batch):
    """The arm without a method makes what the product makes from the same noise and the keyframes as they are."""
    pairs = [(item.read()[0], item.read()[-1]) for item in procedural("dev", FRAMES, 2).items]
    a_plan = sampling.Plan.of(model.config, batch.settings)
    (encoded,) = pipeline.encode(model, a_plan, [Inputs.prepare(pairs, a_plan)], [batch.clips.captions])
    latents = pipeline.denoise(model, a_plan, encoded, batch.noise(4))
    np.testing.assert_array_equal(generate.make(choose(["wan"])[0], batch, 4), pipeline.decode(model, a_plan, latents))


def test_a_clips_noise_is_its_own(model, batch):
    other = Batch(model, None, batch.settings, turned_round(batch.clips))
    noise = np.asarray(batch.noise(0))
    np.testing.assert_array_equal(noise, np.asarray(other.noise(0))[::-1])
    assert not np.array_equal(noise[0], noise[1]) and not np.array_equal(noise, batch.noise(1))
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    uses = [jax.random.key_data(batch.keys(0, use)) for use in (None, 1, 2)]
    assert len({row.tobytes() for keys in map(np.asarray, uses) for row in keys}) == 6


def test_variants_of_the_method_are_one_program(batch):
    made = {}
    first, *others = choose(VARIANTS)
    made[first.name] = generate.make(first, batch, 0)
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for arm in others:
            made[arm.name] = generate.make(arm, batch, 0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    np.testing.assert_array_equal(made["retro-uniform"], made["kab"])
    assert not np.array_equal(made["isolation"], made["wan"])
    assert not np.array_equal(made["retro"], made["wan"])


@pytest.mark.slow
def test_random_bias_has_the_size_of_kabs(model, batch):
    """Its spread is KAB's, in KAB's layers and frames and nowhere else."""
    settings = dataclasses.replace(batch.settings, method=NANO_METHOD)
    own = sampling.Plan.of(model.config, settings)
    latents = generate._denoised(batch, NANO_METHOD, 0, until=1)
    size = generate._bias_size(own.config.dit, model.params["dit"], latents, 500.0, batch.encoded.conditions,
                               own.method, own.strength[1])  # fmt: skip
    for one in size:
        sizes = np.asarray(one)
        assert (sizes[:, :, [0, -1]] == 0).all() and (sizes[:, :, 1:-1] > 0).all()
        drawn = np.asarray(generate._gaussian(batch.keys(0, 1), one, 4000))
        np.testing.assert_allclose(np.sqrt(np.square(drawn).mean(-1)), sizes, rtol=0.06, atol=1e-9)
    arm = Arm("r", "control", "", "random-bias", NANO_METHOD)
    biased, plain = generate.make(arm, batch, 0), generate.make(dataclasses.replace(arm, kind="method"), batch, 0)
    assert np.abs(biased.astype(int) - plain).max() > 1
    other = generate.make(arm, Batch(model, None, batch.settings, turned_round(batch.clips)), 0)
    assert np.abs(other[::-1].astype(int) - biased).max() <= 1, "a clip's bias is its own"


@pytest.mark.parametrize("isolation", [pytest.param(Isolation(), marks=pytest.mark.slow), None])
def test_the_size_of_a_bias_is_what_its_softmax_sees(model, batch, isolation):
    """A constant added to all keys of one softmax changes nothing, so it is no part of the size."""
    method = Method(isolation, NANO_METHOD.kab)
    own = sampling.Plan.of(model.config, dataclasses.replace(batch.settings, method=method))
    latents, conditions = batch.noise(0), batch.encoded.conditions
    strength = own.method.replace(strength=own.strength).strength_of(1, 2)
    _, seen = generate.WanDiT(own.config.dit, inspect=True).apply(
        {"params": model.params["dit"]},
        latents,
        np.full(2, 500.0),
        conditions,
        own.method.table,
        None,
        own.method.control,
        strength,
    )
    size = generate._bias_size(own.config.dit, model.params["dit"], latents, 500.0, conditions, own.method,
                               own.strength[1])  # fmt: skip
    text, images = (np.asarray(of, np.float64) for of in (seen.bias.text, seen.bias.images))
    first, last = np.moveaxis(images, -2, 0)
    joint = np.concatenate([first, last], -1)
    np.testing.assert_allclose(size[0], text.std(-1), rtol=1e-4, atol=1e-6)
    if isolation is None:
        squares = (np.square(np.asarray(size[1])) + np.square(np.asarray(size[2]))) / 2
        np.testing.assert_allclose(np.sqrt(squares), joint.std(-1), rtol=1e-4, atol=1e-6)
    else:
        np.testing.assert_allclose(size[1], first.std(-1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(size[2], last.std(-1), rtol=1e-4, atol=1e-6)


def test_a_uniform_scale_is_the_mean_of_the_factors(model, batch):
    retro = ReTRo("magnitude", 1.3, 0.8, smooth=0)
    mean = scale_vector(retro, FRAMES, 3).mean()
    made = generate.make(Arm("u", "own", "", "uniform-scale", Method(retro=retro)), batch, 0)
    wanted = Arm("w", "own", "", "method", Method(retro=ReTRo("magnitude", mean, mean)))
    np.testing.assert_array_equal(made, generate.make(wanted, batch, 0))
    assert not np.array_equal(made, generate.make(dataclasses.replace(wanted, method=Method()), batch, 0))


def test_wan_by_euler_steps(batch):
    euler = Batch(batch.model, None, dataclasses.replace(batch.settings, solver="euler"), batch.clips)
    wan, by_euler = choose(["wan", "wan-euler"])
    np.testing.assert_array_equal(generate.make(by_euler, batch, 0), generate.make(wan, euler, 0))
    assert batch.settings.solver != "euler"


def test_random_mask_hides_the_last_keyframe_in_half_of_the_steps(batch, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "_varied", lambda batch, chosen, seed, varying, bias: seen.append(varying) or 0)
    monkeypatch.setattr(Batch, "decode", lambda self, latents: latents)
    long = Batch(batch.model, None, dataclasses.replace(batch.settings, steps=10), batch.clips)
    for seed in (0, 0, 1):
        generate.make(choose(["random-mask"])[0], long, seed)
    hidden = [varying.hidden for varying in seen]
    assert all(one.sum() == 5 for one in hidden)
    np.testing.assert_array_equal(hidden[0], hidden[1])
    assert not np.array_equal(hidden[0], hidden[2])


def test_nothing_hidden_and_no_bias_is_the_plain_sampler(batch):
    arm = choose(["mask-only"])[0]
    chosen = dataclasses.replace(batch.settings, method=arm.method)
    off = generate.Varying(np.zeros(3, np.float32), np.zeros(3, np.float32))
    latents = generate._varied(batch, chosen, 0, off, None)
    np.testing.assert_allclose(latents, generate._denoised(batch, arm.method, 0), rtol=2e-5, atol=2e-5)
    on = dataclasses.replace(off, hidden=np.ones(3, np.float32))
    assert not np.allclose(generate._varied(batch, chosen, 0, on, None), latents, atol=1e-2)


def test_the_middle_keyframe_ends_a_latent_frame():
    assert [generate.middle(frames, 4) for frames in (9, 13, 25, 33, 65, 81)] == [4, 8, 12, 16, 32, 40]
    with pytest.raises(ValueError, match="frames 5: too few for a third keyframe; take at least 9"):
        generate.middle(5, 4)


def test_an_overlap_that_a_length_cannot_have_names_the_arm():
    settings = Settings.of(NANO, frames=FRAMES)
    for arm in choose(["wan", "three", "three-chain", "three-cross-fade"]):
        generate.check_three(arm, NANO, settings)
    with pytest.raises(ValueError, match="arm three-overlap: overlap 4: more than half of a clip of 5 frames"):
        generate.check_three(choose(["three-overlap"])[0], NANO, settings)
    generate.check_three(choose(["three-overlap"])[0], NANO, dataclasses.replace(settings, frames=25))


@pytest.mark.slow
def test_three_keyframes_are_the_products(model, batch):
    """One clip and a chain are what the pipeline and a film make of the same keyframes and noise."""
    truth = batch.clips.truth
    given = [(first, one[4], last) for (first, last), one in zip(batch.clips.keyframes, truth, strict=True)]
    plan = sampling.Plan.of(model.config, batch.settings, (0, 4, -1))
    (told,) = pipeline.encode(model, plan, [Inputs.prepare(given, plan)], [batch.clips.captions])
    one = pipeline.decode(model, plan, pipeline.denoise(model, plan, told, batch.noise(4)))
    three, chain, _, fade = THREE
    made = generate.make(three, batch, 4)
    np.testing.assert_array_equal(made, one)
    assert not np.array_equal(made, generate.make(choose(["wan"])[0], batch, 4))
    clips = generate.halves(chain, model.config, FRAMES)
    assert [one.frames for one in clips] == [5, 5]
    joined = generate.make(chain, batch, 4)
    half = sampling.Plan.of(model.config, dataclasses.replace(batch.settings, frames=5))
    for n, shown in enumerate((slice(0, 5), slice(5, 9))):
        (told,) = pipeline.encode(model, half, [Inputs.prepare([one[n : n + 2] for one in given], half)],
                                  [batch.clips.captions])  # fmt: skip
        noise = generate._noise(batch.keys(4, 5 + n), half.latent_shape)
        alone = pipeline.decode(model, half, pipeline.denoise(model, half, told, noise))
        np.testing.assert_array_equal(joined[:, shown], alone[:, n:])
    faded = generate.make(fade, batch, 0)
    np.testing.assert_array_equal(faded[:, [0, 4, 8]], truth[:, [0, 4, 8]])


def test_a_chains_overlap_decides_its_videos():
    chain, overlap = choose(["three-chain", "three-overlap"])
    assert chain.plain()["options"] == {"overlap": 0} and overlap.plain()["options"] == {"overlap": 4}
    assert chain.options == Chain() and choose(["three-cross-fade"])[0].seedless and not chain.seedless


def test_shuffled_anchors_move_every_inner_frame():
    for frames in (5, 7, 21):
        curve = np.linspace(0, 1, frames)
        for seed in range(5):
            mixed = np.array(shuffled_curve(frames, seed))
            assert mixed[0] == 0 and mixed[-1] == 1
            np.testing.assert_allclose(np.sort(mixed), curve)
            assert (np.abs(mixed - curve)[1:-1] > 1e-9).all()


def test_every_claim_and_kind_is_known():
    names = {arm.name for arm in KNOWN}
    assert len(names) == len(KNOWN) and {arm.kind for arm in KNOWN} <= set(generate.KINDS)
    assert choose(["all"]) == ARMS and not set(ARMS) & set(THREE)
    assert choose(["three-chain", "wan", "three"]) == (ARMS[0], *THREE[:2])
    fixed = [claim for claim in CLAIMS if not claim.source.startswith("tuned")]  # those: test_tune
    assert len(fixed) == 20 and all({claim.arm, claim.against} <= names for claim in fixed)
    assert {claim.expected for claim in CLAIMS} == {"better", "worse"}


def test_own_arms_are_read(tmp_path):
    file = tmp_path / "arms.json"
    for name in ("strength_mid", "beta_mid"):  # as an earlier version wrote it
        text = '{"mine": {"about": "x", "isolation": {}, "kab": {"strength_mid": 0.5, "layers": [1, 1]}}}'
        file.write_text(text.replace("strength_mid", name))
        (mine,) = read_own(file)
        assert mine.method == Method(Isolation(), KAB(strength_mid=0.5, layers=(1, 1))) and mine.about == "x"
    assert choose(["wan", "mine"], (mine,))[-1] is mine
    for text in (
        "[]",
        "{",
        '{"a": {"kab": {"nonsense": 1}}}',
        '{"a": {"other": {}}}',
        '{"a": {"kab": {"strength_mid": -1}}}',
        '{"a": {"kind": "trf"}}',
        '{"a": {"kind": "random-bias", "retro": {}}}',
        '{"a": {"kind": "uniform-scale", "kab": {}}}',
        '{"../up": {}}',
        '{"": {}}',
        '{"a|b": {}}',
        '{"all": {}}',
        "[" * 100_000,
        '{"a": {"kab": {"strength_mid": 1' + 400 * "0" + "}}}",
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match="not a file of arms"):
            read_own(file)
    file.write_text('{"wan": {}}')
    with pytest.raises(ValueError, match="'wan' is taken"):
        read_own(file)


def test_profiles_are_the_products():
    for name, method in METHODS.items():
        assert choose([name])[0].method == method
