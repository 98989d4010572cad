"""Tensor names of the UMT5 encoder in the diffusers layout (`text_encoder/`)."""

from convert.keymap import Rule, linear, norm
from wanjax.config import UMT5Config

IGNORE = ("encoder.embed_tokens.weight",)
"""A second copy of `shared.weight` that some files carry."""


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
