"""Tensor names of the diffusion transformer: diffusers layout (`transformer/`) and original Wan2.1 layout."""

from convert.keymap import UNBATCH, Rule, linear, norm, patch
from wanjax.config import DiTConfig


def diffusers(config: DiTConfig) -> list[Rule]:
    """Rules for `WanTransformer3DModel`; the image branch only where the model has one."""
    embed = "condition_embedder"
    rules = [
        Rule("patch_embed/kernel", "patch_embedding.weight", patch(config.patch_size)),
        Rule("patch_embed/bias", "patch_embedding.bias"),
        *linear("time_in", f"{embed}.time_embedder.linear_1"),
        *linear("time_out", f"{embed}.time_embedder.linear_2"),
        *linear("time_modulation", f"{embed}.time_proj"),
        *linear("text_in", f"{embed}.text_embedder.linear_1"),
        *linear("text_out", f"{embed}.text_embedder.linear_2"),
        Rule("head_modulation", "scale_shift_table", UNBATCH),
        *linear("head", "proj_out"),
    ]
    if config.num_images:
        rules += _image_embedder(config)
    return rules + _blocks(config)


def _image_embedder(config: DiTConfig) -> list[Rule]:
    image = "condition_embedder.image_embedder"
    rules = [
        *norm("image_embed/norm_in", f"{image}.norm1"),
        *linear("image_embed/in", f"{image}.ff.net.0.proj"),
        *linear("image_embed/out", f"{image}.ff.net.2"),
        *norm("image_embed/norm_out", f"{image}.norm2"),
    ]
    if config.num_images == 2:
        rules.append(Rule("image_embed/position", f"{image}.pos_embed", UNBATCH))
    return rules


def _blocks(config: DiTConfig) -> list[Rule]:
    block = "blocks.{i}"
    rules = [
        Rule("blocks/modulation", f"{block}.scale_shift_table", UNBATCH),
        *norm("blocks/cross_norm", f"{block}.norm2"),
        *linear("blocks/ffn_in", f"{block}.ffn.net.0.proj"),
        *linear("blocks/ffn_out", f"{block}.ffn.net.2"),
    ]
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
            rules += linear(f"blocks/{ours}/{part}", f"{block}.{theirs}.{name}")
        for part in ("norm_q", "norm_k"):
            rules += norm(f"blocks/{ours}/{part}", f"{block}.{theirs}.{part}", bias=False)
    if config.num_images:
        rules += [
            *linear("blocks/cross_attn/k_image", f"{block}.attn2.add_k_proj"),
            *linear("blocks/cross_attn/v_image", f"{block}.attn2.add_v_proj"),
            *norm("blocks/cross_attn/norm_k_image", f"{block}.attn2.norm_added_k", bias=False),
        ]
    return rules


def original(config: DiTConfig) -> list[Rule]:
    """Rules for `WanModel` of the original repository, also under ComfyUI's single files."""
    rules = [
        Rule("patch_embed/kernel", "patch_embedding.weight", patch(config.patch_size)),
        Rule("patch_embed/bias", "patch_embedding.bias"),
        *linear("time_in", "time_embedding.0"),
        *linear("time_out", "time_embedding.2"),
        *linear("time_modulation", "time_projection.1"),
        *linear("text_in", "text_embedding.0"),
        *linear("text_out", "text_embedding.2"),
        Rule("head_modulation", "head.modulation", UNBATCH),
        *linear("head", "head.head"),
    ]
    if config.num_images:
        rules += [
            *norm("image_embed/norm_in", "img_emb.proj.0"),
            *linear("image_embed/in", "img_emb.proj.1"),
            *linear("image_embed/out", "img_emb.proj.3"),
            *norm("image_embed/norm_out", "img_emb.proj.4"),
        ]
    if config.num_images == 2:
        rules.append(Rule("image_embed/position", "img_emb.emb_pos", UNBATCH))
    return rules + _original_blocks(config)


def _original_blocks(config: DiTConfig) -> list[Rule]:
    block = "blocks.{i}"
    rules = [
        Rule("blocks/modulation", f"{block}.modulation", UNBATCH),
        *norm("blocks/cross_norm", f"{block}.norm3"),
        *linear("blocks/ffn_in", f"{block}.ffn.0"),
        *linear("blocks/ffn_out", f"{block}.ffn.2"),
    ]
    for attention in ("self_attn", "cross_attn"):
        for part in "qkvo":
            rules += linear(f"blocks/{attention}/{part}", f"{block}.{attention}.{part}")
        for part in ("norm_q", "norm_k"):
            rules += norm(f"blocks/{attention}/{part}", f"{block}.{attention}.{part}", bias=False)
    if config.num_images:
        rules += [
            *linear("blocks/cross_attn/k_image", f"{block}.cross_attn.k_img"),
            *linear("blocks/cross_attn/v_image", f"{block}.cross_attn.v_img"),
            *norm("blocks/cross_attn/norm_k_image", f"{block}.cross_attn.norm_k_img", bias=False),
        ]
    return rules
