"""Every row of docs/differences.md that tells diffusers from us, with the option that makes the two equal.

diffusers' whole first-and-last-frame pipeline, its own preprocessing included, beside ours on the same random weights:
saved by theirs, converted, loaded. The noise is handed to both. float32.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import wan_pipeline as wan
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils import load_image
from PIL import Image
from reference import relative_error

from convert.__main__ import main as convert
from samplers import command, files, load, schedule, solvers
from samplers.plan import PRESETS, Plan, Settings
from wanjax import config, keyframes
from wanjax.tokenizer import PromptCut

LIMITS = {"text": 1e-5, "negative": 1e-5, "images": 1e-5, "condition": 1e-5, "latents": 1e-4, "video": 1e-4}
ENCODED = ("text", "negative", "images", "condition")
FIRST, LAST = wan.keyframe(1, 50, 70), wan.keyframe(2, 45, 40)


def words(seed, count):
    """A prompt long enough to weigh something among 512 positions."""
    return " ".join(np.random.default_rng(seed).choice(wan.WORDS, count))


# Cleaned alike: broken Unicode, entities, white space.
PROMPT = f"  a red\n circle &amp;amp; âœ” {words(1, 300)} "
NEGATIVE = words(2, 250)


@dataclass(frozen=True)
class Case:
    """A scheduler of theirs and the options that ask for it here."""

    scheduler: object
    guidance: float = 5.0
    options: dict = field(default_factory=dict)


def unipc(shift):
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


EULER = {"solver": "euler", "schedule": "diffusers-euler", "timesteps": "exact"}
CASES = {
    "unipc": Case(unipc(wan.SHIFT)),  # the shift by the converted folder alone
    "unipc, no guidance": Case(unipc(wan.SHIFT), 1.0),
    "unipc, shift 16": Case(unipc(16.0), 3.0, {"shift": 16.0}),
    "euler": Case(FlowMatchEulerDiscreteScheduler(shift=7.0), 5.0, EULER | {"shift": 7.0}),
    "euler, no guidance": Case(FlowMatchEulerDiscreteScheduler(shift=5.0), 1.0, EULER | {"shift": 5.0}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Theirs on disk and, converted, ours."""
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def pipe(folder):
    made = wan.build(folder)
    made.save_pretrained(folder / "theirs")
    return made


@pytest.fixture(scope="module")
def model(folder, pipe):
    assert convert([str(folder / "theirs"), str(folder / "ours"), "--dtype", "f32"]) == 0
    return load(folder / "ours")


@pytest.fixture(scope="module")
def theirs(pipe):
    """case -> `Stages`, each computed once."""
    done = {}

    def run(name, **call):
        key = (name, *call.items())
        if key not in done:
            pipe.scheduler = CASES[name].scheduler
            call = {"guidance_scale": CASES[name].guidance} | call
            done[key] = wan.theirs(pipe, FIRST, LAST, prompt=PROMPT, negative_prompt=NEGATIVE, **call)
        return done[key]

    return run


def ours(model, case, **options):
    base = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "frames": wan.FRAMES, "size": wan.SIZE, "steps": wan.STEPS,
            "guidance": case.guidance}  # fmt: skip
    settings = Settings.of(model.config, "diffusers", **base | case.options | options)
    return wan.ours(model, Plan.of(model.config, settings), FIRST, LAST)


def errors(ours, theirs):
    """Relative error by stage; the latents' is the worst of the steps. Without guidance there is no negative text."""
    found = {name: relative_error(getattr(ours, name).reshape(getattr(theirs, name).shape), getattr(theirs, name))
             for name in LIMITS if name != "latents" and getattr(theirs, name) is not None}  # fmt: skip
    steps = zip(ours.latents, theirs.latents, strict=True)
    return found | {"latents": max(relative_error(a, b) for a, b in steps)}


@pytest.mark.parametrize("name", CASES)
def test_every_stage(model, theirs, name):
    case, wanted = CASES[name], theirs(name)
    made = ours(model, case)
    found = errors(made, wanted)
    assert len(made.latents) == wan.STEPS and (wanted.negative is None) == (case.guidance == 1)
    assert {stage: error for stage, error in found.items() if error > LIMITS[stage]} == {}
    np.testing.assert_allclose(made.timesteps, wanted.timesteps, rtol=3e-7 if "euler" in name else 0)
    assert (np.abs(wanted.video) == 1).mean() < 0.01 < wanted.video.std(), "clipping or gray would hide errors"
    # A value half-way between two levels may fall to either.
    assert np.abs(made.pixels - wanted.pixels).max() <= 1 and (made.pixels != wanted.pixels).mean() < 1e-3


ROWS = {
    "timesteps": ("exact", "latents"),
    "schedule": ("wan", "latents"),
    "solver": ("dpm++", "latents"),
    "shift": (5.0, "latents"),
    "guidance": (4.0, "latents"),
    "negative_prompt": ("", "negative"),
    "resample": ("bicubic", "condition"),
    "fit": ("crop", "condition"),
    "clip_fit": ("stretch", "images"),
}


