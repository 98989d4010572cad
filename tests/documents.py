"""Code blocks and commands of the documents, as a reader would copy them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
FENCE = re.compile(r"^```(\w*) *$")
INLINE = re.compile(r"`(python -m [^`]+)`")
MODULE = re.compile(r"python3? -m ([\w.]+)")
ELLIPSIS = re.compile(r"(?<![\w\"'.])\.\.\.(?![\w\"'.]).*")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
      file, line: where it begins; the file relative to the root.
      kind: the language of its fence; "" of a fence without, "indented" of a block without fence.
      text: its lines.
    """

    file: str
    line: int
    kind: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def commands(self) -> tuple[str, ...]:
        """Of a shell block all commands, of another its lines that begin with `python -m`; each in one line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        wanted = (line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
        shell = self.kind in ("sh", "indented")
        commands = [part.strip() for line in wanted for part in (line.split(" && ") if shell else [line])]
        return tuple(one for one in commands if shell or one.startswith("python -m "))


def blocks(document: Path) -> list[Block]:
    """All code blocks of a document, in order; indented ones where they begin with a command of Python."""
    found, open_at, kind, held = [], 0, None, []
    lines = document.read_text(encoding="utf-8").splitlines()
    name = document.relative_to(ROOT).as_posix()
    for number, line in enumerate([*lines, ""], 1):
        fence = FENCE.match(line)
        if kind is None and fence:
            open_at, kind, held = number, fence[1], []
        elif kind is None and re.match(r" {4,}python", line):
            open_at, kind, held = number, "indented", [line]
        elif kind == "indented" and not line.startswith("    ") or kind not in (None, "indented") and fence:
            found.append(Block(name, open_at, kind, "\n".join(held)))
            kind = None
        elif kind is not None:
            held.append(line)
    assert kind is None, f"{name}:{open_at}: a code block without an end"
    return found


def mentions(document: Path) -> list[str]:
    """Commands within the text."""
    return [" ".join(one.split()) for one in INLINE.findall(document.read_text(encoding="utf-8"))]


def arguments(command: str, rest: str = "") -> tuple[str, list[str]] | None:
    """(module, arguments) of a `python -m` command, without a comment behind it; None of another command.

    Args:
      rest: stands for a bare `...`, and whatever follows it.
    """
    words = shlex.split(ELLIPSIS.sub(lambda _: rest, command), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if len(words) < 3 or not words[0].endswith(("python", "python3")) or words[1] != "-m":
        return None
    return words[2], words[3:]
