"""Chat templates that write today's date: a run has one, on whatever day it is resumed, whoever prepares its rows."""

import json
import shutil
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_runs import decoded
from rich.console import Console
from tiny_tokenizers import tiny, wrapped

from agd_vllm import Decoder
from agd_vllm.evaluation import evaluate as evaluation
from agd_vllm.evaluation.evaluate import EvaluationSettings, evaluate
from agd_vllm.evaluation.head_ranking import HeadRanking
from agd_vllm.evaluation.strategies import parse_strategies
from agd_vllm.input.schema import parse_row
from agd_vllm.pipeline import run as run_module
from agd_vllm.pipeline.engines import Engines
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.pipeline.run import RunSettings, preview, run_dataset
from agd_vllm.prompts.prepare import Preparer
from agd_vllm.steering.pairs import read_pairs

MESSAGES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CLOCK = "Today: {{ strftime_now('%d %b %Y, %H:%M:%S') }}\n" + MESSAGES
# As Llama 3.2, Llama 3.1 and a template that leaves it all to whoever renders it have it.
LLAMA32 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}'
    "{% endif %}Today: {{ date_string }}\n" + MESSAGES
)
LLAMA31 = (
    '{% if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}Today: {{ date_string }}\n'
    + MESSAGES
)
STRING = "Today: {{ date_string }}\n" + MESSAGES
TICKING = "{{ strftime_now('%H:%M:%S.%f') }}\n" + MESSAGES
MONDAY, TUESDAY = datetime(2019, 12, 30, 23, 50, 7), datetime(2019, 12, 31, 0, 10)
ROWS = [
    {"id": f"{i}", "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
    for i in range(4)
]


@pytest.fixture
def model(smollm2, tmp_path):
    """The demo model with a chat template that the test names, and without weights."""

    def make(template: str) -> str:
        folder = shutil.copytree(smollm2, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return str(folder)

    return make


@pytest.fixture
def source(tmp_path) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "rows.jsonl")


def dates_of(output: Path, tokenizer) -> list[str]:
    """The date in each prompt of a run."""
    prompts = pq.read_table(output / "results")["prompt_token_ids"].to_pylist()
    return [tokenizer.decode(ids).partition("Today: ")[2].partition("\n")[0] for ids in prompts]


@pytest.mark.parametrize(
    ("template", "monday"),
    [
        (CLOCK, "30 Dec 2019, 23:50:07"),
        (LLAMA32, "30 Dec 2019"),
        (STRING, "30 Dec 2019"),
        (LLAMA31, "26 Jul 2024"),
    ],
)
def test_a_run_resumed_the_next_day_has_the_date_of_its_start(tmp_path, model, source, template, monday):
    """Its rows give their answers, so that nothing needs an engine."""
    options, output = DecoderOptions.of(model(template), strategy="greedy"), tmp_path / "out"
    for limit, now in ((2, MONDAY), (None, TUESDAY)):
        run_dataset(RunSettings((source,), str(output), limit, given_answers=True, now=now), options)
    assert dates_of(output, Decoder(options=options).tokenizer) == [monday] * 4
    summary = json.loads((output / "summary.json").read_text())
    assert summary.get("date") == (None if template == LLAMA31 else "2019-12-30T23:50:07")
    assert "date" not in json.loads((output / "run.json").read_text())


def test_a_run_of_an_earlier_release_takes_todays_date_and_keeps_it(tmp_path, model, source):
    options, output = DecoderOptions.of(model(CLOCK), strategy="greedy"), tmp_path / "out"
    for limit, now in ((1, MONDAY), (3, TUESDAY), (4, datetime(2020, 1, 5))):
        if limit == 3:
            (output / "date.json").unlink()
        run_dataset(RunSettings((source,), str(output), limit, given_answers=True, now=now), options)
    tuesday = "31 Dec 2019, 00:10:00"
    assert dates_of(output, Decoder(options=options).tokenizer) == ["30 Dec 2019, 23:50:07", *[tuesday] * 3]


def test_a_template_without_a_date_leaves_no_trace_of_one(tmp_path, model, source):
    options = DecoderOptions.of(model(MESSAGES), strategy="greedy")
    summaries = []
    for day, now in enumerate((MONDAY, TUESDAY)):
        output = tmp_path / f"out-{day}"
        run_dataset(RunSettings((source,), str(output), given_answers=True, now=now), options)
        assert not (output / "date.json").exists()
        summaries.append(json.loads((output / "summary.json").read_text()))
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("template", [LLAMA32, LLAMA31, STRING])
def test_a_date_given_as_a_variable_wins_the_rows_own_over_the_runs(template):
    tokenizer = wrapped(tiny("byte_level").backend_tokenizer, template)
    row = {"id": "a", "messages": [{"role": "user", "content": "Who?"}]}
    given = {"chat_template_kwargs": {"date_string": "1 May 2020"}}
    preparer = Preparer(tokenizer, default_roi=None, guided=False, max_tokens=1, date=MONDAY, **given)
    own = row | {"chat_template_kwargs": {"date_string": "2 June 2021"}}
    for each, date in ((row, "1 May 2020"), (own, "2 June 2021")):
        assert preparer.encode(parse_row(each, 1))[0].text.startswith(f"Today: {date}\n")


def test_the_date_stands_in_prompts_whose_words_are_found_in_roundabout_ways():
    """Emphasis renders twice, and this template looks into a message: it is rendered up to four times."""
    questions = CLOCK.replace("m.content }}", "m.content if m.content.endswith('?') else m.content | trim }}")
    tokenizer = wrapped(tiny("byte_level").backend_tokenizer, questions)
    for emphasized in (True, False):
        preparer = Preparer(tokenizer, default_roi=None, guided=True, emphasized=emphasized, max_tokens=1, date=MONDAY)
        row = {**ROWS[0], "roi": [{"message": 0}]}
        prepared = preparer.prepare(parse_row(row, 1))
        assert "Today: 30 Dec 2019, 23:50:07\n" in tokenizer.decode(prepared.prompt_token_ids)
        assert prepared.roi.spans or emphasized


@pytest.fixture
def decodes_nothing(monkeypatch):
    """Rows are prepared as for engines, which are left out, and so is what measures answers."""

    def outcomes(self, rows):
        preparer = self.preparer()
        for row in rows:
            made = decoded(row.id, row.metadata)
            made.prompt_token_ids[:] = preparer.prepare(row).prompt_token_ids
            yield made

    monkeypatch.setattr(Decoder, "outcomes", outcomes)
    monkeypatch.setattr(Engines, "serving", lambda self, decoder: nullcontext())
    monkeypatch.setattr(evaluation, "perplexities", lambda _, outcomes: (dict.fromkeys(outcomes), "nothing"))


def test_an_evaluation_has_one_date_across_midnight_and_for_strategies_added_later(tmp_path, model, decodes_nothing):
    row = {"messages": ROWS[0]["messages"][:1], "roi": [{"message": 0}], "metadata": {"answers": ["Me"]}}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row | {"id": f"{i}"}) + "\n" for i in range(3)))
    options, output = DecoderOptions.of(model(CLOCK)), tmp_path / "out"
    days = (("greedy,emphasize", 2, MONDAY), ("greedy,emphasize", 3, TUESDAY), ("random-candidate", 3, TUESDAY))
    for strategies, limit, now in days:
        settings = EvaluationSettings("jsonl", str(tmp_path / "data.jsonl"), str(output), limit, now=now)
        evaluate(settings, options, parse_strategies(strategies, {"model": options.model}), lambda line: None)
    tokenizer = Decoder(options=options).tokenizer
    for name in ("greedy", "emphasize", "random-candidate"):
        assert dates_of(output / name, tokenizer) == ["30 Dec 2019, 23:50:07"] * 3
        assert json.loads((output / name / "summary.json").read_text())["date"] == "2019-12-30T23:50:07"


