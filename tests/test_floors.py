"""The floors of the house, held by reading imports: a module imports from its own floor or from below, in no circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("wanjax", "convert", "samplers", "benchmarks")

FLOORS = (
    {
        "types",
        "config",
        "precision",
        "settings",
        "environment",
        "hosts",
        "latent_rgb",
        "compare",
        "marks",
        "publishing",
        "quantise",
        "rooms",
        "undo",
        "targets",
        "writing",
    },
    {
        "layers",
        "rope",
        "retro",
        "kab",
        "cross",
        "method",
        "attention",
        "sharding",
        "layout",
        "pieces",
        "accepted",
        "shapes",
        "flow",
        "lora",
    },
    {"dit", "vae", "umt5", "clip", "tokenizer"},
    {
        "keyframes",
        "colour",
        "frames",
        "conditioning",
        "guidance",
        "manifest",
        "folder",
        "store",
        "layered",
        "streaming",
        "residency",
        "checkpoint",
    },
)
"""Of wanjax, from the ground up."""


def modules():
    """{dotted name: path} of everything that is not a test."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(path, known, lazy=True):
    """Our own modules that a file imports; without `lazy`, only those that importing the file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazy else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in known}


def floor(name):
    """Of a module of wanjax; None for one that the table does not know."""
    place = name.split(".")[1]
    return next((i for i, names in enumerate(FLOORS) if place in names), None)


def test_packages_import_downward():
    known = modules()
    allowed = {"wanjax": {"wanjax"}, "convert": {"convert", "wanjax"}, "samplers": {"samplers", "wanjax"}}
    also = {"samplers.budget": {"convert.hub", "convert.families"}}  # it asks the hub what a download weighs
    for name, path in known.items():
        package = name.split(".")[0]
        if package in allowed:
            above = {one for one in imported(path, known) if one.split(".")[0] not in allowed[package]}
            above -= {one for module in also.get(name, ()) for one in above if one.startswith(module)}
            assert not above, f"{name} imports {above}"


def test_wanjax_imports_downward():
    known = {name: path for name, path in modules().items() if name.startswith("wanjax.")}
    for name, path in known.items():
        assert floor(name) is not None, f"{name} stands on no floor; add it to FLOORS"
        above = {one for one in imported(path, known) if floor(one) > floor(name)}
        assert not above, f"{name} imports {above}"


def test_no_circles():
    known = modules()
    # A package's front door names what is inside; nothing inside asks it for more than a module.
    below = {name: imported(path, known, lazy=False) - {name, name.rpartition(".")[0], *PACKAGES}
             for name, path in known.items() if name not in PACKAGES}  # fmt: skip
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for one in sorted(below.get(name, ())):
                visit(one, [*trail, name])
            done.add(name)

    for name in sorted(below):
        visit(name, [])
