"""Everything that LoRA files change beside linears, against the arithmetic written out, in both layouts."""

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from foreign import CONFIG
from nano import random_params
from reference import relative_error
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import convert
from convert import dit, lora, sources
from convert.keymap import invert
from convert.tensors import SourceError

RANK, SCALE = 3, 0.5
TABLES = {"original": dit.original(CONFIG.dit), "diffusers": dit.diffusers(CONFIG.dit)}


def names_of(layout):
    """Our path -> the layout's name, in block 1 where it is stacked."""
    return {rule.ours: rule.theirs.replace("{i}", "1") for rule in TABLES[layout]}


ORIGINAL = names_of("original")
TO = {layout: {ORIGINAL[ours]: name for ours, name in names_of(layout).items()} for layout in TABLES}
"""Layout -> original name of a tensor -> its name there."""

NORMS = [
    "blocks.1.norm3",
    "blocks.1.self_attn.norm_q",
    "blocks.1.self_attn.norm_k",
    "blocks.1.cross_attn.norm_q",
    "blocks.1.cross_attn.norm_k",
    "blocks.1.cross_attn.norm_k_img",
    "img_emb.proj.0",
    "img_emb.proj.4",
]
LINEARS = [
    *(f"blocks.1.self_attn.{part}" for part in "qkvo"),
    *(f"blocks.1.cross_attn.{part}" for part in ("q", "k", "v", "o", "k_img", "v_img")),
    *(f"blocks.1.ffn.{i}" for i in (0, 2)),
    *(f"{name}.{i}" for name in ("time_embedding", "text_embedding") for i in (0, 2)),
    "time_projection.1",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "head.head",
]


@functools.cache
def tensors(layout):
    """The random transformer under a layout's names; not to be changed."""
    return invert(TABLES[layout], random_params(CONFIG)["dit"])


@pytest.fixture(scope="module", params=TABLES)
def layout(request, tmp_path_factory):
    """A source in each layout: (its name, the source)."""
    file = tmp_path_factory.mktemp("forms") / "dit.safetensors"
    save_file(tensors(request.param), file)
    return request.param, sources.find(file)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def merged(layout, update, path, *, scale=SCALE):
    """What a file of these tensors changes: original name -> (tensor before, after)."""
    name, source = layout
    save_file({key: np.asarray(value) for key, value in update.items()}, path / "lora.safetensors")
    own = lora.merge(source, [f"{path / 'lora.safetensors'}:{scale}"]).parts["dit"].tensors.named
    pairs = {}
    for original, foreign in TO[name].items():
        before, after = tensors(name)[foreign], own[foreign].read()
        if not np.array_equal(before, after):
            pairs[original] = before, after
    return pairs


def agree(pairs, wanted):
    """The tensors that changed are those of `wanted`, by as much as it says."""
    assert set(pairs) == set(wanted)
    for name, change in wanted.items():
        before, after = pairs[name]
        change = np.asarray(change, np.float64).reshape(before.shape)
        assert after.shape == before.shape and after.dtype == np.float32
        assert relative_error(after, before.astype(np.float64) + change) < 1e-6, name
        assert relative_error(after.astype(np.float64) - before, change) < 1e-5, name


def shape_of(name):
    return tensors("original")[name].shape


def test_the_lists_here_are_the_whole_transformer():
    """Every tensor of the model is in a test below."""
    held = {f"{name}.{kind}" for name in NORMS + LINEARS + ["patch_embedding"] for kind in ("weight", "bias")}
    assert set(ORIGINAL.values()) - held == {"blocks.1.modulation", "head.modulation", "img_emb.emb_pos"}