def test_a_dry_run_shows_the_prompts_of_the_run_that_is_there(tmp_path, model, source, monkeypatch):
    options, output = DecoderOptions.of(model(CLOCK), strategy="greedy"), tmp_path / "out"
    run_dataset(RunSettings((source,), str(output), 1, given_answers=True, now=MONDAY), options)
    shown = Console(record=True, quiet=False, width=200)
    monkeypatch.setattr(run_module, "Console", lambda: shown)
    preview((source,), options, 2, str(output))
    assert shown.export_text().count("Today: 30 Dec 2019, 23:50:07") == 2
    preview((source,), options, 2, str(tmp_path / "none yet"))
    text = shown.export_text()
    assert "Today: " in text
    assert "30 Dec 2019" not in text
    assert not (tmp_path / "none yet").exists()


def test_whatever_prepares_rows_reads_the_clock_once(tmp_path, model, smollm2):
    """The template writes microseconds: two looks at the clock would be seen."""
    from agd_vllm.evaluation.lm_eval import AGDModel

    folder = model(TICKING)
    row = parse_row({"id": "a", "messages": ROWS[0]["messages"][:1]}, 1)

    def text(preparer: Preparer) -> str:
        return preparer.encode(row)[0].text

    decoder = Decoder(folder, strategy="greedy")
    assert text(decoder.preparer()) == text(decoder.preparer(512))
    harness = AGDModel(folder, strategy="greedy")
    assert len({text(harness._decoder(penalty).preparer()) for penalty in (1.0, 1.1, 1.2)}) == 1
    ranking = HeadRanking(Shaped(), decoder.tokenizer, 512)
    assert ranking._prompt("Who?") == ranking._prompt("Who?")
    pairs = "".join(
        json.dumps(row | {"metadata": {"preferred": "Me.", "dispreferred": "You."}}) + "\n"
        for row in ({"id": str(i), "messages": ROWS[0]["messages"][:1]} for i in range(3))
    )
    (tmp_path / "pairs.jsonl").write_text(pairs)
    found = read_pairs([str(tmp_path / "pairs.jsonl")], None, decoder.tokenizer, 512)
    assert len({tuple(pair.prompt) for pair in found}) == 1


class Shaped:
    """In a scorer's place, for prompts only."""

    hf = type("HF", (), {"num_layers": 1, "num_heads": 1})
