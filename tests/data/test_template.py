"""Rendering in the sandbox: bounded, refused with a sentence, marks located."""

from __future__ import annotations

from datetime import datetime

import pytest

from peftctl.data import template as module
from peftctl.data.template import Template
from peftctl.errors import DataError
from peftctl.row import Message

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
