"""Scores of answers made up here, and what the table says of them."""

import pytest

from agd_vllm.evaluation.evaluate import EvaluationSettings, notes
from agd_vllm.evaluation.outcomes import Outcome, Step
from agd_vllm.evaluation.passes import forward_passes
from agd_vllm.evaluation.scoring import check_metadata, score
from agd_vllm.evaluation.table import markdown, record
from agd_vllm.pipeline.options import DecoderOptions

NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
TWO_RULES = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [None, {"relation": "at least", "num_words": 3, "language": None}],
}
QUESTION = {"question": "who", "answers": ["Ada"]}
RUN = {"failed": 0, "perplexity": 2.0, "tokens_per_second": 10.0, "forward_passes": 1.0, "relevance": True}


def outcome(id, text, metadata, tokens=(1, 2, 3, 4, 5), steps=()):
    return id, Outcome(id, text, [0], list(tokens), metadata, list(steps))


@pytest.fixture
def outcomes():
    changed = [Step(0, True, -0.5), Step(2, True, 0.5), Step(3, False, -1.0)]
    return {
        "greedy": dict(
            [
                outcome("a", "One, two.", NO_COMMA),
                outcome("b", "One, two.", TWO_RULES),
                outcome("c", "Ada Lovelace", QUESTION),
            ]
        ),
        "agd": dict(
            [
                outcome("a", "One two.", NO_COMMA, steps=changed),
                outcome("b", "Nothing much, really now.", TWO_RULES, tokens=[9] * 13),
                outcome("c", "Ada!", QUESTION, steps=[Step(4, True, 0.1)]),
            ]
        ),
    }


def test_records(outcomes):
    scores = score(outcomes)
    greedy = record("greedy", scores.rows, "greedy", outcomes["greedy"], RUN)
    agd = record("agd", scores.rows, "greedy", outcomes["agd"], RUN)
    assert (greedy["prompt_accuracy"], greedy["instruction_accuracy"]) == (1 / 3, 1 / 4)
    assert (agd["prompt_accuracy"], agd["instruction_accuracy"]) == (2 / 3, 3 / 4)
    assert (greedy["exact_match"], agd["exact_match"]) == (0, 1)
    assert greedy["difference"] is greedy["ci_low"] is None
    assert agd["difference"] == pytest.approx(1 / 3)
    assert agd["instruction_difference"] == pytest.approx(1 / 2)
    assert (agd["ci_low"], agd["ci_high"]) == (0, 1)
    assert agd["repetition_rate"] == pytest.approx(0.3)
    assert agd["composite"] == pytest.approx(2 / 3 * 0.7)
    assert agd["mean_length"] == pytest.approx(23 / 3)
    assert agd["guided_share"] == pytest.approx(4 / 23)
    assert agd["changed_share"] == pytest.approx(3 / 23)
    assert agd["negative_greedy"] == {"prohibition": 0.5, "other": 0}
    control = record("agd", scores.rows, "greedy", outcomes["agd"], {**RUN, "relevance": False})
    assert control["negative_greedy"] == {"prohibition": None, "other": None}
    assert agd["kinds"] == {
        "prohibition": {"rules": 2, "kept": 0.5},
        "length_constraints": {"rules": 1, "kept": 1},
        "qa": {"rules": 1, "kept": 1},
    }
    text = markdown("a suite", [greedy, agd], ["a note"])
    assert "| prompt acc. - greedy [95 %] | instr. acc. - greedy [95 %] |" in text
    assert "| agd | 3 | 66.7% | 75.0% | 100.0% | +33.3 [+0.0, +100.0] |" in text
    assert "| prohibition | 0.0% of 2 | 50.0% of 2 |" in text
    assert "rows with a prohibition | - | 50.0% |" in text
    assert text.endswith("- a note\n")


def test_forward_passes_of_a_token(outcomes):
    """Of the 23 tokens the workers compute 3 and 4: what comes before the last guided step of either row."""

    def passes(**options):
        return forward_passes(DecoderOptions.of(model="m", **options).strategy, outcomes["agd"])

    assert passes(strategy="greedy") == passes(strategy="emphasize") == 1
    assert passes(strategy="cad") == passes(strategy="agd", scorer="inline") == 2
    assert passes(strategy="agd") == pytest.approx(1 + 2 * 7 / 23)
    assert passes(strategy="agd", scorer="lxt") is None


def test_only_rows_that_both_decoded_are_compared(outcomes):
    del outcomes["greedy"]["b"]
    scores = score(outcomes)
    agd = record("agd", scores.rows, "greedy", outcomes["agd"], {**RUN, "failed": 1})
    assert agd["difference"] == 1 / 2
    assert "3 (1 failed)" in markdown("a suite", [agd], [])


def test_a_rule_without_its_data_is_left_out_of_every_strategy(outcomes, monkeypatch):
    import agd_vllm.evaluation.scoring as scoring

    real = scoring.followed

    def followed(rule, kwargs, answer):
        if rule == "punctuation:no_comma" and answer.startswith("Nothing"):
            raise scoring.DataMissing("NLTK's commas")
        return real(rule, kwargs, answer)

    monkeypatch.setattr(scoring, "followed", followed)
    scores = score(outcomes)
    assert scores.left_out == {"punctuation:no_comma": "NLTK's commas"}
    for rows in scores.rows.values():
        assert {id: [rule for rule, _ in row.rules] for id, row in rows.items()} == {
            "b": ["length_constraints:number_words"],
            "c": ["qa:contains_answer"],
        }
    agd = record("agd", scores.rows, "agd", outcomes["agd"], RUN)
    said = notes(EvaluationSettings("ifeval", None, "out"), scores, "perplexity", agd)
    assert any("NLTK's commas; 1 of the 3 rows have no other rule and are not scored" in line for line in said)


def test_a_checker_that_trips_counts_against_the_answer(outcomes, monkeypatch):
    import agd_vllm.evaluation.scoring as scoring

    monkeypatch.setattr(scoring, "followed", lambda *_: 1 // 0)
    scores = score(outcomes)
    assert scores.tripped == {"punctuation:no_comma": 4, "length_constraints:number_words": 2}
    assert not any(row.all_kept for row in (scores.rows["agd"]["a"], scores.rows["agd"]["b"]))


def test_rules_are_looked_at_before_anything_is_decoded():
    check_metadata([("a", NO_COMMA), ("b", TWO_RULES), ("c", QUESTION)])
    with pytest.raises(ValueError, match="row b: rule 'commas:none' is neither"):
        check_metadata([("a", NO_COMMA), ("b", {"instruction_id_list": ["commas:none"], "kwargs": [{}]})])
