"""The methods end to end: one compiled sampler serves every setting, and what must be equal is equal."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano import NANO, write_model
from PIL import Image
from reference import relative_error
from test_pipeline import count_compilations, images

from samplers import explain, files, pipeline, video
from samplers.pipeline import Inputs
from samplers.plan import Plan, Settings
from wanjax import checkpoint, rope
from wanjax.dit import WanDiT
from wanjax.kab import KAB
from wanjax.method import METHODS, Isolation, Method, arrays, override
from wanjax.retro import ReTRo
from wanjax.types import Conditions, CrossBias

WAN = Method()
ALWAYS = KAB(layers=(0, 1), steps=(0.0, 1.0))
"""KAB in every layer of the nano model and every step but the first."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.load(write_model(tmp_path_factory.mktemp("models") / "nano"))


def settings(method=WAN, **changes):
    return Settings.of(NANO, prompt="a red circle moves left", frames=9, method=method, **changes)


def latents(model, chosen, cross_bias=None):
    return np.asarray(pipeline.inbetween(model, *images(), settings=chosen, cross_bias=cross_bias).latents)


def change(model, method, against=WAN, **changes):
    """Relative difference that one method makes to another."""
    return relative_error(*(latents(model, settings(one, **changes)) for one in (method, against)))


@pytest.mark.slow
def test_no_setting_recompiles_and_each_does_something(model):
    base = Method(Isolation(), ALWAYS, ReTRo())
    variants = {
        "none": Method(), "wan": METHODS["wan"], "paper": METHODS["paper"], "release": METHODS["release"],
        "no kab": dataclasses.replace(base, kab=None), "no retro": dataclasses.replace(base, retro=None),
        "no isolation": dataclasses.replace(base, isolation=None),
    }  # fmt: skip
    overrides = {
        "strength_end": 0.5, "strength_mid": 0.1, "kab_floor": 0.1, "kab_layers": (1, 1), "kab_steps": (0.0, 0.4),
        "anchor_curve": "ease-in", "branch_weights": (1.0, 0.5, 2.0), "retro_mode": "position", "s_edge": 1.1,
        "s_mid": 0.9, "w_edge": 2.0, "retro_smooth": 0,
    }  # fmt: skip
    variants |= {name: override(base, {name: value}) for name, value in overrides.items()}
    plain = latents(model, settings(base))
    with count_compilations() as compiled:
        runs = {name: latents(model, settings(variant)) for name, variant in variants.items()}
    assert compiled == []
    for name, run in runs.items():
        # Three latent frames leave one unbiased end each side of a single middle one, at strength strength_mid.
        same = {"strength_end": True, "w_edge": True}.get(name, False)
        assert (relative_error(run, plain) > 1e-6) != same, name
    np.testing.assert_array_equal(runs["none"], runs["wan"])


@pytest.mark.parametrize("mode", ["sequential", pytest.param("batched", marks=pytest.mark.slow)])
def test_kab_acts_on_the_conditional_pass_alone(model, mode):
    """Guidance 0 is the unconditional pass: neither KAB nor a caller's bias reaches it, isolation does."""
    chosen = {"guidance": 0.0, "guidance_mode": mode}
    # A batch of both passes takes one path through cross-attention, where the unconditional bias is all zeros.
    assert change(model, Method(kab=ALWAYS), **chosen) <= (0 if mode == "sequential" else 1e-6)
    assert change(model, Method(isolation=Isolation()), **chosen) > 1e-4
    assert change(model, Method(retro=ReTRo()), **chosen) > 1e-6
    assert change(model, Method(kab=ALWAYS), guidance=1.0, guidance_mode=mode) > 1e-5


def test_guidance_modes_agree_with_the_method_on(model):
    method = Method(Isolation(), ALWAYS, ReTRo("magnitude"))
    modes = [latents(model, settings(method, guidance=3.0, guidance_mode=m)) for m in ("sequential", "batched")]
    plain = latents(model, settings(guidance=3.0))
    assert relative_error(modes[0] - plain, modes[1] - plain) < 1e-4


def random_bias(batch=1, frames=3):
    rng, d = np.random.default_rng(5), NANO.dit
    keys = {"text": (d.text_length,), "images": (2, d.image_tokens)}
    shape = (d.num_layers, batch, frames)
    return CrossBias(
        **{name: jnp.asarray(rng.normal(size=(*shape, *size)), jnp.float32) for name, size in keys.items()}
    )


def test_a_callers_bias_is_added_to_kabs(model):
    method, bias = Method(Isolation(), ALWAYS), random_bias()
    zero = CrossBias(*(jnp.zeros_like(leaf) for leaf in (bias.text, bias.images)))
    kab, both = latents(model, settings(method)), latents(model, settings(method), bias)
    assert relative_error(both, kab) > 1e-3
    assert relative_error(latents(model, settings(method), zero), kab) < 1e-6
    alone = latents(model, settings(Method(Isolation())), bias)
    assert relative_error(both, alone) > 1e-5
    only_text = CrossBias(text=bias.text)
    assert relative_error(latents(model, settings(method), only_text), both) > 1e-4


def test_a_callers_bias_of_another_model_is_refused(model):
    bias = random_bias(frames=4)
    with pytest.raises(ValueError, match=r"cross_bias.text is \[2, 1, 4, 8\]; this model takes \[2, 1, 3, 8\]"):
        latents(model, settings(), bias)


