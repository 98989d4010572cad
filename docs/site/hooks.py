"""The repository's own documents as pages of the site, in the places that they have there, so that their links hold."""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/*.md", "benchmarks/**/*.md")
NOTEBOOKS = ("docs/*.ipynb",)
LINK = re.compile(r"(?:\]\(|src=\")([^)\"#\s:]+)[)\"#]")


def on_files(files: Files, config) -> Files:
    """Adds the documents, what they link to, and the notebooks as pages."""
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text("utf-8"))}
    for path in sorted(pages | {path for path in linked if path.is_file() and path.is_relative_to(ROOT)}):
        files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    for path in sorted(path for pattern in NOTEBOOKS for path in ROOT.glob(pattern)):
        files.append(File.generated(config, _place(path.with_suffix(".md")), content=_notebook(path)))
    return files


def _place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _notebook(path: Path) -> str:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts)
