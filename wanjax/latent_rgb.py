"""Colours of latents: what previews know of an autoencoder."""

from dataclasses import dataclass

from wanjax.settings import refuse


@dataclass(frozen=True)
class LatentRGB:
    """Colours of latents without decoding them, for previews: rgb in -1..1 = normalised latent [C] @ factors + bias.

    Attributes:
      factors: a row of red, green, blue for each of C channels; bias: one row.
    """

    factors: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        wrong = {len(row) for row in (*self.factors, self.bias)} != {3}
        refuse((wrong, "vae: latent_rgb needs three numbers in each row of its factors, and in its bias"))


WAN_RGB = LatentRGB(
    (
        (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
        (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975),
        (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
        (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861),
    ),
    (-0.1835, -0.0868, -0.3360),
)  # fmt: skip
"""Of Wan2.1's VAE: the numbers of ComfyUI's previews (`comfy/latent_formats.py`), which show the data estimate as its
model has it, so normalised."""