@pytest.mark.slow
def test_the_six_settings_of_the_paper_from_one_program():
    """On the bundled model: one compilation; a uniform scale of 1 and a strength of 0 are exactly their baselines."""
    model, example = checkpoint.load("tiny"), files.example()
    pair = [np.asarray(Image.open(example[name]).convert("RGB")) for name in ("first", "last")]
    one = ReTRo(s_edge=1.0, s_mid=1.0)
    arms = {
        "baseline": Method(Isolation()),
        "kab": Method(Isolation(), KAB()),
        "retro": Method(Isolation(), None, ReTRo()),
        "both": METHODS["paper"],
        "kab without isolation": Method(None, KAB()),
        "uniform": Method(Isolation(), None, one),
    }
    equal = {f"uniform {mode}": Method(retro=dataclasses.replace(one, mode=mode)) for mode in
             ("frequency", "magnitude", "position")}  # fmt: skip
    equal["strength 0"] = Method(kab=KAB(strength_end=0.0, strength_mid=0.0))

    def make(method):
        chosen = Settings.of(model.config, prompt=example["prompt"], steps=5, method=method)
        return np.asarray(pipeline.inbetween(model, *pair, settings=chosen).latents)

    wan = make(Method())
    with count_compilations() as compiled:
        made = {name: make(method) for name, method in (arms | equal).items()}
    assert compiled == []
    for name in equal:
        assert np.array_equal(made[name], wan), name
    assert np.array_equal(made["uniform"], made["baseline"])
    different = [wan, *(made[name] for name in arms if name != "uniform")]
    for i, a in enumerate(different):
        for b in different[:i]:
            assert relative_error(a, b) > 1e-4


@pytest.mark.slow
def test_the_documented_example_moves_attention_between_words():
    """The code block of docs/method.md, run as it stands; then where the frames look."""
    text = (Path(__file__).parents[1] / "docs" / "method.md").read_text(encoding="utf-8")
    code = text.split("<!-- example -->")[1].split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, "docs/method.md", "exec"), names)
    assert names["result"].video.shape == (1, 25, 32, 32, 3)
    model, pair, bias = names["model"], (names["first"], names["last"]), CrossBias(text=names["bias"])
    plan = Plan.of(model.config, names["settings"])
    encoded = pipeline.encode(model, plan, [Inputs.prepare([pair], plan)], [[names["settings"].prompt]])[0]
    noise = pipeline.noise(plan, [names["settings"].seed])
    latents = pipeline.denoise(model, plan, encoded, noise, cross_bias=bias, until=1)
    seen = explain.observe(model, plan, encoded, latents, 2, 1, bias)
    share = seen.biased.text / seen.plain.text
    red, blue = share[:, names["red"]], share[:, names["blue"]]
    assert red[-1] < 0.5 < red[0] and blue[0] < 0.5 < blue[-1]


def test_a_bias_of_another_model_is_refused_before_computing(model, monkeypatch):
    monkeypatch.setattr(pipeline, "encode", lambda *_: pytest.fail("computing began"))
    with pytest.raises(ValueError, match="cross_bias.text"):
        latents(model, settings(), random_bias(frames=4))


def test_inspecting_needs_a_control():
    with pytest.raises(ValueError, match="inspect: give a control too"):
        WanDiT(NANO.dit, inspect=True).init(jax.random.key(0), *evaluation())


def evaluation():
    """(latents, timestep, conditions, table) of one evaluation of the nano transformer."""
    d = NANO.dit
    image = jnp.zeros((1, 2, d.image_tokens, d.image_dim))
    conditions = Conditions(jnp.zeros((1, d.text_length, d.text_dim)), image,
                            jnp.zeros((1, 3, 4, 6, d.condition_channels)))  # fmt: skip
    return jnp.zeros((1, 3, 4, 6, 16)), jnp.zeros(1), conditions, rope.table((3, 2, 3), d.head_dim)


def test_a_control_for_one_evaluation(model):
    made = arrays(Method(Isolation(), ALWAYS), NANO, 9, (16, 24), 3)
    apply = WanDiT(NANO.dit, inspect=True).apply
    _, seen = apply({"params": model.params["dit"]}, *evaluation(), control=made.control, strength=made.strength_of(1))
    assert seen.plain.text.shape == (2, 1, 3, 8)
    assert made.strength_of(1, batch=4).shape == (2, 4, 3) and not made.strength_of(0).any()


def test_settings_of_numpy_are_plain(tmp_path):
    """A caller's arrays and numpy scalars compare, hash and reach the report."""
    curve, weights = np.linspace(0, 1, 3), np.ones(3, np.float32)
    method = Method(Isolation(weights), KAB(strength_mid=np.float32(0.25), layers=np.array([0, 1]), curve=curve),
                    ReTRo(s_edge=np.float64(1.05), smooth=np.int64(1)))  # fmt: skip
    same = Method(Isolation((1.0, 1.0, 1.0)), KAB(strength_mid=0.25, layers=(0, 1), curve=(0.0, 0.5, 1.0)),
                  ReTRo(s_edge=1.05, smooth=1))  # fmt: skip
    assert method == same and hash(method) == hash(same)
    video.write_json(tmp_path / "x.json", dataclasses.asdict(settings(method)))
