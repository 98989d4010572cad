"""Dtypes of the models by role, and the policies that are made of them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from jax import lax

from wanjax.settings import refuse

_DTYPES = ("float32", "bfloat16", "float16")
_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "product": ("auto", "float32", "compute"), "passes": ("exact", "fast"),
    "kernel": (None, "int8", "float8_e4m3fn"),
}  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """Dtypes of one model, by role.

    Attributes:
      param: how weights are stored.
      compute: inputs of matrix products and convolutions.
      residual: the stream that blocks add to.
      softmax: attention logits and probabilities.
      product: what matrix products of half-precision inputs return before it is cast: "float32", "compute" (the compute
        dtype; on CPUs an order of magnitude slower) or "auto", which `ModelConfig.for_platform` resolves and which is
        "float32" where it is not resolved. They are summed in float32 either way.
      kernel: how the kernels of the transformer's blocks are stored instead: "int8" or "float8_e4m3fn", with a float32
        factor for each output channel (`quantise`); None for `param`. Products are in `compute` all the same.
      passes: how products of float32 are computed: "exact", or "fast", which is TF32 on GPUs and three passes of
        bfloat16 on TPUs. CPUs know no other than exact.
    Time embedding, modulation, norms, head (their parameters too) and solver arithmetic are float32 under every
    policy.
    """

    param: str = "float32"
    compute: str = "float32"
    residual: str = "float32"
    softmax: str = "float32"
    product: str = "auto"
    kernel: str | None = None
    passes: str = "exact"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, names = getattr(self, field.name), _CHOICES.get(field.name, _DTYPES)
            told = ", ".join(str(name) for name in names)
            refuse((value not in names, f"precision: {field.name}={value!r} is not one of {told}"))
        overflows = bool(self.kernel) and self.compute == "float16"
        refuse((overflows, f"precision: products of kernel={self.kernel!r} overflow compute='float16'; take bfloat16"))

    @property
    def plain(self) -> "Precision":
        """The same without 8-bit kernels."""
        return dataclasses.replace(self, kernel=None)

    @property
    def matmul(self) -> lax.Precision | None:
        """float32 must mean float32 on accelerators too, where the default is TF32 or one pass of bfloat16."""
        if self.compute != "float32":
            return None
        return lax.Precision.HIGHEST if self.passes == "exact" else lax.Precision.HIGH


FLOAT32 = Precision()
BFLOAT16 = Precision(param="bfloat16", compute="bfloat16")
VAE_BFLOAT16 = Precision(compute="float16", residual="float16")
"""The autoencoder's that goes with BFLOAT16: half the memory of float32, steps of 2**-11 where bfloat16's are 2**-8.
Clips decoded by the bundled model's weights are 77 dB from float32's (bfloat16: 60). `vae` keeps it within range, and
`ModelConfig.for_platform` takes others where there are no such products. The weights stay float32: they are small."""
