"""The options of `python -m samplers.studio`."""

import argparse

from samplers import plan_command
from samplers.options import Parser, device_count, mesh_axes

PORT = 7860


def parser() -> Parser:
    """The command line."""
    p = Parser("python -m samplers.studio", description="Open a page in the browser to make clips on.")
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--model", default="tiny", metavar="tiny|PATH", help="the bundled tiny model or a model folder (default: tiny)")
    add("--dtype", choices=("float32", "bfloat16"), help="precision policy (default: the model's)")
    add("--devices", type=device_count, metavar="N", help="how many share the work, or 'all' (default: one)")
    add("--mesh", type=mesh_axes, default={}, metavar="AXIS=N,...", help="instead of --devices, by hand")
    for name in ("memory", "weights", "vae-memory"):
        add(f"--{name}", **plan_command.OPTIONS[name])
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="IPv4 address or name to listen at; one that others can reach wants a token (default: %(default)s)",
    )
    add("--port", type=int, default=PORT, metavar="N", help="0 takes a free one (default: %(default)s)")
    add(
        "--token",
        metavar="TEXT",
        help="what the address must hold (default: none on this machine alone, else a random one, which is printed)",
    )
    add("--warm-up", action=switch, default=True, help="read and compile before the first clip is asked for (yes)")
    add(
        "--compile-cache",
        action=switch,
        default=True,
        help="keep compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR (yes)",
    )
    return p


MODEL = ("model", "dtype", "devices", "mesh", "memory", "weights", "vae_memory")
"""Those that say which model and where it computes."""
