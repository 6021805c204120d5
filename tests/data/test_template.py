"""Rendering in the sandbox: bounded, refused with a sentence, marks located."""

from __future__ import annotations

import tracemalloc
from datetime import datetime
from functools import cache

import pytest

from peftctl.data import sandbox
from peftctl.data import template as module
from peftctl.data.template import Template
from peftctl.errors import DataError
from peftctl.row import Message
from tests.cost import seconds

ASKED = [Message("user", "hi")]


def render(source: str, messages=ASKED, **options) -> str:
    return Template(source, {"eos_token": "</s>"}, "the template", **options).render(messages).text


def test_marks_are_located_and_leave_no_trace():
    source = "a{% generation %}{% set x = 1 %}b{% for i in range(3) %}{% if i == 1 %}{% break %}{% endif %}{{ i }}"
    source += "{% endfor %}{% endgeneration %}c{{ x }}{% generation %}{% endgeneration %}d"
    rendered = Template(source, {}, "t").render(ASKED)
    assert rendered.text == "ab0cd"  # what is set inside a mark stays inside
    assert [rendered.text[slice(*mark)] for mark in rendered.marks] == ["b0", ""]


def test_lines_of_blocks_leave_no_white_space():
    assert render("a\n    {% if true %}\nb\n\t{% endif %}\nc") == "a\nb\nc"


@pytest.mark.fault(34)
def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 1000)
    assert len(render("{% for i in range(1000) %}x{% endfor %}")) == 1000
    with pytest.raises(DataError, match="more than 1,000 characters"):
        render("{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace() %}{% set n.__init__ = 1 %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(1).x.y }}",
        "{{ messages[3].content.strip() }}",
        "{{ 1 / 0 }}",
    ],
)
@pytest.mark.fault(34)
def test_what_a_template_may_not_do_is_one_line(source):
    with pytest.raises(DataError, match="the template fails on this dialogue") as caught:
        render(source)
    assert "\n" not in str(caught.value)


ENDLESS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{{ range(99999) | map('center', 99999) | join }}",
    "{% set n = namespace(s='ab') %}{% for i in range(99999) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99999) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n }}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s | tojson }}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ '%s' % n.s }}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set x %}{{ n.s }}{{ n.s }}{% endset %}"
    "{% set n.s = x %}{% endfor %}",
    "{% set n = namespace(s=3) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**9 }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.rjust(10**10) }}",
    "{{ 'a\n' * 9999 | indent(99999) }}",
    "{{ '\t' * 9999 | string }}{{ ('\t' * 9999).expandtabs(99999) }}",
    "{{ ('a' * 9999).replace('', 'b' * 9999) }}",
    "{{ 'a' * 9999 | string }}{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
    "{{ ('a' * 99999).join(range(9999) | map('string')) }}",
    "{{ range(9999) | join('a' * 99999) }}",
    "{{ range(9999) | map('string') | join('a' * 99999) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ '{:{a[w]}}'.format(1, a={'w': 10**10}) }}",
    "{{ '{:{w}}'.format_map({'w': 10**10}) }}",
    "{{ ('a' * 9999).translate({97: 'b' * 99999}) }}",
    "{{ lipsum(10**6) }}",
]


@pytest.mark.parametrize("source", ENDLESS)
@pytest.mark.fault(34)
def test_what_would_not_end_is_refused_before_it_takes_time_or_memory(source, monkeypatch):
    monkeypatch.setattr(sandbox, "WORK", 20_000)
    monkeypatch.setattr(sandbox, "SECONDS", 60.0)  # what is seen is the count of the work, not the clock

    def refused():
        with pytest.raises(DataError, match="the template fails on this dialogue") as caught:
            render(source)
        assert "\n" not in str(caught.value)

    tracemalloc.start()
    took = seconds(refused, trials=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 10 * half_of_the_work() and peak < 60 << 20


@cache
def half_of_the_work() -> float:
    """Seconds of an honest template that spends half of what these tests allow."""
    tracemalloc.start()
    took = seconds(lambda: render("{% for i in range(4999) %}{{ i }}{% endfor %}"))
    tracemalloc.stop()
    return took


@pytest.mark.fault(34)
def test_work_that_no_count_sees_ends_by_the_clock(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.05)
    source = "{% set s = 'a' * 999999 %}{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="does a loop of it ever end"):
        render(source)


def test_a_long_dialogue_is_within_bounds():
    source = (
        "{% for m in messages %}{% set said = m.content | trim %}{{ '<|' + m.role ~ said.split('</think>')[-1] }}"
        "{% if m.content.startswith('x') or 'y' in m.content %}{{ m.content.replace('y', 'z') }}{% endif %}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ m | tojson }}\n{% endfor %}"
    )
    rows = [Message(("user", "assistant")[i % 2], "some words to say " * 25) for i in range(300)]
    assert len(render(source, rows)) > 250_000


def test_a_refusal_in_the_templates_own_words():
    with pytest.raises(DataError, match="the template refuses this dialogue: no, thanks"):
        render("{{ raise_exception('no, thanks') }}")


def test_a_template_that_does_not_compile_names_the_line():
    with pytest.raises(DataError, match=r"does not compile.*\(line 2\)"):
        render("a\n{% for %}")


def test_json_is_plain_and_the_moment_is_fixed():
    assert render("{{ {'ä': '<b>'} | tojson }}{{ eos_token }}") == '{"ä": "<b>"}</s>'
    assert render("{{ strftime_now('%Y-%m-%d') }}", now=datetime(2024, 2, 29)) == "2024-02-29"


def test_noncharacters_cannot_forge_a_mark():
    with pytest.raises(DataError, match=r"U\+FDD0"):
        render("{{ messages[0].content }}", [Message("user", "\ufdd0x\ufdd1")])
