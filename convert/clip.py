"""Tensor names of the CLIP vision tower: diffusers layout (`image_encoder/`) and original Wan2.1 layout."""

from collections.abc import Iterable

from convert.keymap import LINEAR, SAME, UNBATCH, Rule, Transform, linear, norm, patch
from wanjax.config import CLIPConfig

BESIDE = ("visual_projection.weight", "text_model.", "text_projection", "logit_scale")
"""Beginnings of names that a whole CLIP has beside its vision tower."""


def diffusers(config: CLIPConfig) -> list[Rule]:
    """Rules for `CLIPVisionModel`, whose names some files write behind `vision_model.`; `split` takes that off."""
    block = "encoder.layers.{i}"
    rules = [
        Rule("patch_embed/kernel", "embeddings.patch_embedding.weight", patch((config.patch_size,) * 2)),
        Rule("class_embed", "embeddings.class_embedding"),
        Rule("position_embed", "embeddings.position_embedding.weight"),
        *norm("pre_norm", "pre_layrnorm"),
        *norm("blocks/attn_norm", f"{block}.layer_norm1"),
        *norm("blocks/ffn_norm", f"{block}.layer_norm2"),
        *linear("blocks/ffn_in", f"{block}.mlp.fc1"),
        *linear("blocks/ffn_out", f"{block}.mlp.fc2"),
    ]
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        rules += linear(f"blocks/attn/{ours}", f"{block}.self_attn.{theirs}")
    return rules


def unused(config: CLIPConfig) -> tuple[str, ...]:
    """Names that a file may hold and Wan2.1 does not read: last block, final norm, index buffer."""
    last = {rule.theirs.replace("{i}", str(config.num_layers)) for rule in diffusers(config) if rule.stacked}
    return (*sorted(last), "post_layernorm.weight", "post_layernorm.bias", "embeddings.position_ids")


# [1, 1, D], the class token's own place among the patches.
TOKEN = Transform(lambda x: x.reshape(-1), lambda x: x[None, None], lambda s: (1, 1, *s))


def original(config: CLIPConfig) -> list[Rule]:
    """Rules for the `visual.` part of the open-clip file of the original repository."""
    block = "visual.transformer.{i}"
    rules = [
        Rule("patch_embed/kernel", "visual.patch_embedding.weight", patch((config.patch_size,) * 2)),
        Rule("class_embed", "visual.cls_embedding", TOKEN),
        Rule("position_embed", "visual.pos_embedding", UNBATCH),
        *norm("pre_norm", "visual.pre_norm"),
        *norm("blocks/attn_norm", f"{block}.norm1"),
        *norm("blocks/ffn_norm", f"{block}.norm2"),
        *linear("blocks/ffn_in", f"{block}.mlp.0"),
        *linear("blocks/ffn_out", f"{block}.mlp.2"),
        *linear("blocks/attn/o", f"{block}.attn.proj"),
    ]
    for k, part in enumerate("qkv"):
        rules += [
            Rule(f"blocks/attn/{part}/kernel", f"{block}.attn.to_qkv.weight", LINEAR, (k, 3)),
            Rule(f"blocks/attn/{part}/bias", f"{block}.attn.to_qkv.bias", SAME, (k, 3)),
        ]
    return rules


def original_unused(config: CLIPConfig, names: Iterable[str]) -> tuple[str, ...]:
    """Which of a file's `names` Wan2.1 does not read: last block, head, final norm, and the text tower."""
    last = f"visual.transformer.{config.num_layers}."
    others = ("visual.head", "visual.post_norm.", "textual.", "log_scale", last)
    return tuple(name for name in names if name.startswith(others))
