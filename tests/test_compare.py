"""The one comparison of names and shapes."""

from wanjax import compare


def test_missing_extra_and_shape():
    found = {"a": (1,), "b": (2, 3), "d": ()}
    wanted = {"a": (1,), "b": (3, 2), "c": (4,)}
    assert compare.differences(found, wanted) == {"b": ((2, 3), (3, 2)), "c": (None, (4,)), "d": ((), None)}
    assert compare.lines(found, wanted) == [
        "b: (2, 3), config wants (3, 2)",
        "c: missing, config wants (4,)",
        "d: (), config wants none",
    ]
    assert compare.differences(wanted, wanted) == {}


def test_long_lists_are_cut():
    assert compare.listed(["x"]) == "\n  x"
    assert compare.listed(map(str, range(20))).count("\n") == 20
    text = compare.listed(map(str, range(25)))
    assert text.count("\n") == 21 and text.endswith("\n  19\n  and 5 more")
