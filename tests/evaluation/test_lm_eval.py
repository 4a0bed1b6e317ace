"""AGD as lm-eval's model: a task of its own kind end to end, and what is refused."""

import json
import subprocess
import sys

import pytest
from conftest import CHECKOUT, ENGINE_ARGS
from lm_eval.api.instance import Instance

from agd_vllm.cli import main
from agd_vllm.evaluation.lm_eval import AGDModel, RequestRefused
from agd_vllm.pipeline.decoder import Decoder
from agd_vllm.records import DecodedRow, InputRow, RowError

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
description: "Answer with the name of a city."
doc_to_text: "What is the capital of {{{{country}}}}?"
doc_to_target: "{{{{city}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 24}}
metric_list:
  - metric: exact_match
    ignore_case: true
    ignore_punctuation: true
"""
ROWS = [{"country": "France", "city": "Paris"}, {"country": "Italy", "city": "Rome"}]


def command_line(tmp_path, smollm2, output_type="generate_until"):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "capitals.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl", output_type=output_type))
    engine_args = {name: value for name, value in ENGINE_ARGS.items() if name != "max_model_len"}
    settings = {"pretrained": str(smollm2), "tau": 0.5, "max_model_len": 512, "dtype": "float32"}
    arguments = ["run", "--model", "agd-vllm", "--tasks", "capitals", "--apply_chat_template"]
    arguments += ["--model_args", json.dumps(settings | {"engine_args": engine_args})]
    return [*arguments, "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]


@pytest.mark.long
def test_a_generation_task_end_to_end(tmp_path, smollm2):
    command = [sys.executable, "-m", "agd_vllm", "lm-eval", *command_line(tmp_path, smollm2)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "|capitals|" in done.stdout
    (path,) = (tmp_path / "out").rglob("samples_capitals_*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    answers = [sample["resps"][0][0] for sample in samples]
    # In the order of the rows, cut before the stop string.
    for answer, words in zip(answers, (("France", "Paris"), ("Italy", "Rome")), strict=True):
        assert any(word in answer for word in words)
        assert "." not in answer
    assert "capital of Italy" in samples[1]["arguments"]["gen_args_0"]["arg_0"]


def test_likelihoods_are_refused_in_one_line(monkeypatch, capsys, tmp_path, smollm2):
    monkeypatch.setattr(sys, "argv", ["agd-vllm"])
    with pytest.raises(SystemExit) as ended:
        main(["lm-eval", *command_line(tmp_path, smollm2, "loglikelihood")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("agd-vllm: no likelihoods: AGD selects tokens")


BOTH = """
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask


class Both(ConfigurableTask):
    def __init__(self, config=None):
        super().__init__(config=yaml.safe_load(open(__file__.replace("both.py", "capitals.yaml"))) | {"task": "both"})

    def construct_requests(self, doc, ctx, apply_chat_template=False, chat_template=None, **kwargs):
        return [
            Instance("generate_until", doc, (ctx, {"until": ["."]}), 0, **kwargs),
            Instance("loglikelihood", doc, (ctx, " Paris"), 0, **kwargs),
        ]
