"""How the video tokens of a clip lie on the devices that share them.

Every device holds an equal part of EVERY frame, so that what concerns a frame (cross-attention's bias, frame attention)
is computed where the tokens are, with nothing but one small sum over the devices. Attention does not care for the order
of tokens, and each keeps its own rotary factors. Padding, to parts of equal size that the attention kernel's blocks
divide, is put in once, behind the patch embedding, and is never attended to. Axis letters as in `types`; Q queries
(tokens) of one frame.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class TokenLayout:
    """Tokens [F * Q], frame by frame, as [parts * local]: part i holds tokens i * share on of each frame, then padding.

    Attributes:
      frames, queries: F and Q.
      parts: devices that share the tokens.
      local: tokens of one part, padding included.
    """

    frames: int
    queries: int
    parts: int = 1
    local: int = 0

    @classmethod
    def of(cls, frames: int, queries: int, parts: int = 1, unit: int = 1) -> "TokenLayout":
        """The smallest one whose parts are multiples of `unit`."""
        own = frames * -(-queries // parts)
        return cls(frames, queries, parts, -(-own // unit) * unit)

    @property
    def share(self) -> int:
        """Tokens of a frame that one part holds, padding included."""
        return -(-self.queries // self.parts)

    @property
    def padded(self) -> bool:
        return self.parts * self.local > self.frames * self.queries

    def lay(self, x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """[B, F * Q, ...] -> [B, parts * local, ...], padding zero."""
        if self.parts == 1 and not self.padded:
            return x
        xp = np if isinstance(x, np.ndarray) else jnp
        batch, _, *rest = x.shape
        none = [(0, 0)] * len(rest)
        x = x.reshape(batch, self.frames, self.queries, *rest)
        x = xp.pad(x, [(0, 0), (0, 0), (0, self.parts * self.share - self.queries), *none])
        x = xp.moveaxis(x.reshape(batch, self.frames, self.parts, self.share, *rest), 2, 1)
        x = x.reshape(batch, self.parts, self.frames * self.share, *rest)
        x = xp.pad(x, [(0, 0), (0, 0), (0, self.local - self.frames * self.share), *none])
        return x.reshape(batch, self.parts * self.local, *rest)

    def restore(self, x: jax.Array) -> jax.Array:
        """[B, parts * local, ...] -> [B, F * Q, ...]."""
        if self.parts == 1 and not self.padded:
            return x
        batch, _, *rest = x.shape
        x = x.reshape(batch, self.parts, self.local, *rest)[:, :, : self.frames * self.share]
        x = jnp.moveaxis(x.reshape(batch, self.parts, self.frames, self.share, *rest), 1, 2)
        x = x.reshape(batch, self.frames, self.parts * self.share, *rest)[:, :, : self.queries]
        return x.reshape(batch, self.frames * self.queries, *rest)

    def valid(self) -> np.ndarray | None:
        """bool [parts * local], False for padding; None where there is none."""
        if not self.padded:
            return None
        return self.lay(np.ones((1, self.frames * self.queries), bool))[0]

    def split(self, x: jax.Array) -> jax.Array:
        """One part's tokens [B, local, ...] by frame: [F, B, share, ...]."""
        batch, _, *rest = x.shape
        x = x[:, : self.frames * self.share].reshape(batch, self.frames, self.share, *rest)
        return jnp.moveaxis(x, 1, 0)

    def join(self, x: jax.Array) -> jax.Array:
        """[F, B, share, ...] -> [B, local, ...], padding zero behind the frames."""
        _, batch, _, *rest = x.shape
        x = jnp.moveaxis(x, 0, 1).reshape(batch, self.frames * self.share, *rest)
        return jnp.pad(x, [(0, 0), (0, self.local - x.shape[1]), *[(0, 0)] * len(rest)])

    def counted(self, part: jax.Array | int) -> jax.Array | None:
        """float32 [share], 1 for the tokens of a frame that a part really holds and 0 for padding; None: all count."""
        if self.parts * self.share == self.queries:
            return None
        return (part * self.share + jnp.arange(self.share) < self.queries).astype(jnp.float32)
