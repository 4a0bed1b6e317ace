"""Traced strings: what a plain string gives, and every run says where its characters come from."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, wrapped

from agd_vllm.prompts.template import ChatTemplate
from agd_vllm.prompts.traced import Traced, _concat, traced_messages

WORDS = st.text("ab \n\u2028<", max_size=8)
SHORT = st.text("ab \n<", max_size=2)
INDEX = st.none() | st.integers(-9, 9)
NONE_OR_SHORT = st.none() | SHORT.filter(bool)


@st.composite
def operations(draw):
    """A function of two strings that a template may use, and gives a string or several."""
    sep, other, old = draw(NONE_OR_SHORT), draw(SHORT), draw(SHORT.filter(bool))
    begin, end, step, count = (
        draw(INDEX),
        draw(INDEX),
        draw(st.sampled_from([None, 1, 2, -1])),
        draw(st.integers(-1, 2)),
    )
    return draw(
        st.sampled_from(
            [
                lambda a, b: a + b,
                lambda a, b: a + other,
                lambda a, b: other + b,
                lambda a, b: a[begin:end:step],
                lambda a, b: a[len(a) // 2] if a else b,
                lambda a, b: a.strip(sep),
                lambda a, b: a.lstrip(sep),
                lambda a, b: a.rstrip(sep),
                lambda a, b: a.removeprefix(other),
                lambda a, b: a.removesuffix(other),
                lambda a, b: a.split(sep, count),
                lambda a, b: a.rsplit(sep, count),
                lambda a, b: a.splitlines(),
                lambda a, b: a.splitlines(True),
                lambda a, b: a.partition(old),
                lambda a, b: a.rpartition(old),
                lambda a, b: a.replace(old, other, count),
                lambda a, b: a.replace(other, b),
                lambda a, b: a.upper(),
                lambda a, b: copy.deepcopy(b),
                lambda a, b: str(a),
                lambda a, b: _concat([b, other, a]),
            ]
        )
    )


def check(traced, contents):
    at = 0
    for run in traced.runs if isinstance(traced, Traced) else ():
        assert at <= run.start < run.end <= len(traced)
        source = contents[run.message][run.offset : run.offset + run.end - run.start]
        assert str.__getitem__(traced, slice(run.start, run.end)) == source
        at = run.end


@settings(max_examples=2000, deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=3), st.lists(operations(), max_size=6), st.randoms())
def test_they_are_the_same_strings_and_their_runs_are_true(contents, steps, random):
    traced = [message["content"] for message in traced_messages([{"content": content} for content in contents])]
    plain = list(contents)
    for step in steps:
        i, j = random.randrange(len(plain)), random.randrange(len(plain))
        made, expected = step(traced[i], traced[j]), step(plain[i], plain[j])
        assert made == expected
        assert type(made) in (Traced, type(expected))
        more, less = ([made], [expected]) if isinstance(expected, str) else (made, expected)
        for part in more:
            check(part, contents)
        traced, plain = [*traced, *more], [*plain, *less]


TEMPLATE = (
    "{% macro show(words) %}[{{ words }}]{% endmacro %}{% for m in messages %}{% set c %}{{ m.content }}{% endset %}"
    "{% if m.content.endswith('?') %}{{ EXPRESSION }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "expression",
    [
        "c",
        "show(c)",
        "c ~ '!'",
        "c | trim | string",
        "'x' + c.strip() + 'y'",
        "c.split('<b>')[0] + '<b>' + c.split('<b>')[1]",
        "(c.split(' ') | first) + ' ' + c.split(' ', 1)[1]",
        "c.replace('no', 'on').replace('on', 'no')",
        "c[:3] + c[3:]",
        "c.splitlines() | last",
        "c.partition('<')[0] + c.partition('<')[1] + c.rpartition('<')[2]",
        "[m.content, 5] | first",
    ],
)
def test_nothing_is_lost_by_what_templates_do(expression):
    tokenizer = wrapped(byte_level(False), TEMPLATE.replace("EXPRESSION", expression))
    content = "Yes, <b> no?"
    rendered = ChatTemplate(tokenizer).render([{"role": "user", "content": content}], {})
    assert not rendered.faults
    ((place,),) = rendered.places
    assert rendered.text[place.start : place.end] == content