@pytest.mark.parametrize("pair", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("spelled", TABLES)
def test_every_linear(layout, tmp_path, pair, spelled):
    """With a bias's difference beside; its alpha scales the product alone. Names of both layouts, into both."""
    update, wanted = {}, {}
    for i, name in enumerate(LINEARS):
        out, width = shape_of(f"{name}.weight")
        up, down, bias = normal(out, RANK, seed=i), normal(RANK, width, seed=i), normal(out, seed=i)
        key = f"diffusion_model.{TO[spelled][f'{name}.weight'].removesuffix('.weight')}"
        update |= {f"{key}.{pair[0]}.weight": down, f"{key}.{pair[1]}.weight": up, f"{key}.diff_b": bias}
        update[f"{key}.alpha"] = np.float32(6)
        wanted[f"{name}.weight"] = SCALE * 6 / RANK * (up.astype(np.float64) @ down)
        wanted[f"{name}.bias"] = SCALE * bias
    agree(merged(layout, update, tmp_path), wanted)


@pytest.mark.parametrize("words", [("diff", "diff_b"), ("w_norm", "b_norm")])
def test_norms(layout, tmp_path, words):
    update, wanted = {}, {}
    for i, name in enumerate(NORMS):
        for word, kind in zip(words, ("weight", "bias"), strict=True):
            if f"{name}.{kind}" in tensors("original"):
                update[f"diffusion_model.{name}.{word}"] = value = normal(*shape_of(f"{name}.{kind}"), seed=i)
                wanted[f"{name}.{kind}"] = SCALE * value
    assert len(wanted) == 11  # the norms of queries and keys have no bias
    agree(merged(layout, update, tmp_path), wanted)


@pytest.mark.parametrize("key, name", [
    ("diffusion_model.blocks.1.diff_m", "blocks.1.modulation"), ("blocks.1.modulation.diff", "blocks.1.modulation"),
    ("diffusion_model.head.diff_m", "head.modulation"), ("scale_shift_table.diff", "head.modulation"),
    ("transformer.blocks.1.scale_shift_table.diff", "blocks.1.modulation"), ("img_emb.emb_pos.diff", "img_emb.emb_pos"),
])  # fmt: skip
@pytest.mark.parametrize("axes", ["all", "no batch"])
def test_tables(layout, tmp_path, key, name, axes):
    shape = shape_of(name)
    value = normal(*(shape if axes == "all" else shape[1:]))
    agree(merged(layout, {key: value}, tmp_path), {name: SCALE * value})


def test_whole_linears_and_the_patch_convolution(layout, tmp_path):
    update, wanted = {}, {}
    for name in ("head.head", "patch_embedding", "blocks.1.ffn.0"):
        update[f"{name}.alpha"] = np.float32(100)
        update[f"{name}.diff"] = normal(*shape_of(f"{name}.weight"))
        update[f"{name}.diff_b"] = normal(*shape_of(f"{name}.bias"))
        wanted |= {f"{name}.weight": SCALE * update[f"{name}.diff"], f"{name}.bias": SCALE * update[f"{name}.diff_b"]}
    agree(merged(layout, update, tmp_path), wanted)


def test_a_difference_and_a_product_of_one_weight_add_up(layout, tmp_path):
    name = "blocks.1.self_attn.q"
    out, width = shape_of(f"{name}.weight")
    update = {f"{name}.lora_A.weight": normal(RANK, width), f"{name}.lora_B.weight": normal(out, RANK),
              f"{name}.alpha": np.float32(1), f"{name}.diff": normal(out, width)}  # fmt: skip
    product = normal(out, RANK).astype(np.float64) @ normal(RANK, width)
    agree(merged(layout, update, tmp_path), {f"{name}.weight": SCALE * (product / RANK + update[f"{name}.diff"])})


OUT, IN, *KERNEL = tensors("original")["patch_embedding.weight"].shape
CONVOLUTIONS = {
    "5 axes": ((OUT, RANK, 1, 1, 1), None, (RANK, IN, 1, 2, 2)),
    "4 axes": ((OUT, RANK, 1, 1), None, (RANK, IN, 2, 2)),
    "flat": ((OUT, RANK), None, (RANK, IN * 4)),
    "flat up": ((OUT, RANK), None, (RANK, IN, 1, 2, 2)),
    "rank 1": ((OUT, 1, 1, 1, 1), None, (1, IN, 1, 2, 2)),
    "mid": ((OUT, RANK, 1, 1, 1), (RANK, RANK, 1, 2, 2), (RANK, IN, 1, 1, 1)),
    "mid of 4 axes": ((OUT, RANK, 1, 1), (RANK, RANK, 2, 2), (RANK, IN, 1, 1)),
    "mid, flat": ((OUT, RANK), (RANK, RANK, 1, 2, 2), (RANK, IN)),
    "mid of rank 1": ((OUT, 1, 1, 1, 1), (1, 1, 1, 2, 2), (1, IN, 1, 1, 1)),
    "kernel in up": ((OUT, RANK, 1, 2, 2), None, (RANK, IN, 1, 1, 1)),
    "kernel in up, flat": ((OUT, RANK, 2, 2), None, (RANK, IN)),
}


def five(array, kernel):
    """A factor as torch's convolution wants it, with its own kernel or that of the model."""
    own = array.size // (array.shape[0] * array.shape[1])
    if array.ndim == 2 and array.shape[1] == IN * 4:
        return torch.from_numpy(array.reshape(-1, IN, *KERNEL))
    return torch.from_numpy(array.reshape(*array.shape[:2], *(kernel if own > 1 else (1, 1, 1))))


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_the_patch_convolution(layout, tmp_path, form):
    """The merged convolution is the model's plus the factors run one after the other, by torch."""
    shapes = dict(zip(("lora_up", "lora_mid", "lora_down"), CONVOLUTIONS[form], strict=True))
    factors = {word: normal(*shape, seed=1) for word, shape in shapes.items() if shape is not None}
    update = {f"diffusion_model.patch_embedding.{word}.weight": array for word, array in factors.items()}
    update["diffusion_model.patch_embedding.alpha"] = np.full((), 2.0, np.float32)
    ((_, (before, after)),) = merged(layout, update, tmp_path).items()
    x = torch.from_numpy(normal(2, IN, 3, 6, 4)).double()
    branch = x
    for word in ("lora_down", "lora_mid", "lora_up"):
        if word in factors:
            weight = five(factors[word], KERNEL).double()
            branch = torch.nn.functional.conv3d(branch, weight, stride=tuple(weight.shape[2:]))
    rank = len(factors["lora_down"])
    conv = functools.partial(torch.nn.functional.conv3d, x, stride=tuple(KERNEL))
    wanted = conv(torch.from_numpy(before.astype(np.float64))) + SCALE * 2 / rank * branch
    assert relative_error(conv(torch.from_numpy(after.astype(np.float64))).numpy(), wanted.numpy()) < 1e-5
    changed = conv(torch.from_numpy(after.astype(np.float64) - before)).numpy()
    assert relative_error(changed, (SCALE * 2 / rank * branch).numpy()) < 1e-5


@pytest.mark.parametrize("rank", [1, RANK, 128])
@pytest.mark.parametrize("form", ["linear", "unit axes", "transposed"])
@pytest.mark.parametrize("alpha", [(), (1,), None])
def test_shapes_of_a_linears_factors(layout, tmp_path, rank, form, alpha):
    name = "blocks.1.ffn.0"
    out, width = shape_of(f"{name}.weight")
    up, down = normal(out, rank), normal(rank, width)
    shaped = {"linear": (up, down), "unit axes": (up[..., None, None], down[..., None, None]),
              "transposed": (up.T.copy(), down.T.copy())}[form]  # fmt: skip
    update = {f"{name}.lora_up.weight": shaped[0], f"{name}.lora_down.weight": shaped[1]}
    if alpha is not None:
        update[f"{name}.alpha"] = np.full(alpha, 4.0, np.float32)
    factor = 1 if alpha is None else 4 / rank
    agree(merged(layout, update, tmp_path), {f"{name}.weight": SCALE * factor * (up.astype(np.float64) @ down)})


@pytest.mark.parametrize("rows", [1, 50, 768, 10_000])
def test_products_in_pieces(layout, tmp_path, monkeypatch, rows):
    """A product is made some rows at a time."""
    monkeypatch.setattr(lora, "ROWS", rows)
    name = "time_projection.1"
    out, width = shape_of(f"{name}.weight")
    update = {f"{name}.lora_A.weight": normal(RANK, width), f"{name}.lora_B.weight": normal(out, RANK)}
    product = normal(out, RANK).astype(np.float64) @ normal(RANK, width)
    agree(merged(layout, update, tmp_path), {f"{name}.weight": SCALE * product})


@pytest.mark.parametrize("told", [None, 6.0])
def test_the_bias_of_pefts_lora_b_is_scaled_like_the_product(layout, tmp_path, told):
    name = "blocks.1.self_attn.q"
    out, width = shape_of(f"{name}.weight")
    update = {f"{name}.lora_A.weight": normal(RANK, width), f"{name}.lora_B.weight": normal(out, RANK),
              f"{name}.lora_B.bias": normal(out)}  # fmt: skip
    if told:
        update[f"{name}.alpha"] = np.float32(told)
    factor = SCALE * (told / RANK if told else 1)
    product = normal(out, RANK).astype(np.float64) @ normal(RANK, width)
    agree(merged(layout, update, tmp_path), {f"{name}.weight": factor * product, f"{name}.bias": factor * normal(out)})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_stored_dtypes_are_merged_in_float32(layout, tmp_path, dtype):
    name = "blocks.1.self_attn.q"
    out, width = shape_of(f"{name}.weight")
    up, down, bias = (normal(*shape).astype(dtype) for shape in ((out, RANK), (RANK, width), (out,)))
    update = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.diff_b": bias}
    product = up.astype(np.float64) @ down.astype(np.float64)
    pairs = merged(layout, update, tmp_path)
    agree(pairs, {f"{name}.weight": SCALE * product, f"{name}.bias": SCALE * bias.astype(np.float64)})


def test_scaled_8_bit_sources(tmp_path):
    """The factor of the 8-bit weight comes first, then the update, then the cast."""
    name, held = "blocks.1.ffn.0", dict(tensors("original"))
    out, width = shape_of(f"{name}.weight")
    coarse = (held[f"{name}.weight"] / 0.01).astype(ml_dtypes.float8_e4m3fn)
    state = {key: torch.from_numpy(np.array(value)) for key, value in held.items() if key != f"{name}.weight"}
    state[f"{name}.weight"] = torch.from_numpy(coarse.view(np.uint8)).view(torch.float8_e4m3fn)
    state |= {f"{name}.scale_weight": torch.tensor(0.01), "scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    save_torch({f"model.diffusion_model.{key}": value for key, value in state.items()}, tmp_path / "dit.safetensors")
    up, down = normal(out, RANK), normal(RANK, width)
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.diff": normal(out, width)},
              tmp_path / "a.safetensors")  # fmt: skip
    source = lora.merge(sources.find(tmp_path / "dit.safetensors"), [str(tmp_path / "a.safetensors")])
    read = source.parts["dit"].tensors.named[f"{name}.weight"].read()
    wanted = coarse.astype(np.float64) * 0.01 + up.astype(np.float64) @ down + normal(out, width)
    assert read.dtype == np.float32 and relative_error(read, wanted) < 1e-6


def test_nothing_is_read_before_its_turn(layout, tmp_path, monkeypatch):
    """Merging looks at names and shapes; one weight's factors are read with that weight."""
    name, reads = "blocks.1.ffn.0", []
    update = {}
    for linear in LINEARS:
        out, width = shape_of(f"{linear}.weight")
        update |= {f"{linear}.lora_up.weight": normal(out, RANK), f"{linear}.lora_down.weight": normal(RANK, width),
                   f"{linear}.diff_b": normal(out)}  # fmt: skip
    save_file(update, tmp_path / "a.safetensors")
    opened = lora.open_file

    def spied(path):
        def told(key, tensor):
            return dataclasses.replace(tensor, read=lambda: (reads.append(key), tensor.read())[1])

        held = opened(path)
        return dataclasses.replace(held, named={key: told(key, tensor) for key, tensor in held.named.items()})

    monkeypatch.setattr(lora, "open_file", spied)
    source = lora.merge(layout[1], [str(tmp_path / "a.safetensors")])
    assert not reads
    source.parts["dit"].tensors.named[TO[layout[0]][f"{name}.weight"]].read()
    assert sorted(reads) == [f"{name}.lora_down.weight", f"{name}.lora_up.weight"]


@pytest.mark.parametrize("word", ["lora_up.weight", "lora_down.weight", "diff_b", "diff"])
def test_numbers_that_are_none_are_named(layout, tmp_path, word):
    """In the LoRA's own name, not in the source's."""
    name = "blocks.1.ffn.0"
    out, width = shape_of(f"{name}.weight")
    update = {f"{name}.lora_up.weight": normal(out, RANK), f"{name}.lora_down.weight": normal(RANK, width),
              f"{name}.diff_b": normal(out), f"{name}.diff": normal(out, width)}  # fmt: skip
    update[f"{name}.{word}"].flat[5] = np.nan
    with pytest.raises(SourceError, match=rf"lora.safetensors: {name}.{word} holds NaN or inf"):
        merged(layout, update, tmp_path)


def distilled():
    """A file in the form of the published step-distilled ones: every tensor of the transformer changes."""
    update = {}
    for i in range(CONFIG.dit.num_layers):
        for name in LINEARS + NORMS:
            if i and not name.startswith("blocks"):
                continue
            shape, name = shape_of(f"{name}.weight"), name.replace("blocks.1.", f"blocks.{i}.")
            if len(shape) == 2:
                update |= {f"{name}.lora_up.weight": normal(shape[0], RANK, seed=i) / 10,
                           f"{name}.lora_down.weight": normal(RANK, shape[1], seed=i) / 10}  # fmt: skip
            else:
                update[f"{name}.diff"] = normal(*shape, seed=i) / 10
            if f"{name}.bias" in tensors("original"):
                update[f"{name}.diff_b"] = normal(*shape_of(f"{name}.bias"), seed=i) / 10
        update[f"blocks.{i}.diff_m"] = normal(*shape_of(f"blocks.{i}.modulation"), seed=i) / 10
    for kind, word in (("weight", "diff"), ("bias", "diff_b")):
        update[f"patch_embedding.{word}"] = normal(*shape_of(f"patch_embedding.{kind}")) / 10
    return {f"diffusion_model.{key}": value for key, value in update.items()}


def test_both_layouts_come_to_the_same_parameters(tmp_path):
    """All forms at once, through the conversion."""
    update = distilled()
    save_file(update, tmp_path / "a.safetensors")
    trees = []
    for name in TABLES:
        save_file(tensors(name), tmp_path / f"{name}.safetensors")
        _, params = convert.load(tmp_path / f"{name}.safetensors", "f32", loras=[f"{tmp_path / 'a.safetensors'}:0.5"])
        trees.append(params["dit"])
    jax.tree.map(np.testing.assert_array_equal, *trees)
    plain, blocks = random_params(CONFIG)["dit"], trees[0]["blocks"]
    unchanged = jax.tree.leaves(jax.tree.map(np.array_equal, plain, trees[0]))
    assert sum(unchanged) == 2  # the position table and the head's modulation
    for i in range(CONFIG.dit.num_layers):
        wanted = plain["blocks"]["modulation"][i] + 0.5 * update[f"diffusion_model.blocks.{i}.diff_m"][0]
        np.testing.assert_allclose(blocks["modulation"][i], wanted, rtol=1e-6, atol=1e-6)
        wanted = plain["blocks"]["cross_norm"]["scale"][i] + 0.5 * update[f"diffusion_model.blocks.{i}.norm3.diff"]
        np.testing.assert_allclose(blocks["cross_norm"]["scale"][i], wanted, rtol=1e-6, atol=1e-6)


def test_updates_for_another_width_are_listed(layout, tmp_path):
    """A text-to-video file's patch convolution on a model that takes keyframes, and others of a wrong size."""
    update = {
        "patch_embedding.diff": normal(OUT, 16, 1, 2, 2), "blocks.1.norm3.diff": normal(7),
        "blocks.0.diff_m": normal(1, 6, 5),
        "blocks.1.self_attn.q.diff_b": normal(9), "head.head.lora_up.weight": normal(4, 2),
        "head.head.lora_mid.weight": normal(2, 2), "head.head.lora_down.weight": normal(2, 5),
        "blocks.1.norm3.lora_up.weight": normal(128, 2), "blocks.1.norm3.lora_down.weight": normal(2, 1),
        "blocks.1.ffn.2.alpha": np.float32(1), "blocks.1.ffn.0.lora_mid.weight": normal(2, 2),
        "blocks.1.self_attn.v.lora_up.weight": normal(128, 2), "blocks.1.self_attn.v.lora_down.weight": normal(2, 128),
        "blocks.1.self_attn.v.alpha": normal(2), "blocks.0.self_attn.v.lora_B.bias": normal(128),
        "blocks.1.self_attn.k.lora_up.weight": normal(128, 0), "blocks.1.self_attn.k.lora_down.weight": normal(0, 128),
    }  # fmt: skip
    with pytest.raises(SourceError) as error:
        merged(layout, update, tmp_path)
    text = str(error.value)
    names = TO[layout[0]]
    assert "10 updates do not fit" in text
    assert f"patch_embedding.weight {[OUT, IN, *KERNEL]}: diff {[OUT, 16, 1, 2, 2]}" in text
    for name in ("blocks.1.norm3.weight", "blocks.1.self_attn.q.bias", "head.head.weight", "blocks.1.ffn.2.weight"):
        assert names[name] in text
    assert f"{names['head.head.weight']} {[64, 128]}: up [4, 2], down [2, 5], mid [2, 2]" in text
    assert f"{names['blocks.1.self_attn.v.weight']}: alpha [2] is not one number" in text


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, bool])
def test_integers_are_no_weights(layout, tmp_path, dtype):
    update = {"blocks.1.ffn.0.lora_up.weight": np.ones((96, 2), dtype)}
    with pytest.raises(SourceError, match="lora_up.weight is .*no weight without a scale"):
        merged(layout, update, tmp_path)
