"""What the fuzzer writes: documents that were right once, and templates that no one should run."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", " ", "\0", "\ud800", "\u2028", "../../x", "/etc/passwd", "1e999", "null", "-0", "__class__"]),
)
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 1e308, float("inf"), float("nan"), -0.0, 1e-320]),
    st.floats(width=32),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
DEEP = b"[" * 3000 + b"]" * 3000


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    items: Sequence[Any] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path, *(found for key, inner in items for found in _paths(inner, (*path, key)))]


def _changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _changed(value[path[0]], path[1:], new)
    return copy


@st.composite
def documents(draw: st.DrawFn, seeds: Sequence[Any], keys: Sequence[str] = ()) -> Any:
    """One of these documents with other values, or other keys, at some of its places."""
    value = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_paths(value)))
        if draw(st.booleans()):
            value = _changed(value, path, draw(VALUES))
        elif isinstance(found := _at(value, path), dict):
            name = draw(st.sampled_from([*keys, *found]) if keys or found else TEXTS)
            value = _changed(value, path, found | {name: draw(VALUES)})
    return value


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def encoded(value: Any) -> bytes:
    """As JSON, in which Python writes NaN and infinities, and half surrogates by their escapes."""
    return json.dumps(value).encode()


@st.composite
def spliced(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of these texts with pieces cut, doubled, swapped for those of another, or turned into noise."""
    text = draw(st.sampled_from(seeds))
    other = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        words = [match.span() for match in re.finditer(rb"\w+|\W", text)] or [(0, 0)]
        start, end = draw(st.sampled_from(words))
        piece = draw(
            st.one_of(
                st.just(b""),
                st.just(text[start:end] * 2),
                st.sampled_from(re.findall(rb"\w+|\W", other) or [b""]),
                st.binary(max_size=6),
                st.sampled_from([b"&a", b"*a", b"!!x", b"\t", b"- ", b": ", b"{", b"}", b"|", b"'", b'"', b"#", DEEP]),
            )
        )
        text = text[:start] + piece + text[end:]
    return text


@st.composite
def tensor_files(draw: st.DrawFn, header: dict[str, Any], data: bytes) -> bytes:
    """A safetensors file whose header, length or data are not as they ought to be."""
    text = draw(st.one_of(documents([header]).map(encoded), spliced([encoded(header)])))
    length = draw(st.one_of(st.just(len(text)), st.sampled_from([0, 1, len(text) + 8, 2**40, 2**63, 2**64 - 1])))
    return struct.pack("<Q", length) + text + draw(st.sampled_from([data, data[:-1], data + b"\0", b""]))


# ---- chat templates ------------------------------------------------------------------------------------------------

_NAMES = ("messages", "s", "n", "loop", "bos_token", "x", "namespace", "range", "cycler", "lipsum", "f", "self")
_FILTERS = (
    "length|list|join|upper|trim|tojson|first|last|reverse|sort|unique|string|int|float|items|safe|escape|indent(999999999)"
    "|center(999999999)|replace('a','aaaaaaaaaa')|batch(999999999)|slice(999999999)|round(999999999)|wordwrap(0)"
    "|format(1)|map('upper')|groupby('role')|sum|attr('__class__')|urlize|xmlattr|filesizeformat|truncate(-5)"
).split("|")
_ATOMS = st.one_of(
    st.sampled_from(_NAMES),
    st.integers(-5, 99999).map(str),
    st.sampled_from(
        ["9999999999", "'a'", "'%999999999d'", "'{:>999999999}'", "[]", "{}", "none", "true", "1e308", "''"]
    ),
    st.sampled_from(["messages[0].content", "messages[0]['role']", "loop.index", "range(99999)", "range(-1)", "n.s"]),
    st.sampled_from(
        ["''.__class__", "n.__init__", "cycler.__init__.__globals__", "messages.append(1)", "lipsum(99999)"]
    ),
    st.sampled_from(["'a'.center(999999999)", "'a'.zfill(999999999)", "'{:>999999999}'.format(1)", "namespace(s='a')"]),
)
_EXPRESSIONS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "*", "**", "~", "%", "//", "==", "in", "and", ",", "-"]), inner).map(
            lambda parts: f"({' '.join(parts)})"
        ),
        st.tuples(inner, st.sampled_from(_FILTERS)).map(lambda parts: f"({parts[0]}|{parts[1]})"),
        st.tuples(inner, inner).map(lambda parts: f"{parts[0]}[{parts[1]}]"),
        inner.map(lambda text: f"f({text})"),
    ),
    max_leaves=5,
)
_STATEMENTS: st.SearchStrategy[str] = st.recursive(
    st.one_of(
        _EXPRESSIONS.map(lambda e: f"{{{{ {e} }}}}"),
        st.tuples(st.sampled_from(["s", "n", "x", "n.s", "f"]), _EXPRESSIONS).map(
            lambda parts: f"{{% set {parts[0]} = {parts[1]} %}}"
        ),
        st.sampled_from(
            ["text", "{% set s = s ~ s %}", "{% set n = namespace(s='aa') %}", "{{ raise_exception('no') }}"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(_EXPRESSIONS, inner).map(lambda p: f"{{% for x in {p[0]} %}}{p[1]}{{% endfor %}}"),
        st.tuples(_EXPRESSIONS, inner).map(
            lambda p: f"{{% for x in {p[0]} recursive %}}{p[1]}{{{{ loop(x) }}}}{{% endfor %}}"
        ),
        st.tuples(_EXPRESSIONS, inner).map(lambda p: f"{{% if {p[0]} %}}{p[1]}{{% endif %}}"),
        inner.map(lambda body: f"{{% macro f(x) %}}{body}{{{{ f(x) }}}}{{{{ f(x) }}}}{{% endmacro %}}{{{{ f(1) }}}}"),
        inner.map(lambda body: f"{{% set s %}}{body}{{{{ s }}}}{{{{ s }}}}{{% endset %}}"),
        inner.map(lambda body: f"{{% generation %}}{body}{{% endgeneration %}}"),
        inner.map(lambda body: f"{{% filter center(999999999) %}}{body}{{% endfilter %}}"),
        inner.map(lambda body: body[: len(body) // 2]),
    ),
    max_leaves=6,
)
TEMPLATES = _STATEMENTS.map(lambda text: text.encode("utf-8", "surrogatepass"))
