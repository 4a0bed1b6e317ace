"""The dry run: counts, reasons, and regions that can be read on a terminal and in a pipe."""

import io

import pytest
from rich.console import Console
from tiny_tokenizers import tiny

from agd_vllm.prompts.dry_run import dry_run, highlight
from agd_vllm.prompts.prepare import Preparer
from agd_vllm.prompts.roi import region
from agd_vllm.prompts.template import raw_prompt
from agd_vllm.prompts.tokenizer import ChatTokenizer, Tokens
from agd_vllm.records import InputRow, Roi, RowError, Selector, Span

SYSTEM = (Selector(role="system"),)


def chat(id, system, question="what is the weather like?", **settings):
    messages = [{"role": "system", "content": system}] if system else []
    return InputRow(id=id, messages=(*messages, {"role": "user", "content": question}), **settings)


def shown(items, show=3, terminal=False, guided=True, default_roi=SYSTEM, kind="byte_level"):
    preparer = Preparer(tiny(kind), default_roi=default_roi, guided=guided, max_tokens=8)
    console = Console(
        file=io.StringIO(), width=40, force_terminal=terminal, color_system="truecolor" if terminal else None
    )
    counts = dry_run(items, preparer, console, show)
    return counts, console.file.getvalue()


def highlighted(prompt, *selectors, kind="byte_level"):
    rendered = raw_prompt(prompt)
    tokens = ChatTokenizer(tiny(kind)).encode(rendered)
    return highlight(rendered.text, tokens, region(selectors, rendered, tokens)).plain


def test_counts():
    items = [
        chat("a", "Please answer in one sentence."),
        RowError(input="{", line=2, id=None, type="not_json", message="cut off"),
        chat("b", None, line=3),
        InputRow(id="c", prompt="Answer in French.", roi=(Selector(text="French"),)),
        chat("d", "Answer in French."),
    ]
    counts, text = shown(items)
    prompts = [
        Preparer(tiny("byte_level"), default_roi=None, guided=True, max_tokens=8).prepare(items[i]) for i in (0, 3, 4)
    ]
    sizes = [len(row.prompt_token_ids) for row in prompts]
    assert (counts.rows, counts.usable, counts.refused, counts.without_region) == (5, 3, 2, 0)
    assert counts.prompt_tokens == sum(sizes)
    # " French" alone is the smallest region, "Answer| in| French|." the next.
    assert (counts.region_min, counts.region_tokens) == (1, 4 + 1 + counts.region_max)
    assert "rows             5\n" in text
    assert "usable           3\n" in text
    assert "refused          2 (not_json 1, roi 1)\n" in text
    assert f"prompt tokens    {sum(sizes)}\n" in text
    mean = counts.region_tokens / 3
    assert f"region tokens    min 1, mean {mean:.1f}, max {counts.region_max} a row\n" in text
    assert "without a region 0 (decoded unguided)\n" in text
    assert "  line 2: cut off\n" in text
    assert '  line 3 (b): roi selector {"role": "system"}: no message has this role;' in text


def test_rows_without_a_region_are_counted_apart():
    plain = [chat("a", "Answer in French."), chat("b", None)]
    counts, text = shown(plain, default_roi=None)
    assert (counts.usable, counts.without_region, counts.region_tokens) == (2, 2, 0)
    assert "region tokens    none\n" in text
    assert "without a region 2 (decoded unguided)\n" in text
    counts, text = shown([chat("c", "Answer in French.", roi=SYSTEM), *plain], default_roi=None)
    assert (counts.usable, counts.without_region) == (3, 2)
    assert "region tokens    min 4, mean 4.0, max 4 a row\n" in text


def test_warnings_are_said_once_at_the_end():
    rows = [
        InputRow(id=id, prompt="Answer in French.", roi=(Selector(text=text),), stop=("<|start|>",))
        for id, text in (("a", "French"), ("b", "Answer"), ("c", "Answer"))
    ]
    _, text = shown(rows)
    *_, stop, region = text.splitlines()
    assert stop.startswith("  warning: row 'a': the stop string")
    assert region.startswith("  warning: row 'b': the region holds the prompt's first token")
    assert text.count("warning:") == 2