@pytest.mark.parametrize("option", ROWS)
def test_every_option_is_needed(model, theirs, option):
    """Equality is no accident: a single other choice, and its own stage differs, with all that follow it."""
    value, stage = ROWS[option]
    found = errors(ours(model, CASES["unipc"], **{option: value}), theirs("unipc"))
    assert found[stage] > 1e-3 and found["latents"] > 1e-3 and found["video"] > 1e-3
    assert all(found[other] <= LIMITS[other] for other in ENCODED if other != stage)


def test_guidance_below_one(model, theirs):
    """One pass in theirs, as at 1; in ours a mixture of two."""
    wanted = theirs("unipc", guidance_scale=0.5)
    assert wanted.negative is None
    assert errors(ours(model, CASES["unipc"], guidance=1.0), wanted)["latents"] <= LIMITS["latents"]
    assert errors(ours(model, CASES["unipc"], guidance=0.5), wanted)["latents"] > 1e-3


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0, 16.0])
@pytest.mark.parametrize("steps", [1, 4, 20, 50, 100, 1000])
def test_truncated_timesteps_are_the_same_integers(steps, shift):
    scheduler = unipc(shift)
    scheduler.set_timesteps(steps)
    table = solvers.table("unipc", schedule.sigmas("diffusers-unipc", steps, shift), "truncated")
    assert np.array_equal(table.timestep, scheduler.timesteps.numpy())


@pytest.mark.parametrize("text", ["", PROMPT, words(3, 600)], ids=["empty", "to clean", "too long"])
def test_tokens(pipe, model, text):
    taken = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda module, args: taken.extend(args))
    try:
        pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)
    finally:
        hook.remove()
    if len(text.split()) >= 512:
        with pytest.warns(PromptCut):
            made = model.tokenizer.encode([text], 512)
    else:
        made = model.tokenizer.encode([text], 512)
    for own, other in zip(made, taken, strict=True):
        assert np.array_equal(own, other.numpy())


def test_the_folder_takes_the_shift_of_the_scheduler(model):
    assert model.config.sampling.shift == wan.SHIFT != config.preset("flf2v_14b").sampling.shift


def test_preset_names_all_that_differs():
    """Also where a model's own solver is another."""
    euler = config.preset("fun_inp_1_3b")
    assert euler.sampling.solver == "euler" and Settings.of(euler, "diffusers").solver == "unipc"
    line = [word for name, value in PRESETS["diffusers"].items() for word in (f"--{name.replace('_', '-')}", value)]
    options = vars(command.parser().parse_args(line))
    assert {name: options[name] for name in PRESETS["diffusers"]} == PRESETS["diffusers"]


def test_from_files(tmp_path, folder, model):
    """The command line's way: keyframes read from files, the preset by name."""
    for name, image in (("first", FIRST), ("last", LAST)):
        image.save(tmp_path / f"{name}.png")
    job = files.prepare(tmp_path / "first.png", tmp_path / "last.png", tmp_path / "clip.mp4", model=folder / "ours",
                        preset="diffusers", frames=wan.FRAMES, size=wan.SIZE, prompt=PROMPT)  # fmt: skip
    made = job.inputs
    wanted = [image.resize(wan.SIZE[::-1], Image.Resampling.LANCZOS) for image in (FIRST, LAST)]
    assert np.array_equal(made.pixels[0], np.stack([np.asarray(image) for image in wanted]))
    processor = wan.image_processor()
    pixels = processor([FIRST, LAST], return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    assert np.abs(made.vision[0] - pixels).max() <= 1e-6


def test_transparent_keyframes_without_their_alpha(tmp_path):
    """diffusers' reader drops alpha; here a caller can."""
    alpha = Image.fromarray(np.random.default_rng(4).integers(0, 256, (50, 70), np.uint8))
    image = FIRST.copy()
    image.putalpha(alpha)
    image.save(tmp_path / "a.png")
    wanted = np.asarray(load_image(str(tmp_path / "a.png")))
    assert np.array_equal(keyframes.image(image.convert("RGB")), wanted)
    assert (np.asarray(keyframes.image(tmp_path / "a.png")) != wanted).any()


def test_keyframes_that_have_the_size_are_not_rounded_anew():
    fitting = wan.keyframe(5, *wan.SIZE)
    for mode in ("stretch", "crop", "pad"):
        for resample in ("bicubic", "lanczos"):
            assert np.array_equal(keyframes.fit(fitting, *wan.SIZE, mode, resample=resample), np.asarray(fitting))


def test_the_table_names_options_that_exist():
    known = {word for action in command.parser()._actions for word in action.option_strings}
    text = (Path(__file__).parent.parent / "docs" / "differences.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert len(named) > 20 and named <= known, named - known
