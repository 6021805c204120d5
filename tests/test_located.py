"""YAML is read as plain data with places; everything else that YAML can do is refused at its place."""

import math
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peftctl import located
from peftctl.errors import RecipeError
from tests.cost import seconds


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        located.parse(text, "r.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: {c: 1, c: 2}\na: 3", "r.yaml:2:11: c stands here again; it was set in line 2"),
        ("a: 1\nb: {c: 1, c: 2}\na: 3", "r.yaml:3:1: a stands here again; it was set in line 1"),
        ("a: &x 1", "r.yaml:1:4: anchors and aliases (& and *) are not allowed: write the value out"),
        ("a: 1\nb: *x", "r.yaml:2:4: anchors and aliases (& and *) are not allowed: write the value out"),
        ("a: &x [*x]", "r.yaml:1:4: anchors and aliases (& and *) are not allowed: write the value out"),
        ("a: !!int 3", "r.yaml:1:4: the tag tag:yaml.org,2002:int is not allowed: write a plain value"),
        ("a: !x 3", "r.yaml:1:4: the tag !x is not allowed: write a plain value"),
        (
            "a:\n\tb: 1",
            "r.yaml:2:1: is not YAML: found character '\\t' that cannot start any token; indent with spaces",
        ),
        ("a: b: c", "r.yaml:1:5: is not YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 1", "r.yaml:2:1: is not YAML: but found another document"),
        ("a: \x01", "r.yaml:1:4: the character U+0001 is not allowed"),
        ("? [a]\n: b", "r.yaml:1:3: a key is a word"),
        ('a: "\\0"', "r.yaml:1:4: holds a null character or half a surrogate pair: leave it out"),
        ('"\\ud800": 1', "r.yaml:1:1: holds a null character or half a surrogate pair: leave it out"),
    ],
)
def test_what_is_no_plain_data_is_refused_at_its_place(text: str, expected: str) -> None:
    assert expected in refusal(text).splitlines()


@pytest.mark.fault(29)
def test_a_tag_that_would_run_code_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    text = f'a: !!python/object/apply:os.system ["touch {trace}"]'
    assert refusal(text).startswith("r.yaml:1:4: the tag tag:yaml.org,2002:python/object/apply:os.system is not")
    assert not trace.exists()


def test_twenty_levels_are_read_and_more_are_refused() -> None:
    def nested(levels: int) -> str:
        return "a: " + "[" * (levels - 1) + "]" * (levels - 1)

    located.parse(nested(20), "r.yaml")
    assert refusal(nested(21)) == "r.yaml:1:23: is nested over 20 deep"
    assert refusal("[" * 100_000) == "r.yaml:1:21: is nested over 20 deep"


@cache
def largest() -> float:
    """Seconds that the largest recipe takes to be read."""
    return seconds(lambda: located.parse(f"a: [{'1, ' * (located.MOST - 20)}]", "r.yaml"))


@pytest.mark.fault(30)
def test_bombs_are_refused_at_once() -> None:
    doubling = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    assert seconds(lambda: refusal(doubling) + refusal("a: &a {b: *a}")) < largest() / 3


@pytest.mark.fault(30)
def test_more_values_than_any_recipe_has_are_refused_before_they_take_time() -> None:
    many = "a: [" + "1, " * 300_000 + "]"
    assert "the file has over 5000 values" in refusal(many)
    assert seconds(lambda: refusal(many)) < 3 * largest()


@pytest.mark.fault(30)
def test_files_that_are_no_recipes_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"

    def found(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(RecipeError) as caught:
            located.read(path, "r.yaml")
        return str(caught.value)

    assert found(b"- a\n") == "r.yaml:1:1: a recipe is a mapping of keys to values, this is not"
    assert found(b"a: \xff") == "r.yaml: is not UTF-8 at byte 3"
    assert found(b"#" * (1 << 20) + b"#") == "r.yaml: the file has over 1 MiB; a recipe has a few lines"
    path.write_bytes(b"#" * (1 << 20))
    assert located.read(path, "r.yaml").value == {}
    path.unlink()
    with pytest.raises(RecipeError, match=r"^r.yaml: cannot be read: No such file or directory$"):
        located.read(path, "r.yaml")
    path.with_name("smoke.yaml").touch()
    with pytest.raises(
        RecipeError, match=r"^s.yml: cannot be read: No such file or directory; did you mean smoke.yaml"
    ):
        located.read(path.with_name("smoke.yml"), "s.yml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e-4", 2e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("0x10", "0x10"),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("9" * 5000, math.inf),
    ],
)
@pytest.mark.fault(31)
def test_unquoted_values(text: str, value: object) -> None:
    found = located.scalar(text)
    assert found == value and type(found) is type(value)


def test_quoted_values_are_text() -> None:
    assert located.parse("""{a: "1", b: 'true', c: "", d: ~, e: .nan}""", "r").plain() | {"e": 0} == {
        "a": "1",
        "b": "true",
        "c": "",
        "d": None,
        "e": 0,
    }


def test_every_value_knows_its_place() -> None:
    root = located.parse("a:\n  b: [1, x]\n", "r")
    inner = root.at(("a", "b"))
    assert inner.place == ("r", 2, 6) and inner.key == ("r", 2, 3)
    assert root.at(("a", "b", 1)).place == ("r", 2, 10)
    assert root.at(("a", "b", 7)) is inner and root.at(("a", "z")).place == ("r", 2, 3)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
LOOKS_LIKE_A_NUMBER = st.from_regex(r"[-+]?[0-9]{1,3}(\.[0-9]?)?([eE][-+]?[0-9])?", fullmatch=True)
LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | LOOKS_LIKE_A_NUMBER
PLAIN = st.recursive(LEAF, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=10)


@example({"a": "\x85", "\u2028b": ["\u2029"], "1e5": "09"})
@given(st.dictionaries(TEXT, PLAIN, max_size=4))
def test_what_is_written_is_read_back(value: dict[str, object]) -> None:
    read = located.parse(located.write(value), "r").plain()
    assert read == value and repr(read) == repr(value)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        located.parse(text, "r.yaml")
    except RecipeError as error:
        assert all(str(problem).startswith("r.yaml:") for problem in error.problems)
