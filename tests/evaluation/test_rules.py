"""The benchmarks' checkers as they are used here: offline, by rule, honest about what they cannot check."""

import contextlib
import copy
import random
import sys

import nltk
import pytest

from agd_vllm.evaluation import rules
from agd_vllm.evaluation.rules import DataMissing, RuleUnusable, check_rule, followed, kind_of


@pytest.mark.parametrize(
    ("rule", "kwargs", "kept", "broken"),
    [
        ("punctuation:no_comma", {}, "One and two.", "One, two."),
        ("keywords:forbidden_words", {"forbidden_words": ["sea"]}, "The ocean.", "The sea."),
        ("keywords:existence", {"keywords": ["sea"]}, "The sea.", "The ocean."),
        ("change_case:english_lowercase", {}, "this is a quiet english sentence.", "This is LOUD."),
        ("detectable_format:json_format", {}, '{"a": 1}', "a is 1"),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "one two three", "one two"),
        ("startend:quotation", {}, '"Quoted."', "Quoted."),
        ("count:word_count_range", {"min_words": 2, "max_words": 3}, "one two", "one two three four"),
        ("words:no_consecutive", {}, "one big cat", "big bad cat"),
        ("format:no_whitespace", {}, "onetwo", "one two"),
        ("count:keywords_multiple", {f"keyword{i}": "abcde"[i - 1] for i in range(1, 6)}, None, "a b"),
    ],
)
def test_an_answer_keeps_a_rule_or_breaks_it(rule, kwargs, kept, broken):
    check_rule(rule, kwargs)
    assert kept is None or followed(rule, kwargs, kept)
    assert not followed(rule, kwargs, broken)
    assert not followed(rule, kwargs, " \n")


def test_prohibitions_are_a_kind_of_their_own():
    assert kind_of("punctuation:no_comma") == kind_of("words:no_consecutive") == "prohibition"
    assert kind_of("words:vowel") == "words"


@pytest.mark.parametrize(
    ("rule", "kwargs", "word"),
    [
        ("punctuation:none", {}, "neither one of IFEval's nor one of IFBench's"),
        ("keywords:existence", {"words": ["sea"]}, "does not take"),
        ("count:word_count_range", {"num_words": 3}, "does not take"),
    ],
)
def test_rules_that_cannot_be_checked(rule, kwargs, word):
    with pytest.raises(RuleUnusable, match=word) as error:
        check_rule(rule, kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rule", "kwargs", "data"),
    [
        ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 1}, "punkt_tab"),
        ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 1}, "punkt_tab"),
        ("ratio:stop_words", {"percentage": 50}, "stopwords"),
        ("words:start_verb", {}, "punkt_tab"),
    ],
)
def test_missing_data_is_named_and_nothing_is_fetched(monkeypatch, tmp_path, rule, kwargs, data):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    fetched = []
    monkeypatch.setattr(nltk, "download", lambda *args, **_: fetched.append(args))
    check_rule(rule, kwargs)
    for library in ("lm_eval.tasks.ifeval", "ifbench"):  # both keep NLTK's sentence splitter once it is loaded
        if module := sys.modules.get(f"{library}.instructions_util"):
            module._get_sentence_tokenizer.cache_clear()
    with pytest.raises(DataMissing, match=data):
        followed(rule, kwargs, "Run to the sea. Swim.")
    assert fetched == []


def test_spacy_is_as_it_was_after_ifbench_is_imported():
    check_rule("words:vowel", {})
    assert all(sys.modules[name].__spec__ for name in ("spacy", "spacy.cli") if name in sys.modules)


@pytest.fixture
def arguments_of(monkeypatch):
    """The arguments that a rule's checker goes by, given and drawn."""
    gone_by = []
    real = rules._rule

    def watched(id):
        rule = real(id)
        build = rule.build_description

        def build_description(**kwargs):
            build(**kwargs)
            gone_by.append(copy.deepcopy(rule.get_instruction_args()))

        rule.build_description = build_description
        return rule

    def arguments_of(id, kwargs):
        gone_by.clear()
        check_rule(id, kwargs)
        # NLTK's data may be missing, and checkers trip over answers.
        with contextlib.suppress(Exception):
            followed(id, kwargs, "Some answer.")
        assert len(gone_by) == 2 and gone_by[0] == gone_by[1]
        return gone_by[0]

    monkeypatch.setattr(rules, "_rule", watched)
    return arguments_of


def test_a_letter_that_is_none_is_drawn_by_rule_and_arguments(arguments_of):
    drawn = [
        arguments_of(
            "keywords:letter_frequency", {"letter": letter, "let_frequency": count, "let_relation": "at least"}
        )
        for letter in "!#"
        for count in (1, 4, 10)
    ]
    # Spelled out, as another process must draw them, too.
    assert "".join(arguments["letter"] for arguments in drawn) == "esdkla"
    assert [arguments["let_frequency"] for arguments in drawn] == [1, 4, 10] * 2


def test_what_any_checker_draws_is_always_the_same(arguments_of):
    check_rule("words:vowel", {})
    known = [sys.modules[f"{name}.instructions_registry"] for name in ("lm_eval.tasks.ifeval", "ifbench")]
    drawing = 0
    for id in [id for registry in known for id in registry.INSTRUCTION_DICT]:
        kwargs = {"prompt_to_repeat": "Say this once more, please."} if id.startswith("repeat:") else {}
        drawn = []
        for seed in range(4):
            random.seed(seed)
            state = random.getstate()
            try:
                drawn.append(arguments_of(id, kwargs))
            except RuleUnusable:
                break  # it needs an argument
            assert random.getstate() == state
        assert all(arguments == drawn[0] for arguments in drawn), id
        drawing += bool(drawn and drawn[0])
    assert drawing > 30
