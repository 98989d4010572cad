"""Plots of a run on a random model: the numbers in them, what is refused, and that nothing is left half-written."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from nano import NANO, write_model
from PIL import Image

from samplers import explain, pipeline, plots
from samplers.pipeline import Inputs
from samplers.plan import Plan, Settings
from wanjax import checkpoint, dit, method, sharding, writing
from wanjax.cross import CrossReport
from wanjax.kab import KAB
from wanjax.method import Method
from wanjax.types import Branches, CrossBias

FRAMES = 5  # latent, of 17
# Strong, so that the random model's faint structure shows.
ANCHORED = dataclasses.replace(
    method.named("paper"), kab=KAB(strength_end=0.9, strength_mid=0.6, floor=1e-6, curve="ease-in")
)


def settings(**changes):
    given = {"prompt": "a red circle", "frames": 17, "method": ANCHORED, "guidance": 1.5} | changes
    return Settings.of(NANO, **given)


def plan(**changes):
    return Plan.of(NANO, settings(**changes))


def encoded_of(model, chosen):
    """(plan, conditions of the two images)."""
    made = Plan.of(NANO, chosen)
    return made, pipeline.encode(model, made, [Inputs.prepare([images()], made)], [[chosen.prompt]])[0]


def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.load(write_model(tmp_path_factory.mktemp("models") / "nano"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """(folder, files, report, layer -> (q, text keys, first keys, last keys) of the observed evaluation)."""
    layers, folder = [], tmp_path_factory.mktemp("explain") / "plots"
    attend = dit.cross_attention

    def kept(*arrays):
        layers.append([np.asarray(a[0], np.float64) for a in arrays])
        return arrays[0]

    def recorded(q, keys, *args, **options):
        # Without effects, which newer flax refuses in a scan; each layer needs the one before, which orders them.
        q = jax.pure_callback(
            kept, jax.ShapeDtypeStruct(q.shape, q.dtype), q, keys.text, keys.images[:, 0], keys.images[:, 1]
        )
        return attend(q, keys, *args, **options)

    inspect = explain._inspect

    def recording(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dit, "cross_attention", recorded)
            return jax.jit(inspect.__wrapped__, static_argnums=0)(*args)  # nothing cached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "_inspect", recording)
        files = explain.explain(model, *images(), settings(), folder, layer=0, step=1)
    jax.effects_barrier()
    return folder, files, json.loads((folder / "attention.json").read_text(encoding="utf-8")), layers


@pytest.fixture
def observed(run, monkeypatch):
    """`explain` without computing: it gets attention that was observed before, padding taken as one token."""
    _, _, report, _ = run
    rows = {name: [np.array(report["attention"][name][key], np.float32) for key in ("plain", "biased")]
            for name in ("text", "first", "last")}  # fmt: skip
    for leaf in rows["text"]:
        assert leaf.shape == (FRAMES, 5)
    text = [np.pad(leaf, ((0, 0), (0, 3))) for leaf in rows["text"]]
    images = [np.stack([rows["first"][i], rows["last"][i]], 1) for i in range(2)]
    seen = CrossReport(*(Branches(text[i], images[i]) for i in range(2)), CrossBias())
    monkeypatch.setattr(explain, "observe", lambda *args: seen)
    return seen


@pytest.fixture
def computed(monkeypatch):
    """The run up to the step, without computing it."""
    monkeypatch.setattr(pipeline, "encode", lambda *args: [None])
    monkeypatch.setattr(pipeline, "denoise", lambda *args, **options: None)


def test_files(run):
    folder, files, _, _ = run
    assert [path.name for path in files] == list(explain.NAMES)
    assert sorted(folder.iterdir()) == sorted(files) and list(folder.parent.iterdir()) == [folder]
    for path in files[:3]:
        with Image.open(path) as image:
            assert min(image.size) >= 400
            assert len(np.unique(np.asarray(image.convert("L")))) > 100


def test_numbers_of_the_attention(run):
    _, _, report, _ = run
    assert (report["layer"], report["step"], report["kab"], report["isolated"]) == (0, 1, True, True)
    assert report["settings"]["method"]["kab"]["strength_end"] == 0.9
    assert report["attention"]["text"]["labels"] == ["a", "red", "circle", "</s>", "padding (4)"]
    assert report["attention"]["first"]["labels"] == ["class", "patch 0", "patch 1", "patch 2", "patch 3"]
    assert report["pixel_frames"] == [[0, 0], [1, 4], [5, 8], [9, 12], [13, 16]]
    for name, branch in report["attention"].items():
        plain, biased = np.array(branch["plain"]), np.array(branch["biased"])
        assert plain.shape == biased.shape == (FRAMES, len(branch["labels"])), name
        np.testing.assert_allclose([plain.sum(1), biased.sum(1)], 1, atol=1e-6)
        change = np.abs(biased - plain).max(1)
        assert (change[[0, -1]] < 1e-7).all() and (change[1:-1] > 1e-5).all(), name


def test_numbers_are_those_of_the_method(run):
    """Frame attention and bias of one middle frame, from the layer's queries and keys and METHOD's formulas."""
    _, _, report, layers = run
    assert len(layers) == NANO.dit.num_layers
    q, *keys = layers[0]
    q = q.reshape(FRAMES, -1, *q.shape[1:])
    frame, strength, curve = 1, 0.9 * 0.5 + 0.6 * 0.5, (1 / 4) ** 2
    for (name, branch), k in zip(report["attention"].items(), keys, strict=True):
        logits = np.einsum("fqnd,knd->fnqk", q, k) / np.sqrt(q.shape[-1])
        seen = softmax(logits).mean((1, 2))
        target = (1 - curve) * seen[0] + curve * seen[-1]
        bias = strength * (np.log(np.maximum(target, 1e-6)) - np.log(np.maximum(seen[frame], 1e-6)))
        biased = softmax(logits[frame] + bias).mean((0, 1))
        for key, wanted in (("plain", seen[frame]), ("biased", biased)):
            if name == "text":
                wanted = np.append(wanted[:4], wanted[4:].sum())
            np.testing.assert_allclose(branch[key][frame], wanted, atol=2e-6, err_msg=f"{name} {key}")
    np.testing.assert_allclose(report["strength"]["by_step"][1], [0, 0.75, 0.6, 0.75, 0], atol=1e-7)
    np.testing.assert_allclose(np.transpose(report["strength"]["curve"])[-1], [0, 1 / 16, 1 / 4, 9 / 16, 1], atol=1e-7)
    assert not np.any(report["strength"]["by_step"][0])


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_latents_are_those_of_the_run(model):
    """Stopped after all of its steps, the truncated run is the run; before the first, it is the noise."""
    a_plan, encoded = encoded_of(model, settings(steps=2))
    start = pipeline.noise(a_plan, [0])
    whole = pipeline.denoise(model, a_plan, encoded, start)
    assert np.array_equal(pipeline.denoise(model, a_plan, encoded, start, until=2), whole)
    noise = np.asarray(pipeline.denoise(model, a_plan, encoded, start, until=0))
    assert noise.shape == whole.shape and abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("mode", [None, "frequency", "magnitude", "position"])
def test_retro(model, observed, mode):
    own = None if mode is None else dataclasses.replace(ANCHORED.retro, mode=mode, w_edge=4, smooth=0)
    chosen = plan(method=Method(retro=own))
    numbers = explain.numbers(model, chosen, 0, 1, observed, False)
    scale, position = (np.array(numbers["retro"][name]) for name in ("scale", "position"))
    title = plots.draw_retro(numbers).get_suptitle()
    index = np.arange(FRAMES)
    if mode is None:
        assert (scale == 1).all() and "none in this method" in title
        return
    np.testing.assert_allclose(scale, [1.06, 0.94, 0.94, 0.94, 1.06], atol=1e-7)
    assert title.splitlines()[1].startswith(f"ReTRo, {mode}: ")
    # What is plotted is what the model gets: the fastest temporal pair turns by one radian a frame.
    table = chosen.method.table
    pairs = (np.asarray(a).reshape(FRAMES, -1, a.shape[-1])[:, 0, 0] for a in (table.cos, table.sin))
    factor = next(pairs) + 1j * next(pairs)
    np.testing.assert_allclose(np.unwrap(np.angle(factor)), position, atol=1e-5)
    np.testing.assert_allclose(np.abs(factor), scale if mode == "magnitude" else 1, atol=1e-6)
    assert (position == index).all() == (mode == "magnitude")


def test_titles_say_where_nothing_is_done(model, observed):
    cases = [
        (settings(), 0, 1, False, "", "KAB in layer 0 of 0-1, step 1 of 0-2"),
        (settings(), 1, 1, False, "No KAB in this layer and step", "KAB in layer 0"),
        (settings(), 0, 0, False, "No KAB in this layer and step", "KAB in layer 0"),
        (settings(steps=2), 0, 1, False, "No KAB in this layer and step", "strength is 0 in every step"),
        (settings(method=Method()), 0, 1, False, "Keyframes are not isolated", "none in this method"),
        (settings(method=Method()), 0, 1, True, "Keyframes are not isolated", "none in this method"),
    ]
    for chosen, layer, step, own, attention, strength in cases:
        numbers = explain.numbers(model, Plan.of(NANO, chosen), layer, step, observed, own)
        assert attention in plots._attention_title(numbers)
        assert ("No KAB" in plots._attention_title(numbers)) == (not numbers["kab"] and not own)
        assert strength in plots.draw_strength(numbers).get_suptitle()
    axes = plots.draw_attention(numbers).axes
    assert "prompt, with own bias" in [ax.get_title() for ax in axes]


def test_every_keyframes_curve_is_plotted(model, observed):
    numbers = explain.numbers(model, Plan.of(NANO, settings(), (0, 8, -1)), 0, 1, observed, False)
    lines = [line for axes in plots.draw_strength(numbers).axes for line in axes.lines]
    curves = {line.get_label(): line.get_ydata() for line in lines if "curve" in line.get_label()}
    assert list(curves) == [f"anchor curve of frame {anchor}" for anchor in (0, 2, 4)]
    np.testing.assert_allclose(np.sum(list(curves.values()), 0), 1, atol=1e-6)
    np.testing.assert_allclose([curve[[0, 2, 4]] for curve in curves.values()], np.eye(3), atol=1e-6)


def test_a_model_of_one_image_has_one_column_less(model, observed):
    numbers = explain.numbers(model, plan(), 0, 1, observed, False)
    del numbers["attention"]["last"]
    titles = [ax.get_title() for ax in plots.draw_attention(numbers).axes]
    assert "first keyframe, difference" in titles and not [title for title in titles if "last" in title]


def test_labels_of_any_prompt(model, observed, monkeypatch):
    """Cut prompts, no padding, characters that no font has, and text that would be a formula."""
    words = ["a", "▁red", "▁", "一只", "🐈", "$x_1$", "▁over", "▁under", "▁up"]
    monkeypatch.setattr(type(model.tokenizer), "tokens", lambda self, text: [*words, "</s>"])
    numbers = explain.numbers(model, plan(), 0, 1, observed, False)
    labels = numbers["attention"]["text"]["labels"]
    assert labels == ["a", " red", " ", "一只", "🐈", "$x_1$", " over", "</s>", "padding (0)"]
    np.testing.assert_allclose(np.array(numbers["attention"]["text"]["plain"]).sum(1), 1, atol=1e-6)
    monkeypatch.setattr(plots, "_FALLBACKS", ())
    names, _ = plots._drawable(labels, range(9))
    assert names[:4] == ["a", "red", "␣", "#3"] and names[5] == "$x_1$"
    figure = plots.draw_attention(numbers)
    figure.canvas.draw()  # warnings about missing glyphs are errors here
    assert any("no font for it" in ax.get_xlabel() for ax in figure.axes)


def test_many_tokens_share_the_axis():
    assert plots._every(5, 1) == [0, 1, 2, 3, 4]
    ticks = plots._every(500, 3)
    assert ticks[0] == 0 and ticks[-1] == 499 and min(np.diff(ticks)) >= 3
    assert plots._every(1, 1) == [0] and plots._spread(50, 15)[-1] == 49


def test_defaults():
    def resolve(**changes):
        return explain.check(plan(**changes))

    assert resolve() == (0, 1)
    assert resolve(steps=20) == (0, 1)
    assert resolve(steps=1) == (0, 0)
    assert resolve(steps=2) == (0, 1)  # no step within 40 percent
    assert resolve(method=Method()) == (0, 1)
    late = dataclasses.replace(ANCHORED, kab=KAB(layers=(1, 1), steps=(0.5, 1.0)))
    assert resolve(steps=10, method=late) == (1, 6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer": 2}, "explain layer 2: the model has layers 0 to 1"),
        ({"layer": -1}, "explain layer -1"),
        ({"step": 3}, "explain step 3: the run has steps 0 to 2"),
        ({"step": -1}, "explain step -1"),
    ],
)
def test_bad_places_are_named(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        explain.check(plan(), **changes)
    with pytest.raises(ValueError, match=message):
        explain.explain(model, *images(), settings(), tmp_path / "plots", **changes)
    assert not list(tmp_path.iterdir())


def test_bad_folders_are_named(tmp_path):
    def allowed(folder, overwrite=False):
        writing.check([explain.target(folder)], overwrite=overwrite)

    def refused(folder, message, overwrite=False):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=message) as caught:
            allowed(folder, overwrite)
        assert "\n" not in str(caught.value) and "explain folder" in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    refused(tmp_path / "missing" / "plots", "mkdir -p")
    refused("/proc/plots", "cannot write")
    refused(tmp_path / ("x" * 300), "not a usable name")
    file = tmp_path / "file"
    file.write_text("mine")
    refused(file, "is not a folder", overwrite=True)
    refused(file / "plots", "is not a folder")
    folder = tmp_path / "plots"
    folder.mkdir()
    allowed(folder)  # empty
    (tmp_path / "link").symlink_to(folder)
    refused(tmp_path / "link", "is not a folder", overwrite=True)
    plots.save(plots._figure(1, 1), folder / "retro.png")
    refused(folder, "pass --overwrite")
    allowed(folder, overwrite=True)
    (folder / "strength.png").write_bytes(b"by somebody else")
    refused(folder, "holds 'strength.png', which wanjax did not write", overwrite=True)
    (folder / "strength.png").unlink()
    (folder / "holiday.jpg").write_bytes(b"mine")
    refused(folder, "holds 'holiday.jpg'", overwrite=True)


@pytest.mark.parametrize("module", ["matplotlib", "matplotlib.figure"])
def test_without_matplotlib(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"--explain needs matplotlib: pip install 'wanjax\[explain\]'"):
        explain.check(plan())


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["draw_attention", "video.write_json"])
def test_a_failed_run_leaves_what_was_there(model, observed, computed, tmp_path, monkeypatch, error, place):
    def fail(*args):
        raise error

    owner, name = (explain.video, "write_json") if "." in place else (plots, place)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(error):
            explain.explain(model, *images(), settings(), tmp_path / "plots")
    assert not list(tmp_path.iterdir())
    old = tmp_path / "plots"
    old.mkdir()
    plots.save(plots._figure(1, 1), old / "retro.png")
    before = (old / "retro.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(error):
            explain.explain(model, *images(), settings(), old)
    assert list(tmp_path.iterdir()) == [old] and (old / "retro.png").read_bytes() == before


def test_earlier_plots_are_replaced_and_other_files_never(model, observed, computed, tmp_path, monkeypatch):
    folder = tmp_path / "plots"
    folder.mkdir()
    plots.save(plots._figure(1, 1), folder / "retro.png")
    explain.explain(model, *images(), settings(), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(explain.NAMES)
    assert list(tmp_path.iterdir()) == [folder]

    def late(*args):
        (folder / "mine.txt").write_text("came while plotting")
        return {}

    monkeypatch.setattr(explain.video, "write_json", late)
    with pytest.raises(ValueError, match="changed while this run worked"):
        explain.explain(model, *images(), settings(), folder)
    assert len(list(folder.iterdir())) == 5 and list(tmp_path.iterdir()) == [folder]


def test_nan_is_named(model, observed, monkeypatch):
    broken = observed.replace(biased=observed.biased.replace(images=np.full((FRAMES, 2, 5), np.nan)))
    monkeypatch.undo()
    monkeypatch.setattr(explain, "_inspect", lambda *args: broken)
    a_plan, encoded = encoded_of(model, settings())
    with pytest.raises(FloatingPointError, match="layer 1, step 0"):
        explain.observe(model, a_plan, encoded, pipeline.noise(a_plan, [0]), 1, 0)


@pytest.mark.slow
def test_on_a_mesh(model, run):
    """Two devices see what one sees; what goes before is left to one, for its programs take long to compile."""
    a_plan, encoded = encoded_of(model, settings())
    latents = pipeline.denoise(model, a_plan, encoded, pipeline.noise(a_plan, [0]), until=1)
    mesh = sharding.make_mesh({"sequence": 2}, jax.devices()[:2])
    params = {name: sharding.shard_params(tree, mesh) for name, tree in model.params.items()}
    spread = dataclasses.replace(model, params=params)
    seen = explain.observe(spread, a_plan, pipeline.place(encoded, mesh), sharding.shard_batch(latents, mesh), 0, 1,
                           mesh=mesh)  # fmt: skip
    for i, name in enumerate(("first", "last")):
        branch = run[2]["attention"][name]
        for key in ("plain", "biased"):
            np.testing.assert_allclose(getattr(seen, key).images[:, i], branch[key], atol=1e-6)
