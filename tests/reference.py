"""What the tests share: the error measure, random weights for torch references, and checkpoint listings."""

import re
from pathlib import Path

import numpy as np
import torch

LISTINGS = Path(__file__).parent / "data" / "wan21"


def relative_error(a, b) -> float:
    """norm(a - b) / norm(b) in float64; b is the reference. Takes numpy, JAX and torch arrays."""
    a, b = (x.detach().float().numpy() if isinstance(x, torch.Tensor) else x for x in (a, b))
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fills every parameter with seeded random values, so that no zero or one hides a mistake.

    Vectors called weight (and gamma) are norms' scales: near 1. Other tensors with one long axis (biases,
    class embeddings): small. Matrices and convolutions: variance-preserving over their inputs. Tables looked
    up by row (embeddings, positions, modulation): of order one. Returns the same module, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_sane(name, noise))
    return module.eval()


def _sane(name: str, noise: torch.Tensor) -> torch.Tensor:
    last = name.rsplit(".", 1)[-1]
    if sum(size > 1 for size in noise.shape) <= 1:
        scale = last in ("weight", "gamma", "scale") and noise.shape[0] == noise.numel()
        return 1 + 0.2 * noise if scale else 0.2 * noise
    if last != "weight" or re.search(r"embed_tokens|shared|position_embedding|relative_attention_bias", name):
        return 0.5 * noise
    return noise / noise[0].numel() ** 0.5


def numpy_state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The module's state dict as numpy arrays (copies)."""
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def listing(file: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, from `tests/data/wan21/<file>`.

    A line is `name  [shape]`, or `name.{i}.x  [shape]  i=0..39` for a whole stack.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for line in (LISTINGS / file).read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, shape, first, last = re.fullmatch(r"(\S+)\s+\[([\d, ]*)\](?:\s+i=(\d+)\.\.(\d+))?\s*", line).groups()
        size = tuple(int(n) for n in shape.split(",") if n.strip())
        names = [name] if first is None else [
            name.replace("{i}", str(i)) for i in range(int(first), int(last) + 1)
        ]  # fmt: skip
        shapes |= dict.fromkeys(names, size)
    return shapes
