"""Every code block of README.md and docs/ is run as it stands, but for those listed here, each with its reason; every
command in them is understood by its real parser, also where it stands within a sentence."""

import argparse
import contextlib
import dataclasses
import json
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import documents
import pytest
from documents import DOCUMENTS, ROOT, arguments, blocks, mentions
from nano import NANO, write_model
from PIL import Image

from samplers.files import example
from samplers.plan import Settings
from samplers.skipping import Schedule
from wanjax import writing
from wanjax.config import preset

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]

NOT_RUN = {
    r"^python3 -m venv|pip install": "installs; .ci/run does it in a fresh environment",
    r"-m pytest|\.ci/run": "would run this test again",
    r"--distributed": "several processes: tests/test_hosts.py",
    r"--size 480x864 --steps 50": "the 14B's size; its options one by one: tests/test_diffusers_pipeline.py",
    r"--frames 49 33": "two more lengths of the film that the README makes",
    r"-m benchmarks\.tiny\.train_vae": "hours: tests/test_train_vae.py",
    r"-m benchmarks\.tiny\.train_dit": "hours: tests/test_train_dit.py",
    r"-m benchmarks\.tiny\.evaluate": "minutes: tests/test_evaluate.py",
    r"-m benchmarks\.lora_": "needs the 14B: tests/test_lora_recipe.py",
    r"-m samplers\.studio": "a server: tests/test_studio.py",
    r"CrossBias\(text=bias\)": "tests/test_ablation.py runs it and looks at what it did",
    r"loratree\.save\(": "tests/test_lora_tree.py runs it and takes a step by it",
}
"""What is not run here: expression found in the command, or in the block of Python, and why."""


def excused(text):
    return any(re.search(expression, text) for expression in NOT_RUN)


class Parsed(BaseException):
    """In place of what a command does when its arguments are understood."""


