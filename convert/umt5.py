"""Tensor names of the UMT5 encoder: diffusers layout (`text_encoder/`) and original Wan2.1 layout."""

from convert.keymap import Rule, linear, norm
from wanjax.config import UMT5Config

BESIDE = ("spiece_model", "logit_scale")
"""What ComfyUI's files hold beside the encoder: the tokenizer, and a number of its own."""

IGNORE = ("encoder.embed_tokens.weight", "decoder.", "lm_head.weight", *BESIDE)
"""Beginnings of names that are not read: a second copy of `shared.weight`, and a whole UMT5's other half."""


def diffusers(config: UMT5Config) -> list[Rule]:
    """Rules for `UMT5EncoderModel`; the same for every size, so `config` is not read."""
    block = "encoder.block.{i}"
    attention, ffn = f"{block}.layer.0", f"{block}.layer.1"
    rules = [
        Rule("token_embed", "shared.weight"),
        *norm("final_norm", "encoder.final_layer_norm", bias=False),
        *norm("blocks/attn_norm", f"{attention}.layer_norm", bias=False),
        Rule("blocks/attn/position_bias", f"{attention}.SelfAttention.relative_attention_bias.weight"),
        *norm("blocks/ffn_norm", f"{ffn}.layer_norm", bias=False),
    ]
    for part in "qkvo":
        rules += linear(f"blocks/attn/{part}", f"{attention}.SelfAttention.{part}", bias=False)
    for ours, theirs in (("ffn_gate", "wi_0"), ("ffn_in", "wi_1"), ("ffn_out", "wo")):
        rules += linear(f"blocks/{ours}", f"{ffn}.DenseReluDense.{theirs}", bias=False)
    return rules


def original(config: UMT5Config) -> list[Rule]:
    """Rules for `models_t5_umt5-xxl-enc-bf16.pth`; the same for every size, so `config` is not read."""
    block = "blocks.{i}"
    rules = [
        Rule("token_embed", "token_embedding.weight"),
        *norm("final_norm", "norm", bias=False),
        *norm("blocks/attn_norm", f"{block}.norm1", bias=False),
        Rule("blocks/attn/position_bias", f"{block}.pos_embedding.embedding.weight"),
        *norm("blocks/ffn_norm", f"{block}.norm2", bias=False),
    ]
    for part in "qkvo":
        rules += linear(f"blocks/attn/{part}", f"{block}.attn.{part}", bias=False)
    for ours, theirs in (("ffn_gate", "gate.0"), ("ffn_in", "fc1"), ("ffn_out", "fc2")):
        rules += linear(f"blocks/{ours}", f"{block}.ffn.{theirs}", bias=False)
    return rules
