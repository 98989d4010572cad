"""Tensor names of the CLIP vision tower in the diffusers layout (`image_encoder/`)."""

from collections.abc import Mapping
from typing import TypeVar

from convert.keymap import Rule, linear, norm, patch
from wanjax.config import CLIPConfig

PREFIX = "vision_model."

T = TypeVar("T")


def plain_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors (or shapes) under names without the `vision_model.` that some files put in front.

    Raises:
      ValueError: a name is there with the prefix and without it.
    """
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    if len(plain) != len(tensors):
        twice = sorted(name for name in tensors if PREFIX + name in tensors)
        raise ValueError(f"clip: tensors both with and without {PREFIX}: {', '.join(twice)}")
    return plain


def diffusers(config: CLIPConfig) -> list[Rule]:
    """Rules for `CLIPVisionModel` under `plain_names`."""
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