def test_a_region_at_the_start_of_a_prompt_is_no_matter_behind_a_bos_token():
    counts, text = shown(
        [InputRow(id="a", prompt="Answer in French.", roi=(Selector(chars=(0, 6)),))], kind="wordpiece"
    )
    assert counts.region_tokens == 1
    assert "warning:" not in text
    assert "warning:" in shown([InputRow(id="a", prompt="Answer", roi=(Selector(chars=(0, 6)),))])[1]
    assert "warning:" not in shown([chat("a", "Answer in French.")])[1]


def test_greedy_shows_no_region():
    _, text = shown([chat("a", "Answer in French.")], guided=False)
    assert "⟦" not in text
    assert "regions are ignored" in text


def test_only_the_first_rows_and_reasons_are_shown():
    good = [chat(f"good-{i}", "Answer in French.") for i in range(5)]
    bad = [chat(f"bad-{i}", None) for i in range(9)]
    _, text = shown([*bad, *good], show=2)
    assert [f"row good-{i} " in text for i in range(5)] == [True, True, False, False, False]
    assert [f"(bad-{i})" in text for i in range(9)] == [True] * 5 + [False] * 4
    assert "... and 4 more" in text


def test_an_empty_input():
    counts, text = shown([])
    assert counts.rows == 0
    assert "rows             0\n" in text


def test_the_region_token_by_token_in_a_pipe():
    _, text = shown([chat("a", "Answer in French.")])
    assert "── row a (line 0): " in text
    assert "<|start|>system\\n\n⟦Answer│ in│ French│.⟧<|end|>\\n\n<|start|>user\\n\nwhat is the weather like?" in text
    assert "\x1b" not in text


def test_colours_on_a_terminal():
    selectors = (Selector(message=0, text="French"), Selector(message=1, text="weather", weight=-1.0))
    _, text = shown([chat("a", "Answer in French.", roi=selectors)], terminal=True)
    positive, negative, outside = (
        text.split(word)[0].rsplit("\x1b[", 1)[1] for word in (" French", " weather", "what")
    )
    assert "48;" in positive
    assert "48;" in negative
    assert positive != negative
    assert outside.startswith("0m")


def test_weights_are_shown():
    text = highlighted("Answer in French.", Selector(text="in", weight=-0.5), Selector(text="French", weight=2))
    assert text == "Answer⟦-0.5*│ in⟧⟦2*│ French⟧."


def test_a_character_of_several_tokens_is_shown_once():
    assert highlighted("x🤖y", Selector(text="🤖")) == "x⟦🤖│││⟧y"


def test_tokens_that_overlap_under_different_weights():
    """A token may end with the first bytes of the character that the next one completes."""
    tokens = Tokens([7, 8], [(0, 2), (1, 3)])
    assert highlight("abc", tokens, Roi((Span(0, 1, 1.0), Span(1, 2, 2.0)))).plain == "⟦ab⟧⟦2*│c⟧"


def test_white_space_that_no_token_covers_is_not_lost():
    assert highlighted("in  French  in", Selector(text="in  French"), kind="wordpiece") == "⟦in│  French⟧  in"


def test_long_unguided_stretches_are_shortened_and_regions_are_not():
    text = highlighted("x" * 1000 + "Answer" * 200, Selector(text="Answer"))
    assert text.startswith("x" * 200 + " ... 600 characters ... " + "x" * 200 + "⟦")
    assert text.count("Answer") == 200


@pytest.mark.parametrize(
    ("hostile", "harmless"),
    [
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\r\x08b", "a\\r\\x08b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\x9b2J", "\\x9b2J"),
        ("⟦ fake │ ⟧", "\\u27e6 fake \\u2502 \\u27e7"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_text_of_rows_is_inert(hostile, harmless, terminal):
    row = InputRow(id=hostile, prompt=f"Answer {hostile} in", roi=(Selector(text="in"),))
    error = RowError(input=None, line=1, id=hostile, type=hostile, message=hostile)
    _, text = shown([row, error], terminal=terminal)
    assert hostile not in text or hostile == harmless
    # As id and text of a row; as id, type and message of an error.
    assert text.count(harmless) == 5
