"""Programs kept on disk: found without tracing, made anew where anything is different or damaged."""

import os
import pickle
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from samplers import kept

X = jax.ShapeDtypeStruct((3, 4), np.float32)
VALUE = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def traced():
    """A jitted function (a static number, x, by another number) and the list of its traces; in no cache of JAX's."""
    traces, own = [], float(np.random.default_rng().random())

    def scale(factor, x, *, power=1):
        traces.append(factor)
        return {"y": (x * factor) ** power + own, "sum": x.sum()}

    return jax.jit(scale, static_argnums=0, static_argnames="power"), traces


@pytest.fixture(autouse=True)
def alone():
    """Without JAX's own cache, out of which nothing is kept; every test reads its own surroundings and source."""
    place = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_default_matmul_precision", None)
    compilation_cache.reset_cache()
    kept.surroundings.cache_clear()
    kept._source.cache_clear()


def test_it_is_traced_once_and_gives_the_same(tmp_path, traced):
    function, traces = traced
    first = kept.compiled(partial(function, 2.0, power=3), (X,), tmp_path)(VALUE)
    jax.clear_caches()
    again = kept.compiled(partial(function, 2.0, power=3), (X,), tmp_path)(VALUE)
    plain = function(2.0, VALUE, power=3)
    assert len(traces) == 2, "the second without, the third by the jitted function"
    for name, value in plain.items():
        assert np.array_equal(first[name], value) and np.array_equal(again[name], value)
    with pytest.raises(TypeError, match="compiled"):
        kept.compiled(partial(function, 2.0, power=3), (X,), tmp_path)(VALUE[:2])


def other(where, program, arguments, monkeypatch):
    """Another program in one respect."""
    if where == "argument":
        return partial(program.func, 3.0, power=3), arguments
    if where == "keyword":
        return partial(program.func, 2.0, power=2), arguments
    if where == "shape":
        return program, (jax.ShapeDtypeStruct((3, 5), np.float32),)
    if where == "dtype":
        return program, (jax.ShapeDtypeStruct((3, 4), np.int32),)
    if where == "flags":
        monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
    if where == "source":
        monkeypatch.setattr(kept, "_source", lambda: "another")
    if where == "setting":
        jax.config.update("jax_default_matmul_precision", "highest")
    return program, arguments


@pytest.mark.parametrize("where", [None, "argument", "keyword", "shape", "dtype", "flags", "setting", "source"])
def test_what_decides_a_program_finds_another(tmp_path, traced, monkeypatch, where):
    function, traces = traced
    program, arguments = partial(function, 2.0, power=3), (X,)
    kept.compiled(program, arguments, tmp_path)
    kept.surroundings.cache_clear()
    program, arguments = other(where, program, arguments, monkeypatch)
    jax.clear_caches()
    kept.compiled(program, arguments, tmp_path)
    count = 1 if where is None else 2
    assert len(traces) == len(list(tmp_path.glob("*.key"))) == count
    # A change of source that leaves the program as it was finds the machine code.
    assert len(list(tmp_path.glob("*.program"))) == (1 if where == "source" else count)


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-7],
    "flipped": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "nonsense": lambda data: b"nonsense" * 20,
    "no program": lambda data: kept.signed(pickle.dumps((b"", 1, 2))),
    "no pickle": lambda data: kept.signed(b"\x80\x05nothing"),
    "no text": lambda data: kept.signed(b"\xff\xfe"),
    "outside": lambda data: kept.signed(b"../../../etc/passwd"),
}


@pytest.mark.parametrize("kind", ["key", "program"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_anew(tmp_path, traced, kind, damage):
    function, traces = traced
    program = partial(function, 2.0)
    kept.compiled(program, (X,), tmp_path)
    (file,) = tmp_path.glob(f"*.{kind}")
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    jax.clear_caches()
    found = kept.compiled(program, (X,), tmp_path)
    assert np.array_equal(found(VALUE)["y"], function(2.0, VALUE)["y"])
    jax.clear_caches()
    count = len(traces)
    assert np.array_equal(kept.compiled(program, (X,), tmp_path)(VALUE)["y"], found(VALUE)["y"])
    assert len(traces) == count and (kind == "program" or file.read_bytes() == whole)


def test_those_used_longest_ago_make_room(tmp_path, traced, monkeypatch):
    function, _ = traced
    for number in range(4):
        kept.compiled(partial(function, float(number)), (X,), tmp_path)
    files = sorted(tmp_path.glob("*.program"))
    size = files[0].stat().st_size
    for file in tmp_path.iterdir():
        os.utime(file, (1e9, 1e9))
    os.utime(files[2], (1e9 + 1, 1e9 + 1))
    monkeypatch.setattr(kept, "MOST_BYTES", int(3.5 * size))
    kept.compiled(partial(function, 9.0), (X,), tmp_path)
    left = set(tmp_path.glob("*.program"))
    assert len(left) <= 3 and files[2] in left and len(left - set(files)) == 1


def test_a_disk_that_is_full_keeps_nothing_and_hinders_nothing(tmp_path, traced, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    function, _ = traced
    monkeypatch.setattr(kept.writing, "write_bytes", full)
    found = kept.compiled(partial(function, 2.0), (X,), tmp_path)
    assert np.array_equal(found(VALUE)["y"], function(2.0, VALUE)["y"]) and not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_kept(tmp_path, traced, monkeypatch):
    function, _ = traced
    monkeypatch.chdir(tmp_path)
    kept.compiled(partial(function, 2.0), (X,), None)(VALUE)
    assert not list(tmp_path.iterdir())


FROM_JAX = """
import sys
from functools import partial
from pathlib import Path
import jax, numpy as np
from samplers import cache, kept
cache.enable(sys.argv[1])
function = jax.jit(lambda n, x: jax.random.normal(jax.random.key(n), x.shape) + x, static_argnums=0)
program, x = partial(function, 3), np.ones(5)
shape = jax.ShapeDtypeStruct(x.shape, np.float32)
program.func.lower(3, shape).compile()  # now it is in JAX's cache
jax.clear_caches()
place = cache.programs(Path(sys.argv[1]))
found = kept.compiled(program, (shape,), place)(np.float32(x))
found = kept.compiled(program, (shape,), place)(np.float32(x))  # the process has it now
print(len(list(place.iterdir())), np.array_equal(found, program(np.float32(x))))
"""


def test_what_comes_out_of_the_cache_of_jax_is_not_kept(tmp_path):
    """A CPU client writes only a part of it, which would be found out when it runs."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-c", FROM_JAX, str(tmp_path / "cache")], capture_output=True, text=True,
                          env=own | {"PYTHONPATH": os.getcwd()})  # fmt: skip
    assert done.stdout.split() == ["0", "True"], done.stderr