def started(module, argv):
    """`python -m module`, in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'.*' found in sys.modules after import of package", RuntimeWarning)
        patch.setattr(sys, "argv", [module, *argv])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code or 0
    return 0


@pytest.fixture
def understood(monkeypatch, capsys):
    """Says of (module, arguments) what its parser has against them; None if nothing."""

    def parsing(original):
        def parse(self, args=None, namespace=None):
            original(self, args, namespace)
            raise Parsed

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, parsing(getattr(argparse.ArgumentParser, name)))

    def complaint(module, argv):
        try:
            code = started(module, argv)
        except Parsed:
            return None
        told = capsys.readouterr()
        return None if code == 0 and "--help" in argv else f"exit code {code}: {told.err.strip()[-300:]}"

    return complaint


def test_blocks_are_of_a_kind_that_is_looked_at():
    for block in BLOCKS:
        assert block.kind in ("sh", "python", "json", "text", "indented"), f"{block.place}: a block of {block.kind!r}"
        if block.kind == "python":
            compile(block.text, block.place, "exec")
        if block.kind == "json":
            assert [json.loads(line) for line in block.text.splitlines()], block.place


def test_every_command_is_understood(understood):
    """Also those that are not run, and those within sentences, which may leave out what they need."""
    commands = [(block.place, one) for block in BLOCKS for one in block.commands]
    assert len(commands) > 25
    wrong = []
    for place, command in commands:
        told = arguments(command, rest="")
        if told is None:
            assert excused(command), f"{place}: {command}: no command of Python; list it with a reason"
        elif told[0].split(".")[0] in ("samplers", "convert", "benchmarks"):
            problem = understood(*told)
            wrong += [f"{place}: {command}: {problem}"] if problem else []
    for document in DOCUMENTS:
        for command in mentions(document):
            module, argv = arguments(command)
            if module.split(".")[-1].isupper():  # stands for any
                continue
            problem = understood(module, argv)
            if problem and (argv or "arguments are required" not in problem):
                wrong.append(f"{document.name}: {command}: {problem}")
    assert not wrong, "\n".join(wrong)


def test_a_wrong_command_is_not_understood(understood):
    assert "unrecognized arguments: --nonsense" in understood("samplers.inbetween", ["--nonsense"])
    assert "invalid choice" in understood("convert", ["a", "b", "--dtype", "f13"])
    assert "exit code" in understood("samplers.plan", ["--frames", "many"])


def test_what_is_found(tmp_path, monkeypatch):
    """Commands over several lines, behind `&&`, with comments, variables and a bare `...`; no block is passed over."""
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "x.md").write_text(
        "Text with `python -m convert A\nB`.\n\n```sh\n# no command\nX_Y=1 python -m a.b --c 'd e' \\\n  --f ... # g\n"
        'ls && .venv/bin/python -m h "..."\n```\n\n    python -m i\n    python -m j\n\n```\nunknown\n```\n'
    )
    shell, indented, other = blocks(tmp_path / "x.md")
    assert (shell.place, shell.kind, indented.kind, other.kind) == ("x.md:4", "sh", "indented", "")
    assert [arguments(one, "--z") for one in shell.commands] == [
        ("a.b", ["--c", "d e", "--f", "--z"]), None, ("h", ["..."])
    ]  # fmt: skip
    assert [arguments(one) for one in indented.commands] == [("i", []), ("j", [])]
    assert mentions(tmp_path / "x.md") == ["python -m convert A B"]


def test_reasons_name_tests_that_are_there():
    for expression, reason in NOT_RUN.items():
        for file in re.findall(r"tests/\w+\.py", reason):
            if not expression.endswith("studio") or (ROOT / "samplers" / "studio").exists():
                assert (ROOT / file).exists(), (expression, file)


@pytest.fixture(scope="module")
def pantry(tmp_path_factory):
    """What the documents take as given, by the names that they give it."""
    folder = tmp_path_factory.mktemp("pantry")
    pair = example()
    for name, end in (("a.png", "first"), ("b.png", "last"), ("b.jpg", "last"), ("c.png", "first")):
        Image.open(pair[end]).convert("RGB").save(folder / name)
    # As many layers as the documents speak of, and steps that can be skipped.
    own = dataclasses.replace(
        NANO, dit=dataclasses.replace(NANO.dit, num_layers=13), sampling=dataclasses.replace(NANO.sampling, steps=5)
    )
    for name in ("SRC", "wan-flf2v"):
        write_model(folder / name, own)
    schedules = ((folder / "skip.json", preset("tiny")), (folder / "wan-flf2v" / "skip.json", own))
    for file, config in schedules:
        settings = Settings.of(config)
        writing.write_json(file, Schedule.of(settings, (2,), 0.0, 1).report())
    (folder / "pairs").mkdir()
    for end, image in (("first", "a.png"), ("last", "b.png")):
        shutil.copy(folder / image, folder / "pairs" / f"one.{end}.png")
    lines = [{"first": "a.png", "last": "b.png", "seed": seed, "out": f"{seed}.mp4"} for seed in (0, 1)]
    (folder / "clips.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "old").mkdir()
    keyframes = ["--first", "a.png", "--last", "b.png"]
    with contextlib.chdir(folder):
        assert started("samplers.inbetween", [*keyframes, "--out", "clip.mp4", "--quiet"]) == 0
        own = ["--model", "wan-flf2v", "--keep-latents", "--out", "old/clip.mp4", "--quiet"]
        assert started("samplers.inbetween", [*keyframes, *own]) == 0
    shutil.copy(folder / "old" / "clip.latents.safetensors", folder)
    return folder


PICTURES = ("a.png", "b.png", "b.jpg", "c.png", "old")


def serve(pantry, folder, words, made=()):
    """Copies what `words` name, as far as it is not there yet, and is not about to be made."""
    for item in pantry.iterdir():
        named = any(word == item.name or word.startswith(f"{item.name}/") for word in words)
        if (item.name in PICTURES or named) and item.name not in made and not (folder / item.name).exists():
            (shutil.copytree if item.is_dir() else shutil.copy)(item, folder / item.name)


def made_by(module, argv):
    """What a command makes, as far as it says so."""
    if module == "convert" and argv[0] != "inspect":
        return argv[1:2]
    return [argv[argv.index("--out") + 1]] if "--out" in argv else []


def run_shell(block, pantry, folder):
    for command in block.commands:
        if excused(command):
            continue
        own = " --first a.png --last b.png" if "--model" in command and "--first" not in command else ""
        module, argv = arguments(command, rest=f"{own} --overwrite")
        made = made_by(module, argv)
        serve(pantry, folder, argv, made)
        assert started(module, argv) == 0, f"{block.place}: {command}"
        assert all((folder / name).exists() for name in made), f"{block.place}: {command}: made no {made}"


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_the_blocks_of_a_document_run(document, pantry, tmp_path, monkeypatch, capfd):
    """Each block in a folder of its own, its commands in turn; `clips.jsonl` is what the document shows of it."""
    for number, block in enumerate(blocks(document)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        lists = [one.text for one in blocks(document) if one.kind == "json"]
        if lists:
            Path("clips.jsonl").write_text(lists[0])
        if block.kind == "python" and not excused(block.text):
            serve(pantry, folder, re.findall(r"\"([^\"]*)\"", block.text))
            exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
        elif block.kind in ("sh", "indented"):
            run_shell(block, pantry, folder)
        print(capfd.readouterr().err)
    for command in mentions(document):
        module, argv = arguments(command)
        if module == "samplers.plan" and argv:
            assert started(module, argv) == 0, command
