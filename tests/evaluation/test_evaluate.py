"""`agd-vllm evaluate` end to end, on real engines, and what stops it before one is started."""

import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from command_line import fails, run
from conftest import CHECKOUT
from real_runs import engine_options
from transformers import AutoModelForCausalLM

from agd_vllm.evaluation import evaluate as evaluation
from agd_vllm.evaluation.outcomes import Outcome
from agd_vllm.steering.vector_file import SteeringVectors, write_vectors

SYSTEM = "Use no commas. Answer in at least three words."
RULES = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"relation": "at least", "num_words": 3}],
}


def row(number, question, metadata):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return {"id": f"row-{number}", "messages": messages, "roi": [{"message": 0}], "metadata": metadata}


ROWS = [
    row(0, "Which colours does the sky have?", RULES),
    row(1, "Name three cities of France.", RULES),
    row(2, "What is the capital of France?", {"answers": ["Paris"]}),
    row(3, "Who wrote Hamlet?", {"answers": ["Shakespeare", "William Shakespeare"]}),
    row(4, "Beyond the limit.", RULES),
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", ROWS)


def perplexity(model, results):
    """Row by row, without a batch."""
    losses = []
    for row in results:
        prompt, tokens = row["prompt_token_ids"], row["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(tokens), reduction="none").tolist()
    return math.exp(sum(losses) / len(losses))


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of all `strategies`, of which some can share an engine."""

    arguments: list[str]
    strategies: list[str]
    vectors: Path
    output: Path
    done: subprocess.CompletedProcess

    def folder(self, strategy: str) -> Path:
        return self.output / re.sub("[^A-Za-z0-9]", "-", strategy)


@pytest.fixture(scope="module")
def evaluated(smollm2, tmp_path_factory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluated")
    # A cached prefix is whole blocks: those that are steered otherwise would be found again.
    data = write_rows(folder / "data.jsonl", ROWS)
    Path(data).write_text(Path(data).read_text().replace(SYSTEM, f"{SYSTEM} {SYSTEM}"))
    vectors = folder / "v.safetensors"
    drawn = 4 * torch.randn(576, generator=torch.Generator().manual_seed(0))
    write_vectors(str(vectors), SteeringVectors({15: drawn}, "caa", str(smollm2)))
    steers = [f"steer:steering={vectors}:steering-strength={strength}" for strength in (2, -2, 0)]
    strategies = ["greedy", steers[0], "emphasize:repetition-penalty=1.3", *steers[1:], "agd:tau=0.3"]
    arguments = ["--model", str(smollm2), "--dtype", "float32", "--limit", "4", "--max-tokens", "24"]
    arguments = ["--data", data, *arguments, *engine_options(max_model_len=512, block_size=32)]
    arguments = ["evaluate", "--suite", "jsonl", *arguments, "--output", str(folder / "out")]
    arguments += ["--strategies", ",".join(strategies)]
    command = [sys.executable, "-m", "agd_vllm", *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return Evaluated(arguments, strategies, vectors, folder / "out", done)


@pytest.mark.long
def test_the_table_is_of_what_was_decoded(capsys, smollm2, evaluated):
    output, arguments = evaluated.output, evaluated.arguments
    assert "nothing left to decode" not in evaluated.done.stderr
    table = (output / "table.md").read_text()
    assert table.strip() in evaluated.done.stdout
    greedy, *_, agd = json.loads((output / "table.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for record, strategy in ((greedy, "greedy"), (agd, "agd:tau=0.3")):
        folder = evaluated.folder(strategy)
        results = pq.read_table(folder / "results").to_pylist()
        assert {row["id"] for row in results} == {f"row-{number}" for number in range(4)}
        texts = {row["id"]: row["text"] for row in results}
        kept = ["," not in texts[id] for id in ("row-0", "row-1")]
        long = [len(texts[id].split()) >= 3 for id in ("row-0", "row-1")]
        right = [name in texts[id] for id, name in (("row-2", "Paris"), ("row-3", "Shakespeare"))]
        rows = [a and b for a, b in zip(kept, long, strict=True)] + right
        assert record["rows"] == 4
        assert record["prompt_accuracy"] == sum(rows) / 4
        assert record["instruction_accuracy"] == pytest.approx(sum(kept + long + right) / 6)
        assert record["perplexity"] == pytest.approx(perplexity(model, results), rel=1e-3)
        summary = json.loads((folder / "summary.json").read_text())
        assert record["guided_share"] == pytest.approx(summary["guided_steps"] / summary["output_tokens"])
        assert record["tokens_per_second"] == pytest.approx(summary["tokens_per_second"])
    assert greedy["guided_share"] == 0 < agd["guided_share"]
    assert greedy["difference"] is None
    assert agd["difference"] == pytest.approx(agd["prompt_accuracy"] - greedy["prompt_accuracy"])
    assert agd["ci_low"] <= agd["difference"] <= agd["ci_high"]

    # The same command again decodes nothing and says the same; a smaller limit looks at fewer rows.
    count = len(evaluated.strategies)
    status, _, err = run(capsys, *arguments)
    assert (status, err.count("nothing left to decode")) == (0, count)
    assert (output / "table.md").read_text() == table
    assert run(capsys, *arguments, "--limit", "2")[0] == 0
    assert [record["rows"] for record in json.loads((output / "table.json").read_text())] == [2] * count


@pytest.mark.long
def test_strategies_that_can_share_an_engine_load_it_once_and_decode_the_same(tmp_path, evaluated):
    """Whatever stands between them, and against one that has an engine of its own."""
    suite, output = evaluated.arguments.index("--data"), evaluated.arguments.index("--output")
    _, data, *common = evaluated.arguments[suite:output]
    for name, strategy in (
        ("emphasize", ["--repetition-penalty", "1.3"]),
        ("steer", ["--steering", str(evaluated.vectors), "--steering-strength", "-2"]),
    ):
        own = ["decode", data, "--output", str(tmp_path / name), "--strategy", name, *strategy, *common]
        subprocess.run([sys.executable, "-m", "agd_vllm", *own], cwd=CHECKOUT, check=True, timeout=300)
    folders = [evaluated.folder(strategy) for strategy in evaluated.strategies]
    loading = [json.loads((folder / "summary.json").read_text())["load_seconds"] for folder in folders]
    assert max(loading[2:-1]) < 3 < min(*loading[:2], loading[-1])
    greedy, strong, emphasized, negative, nothing, _ = map(tokens, folders)
    assert emphasized == tokens(tmp_path / "emphasize") and len(emphasized) == 4
    assert negative == tokens(tmp_path / "steer")
    assert nothing == greedy
    assert all(one != other for one, other in itertools.combinations((greedy, strong, emphasized, negative), 2))


def tokens(folder):
    return {row["id"]: row["token_ids"] for row in pq.read_table(folder / "results").to_pylist()}


PENALISED = "greedy:repetition-penalty=1.3"


@pytest.mark.parametrize(
    ("strategies", "reference"),
    [
        ([PENALISED, "greedy", "agd"], "greedy"),
        (["agd", PENALISED, "greedy"], "greedy"),
        ([PENALISED, "agd"], PENALISED),
        (["agd", PENALISED], "agd"),
        (["greedy"], "greedy"),
    ],
)
def test_differences_are_to_plain_greedy_or_to_the_first_strategy(
    monkeypatch, capsys, tmp_path, smollm2, data, strategies, reference
):
    # Rows 2 and 3 are questions; each strategy answers another number of them.
    right = {PENALISED: [], "greedy": ["row-2"], "agd": ["row-2", "row-3"]}
    folders = {re.sub("[^A-Za-z0-9]", "-", name): ids for name, ids in right.items()}
    answers = {"row-2": "Paris", "row-3": "Shakespeare"}
    metadata = {row["id"]: row["metadata"] for row in ROWS}

    def outcomes(output, _ids):
        kept = folders[Path(output).name]
        return {id: Outcome(id, text if id in kept else "?", [0], [1], metadata[id]) for id, text in answers.items()}

    monkeypatch.setattr(evaluation, "run_dataset", lambda *_: 0)
    monkeypatch.setattr(evaluation, "read_outcomes", outcomes)
    monkeypatch.setattr(evaluation.RunReader, "parameters", lambda _: {"tokens_per_second": 1.0})
    monkeypatch.setattr(evaluation, "perplexities", lambda *_: (dict.fromkeys(right, 1.0), "perplexity"))
    arguments = ["evaluate", "--suite", "jsonl", "--data", data, "--model", str(smollm2)]
    arguments += ["--strategies", ",".join(strategies), "--output", str(tmp_path / "out")]
    assert run(capsys, *arguments)[0] == 0
    records = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [record["reference"] for record in records] == [reference] * len(strategies)
    for record in records:
        name = record["strategy"]
        expected = None if name == reference else (len(right[name]) - len(right[reference])) / 2
        assert (record["difference"], record["instruction_difference"]) == (expected, expected)
    header = (tmp_path / "out" / "table.md").read_text().splitlines()[2]
    others = len(strategies) > 1
    assert (f"| prompt acc. - {reference} [95 %] | instr. acc. - {reference} [95 %] |" in header) == others
    assert ("[95 %]" in header) == others


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"--strategies": "greedy,agd:top-k=1"}, "top_k"),
        ({"--strategies": "greedy,agd:roi-heads=missing.json"}, "missing.json"),
        ({"--strategies": "greedy,agd:roi=role=nobody"}, "role=nobody"),
        ({"--suite": "iheval"}, "record 1 is no record of iheval"),
        ({"--suite": "squad"}, "squad"),
        ({"--suite": "nq", "--distractors": "-1"}, "distractors"),
        ({"--data": "missing.jsonl"}, "missing.jsonl"),
        ({"--model": "./missing"}, "./missing"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_an_engine_is_started(capsys, tmp_path, smollm2, data, change, word):
    output = tmp_path / "out"
    options = {"--suite": "jsonl", "--data": data, "--model": str(smollm2), "--strategies": "greedy,agd"} | change
    arguments = [part for pair in options.items() for part in pair]
    assert word in fails(capsys, 2, "evaluate", *arguments, "--output", str(output))
    assert not output.exists()


def test_a_rule_of_no_checker_and_a_folder_of_something_else(capsys, tmp_path, smollm2, data):
    output = tmp_path / "out"
    arguments = ("evaluate", "--suite", "jsonl", "--model", str(smollm2), "--strategies", "greedy")
    unknown = tmp_path / "unknown.jsonl"
    unknown.write_text(json.dumps(row(0, "Hi", {"instruction_id_list": ["commas:none"], "kwargs": [{}]})))
    line = fails(capsys, 2, *arguments, "--data", str(unknown), "--output", str(output))
    assert "row row-0: rule 'commas:none'" in line
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    assert "holds no evaluation" in fails(capsys, 2, *arguments, "--data", data, "--output", str(output))
    (output / "thesis.tex").rename(output / "rows.jsonl")
    assert "of other rows" in fails(capsys, 2, *arguments, "--data", data, "--output", str(output))
    assert (output / "rows.jsonl").read_text() == "precious"