"""


@pytest.mark.parametrize(
    ("tasks", "named", "cached"),
    [
        ("capitals,scored", "scored", False),
        ("mixed", "scored", True),
        ("capitals,choice,rolling", "choice, rolling", False),
        ("both", "both", False),
    ],
)
def test_a_task_of_likelihoods_beside_others_is_refused_before_anything_is_decoded(
    monkeypatch, capsys, tmp_path, smollm2, tasks, named, cached
):
    arguments = command_line(tmp_path, smollm2)
    arguments[arguments.index("--tasks") + 1] = tasks
    if cached:
        arguments += ["--use_cache", str(tmp_path / "cache")]
    kinds = {"scored": "loglikelihood", "choice": "multiple_choice", "rolling": "loglikelihood_rolling"}
    for name, kind in kinds.items():
        task = TASK.format(data=tmp_path / "rows.jsonl", output_type=kind).replace("task: capitals", f"task: {name}")
        choices = "doc_to_choice: [Paris, Rome]\n" if name == "choice" else ""
        (tmp_path / f"{name}.yaml").write_text(task + choices)
    (tmp_path / "mixed.yaml").write_text("group: mixed\ntask: [capitals, scored]\n")
    (tmp_path / "both.py").write_text(BOTH)
    (tmp_path / "both.yaml").write_text("task: both\nclass: !function both.Both\n")
    engines = _Decodes(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["agd-vllm"])
    with pytest.raises(SystemExit) as ended:
        main(["lm-eval", *arguments])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("agd-vllm: no likelihoods: AGD selects tokens")
    assert line.endswith(f"(asked for by {named})")
    assert not engines.started


@pytest.fixture(scope="module")
def model(smollm2):
    return AGDModel(str(smollm2), batch_size=1, device="cpu", tau="0.5")


def row(model, context, **settings):
    return model._row(0, context, settings)


def test_requests_become_rows(model):
    assert model._options.strategy.tau == 0.5
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    chat = row(model, model.apply_chat_template([system, user]), until="\n\n", max_gen_toks=7, temperature=0)
    assert chat == {
        "id": "0",
        "max_tokens": 7,
        "stop": ["\n\n"],
        "messages": [system, user],
        "roi": [{"role": "system"}],
    }
    assert row(model, model.apply_chat_template([user, user]), until=["", "x"])["roi"] == [{"message": 1}]
    prompt = row(model, "Q: Hi", until=[], do_sample=False, temperature=0.0)
    assert (prompt["prompt"], prompt["roi"], prompt["max_tokens"]) == ("Q: Hi", [{"chars": [0, 5]}], 256)


@pytest.mark.parametrize(
    ("contents", "index"),
    [(("", "Hi"), 1), (("", ""), 0), (("Be brief.", ""), None)],
)
def test_the_region_is_a_message_that_says_something(model, contents, index):
    roles = ("system", "user", "assistant")
    chat = [{"role": role, "content": content} for role, content in zip(roles, (*contents, "Yes"), strict=True)]
    region = {"role": "system"} if index is None else {"message": index}
    assert row(model, model.apply_chat_template(chat), until=[])["roi"] == [region]
    assert row(model, model.apply_chat_template(chat[2:]), until=[])["roi"] == [{"message": 0}]


class _Decodes:
    """Stands in for engines: what reaches them is answered with its prompt, but for the id `fails`."""

    def __init__(self, monkeypatch, fails=None):
        self.started, self.rows, self._fails = 0, [], fails
        monkeypatch.setattr(Decoder, "start", lambda decoder: setattr(self, "started", self.started + 1))
        monkeypatch.setattr(Decoder, "outcomes", lambda decoder, items: self._outcomes(items))

    def _outcomes(self, items):
        for item in reversed(list(items)):
            assert isinstance(item, InputRow)
            self.rows.append(item.id)
            if item.id == self._fails:
                yield RowError(item.raw, item.line, item.id, "engine", "vLLM gave no token")
            else:
                text = item.prompt or item.messages[-1]["content"]
                yield DecodedRow(item.id, text, [1], [1], (), "stop", [])


def requests(*contexts):
    settings = {"until": ["\n"], "max_gen_toks": 4}
    return [Instance("generate_until", {}, (context, settings), i) for i, context in enumerate(contexts)]


def test_requests_that_cannot_be_decoded_have_empty_answers(monkeypatch, caplog, smollm2):
    model = AGDModel(str(smollm2), max_model_len=64)
    engines = _Decodes(monkeypatch, fails="4")
    cached = []
    monkeypatch.setattr(model.cache_hook, "add_partial", lambda kind, args, answer: cached.append((args[0], answer)))
    chat = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    empty_chat = model.apply_chat_template([{"role": "system", "content": ""}, {"role": "user", "content": ""}])
    answers = model.generate_until(requests("a", "long " * 100, "", "b", "c", empty_chat, chat, "d"))
    assert answers == ["a", "", "", "b", "", "", "Hi", "d"]
    assert engines.rows == ["7", "6", "4", "3", "0"]
    assert cached == [("d", "d"), (chat, "Hi"), ("b", "b"), ("a", "a")]
    before, after = (record.getMessage() for record in caplog.records)
    assert before.startswith("3 of 8 requests cannot be decoded, their answers are empty; request 1: the prompt has 1")
    assert "; request 2: prompt must be a non-empty string" in before
    assert after == "1 of 8 requests could not be decoded, their answers are empty; request 4: vLLM gave no token"


def test_where_no_request_can_be_decoded_nothing_is_loaded(monkeypatch, smollm2):
    model = AGDModel(str(smollm2), max_model_len=64)
    engines = _Decodes(monkeypatch)
    with pytest.raises(RequestRefused, match=r"^none of the 2 requests can be decoded; request 0: .*; request 1: "):
        model.generate_until(requests("long " * 100, ""))
    assert not engines.started
    assert model.generate_until([]) == []


def test_a_region_that_is_named_is_the_region(smollm2):
    model = AGDModel(str(smollm2), roi="role=user")
    assert "roi" not in row(model, model.apply_chat_template([{"role": "user", "content": "Hi"}]), until=[])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"do_sample": True}, "do_sample=False"),
        ({"temperature": 0.7}, "temperature=0"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"num_beams": 1, "presence_penalty": 0.5}, "setting presence_penalty=0.5;"),
        ({"repetition_penalty": 1.2}, "strategy agd has none with attribution workers"),
        ({"repetition_penalty": 0}, "finite number above 0"),
        ({"repetition_penalty": "high"}, "'high': must be a number"),
    ],
)
def test_refused_generation_settings(model, settings, word):
    request = Instance("generate_until", {}, ("Hi", {"until": [], **settings}), 0)
    with pytest.raises(RequestRefused, match=word) as error:
        model.generate_until([request])
    assert "\n" not in str(error.value)


def test_settings_that_change_nothing_are_taken(model):
    settings = {"num_beams": 1, "num_return_sequences": 1, "top_p": 0.9, "presence_penalty": 0.0, "n": 1}
    assert row(model, "Hi", until=[], **settings) == row(model, "Hi", until=[])


def test_a_repetition_penalty_is_the_requests_own_else_the_models(monkeypatch, smollm2):
    penalties = {}

    class Penalties(_Decodes):
        def _outcomes(self, items):
            for decoded in super()._outcomes(items):
                penalties[decoded.text] = self.decoder.options.strategy.repetition_penalty
                yield decoded

    engines = Penalties(monkeypatch)
    monkeypatch.setattr(Decoder, "start", lambda decoder: setattr(engines, "decoder", decoder))
    model = AGDModel(str(smollm2), strategy="greedy", repetition_penalty=1.1, max_model_len=64)
    own = {"b": 1.3, "c": 1, "d": None, "e": 1.3}
    asked = requests(*"abcde")
    for request in asked:
        context, settings = request.args
        penalty = {"repetition_penalty": own[context]} if context in own else {}
        request.arguments = (context, settings | penalty)
    assert model.generate_until(asked) == list("abcde")
    assert penalties == {"a": 1.1, "b": 1.3, "c": 1.0, "d": 1.1, "e": 1.3}


def test_engine_arguments_are_model_args(smollm2):
    text = f"pretrained={smollm2},gpu_memory_utilization=0.5,max_num_seqs=4,revision=main,max_length=64,max_gen_toks=9"
    options = AGDModel.create_from_arg_string(text)._options
    assert options.engine_args == {"gpu_memory_utilization": 0.5, "max_num_seqs": 4, "revision": "main"}
    assert (options.max_model_len, options.max_tokens) == (64, 9)
    both = AGDModel(str(smollm2), engine_args={"enforce_eager": True}, block_size=32, seed=3)._options
    assert both.engine_args == {"enforce_eager": True, "block_size": 32}
    assert both.seed == 3


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ({"tauu": 1}, "unknown key 'tauu'"),
        ({"tau": "low"}, "tau 'low'"),
        ({"gpu_memory_utilisation": 0.5}, "unknown key 'gpu-memory-utilisation'"),
        ({"tokenizer": "other"}, "unknown key 'tokenizer'"),
        ({"scheduler_cls": "mine"}, "scheduler_cls: agd-vllm sets it"),
        ({"block_size": 32, "engine_args": {"block_size": 16}}, "block_size: in engine_args, too"),
        ({"max_length": 64, "max_model_len": 64}, "max_length and max_model_len are the same"),
        ({"max_model_len": 64, "max_length": 64}, "max_length and max_model_len are the same"),
    ],
)
def test_unusable_model_args(smollm2, option, word):
    with pytest.raises(RequestRefused, match=word):
        AGDModel(str(smollm2), **option)
