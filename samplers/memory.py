"""How a model is to lie in memory, and the refusal of a run that cannot fit, by the estimate of `samplers.estimate`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from samplers.estimate import GIB, Estimate, estimate, most_tiles, temporary
from samplers.hostmemory import host_memory
from samplers.plan import Settings
from wanjax import keyframes
from wanjax.checkpoint import WEIGHTS, with_weights
from wanjax.config import ModelConfig
from wanjax.residency import POLICIES

PREFERRED = (("keep", "bf16"), ("stage", "bf16"), ("stage", "int8"), ("stream", "bf16"), ("stream", "int8"))
"""What "auto" takes the first of that fits: memory is cheaper than exactness, and that than time."""
MARGIN = 0.8
"""A run is refused when this part of its estimate is more than there is: an estimate may be too high."""
SPARE = 1.05
"""A way to run is taken on its own account only if its estimate times this fits. Not in the compiler's plans, which the
estimate follows: workspaces of cuDNN, memory in pieces, the runtime's own."""


@dataclass(frozen=True)
class Choice:
    """A way for a model to lie in memory.

    Attributes:
      policy, weights: in POLICIES, WEIGHTS; "bf16" is as stored.
      tiles: windows of the VAE's pictures.
      fits: "yes" with SPARE; "near" where only the MARGIN of the estimate lets it; "no".
      why: one line for a user.
    """

    policy: str
    weights: str
    tiles: int
    estimate: Estimate
    fits: str
    why: str

    def report(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        own = {"policy": self.policy, "weights": self.weights, "vae_tiles": self.tiles, "why": self.why}
        return own | {"estimated_stages": dict(self.estimate.stages), "estimated_host": self.estimate.host}


def available(root: Path = Path("/")) -> int | None:
    """Bytes of the first device, or of the host where that computes; None where nobody tells."""
    device = jax.local_devices()[0]
    return host_memory(root) if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def choose(
    config: ModelConfig,
    settings: Settings,
    mesh: Mapping[str, int] | None = None,
    memory: int | None = None,
    policy: str = "auto",
    weights: str = "auto",
    vae_memory: int | None = None,
    platform: str | None = None,
    host: int | None = None,
) -> Choice:
    """How a clip's model is to lie in memory: the first of PREFERRED that fits, each with the fewest tiles.

    Args:
      memory: bytes of a device; None asks `available`, and where nobody tells all is taken to fit.
      policy, weights: in POLICIES, WEIGHTS, or "auto". "bf16" narrows what is stored in float32; chosen by itself it is
        as stored.
      vae_memory: bytes that encoding keyframes and decoding may take besides the weights.
      platform: as in `estimate`. host: bytes of host memory; None asks.

    Raises:
      ValueError: nothing fits, in one line with the estimate and the largest size of the same shape that does.
    """
    platform = platform or jax.default_backend()
    memory = available() if memory is None else memory
    host = host_memory() if host is None else host
    config = with_weights(config, weights) if weights == "bf16" else config
    pairs = preferred(config, policy, weights, math.prod((mesh or {}).values()))
    found = ways(config, settings, pairs, mesh, memory, vae_memory, platform, host)
    best = next((one for one in found if one.fits == "yes"), None)
    least = min(found, key=lambda one: one.estimate.peak)
    if best is not None or least.fits == "near":
        return best or least
    cut = math.prod((mesh or {}).values()) == 1
    raise ValueError(_refusal(config, settings, mesh, memory, host, platform, least, cut))


def preferred(
    config: ModelConfig, policy: str = "auto", weights: str = "auto", devices: int = 1
) -> list[tuple[str, str]]:
    """(policy, weights) in the order of preference: all of PREFERRED, or those that are left by what is said.

    Args:
      devices: that share the weights; they do not stream unless they are told to, and then are refused.

    Raises:
      ValueError: no such policy or weights.
    """
    for name, value, names in (("memory", policy, POLICIES), ("weights", weights, WEIGHTS)):
        if value not in ("auto", *names):
            raise ValueError(f"{name} {value!r}: choose auto or one of {', '.join(names)}")
    if policy == "auto" and weights == "auto":
        pairs = list(PREFERRED)
    else:
        kinds = ("bf16", "int8") if weights == "auto" else (weights,)
        pairs = [(one, kind) for one in (POLICIES if policy == "auto" else (policy,)) for kind in kinds]
    if devices > 1 and policy == "auto":
        pairs = [pair for pair in pairs if pair[0] != "stream"]
    # Of weights that are stored in 8 bits there is nothing more to be gained.
    return [pair for pair in pairs if pair[1] == "bf16" or weights != "auto" or config.dit.precision.kernel is None]


def ways(
    config: ModelConfig,
    settings: Settings,
    pairs: Sequence[tuple[str, str]],
    mesh: Mapping[str, int] | None,
    memory: int | None,
    vae_memory: int | None,
    platform: str,
    host: int,
) -> list[Choice]:
    """Each (policy, weights) with the fewest tiles that let it fit, or the most where none does; else as `choose`."""
    counts = _tiles(config, settings, mesh, vae_memory, platform)
    found = []
    for policy, weights in pairs:
        whole = estimate(config, settings, mesh, policy, weights, counts[0], platform)
        tried = []
        for tiles in counts:
            own = replace(whole, temporary=temporary(config, settings, mesh or {}, policy, weights, tiles, platform))
            fits = _fits(own, memory, host)
            tried.append((own.peak, tiles, own, fits))
            if fits == "yes":
                break
        *_, tiles, own, fits = tried[-1] if fits == "yes" else min(tried, key=lambda one: one[:2])
        found.append(Choice(policy, weights, tiles, own, fits, _why(policy, weights, tiles, own, memory, fits)))
    return found


def _fits(found: Estimate, memory: int | None, host: int) -> str:
    needs = max(found.peak / memory if memory else 0, found.host / host)
    return "yes" if needs * SPARE <= 1 else "near" if needs * MARGIN <= 1 else "no"


def _tiles(
    config: ModelConfig, settings: Settings, mesh: Mapping[str, int] | None, limit: int | None, platform: str
) -> list[int]:
    """Numbers of the VAE's windows to try, from the fewest. ValueError if none keeps to the limit."""
    several = math.prod((mesh or {}).values()) > 1  # devices share the picture already
    counts = [1] if several else list(range(1, most_tiles(config.vae, settings.size) + 1))
    if limit is None:
        return counts

    def takes(tiles: int) -> int:
        found = temporary(config, settings, mesh or {}, "stage", "bf16", tiles, platform)
        return max(found["keyframes"], found["decode"])

    fitting = [tiles for tiles in counts if takes(tiles) <= limit]
    if not fitting:
        (height, width), least = settings.size, takes(counts[-1])
        raise ValueError(f"vae memory {limit / GIB:.1f} GiB: size {height}x{width} takes at least {least / GIB:.1f} "
                         "(estimated); give more, a smaller size, or --dtype bfloat16")  # fmt: skip
    return fitting


def decode_tiles(config: ModelConfig, settings: Settings, vae_memory: int | None = None) -> int:
    """Windows of the VAE with which a clip is decoded, the VAE alone in memory: the fewest that fit.

    Args:
      vae_memory: bytes that it may take besides the weights; None takes what there is.

    Raises:
      ValueError: that is too little.
    """
    platform, there = jax.default_backend(), available()
    counts = _tiles(config, settings, None, vae_memory, platform)

    def fits(tiles: int) -> bool:
        found = estimate(config, settings, None, "stage", "bf16", tiles, platform)
        return there is None or found.stages["decode"] * SPARE <= there

    return next((tiles for tiles in counts if fits(tiles)), counts[-1])


def _why(policy: str, weights: str, tiles: int, found: Estimate, memory: int | None, fits: str) -> str:
    """What it is, for a note."""
    what = {
        "keep": "all parts are kept in memory",
        "stage": "one part is in memory at a time",
        "stream": "one part is in memory at a time, the transformer's kernels stream from the host",
    }[policy]
    kind = "" if weights == "bf16" else f", the transformer's kernels in {weights}"
    windows = "" if tiles == 1 else f", the VAE in {tiles} windows"
    there = "" if memory is None else f" of {memory / GIB:.1f}"
    doubt = {"yes": "", "near": ", which may be too much", "no": ", which is too much"}[fits]
    return f"memory {policy}: {what}{kind}{windows}; takes about {found.peak / GIB:.1f} GiB{there} (estimated){doubt}"


def check(
    config: ModelConfig,
    settings: Settings,
    mesh: Mapping[str, int] | None = None,
    policy: str = "keep",
    memory: int | None = None,
    platform: str | None = None,
) -> None:
    """Refuses a run that cannot fit, before anything of its size is made.

    Args:
      policy: that the model was loaded under.
      memory: bytes that there are; None asks `available`.

    Raises:
      ValueError: one line with the estimate and the largest size of the same shape that fits.
    """
    platform = platform or jax.default_backend()
    memory = available() if memory is None else memory
    found = estimate(config, settings, mesh, policy, platform=platform)
    if memory is not None and found.peak * MARGIN > memory:
        way = Choice(policy, "bf16", config.vae.tiles, found, "no", "")
        raise ValueError(_refusal(config, settings, mesh, memory, found.host, platform, way))


def _refusal(
    config: ModelConfig, settings: Settings, mesh: Mapping[str, int] | None, memory: int, host: int, platform: str,
    way: Choice, cut: bool = False,
) -> str:  # fmt: skip
    """Why a run cannot be, with what can; `cut` says that the VAE's pictures may be cut into windows."""
    found, there = way.estimate, f"there are {memory / GIB:.1f}"
    if found.host * MARGIN > host:
        return (f"model {config.name}: streams {found.host / GIB:.1f} GiB from host memory, of which there are "
                f"{host / GIB:.1f}; use a larger host, or --weights int8")  # fmt: skip
    weights = max(map(found.resident, found.temporary))
    if weights * MARGIN > memory:
        mend = "use bfloat16 or a larger device" if way.policy == "keep" else "use a larger device, or several"
        return f"model {config.name}: its weights alone are {weights / GIB:.1f} GiB, {there}; {mend}"

    def fits(size: tuple[int, int]) -> bool:
        tiles = most_tiles(config.vae, size) if cut else way.tiles
        own = temporary(config, replace(settings, size=size), mesh or {}, way.policy, way.weights, tiles, platform)
        return max(found.resident(stage) + n for stage, n in own.items()) * MARGIN <= memory

    (height, width), fitting = settings.size, _largest(config, settings.size, fits)
    mend = "use fewer frames" if fitting is None else f"the largest size of this shape is {fitting[0]}x{fitting[1]}"
    return (f"size {height}x{width}, {settings.frames} frames: takes about {found.peak / GIB:.1f} GiB (estimated), "
            f"{there}; {mend}")  # fmt: skip


def _largest(
    config: ModelConfig, size: tuple[int, int], fits: Callable[[tuple[int, int]], bool]
) -> tuple[int, int] | None:
    """The largest (height, width) of this aspect that fits; None where not even the smallest does."""
    low, high = 0, math.prod(size)  # an area that fits, and one that does not
    while high - low > config.size_multiple**2:
        area = (low + high) // 2
        if fits(keyframes.area_size(size, area, config.size_multiple)):
            low = area
        else:
            high = area
    return keyframes.area_size(size, low, config.size_multiple) if low else None
