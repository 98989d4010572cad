"""What the transformer takes: shapes of conditions, of a caller's bias, of a control. Axis letters as in `types`."""

from typing import Any

import jax
import numpy as np

from wanjax.config import DiTConfig
from wanjax.shapes import condition_shapes
from wanjax.types import Conditions, CrossBias, CrossControl


def check_conditions(config: DiTConfig, conditions: Conditions, latents: tuple[int, ...]) -> None:
    """Compares conditions with the model.

    Args:
      latents: shape [B, F, h, w, out_channels].

    Raises:
      ValueError: a missing, superfluous or wrongly shaped condition; latents that patches do not tile.
    """
    batch, *grid, channels = latents
    if channels != config.out_channels or any(n % size for n, size in zip(grid, config.patch_size, strict=True)):
        raise ValueError(
            f"latents {list(latents)}: the model takes {config.out_channels} channels and multiples "
            f"of the patch {config.patch_size}"
        )
    _check_fields("conditions", conditions, condition_shapes(config, batch, tuple(grid)))


def check_cross(
    config: DiTConfig,
    rows: tuple[int, int],
    bias: CrossBias | None,
    control: CrossControl | None = None,
    strength: jax.Array | None = None,
    images: int | None = None,
) -> None:
    """Compares a caller's bias, a control and its strength with the model.

    Args:
      rows: (batch, token frames).
      images: M of the conditions; None is what the model was trained with.

    Raises:
      ValueError: leaves that are not [L, B, F, K] or [L, B, F, M, K] of what the model sees; strength not [L, B, F].
    """
    layers, images = config.num_layers, config.num_images if images is None else images
    if bias is not None:
        wanted = {"text": (layers, *rows, config.text_length),
                  "images": (layers, *rows, images, config.image_tokens) if images else None}  # fmt: skip
        given = {name: shape for name, shape in wanted.items() if getattr(bias, name) is not None}
        _check_fields("cross_bias", bias, given)
    if control is not None:
        anchors = "A" if np.ndim(control.anchors) != 1 else np.shape(control.anchors)[0]
        wanted = {"anchors": (anchors,), "curve": (rows[1], anchors), "floor": (), "isolated": (),
                  "weights": (1 + images,)}  # fmt: skip
        _check_fields("control", control, wanted)
    _check_leaf("strength", strength, None if control is None else (layers, *rows))


def _check_fields(name: str, value: Any, shapes: dict[str, tuple | None]) -> None:
    """Compares array fields of `value` with shapes, as `_check_leaf`."""
    for field, wanted in shapes.items():
        _check_leaf(f"{name}.{field}", getattr(value, field), wanted)


def _check_leaf(name: str, leaf: Any, wanted: tuple | None) -> None:
    """Compares an array with a shape; None is absent, a letter any size but 0. ValueError names both."""

    def show(shape: tuple | None) -> str:
        return "absent" if shape is None else f"[{', '.join(map(str, shape))}]"

    found = None if leaf is None else tuple(np.shape(leaf))
    fits = found == wanted
    if found is not None and wanted is not None and len(found) == len(wanted):
        fits = all(n == size or (isinstance(size, str) and n > 0) for n, size in zip(found, wanted, strict=True))
    if not fits:
        raise ValueError(f"{name} is {show(found)}; this model takes {show(wanted)}")
