"""The room for results: two runs at once, what appears meanwhile, runs that die at any moment, full disks."""

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from writers import LIGHT, finish, group, start, tree, write_group, writers

from wanjax import marks, rooms, writing
from wanjax.writing import OutputError, Target

# Several at once, and what appears meanwhile


def test_a_group_in_two_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    targets = [Target(tmp_path / "a" / "x.json"), Target(tmp_path / "b" / "x.json"), Target(tmp_path / "a" / "y.json")]
    for who in ("one", "two"):
        with writing.staged(writing.check(targets, overwrite=True)) as parts:
            for part in parts:
                part.write_text(json.dumps(marks.marked({"by": who})))
        assert [json.loads(target.path.read_text())["by"] for target in targets] == [who] * 3
    assert len(tree(tmp_path)) == 3
    with (
        pytest.raises(OutputError, match="b/x.json: changed"),
        writing.staged(writing.check(targets, overwrite=True)) as parts,
    ):
        for part in parts:
            part.write_text('{"by": "three"}')
        (tmp_path / "b" / "x.json").write_text('{"by": "other"}')
    assert [json.loads(target.path.read_text())["by"] for target in targets] == ["two", "other", "two"]
    assert len(tree(tmp_path)) == 3


@pytest.mark.parametrize("name", ["frames", "sheet.json", "clip.json"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("late", [False, True])
def test_what_appears_meanwhile_is_left_alone(tmp_path, monkeypatch, name, kind, late):
    def appear():
        if kind == "file":
            (tmp_path / name).write_text("years of work")
        elif kind == "folder":
            (tmp_path / name).mkdir()
            (tmp_path / name / "thesis.txt").write_text("years of work")
        else:
            (tmp_path / name).symlink_to("elsewhere")

    checked = writing.check(group(tmp_path))
    if late:  # after the last look: only the system's own refusal to replace is left
        all_at_once = writing.publish_all
        monkeypatch.setattr(writing, "publish_all", lambda *args: (appear(), all_at_once(*args)))
    with pytest.raises(OutputError, match=f"{name}: appeared") as caught, writing.staged(checked) as parts:
        write_group(parts, "us")
        if not late:
            appear()
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name]
    assert {"file": (tmp_path / name).is_file(), "folder": (tmp_path / name / "thesis.txt").is_file(),
            "link": (tmp_path / name).is_symlink()}[kind]  # fmt: skip


@pytest.mark.parametrize("name", ["frames/0.json", "frames/1.json", "sheet.json", "clip.json"])
@pytest.mark.parametrize("late", [False, True])
def test_what_changes_meanwhile_is_left_alone(tmp_path, monkeypatch, name, late):
    with writing.staged(writing.check(group(tmp_path))) as parts:
        write_group(parts, "old")

    def change():
        (tmp_path / name).write_text('{"by": "another program"}')

    checked = writing.check(group(tmp_path), overwrite=True)
    if late:
        all_at_once = writing.publish_all
        monkeypatch.setattr(writing, "publish_all", lambda *args: (change(), all_at_once(*args)))
    with pytest.raises(OutputError, match="changed while"), writing.staged(checked) as parts:
        write_group(parts, "new")
        if not late:
            change()
    expected = ["another program" if name == one else "old" for one in ("frames/0.json", "sheet.json", "clip.json")]
    assert writers(tmp_path) == expected
    assert json.loads((tmp_path / name).read_text())["by"] == "another program"
    assert sorted(os.listdir(tmp_path)) == ["clip.json", "frames", "sheet.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_first_to_finish_wins_even_without_claims(tmp_path, monkeypatch, overwrite):
    """Two runs that did not see each other: the last line of defence."""
    monkeypatch.setattr(rooms, "_alive", lambda room: False)
    if overwrite:
        with writing.staged(writing.check(group(tmp_path))) as parts:
            write_group(parts, "before")
    slow, fast = (writing.check(group(tmp_path), overwrite=overwrite) for _ in range(2))
    with pytest.raises(OutputError, match="changed|appeared"), writing.staged(slow) as parts:
        write_group(parts, "slow")
        with writing.staged(fast) as others:
            write_group(others, "fast")
    assert writers(tmp_path) == ["fast"] * 3
    assert sorted(os.listdir(tmp_path)) == ["clip.json", "frames", "sheet.json"]


def test_a_second_run_is_told_before_it_works(tmp_path):
    first, second = writing.check(group(tmp_path)), writing.check([Target(tmp_path / "clip.json")])
    other = writing.check([Target(tmp_path / "other.json")])
    with writing.staged(first) as parts:
        told = r"clip.json: another run \(process \d+\) is writing it; wait"
        with pytest.raises(OutputError, match=told), writing.staged(second):
            raise AssertionError("entered")
        with writing.staged(other) as (part,):
            part.write_bytes(b"x")
        assert writing.leftovers(tmp_path) == []
        write_group(parts, "first")
    assert writers(tmp_path) == ["first"] * 3 and not list(tmp_path.glob(".*"))


RACE = """
    who, overwrite = sys.argv[1], sys.argv[2] == "True"
    here = Path.cwd()
    targets = [Target(here / "frames", folder=True), Target(here / "sheet.json"), Target(here / "clip.json")]
    def write(parts):
        parts[0].mkdir()
        for path in (parts[0] / "0.json", parts[1], parts[2]):
            writing.write_json(path, {"by": who})
    print("ready", flush=True)
    for turn in sys.stdin:
        try:
            checked = writing.check(targets, overwrite=overwrite)
            with writing.staged(checked) as parts:
                write(parts)
            print("won", flush=True)
        except OutputError as error:
            print("lost", str(error).count(chr(10)), error, flush=True)
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_race_for_one_name(tmp_path, overwrite):
    code = LIGHT + textwrap.dedent(RACE)
    command = [sys.executable, "-W", "error", "-c", code]
    options = {"cwd": tmp_path, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, who, str(overwrite)], **options) for who in "ab"]
    won = {"a": 0, "b": 0}
    try:
        for run in runs:
            assert run.stdout.readline() == "ready\n"
        for _ in range(20):
            if not overwrite:
                for path in tmp_path.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            for run in runs:
                run.stdin.write("go\n")
                run.stdin.flush()
            said = [run.stdout.readline() for run in runs]
            winners = [who for who, line in zip("ab", said, strict=True) if line == "won\n"]
            assert winners, said
            if not overwrite:
                assert len(winners) == 1, said
            assert len(set(writers(tmp_path))) == 1 and writers(tmp_path)[0] in winners, said
            assert all(line == "won\n" or line.startswith("lost 0 output ") for line in said), said
            assert sorted(os.listdir(tmp_path)) == ["clip.json", "frames", "sheet.json"]
            for who in winners:
                won[who] += 1
    finally:
        for run in runs:
            run.stdin.close()
            run.stdout.close()
            run.wait(60)
    assert sum(won.values()) >= 20


# Runs that die

KILLED = """
    # Dies at its n-th step of giving names, for n in sys.argv; every death in a process of its own.
    folder, last, overwrite = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
    def targets(here):
        (here / "b").mkdir(exist_ok=True)
        return [Target(here / "frames", folder=True), Target(here / "sheet.json"), Target(here / "b" / "clip.json")]
    def write(here, who, die_at=None, **options):
        checked = writing.check(targets(here), **options)
        count[:] = [0, die_at]
        with writing.staged(checked) as parts:
            parts[0].mkdir()
            for path in (parts[0] / "0.json", parts[1], parts[2]):
                path.write_text(json.dumps(marks.marked({"by": who})))
    count = [0, None]
    def counted(call):
        def step(*args, **options):
            count[0] += 1
            if count[0] == count[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)
        return step
    for name in ("rename", "link", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    for n in range(1, last + 1):
        here = folder / str(n)
        here.mkdir()
        if overwrite:
            write(here, "old")
        child = os.fork()
        if child == 0:
            write(here, "new", n, overwrite=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(n, os.WTERMSIG(status), flush=True)
        if status == 0:
            break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_step_leaves_one_result_after_the_next_run(tmp_path, overwrite):
    lines = finish(start(KILLED, tmp_path, 60, overwrite, cwd=tmp_path)).split("\n")[:-1]
    assert len(lines) > 10 and lines[-1].endswith(" 0"), lines  # died at every step there is, then lived
    states, told = [], []
    for line in lines:
        here, died = tmp_path / line.split()[0], not line.endswith(" 0")
        seen = set()  # before anybody tidies up: never parts of two results
        for name in ("frames/0.json", "sheet.json", "b/clip.json"):
            if (here / name).exists():
                seen.add(json.loads((here / name).read_text())["by"])
        assert len(seen) <= 1, (line, seen)
        notes = [*writing.leftovers(here), *writing.leftovers(here / "b")]
        told += notes
        assert not list(here.rglob(".wanjax*")), (line, died)
        names = [name for name in tree(here)]
        found = {json.loads(content)["by"] for content in tree(here).values()}
        assert sorted(names) in ([], ["b/clip.json", "frames/0.json", "sheet.json"]), (line, names)
        assert len(found) <= 1, (line, found)
        states += found or {"nothing"}
    before = "old" if overwrite else "nothing"
    turn = states.index("new")
    assert told and all(note.startswith(f"removed {tmp_path}") for note in told)
    assert set(states[:turn]) == {before} and set(states[turn:]) == {"new"} and turn > 3


SLEEPER = """
    with writing.terminate_as_interrupt():
        try:
            with writing.staged(writing.check([Target(Path.cwd() / "a.json"), Target(Path.cwd() / "b.json")])) as parts:
                parts[0].write_text("half")
                print("working", flush=True)
                time.sleep(60)
        except KeyboardInterrupt:
            sys.exit(130)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to one process")
@pytest.mark.parametrize("number,code", [("SIGTERM", 130), ("SIGHUP", 130), ("SIGINT", 130), ("SIGKILL", -9)])
def test_stopped_in_the_middle(tmp_path, number, code):
    script = "signal.signal(signal.SIGINT, signal.default_int_handler)" + textwrap.dedent(SLEEPER)
    process = start(script, cwd=tmp_path)
    assert process.stdout.readline() == "working\n"
    (hidden,) = tmp_path.iterdir()
    assert writing.check([Target(tmp_path / "c.json")]).notes == () and hidden.exists()  # alive: left alone
    process.send_signal(getattr(signal, number))
    finish(process, code)
    assert os.listdir(tmp_path) == ([hidden.name] if number == "SIGKILL" else [])
    checked = writing.check([Target(tmp_path / "a.json")])
    assert checked.notes == ((f"removed {hidden}, which a run that was stopped had left",) if code == -9 else ())
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_put_back_is_kept_and_told(tmp_path):
    """A run died after moving the old file aside, and another program took the name."""
    room = tmp_path / ".wanjax-00000000"
    for name in ("new", "old"):
        (room / name).mkdir(parents=True)
    (room / "lock").touch()
    (room / "claim.json").write_text(json.dumps({"rooms": [str(room)], "targets": ["a.json"]}))
    (room / "moves.json").write_text(json.dumps({"a.json": [0, 0]}))
    (room / "old" / "a.json").write_text("the old one")
    (tmp_path / "a.json").write_text("another program's")
    for _ in range(2):
        (note,) = writing.leftovers(tmp_path)
        assert str(room / "old" / "a.json") in note and "move it where it belongs" in note and "\n" not in note
        assert (room / "old" / "a.json").read_text() == "the old one"
        assert (tmp_path / "a.json").read_text() == "another program's"
    (tmp_path / "a.json").unlink()
    assert writing.leftovers(tmp_path) == [f"removed {room}, which a run that was stopped had left"]
    assert tree(tmp_path) == {"a.json": b"the old one"}


def test_hidden_folders_of_versions_without_locks(tmp_path):
    hours = time.time() - 7 * 3600
    stale = {".wanjax-abcd_123": 0o700, ".wanjax-efgh4567": 0o700}
    kept = {".wanjax-settings": 0o755, ".wanjax-my": 0o700, ".wanjax-back-up2": 0o700, "wanjax-abcdefgh": 0o700}
    for name, mode in (stale | kept).items():
        (tmp_path / name).mkdir(mode=mode)
        (tmp_path / name / "new.mp4").write_bytes(b"half")
        for path in (tmp_path / name / "new.mp4", tmp_path / name):
            os.utime(path, (hours, hours))
    young, aside = tmp_path / ".wanjax-young123", tmp_path / ".wanjax-aside123"
    for path, inner in ((young, "new"), (aside, "old")):
        (path / inner).mkdir(parents=True)
        path.chmod(0o700)
        (path / inner / "00000.png").write_bytes(b"x")
    for path in (aside / "old" / "00000.png", aside / "old", aside, young):
        os.utime(path, (hours, hours))
    notes = writing.leftovers(tmp_path)
    assert len(notes) == 3 and sum(note.startswith("removed") for note in notes) == 2
    assert sum(str(aside / "old") in note and "move it where it belongs" in note for note in notes) == 1
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, young.name, aside.name])


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX")
def test_hidden_folders_of_other_users_move_nothing(tmp_path, monkeypatch):
    """In a shared folder anybody could write a list of moves."""
    victim = tmp_path / "a.json"
    victim.write_text("dear")
    room = tmp_path / ".wanjax-00000000"
    (room / "new").mkdir(parents=True)
    (room / "lock").touch()
    status = victim.stat()
    (room / "claim.json").write_text(json.dumps({"rooms": [str(room)]}))
    (room / "moves.json").write_text(json.dumps({"a.json": [status.st_dev, status.st_ino]}))
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert writing.leftovers(tmp_path) == []
    assert victim.read_text() == "dear" and room.exists()


# Full disks


FULL = """
    import resource
    import numpy as np
    from samplers import video
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    frames = np.random.default_rng(0).integers(0, 256, (9, 48, 48, 3), np.uint8)
    here = Path.cwd()
    def frames_to(name): return lambda: video.write(here / name, frames, 8)
    for write in [
        *map(frames_to, ["clip.mp4", "clip.webm", "clip.gif", "clip.webp", "clip"]),
        lambda: video.write_png(here / "a.png", frames[0]),
        lambda: writing.write_json(here / "a.json", ["x" * 100] * 100),
        lambda: writing.write_bytes(here / "a.bin", bytes(5000)),
    ]:
        try:
            write()
            print("written")
        except OSError as error:
            print(error.errno, os.listdir(here))
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_full_disk_leaves_nothing(tmp_path):
    assert finish(start(FULL, cwd=tmp_path)).split("\n") == [f"{errno.EFBIG} []"] * 8 + [""]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("at", range(1, 5))
def test_a_failing_step_of_giving_names_changes_nothing(tmp_path, monkeypatch, at):
    with writing.staged(writing.check(group(tmp_path))) as parts:
        write_group(parts, "old")
    before, calls = tree(tmp_path), []

    def failing(call):
        def step(*args, **options):
            calls.append(1)
            if len(calls) == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **options)

        return step

    checked = writing.check(group(tmp_path), overwrite=True)
    with pytest.raises(OSError, match="No space"), writing.staged(checked) as parts:
        write_group(parts, "new")
        monkeypatch.setattr(os, "rename", failing(os.rename))
        monkeypatch.setattr(os, "link", failing(os.link))
    monkeypatch.undo()
    assert tree(tmp_path) == before and len(calls) >= at


# Signals


def test_signals_become_interrupts_and_come_back():
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        number = getattr(signal, name, None)
        if number is None:
            continue
        with pytest.raises(KeyboardInterrupt, match=name), writing.terminate_as_interrupt():
            signal.raise_signal(number)
            time.sleep(5)
    seen = []
    old = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with writing.terminate_as_interrupt():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert seen == [1]
        with pytest.raises(KeyboardInterrupt), writing.terminate_as_interrupt():
            signal.raise_signal(signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, old)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX")
def test_nohup_stays():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with writing.terminate_as_interrupt():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, old)


def test_other_threads_are_left_alone():
    before, errors = signal.getsignal(signal.SIGTERM), []

    def run():
        try:
            with writing.terminate_as_interrupt():
                assert signal.getsignal(signal.SIGTERM) == before
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []


def test_an_interrupt_inside_a_collection_is_not_lost():
    """Python drops what is raised in a callback of the garbage collector, and JAX has one."""

    def _xla_gc_callback(phase, info):
        if phase == "start":
            gc.callbacks.remove(_xla_gc_callback)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), writing.terminate_as_interrupt():
        gc.callbacks.append(_xla_gc_callback)
        gc.collect()
        time.sleep(5)
