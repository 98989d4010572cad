"""Ends that cannot wait for who holds something: what another thread takes away, and what it must leave."""

import json
import threading

import pytest

from samplers.resume import RunFolder
from wanjax import publishing, undo, writing
from wanjax.writing import OutputError, Target


@pytest.mark.parametrize("folders", [1, 2])
def test_hidden_folders_go_from_another_thread(tmp_path, folders):
    """Meanwhile the working one cannot publish; what stood there stays, and other runs may begin on the names."""
    outs = [tmp_path / f"{n}" / "clip.json" for n in range(folders)]
    for out in outs:
        out.parent.mkdir()
        writing.write_json(out, {"old": True})
    before = {out: out.read_bytes() for out in outs}

    def work(undoing):
        with writing.staged(writing.check([Target(out) for out in outs], overwrite=True)) as parts:
            for part in parts:
                part.write_text("half")
            thread = threading.Thread(target=undoing.run)
            thread.start()
            thread.join()
            assert [sorted(path.name for path in out.parent.iterdir()) for out in outs] == [["clip.json"]] * folders
            with writing.staged(writing.check([Target(out) for out in outs], overwrite=True)):
                assert all(list(out.parent.glob(".wanjax*")) for out in outs)

    with undo.collected() as undoing:
        with pytest.raises((OutputError, OSError)):
            work(undoing)
        undoing.run()  # closed blocks are not called any more
    assert {out: out.read_bytes() for out in outs} == before


@pytest.mark.parametrize("moment", ["publish_all", "begin"])
@pytest.mark.parametrize("then", ["goes on", "dies"])
def test_what_was_moved_aside_is_never_lost(tmp_path, monkeypatch, moment, then):
    """It comes in the middle of giving names, or right before: the next run finds the old result or the new one."""
    out, other = tmp_path / "clip.json", tmp_path / "sheet.json"
    for path in (out, other):
        writing.write_json(path, {"old": True})
    whole = getattr(writing, moment)

    class Died(BaseException):
        pass

    with undo.collected() as undoing, monkeypatch.context() as patched:

        def passing(*arguments):
            if moment == "begin":
                undoing.run()
            found = whole(*arguments)
            undoing.run()
            return found

        patched.setattr(writing, moment, passing)
        if then == "dies":  # nothing is undone, as if the process had ended there
            patched.setattr(writing, "put_back", lambda moves: ["kept"])
            patched.setattr(writing, "done", lambda first: (_ for _ in ()).throw(Died))
        try:
            with writing.staged(writing.check([Target(out), Target(other)], overwrite=True)) as parts:
                for part in parts:
                    part.write_text(json.dumps({"written_by": "x", "old": False}))
        except (Died, OutputError, OSError):
            pass
    writing.leftovers(tmp_path)
    found = [json.loads(path.read_text())["old"] for path in (out, other)]
    assert found in ([True, True], [False, False])
    assert not list(tmp_path.glob(".wanjax*"))


def test_a_folder_that_holds_something_moved_aside_stays(tmp_path):
    out = tmp_path / "clip.json"
    with undo.collected() as undoing, writing.staged(writing.check([Target(out)])) as (part,):
        (part.parent.parent / publishing.OLD / "clip.json").write_text("years of work")
        undoing.run()
        assert (part.parent.parent / publishing.OLD / "clip.json").read_text() == "years of work"
        (part.parent.parent / publishing.OLD / "clip.json").unlink()
        part.parent.mkdir()
        part.write_text("{}")


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_folder_stays_for_what_is_kept(tmp_path, kept):
    folder = RunFolder.of(tmp_path / "clip.mp4", {"seed": 1})
    with undo.collected() as undoing, folder.opened():
        if kept:
            writing.write_bytes(folder.path / "carry.safetensors", b"kept")
        undoing.run()
        assert folder.path.exists() == kept
        if kept:
            assert {path.name for path in folder.path.iterdir()} >= {"carry.safetensors", "run.json"}


def test_calls_go_backwards_and_one_that_fails_stops_none():
    made = []

    def fails():
        made.append(1)
        raise OSError

    with undo.undone(lambda: made.append("nobody collects")):
        pass
    with undo.collected() as undoing:
        with undo.undone(lambda: made.append(0)), undo.undone(fails), undo.undone(lambda: made.append(2)):
            undoing.run()
        undoing.run()
    assert made == [2, 1, 0]
