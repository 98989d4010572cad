"""The notebook runs, and the documents build into a site that asks nobody outside; each in a process of its own."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("docs/*.ipynb"))

# Kernels are found by a specification that is installed; this one is the interpreter's own.
RUN = """
import sys
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

class Kernel(AsyncKernelManager):
    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="own", language="python")

book = nbformat.read(sys.argv[1], 4)
NotebookClient(book, timeout=1500, kernel_manager_class=Kernel).execute()
nbformat.write(book, sys.argv[2])
"""


def run(command, folder, **environment):
    """A process that imports what is in the clone; no fake devices of the tests' own."""
    own = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0", "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=os.environ | own | environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    """In a folder that is not the clone, by a fresh kernel; a cell that raises ends it."""
    done = run([sys.executable, "-c", RUN, notebook, tmp_path / "executed.ipynb"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    book = json.loads((tmp_path / "executed.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell["outputs"] if out.get("name") == "stderr"]


def test_the_tour_shows_what_it_should():
    """Load, make, KAB, a bias, a gradient, eight devices, a training step; without outputs in the clone."""
    book = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    code = "\n".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code")
    for needed in ("load(", "inbetween(", "strength_mid", "assert not compiled", "CrossBias(", "jax.grad(", "optax.",
                   "host_platform_device_count=8", "make_mesh(", "flow.draw("):  # fmt: skip
        assert needed in code, needed
    assert code.index("XLA_FLAGS") < code.index("import jax")
    for cell in book["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


class Asked(HTMLParser):
    """Addresses that a page makes a browser ask for by itself: not links, which a reader follows."""

    LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        if tag in self.LOADING and told.get("rel") != "canonical":
            self.found.append(told.get(self.LOADING[tag]))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = run([sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "docs/site/mkdocs.yml", "-d",
                folder / "site"], folder)  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder / "site"


def test_every_document_is_in_the_navigation():
    """By a line of its own in docs/site/mkdocs.yml, or nobody finds it there."""
    listed = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    for document in (*ROOT.glob("docs/*.md"), *NOTEBOOKS):
        assert f": docs/{document.stem}.md\n" in listed, document


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_asks_nobody(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        parser = Asked()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.found
        outside = [address for address in parser.found if address and re.match(r"(?i)(\w+:)?//", address)]
        assert not outside, (page, outside)
        if page.name != "404.html":  # shown for any address, so its own are from the root
            lost = [address for address in filter(None, parser.found) if not (page.parent / address).exists()]
            assert not lost, (page, lost)
    for sheet in site.rglob("*.css"):
        used = re.findall(r"(?i)(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", sheet.read_text("utf-8"))
        assert not used, (sheet, used)


@pytest.mark.slow
def test_the_site_has_every_document_and_the_public_names(site):
    for document in (*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*/README.md"), *NOTEBOOKS):
        page = document.relative_to(ROOT).with_suffix(".html")
        assert (site / page).exists() or (site / page.with_name("index.html")).exists(), document
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    for name in ("samplers.pipeline.inbetween", "samplers.plan.Settings", "wanjax.flow.draw", "wanjax.lora.init",
                 "wanjax.dit.WanDiT", "wanjax.kab.KAB", "convert.load", "samplers.solvers.coefficients"):  # fmt: skip
        assert f'id="{name}"' in reference, name
    # Names that share an entry of a docstring are there apart.
    assert "<code>first</code>" in reference and "<code>last</code>" in reference and "first,</" not in reference
