"""One writer at a time; what an interruption leaves is gone on with or removed, and nothing half-made gets the name."""

import fcntl
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conversion import equal, plain_params, refused, started
from foreign import SHARD, copy_of
from safetensors.numpy import load_file, save_file

import convert
from convert import __main__ as command
from convert import finish, plan, sources, write
from wanjax import checkpoint, store


def test_targets_that_cannot_be_written(source, made, tmp_path, capsys):
    assert "exists; choose another name" in refused(capsys, source, made)
    assert "no folder" in refused(capsys, source, tmp_path / "no" / "m")
    assert "cannot write in folder /proc" in refused(capsys, source, "/proc/m")
    with open(tmp_path / ".m.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another conversion is writing it" in refused(capsys, source, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_two_writers_never_hold_the_lock_together(source, tmp_path, monkeypatch):
    """One that opened the lock before its holder removed it must not think that it has it."""
    planned, plain, tried = plan.plan(sources.find(source, ["clip"])), write._write_array, []
    late = os.open(tmp_path / ".m.lock", os.O_CREAT | os.O_RDWR)
    os.unlink(tmp_path / ".m.lock")

    def second(*arguments):
        if not tried:
            tried.append(True)
            fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the removed file's lock is free, and means nothing
            with pytest.raises(write.OutputError, match="another conversion"):
                write.write(planned, tmp_path / "m", "keep")
        return plain(*arguments)

    monkeypatch.setattr(write, "_write_array", second)
    write.write(planned, tmp_path / "m", "keep")
    os.close(late)
    assert tried and [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("step", ["before the rename", "after it"])
def test_killed_while_finishing(source, tmp_path, monkeypatch, step):
    """Whatever is left, the next run goes on, or the folder is there and whole."""
    target, plain = tmp_path / "m", os.rename

    def rename(old, new, **others):
        if Path(new) != target:
            return plain(old, new, **others)
        if step == "after it":
            plain(old, new)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        assert command.main([str(source), str(target), "--dtype", "f32"]) == 130
    if step == "before the rename":
        assert not target.exists()
        assert command.main([str(source), str(target), "--dtype", "f32"]) == 0
    equal(checkpoint.load(target, fast=False).params, plain_params())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_named(source, tmp_path, capsys, value):
    path = copy_of(source, tmp_path / "copy")
    tensors = load_file(path / SHARD)
    name = sorted(name for name in tensors if tensors[name].ndim == 2)[0]
    tensors[name][1, 1] = value
    save_file(tensors, path / SHARD)
    error = refused(capsys, path, tmp_path / "m", "--only", "dit")
    assert f"{name} holds NaN or inf" in error
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]  # nothing could go on from what was written


SLOW = """
import sys, time
from convert import write
plain = write._write_array
def slow(*arguments):
    time.sleep(0.2)
    return plain(*arguments)
write._write_array = slow
from convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def interrupted(source, target, number):
    """A run stopped by a signal once a few arrays are finished; their names."""
    progress = target.parent / f".{target.name}.part" / finish.PROGRESS
    process = started(source, target, "--only", "dit", code=SLOW)
    deadline = time.monotonic() + 120
    while not (progress.is_file() and len(progress.read_text().splitlines()) > 8):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert number == signal.SIGKILL or errors.strip().endswith("interrupted; run it again to go on"), errors
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert not target.exists()
    return [json.loads(line)["name"] for line in progress.read_text().splitlines()[:8]]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_run_goes_on_where_it_was(source, tmp_path, number):
    target = tmp_path / "m"
    done = interrupted(source, target, number)
    part = tmp_path / ".m.part"
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(part)
    stamps = {name: (store.place(part, name) / "zarr.json").stat().st_mtime_ns for name in done}
    assert command.main([str(source), str(target), "--only", "dit"]) == 0
    for name, stamp in stamps.items():
        assert (store.place(target, name) / "zarr.json").stat().st_mtime_ns == stamp, f"{name} was written again"
    wanted = plain_params()["dit"]
    equal(store.restore(target, "dit", wanted, None), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def left(source, target, monkeypatch):
    """What Ctrl-C leaves once a few arrays are finished, without a process of its own."""
    plain, count = write._write_array, iter(range(100))

    def stopped(*arguments):
        if next(count) == 8:
            raise KeyboardInterrupt
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_array", stopped)
        assert command.main([str(source), str(target), "--only", "dit"]) == 130
    assert len((target.parent / f".{target.name}.part" / finish.PROGRESS).read_text().splitlines()) == 8


LEFT = "left by a conversion of another source or with other settings; removed"


def test_a_changed_source_starts_over(source, tmp_path, capsys, monkeypatch):
    path, target = copy_of(source, tmp_path / "copy"), tmp_path / "m"
    left(path, target, monkeypatch)
    tensors = load_file(path / SHARD)
    tensors = {name: tensor + np.float32(1) for name, tensor in tensors.items()}
    save_file(tensors, path / SHARD)
    assert command.main([str(path), str(target), "--only", "dit"]) == 0
    assert f"note: {tmp_path / '.m.part'}: {LEFT}" in capsys.readouterr().err
    _, wanted = convert.load(path, only=["dit"])
    equal(store.restore(target, "dit", wanted["dit"], None), wanted["dit"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy", "m"]


def test_other_parts_start_over(source, tmp_path, capsys, monkeypatch):
    """What was finished for another job is not taken for this one's."""
    target = tmp_path / "m"
    left(source, target, monkeypatch)
    assert command.main([str(source), str(target), "--only", "clip"]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["clip", "config.json", "manifest.json", "tokenizer.json"]
    assert LEFT in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_source_that_changes_meanwhile_is_noticed(source, tmp_path, capsys, monkeypatch):
    path = copy_of(source, tmp_path / "copy")
    plain = write._write_arrays

    def changing(*arguments):
        os.utime(path / SHARD, ns=(1, 1))
        return plain(*arguments)

    monkeypatch.setattr(write, "_write_arrays", changing)
    assert "its files changed during the conversion" in refused(capsys, path, tmp_path / "m", "--only", "dit")
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from convert.__main__ import main
limit = int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("limit", [60_000, 100_000])
def test_a_full_disk_is_one_line_and_nothing_stands_under_the_name(source, tmp_path, limit):
    """A limit on file size stands for the disk's: writing fails in the middle of an array."""
    process = started(source, tmp_path / "m", limit, code=FULL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    last = error.strip().splitlines()[-1]
    assert "free some space and run it again" in last and "Traceback" not in error
    assert not (tmp_path / "m").exists()
    # What was finished is kept, and gone on with when there is room; what nothing was finished of is not.
    progress = tmp_path / ".m.part" / finish.PROGRESS
    assert progress.is_file() == (limit == 100_000)
    if limit == 60_000:
        assert not list(tmp_path.iterdir())
        return
    assert progress.read_text()
    assert command.main([str(source), str(tmp_path / "m")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


ENDS = {
    "refused": (ValueError("a value that is refused"), False), "a fault": (RuntimeError("a fault of ours"), False),
    "interrupted": (KeyboardInterrupt(), True), "a broken disk": (OSError(5, "Input/output error"), True),
    "full": (OSError(28, "No space left on device"), True),
}  # fmt: skip


@pytest.mark.parametrize("finished", [0, 3])
@pytest.mark.parametrize("kind", ENDS)
def test_what_is_left_can_be_gone_on_with(source, tmp_path, monkeypatch, kind, finished):
    """A hidden folder stays only if the same command goes on from it, and something in it is finished."""
    planned = plan.plan(sources.find(source, ["clip"]))
    error, resumable = ENDS[kind]
    plain, count = write._write_array, iter(range(100))

    def failing(*arguments):
        if next(count) == finished:
            raise error
        return plain(*arguments)

    monkeypatch.setattr(write, "_write_array", failing)
    with pytest.raises((type(error), write.OutputError)) as caught:
        write.write(planned, tmp_path / "m", "keep")
    assert kind != "full" or "m: No space left on device; free some space and run it again" in str(caught.value)
    assert bool(list(tmp_path.iterdir())) == (resumable and finished > 0)
    monkeypatch.setattr(write, "_write_array", plain)
    notes = []
    write.write(planned, tmp_path / "m", "keep", noted=notes.append)
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and not notes


def test_a_folder_of_a_run_that_died_early_is_begun_anew(source, tmp_path):
    """Killed before the job was written: there is nothing to go on from, and nobody's file to keep."""
    planned, notes = plan.plan(sources.find(source, ["clip"])), []
    (tmp_path / ".m.part" / "clip").mkdir(parents=True)
    (tmp_path / ".m.part" / "umt5.orbax-checkpoint-tmp").mkdir()
    write.write(planned, tmp_path / "m", "keep", noted=notes.append)
    assert notes == [f"{tmp_path / '.m.part'}: {LEFT}"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_conversions_is_not_removed(source, tmp_path, capsys, kind):
    """Something of the user's under the hidden name, as browsers call what they are downloading."""
    hidden, kept = tmp_path / ".m.part", tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("years of work")
    if kind == "file":
        hidden.write_text("half a download")
    elif kind == "folder":
        copy_of(kept, hidden)
    else:
        hidden.symlink_to(kept)
    assert "is in the way and no conversion's; move it away" in refused(capsys, source, tmp_path / "m")
    assert os.path.lexists(hidden) and (kept / "thesis.txt").read_text() == "years of work"
    assert kind != "folder" or (hidden / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.part", "kept"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_appears_meanwhile_is_not_replaced(source, tmp_path, monkeypatch, kind):
    planned, target = plan.plan(sources.find(source, ["clip"])), tmp_path / "m"
    plain = finish.write_synced

    def appearing(path, text):
        if path.name == checkpoint.MANIFEST:
            target.mkdir() if kind == "folder" else target.write_text("another's")
            if kind == "folder":
                (target / "x").write_text("another's")
        plain(path, text)

    monkeypatch.setattr(finish, "write_synced", appearing)
    with pytest.raises(write.OutputError, match="m: appeared while it was written, and was left alone"):
        write.write(planned, target, "keep")
    assert (target / "x" if kind == "folder" else target).read_text() == "another's"
    (target / "x").unlink() if kind == "folder" else target.unlink()
    if kind == "folder":
        target.rmdir()
    monkeypatch.setattr(finish, "write_synced", plain)
    monkeypatch.setattr(write, "_write_array", lambda *arguments: pytest.fail("written again"))
    write.write(planned, target, "keep")  # and nothing was lost
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
