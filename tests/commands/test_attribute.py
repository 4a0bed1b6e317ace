"""Relevance as data: which steps are attributed, what is written when, and that it adds up to what guided the run."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from command_line import fails, run
from conftest import CHECKOUT, DEMO_ROWS
from made_runs import made_row, write_run

from agd_vllm.attribution.worker import AttributionSettings, WorkerInfo, WorkerRelevance
from agd_vllm.output.relevance_writer import RelevanceWriter, TokenRelevance
from agd_vllm.output.run_reader import RunReader
from agd_vllm.output.storage import OutputFailed
from agd_vllm.pipeline import placement
from agd_vllm.pipeline.relevance import RelevanceSettings, remaining, selected_steps, step_targets
from agd_vllm.pipeline.relevance_fleet import RelevanceFleet, Task
from agd_vllm.prompts.tokenizer import load_tokenizer

ANSWER = "The lamp is lit at dusk, and nobody on the coast sleeps before."


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(str(smollm2))


@pytest.fixture
def row(tokenizer):
    """Guided at 2, 5, 7 and 9; 2 and 7 changed the token."""
    return made_row(tokenizer, "row-1", "A prompt of some tokens.", ANSWER, guided=(2, 5, 7, 9))


def attribute(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "agd_vllm", "attribute", *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)


def relevance_of(directory) -> dict[tuple[str, int, int], dict]:
    rows = pq.read_table(directory / "relevance").to_pylist()
    found = {(row["id"], row["step"], row["token_id"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_steps_that_changed_the_token_come_first_then_guided_ones_then_the_rest(row):
    length = len(row.token_ids)
    rest = [step for step in range(length) if step not in (2, 5, 7, 9)]
    assert selected_steps(row, None) == [2, 7, 5, 9, *rest]
    assert selected_steps(row, 3) == [2, 7, 5]


def test_a_changed_step_has_the_chosen_and_the_greedy_token(row):
    chosen = {step.step: step.chosen_id for step in row.steps}
    greedy = {step.step: step.greedy_id for step in row.steps}
    targets = step_targets(row, [2, 5, 0])
    assert targets == [(2, chosen[2]), (2, greedy[2]), (5, chosen[5]), (0, row.token_ids[0])]
    assert all(token == row.token_ids[step] for step, token in targets if (step, token) != (2, greedy[2]))


def test_a_run_is_read_back_as_it_was_written(tmp_path, tokenizer, row):
    rows = [row, *(made_row(tokenizer, f"plain-{index}", "Hi", "there") for index in range(3))]
    reader = RunReader(str(write_run(tmp_path / "run", rows, "model")))
    assert list(reader.rows()) == [*reader.rows(["row-1"]), *rows[1:]]
    (read,) = reader.rows(["row-1"])
    assert (read.token_ids, read.roi_spans, len(read.steps)) == (row.token_ids, row.roi_spans, 4)
    assert [step.candidate_ids for step in read.steps] == [step.candidate_ids for step in row.steps]
    assert reader.ids() == ["row-1", "plain-0", "plain-1", "plain-2"]


def some(step: int, token_id: int = 7) -> TokenRelevance:
    return TokenRelevance(step, token_id, 2.0, np.arange(3 + step, dtype=np.float32))


def test_relevance_is_durable_in_parts_and_knows_what_is_done(tmp_path):
    with RelevanceWriter(str(tmp_path)) as writer:
        writer.add("a", [some(4), some(4, 8), some(0)])
        writer.flush()
        writer.add("b", [some(1)])
        writer.fail("c", "attribution", "too large")
    # As a process that died would leave it: a part half written, a line torn.
    (tmp_path / "relevance/.part-00002.parquet.tmp").write_bytes(b"PAR1")
    with (tmp_path / "relevance-errors.jsonl").open("ab") as file:
        file.write(b'{"id": "d", "err')
    with RelevanceWriter(str(tmp_path)) as writer:
        assert [writer.steps_of(id) for id in "abcd"] == [2, 1, 0, 0]
        assert [writer.has_failed(id) for id in "abcd"] == [False, False, True, False]
        with pytest.raises(OutputFailed, match="another run is writing"):
            # A lock is a process's own, so another one must ask.
            raise_in_another_process(tmp_path)
        writer.fail("d", "attribution", "too large")
        writer.add("a", [some(5)])
    names = sorted(path.name for path in (tmp_path / "relevance").iterdir())
    assert names[0] == ".lock"
    assert [name.rpartition("-")[0] for name in names[1:]] == ["part-00000", "part-00001", "part-00002"]
    errors = [json.loads(line) for line in (tmp_path / "relevance-errors.jsonl").read_text().splitlines()]
    assert [error["id"] for error in errors] == ["c", "d"]
    found = relevance_of(tmp_path)
    assert set(found) == {("a", 4, 7), ("a", 4, 8), ("a", 0, 7), ("b", 1, 7), ("a", 5, 7)}
    assert found["a", 0, 7] == {"id": "a", "step": 0, "token_id": 7, "logit": 2.0, "relevance": [0.0, 1.0, 2.0]}


def test_a_rerun_goes_on_with_rows_and_steps_that_are_not_done(tmp_path, tokenizer, row):
    rows = [row, *(made_row(tokenizer, name, "Hi", "there") for name in ("failed", "new"))]
    run = str(write_run(tmp_path / "run", rows, "model"))

    def left(max_steps: int | None) -> dict[str, list[int]]:
        tasks = remaining(RunReader(run), RelevanceSettings(run, max_steps=max_steps), writer)
        return {task.id: list(dict.fromkeys(step for step, _ in task.targets)) for task in tasks}

    with RelevanceWriter(run) as writer:
        writer.add("row-1", [some(2), some(2, 8), some(7)])
        writer.fail("failed", "attribution", "too large")
        assert left(2) == {"new": [0]}
        assert left(4) == {"row-1": [5, 9], "new": [0]}
        assert left(None) == {"row-1": selected_steps(row, None)[2:], "new": [0]}


def raise_in_another_process(directory) -> None:
    program = f"from agd_vllm.output.relevance_writer import RelevanceWriter; RelevanceWriter({str(directory)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OutputFailed(done.stderr.splitlines()[-1])


def test_unusable_requests_are_one_line(capsys, tmp_path, smollm2, tokenizer, row):
    rows = str(DEMO_ROWS)
    run = write_run(tmp_path / "run", [row], str(smollm2))
    assert "INPUT is missing" in fails(capsys, 2, "attribute", "--model", str(smollm2))
    assert "--output" in fails(capsys, 2, "attribute", rows, "--model", str(smollm2))
    assert "--model" in fails(capsys, 2, "attribute", rows, "--output", str(tmp_path / "out"))
    assert "leave INPUT" in fails(capsys, 2, "attribute", rows, "--run", str(run))
    assert "--max-tokens" in fails(capsys, 2, "attribute", "--run", str(run), "--max-tokens", "3")
    assert "max-steps" in fails(capsys, 2, "attribute", "--run", str(run), "--max-steps", "0")
    assert "no run is there" in fails(capsys, 2, "attribute", "--run", str(tmp_path / "nowhere"))
    empty = write_run(tmp_path / "empty", [], str(smollm2))
    assert "no row is decoded there" in fails(capsys, 2, "attribute", "--run", str(empty))
    for strategy in ("steer", "dola", "cad"):
        other = write_run(tmp_path / strategy, [row], str(smollm2), strategy=strategy)
        line = fails(capsys, 2, "attribute", "--run", str(other))
        assert f"strategy {strategy} does not choose tokens by the logits of the model itself" in line
        assert not (other / "relevance.json").exists()
    moved = write_run(tmp_path / "moved", [row], str(tmp_path / "gone"))
    assert "--model says where it is now" in fails(capsys, 2, "attribute", "--run", str(moved))
    assert not (moved / "relevance").exists()
    (run / "relevance.json").write_text('{"model": "other", "revision": null, "rule": "ixg", "dtype": "float32"}')
    line = fails(capsys, 2, "attribute", "--run", str(run))
    assert 'rule is "ixg" there and "attnlrp" here' in line
    assert "removing" in line


def test_a_model_that_reads_the_tokens_otherwise_is_refused(capsys, tmp_path, smollm2, tokenizer, row):
    run = write_run(tmp_path / "run", [row], str(smollm2))
    other = shutil.copytree(smollm2, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((other / "config.json").read_text())

    def line(**changed) -> str:
        (other / "config.json").write_text(json.dumps(config | changed))
        return fails(capsys, 2, "attribute", "--run", str(run), "--model", str(other))

    assert "mean something else" in line(vocab_size=max(row.token_ids))
    assert "GPT2LMHeadModel" in line(architectures=["GPT2LMHeadModel"], model_type="gpt2")
    saved = json.loads((other / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    saved["model"]["vocab"] = {token: id for token, id in zip(vocabulary, reversed(vocabulary.values()), strict=True)}
    (other / "tokenizer.json").write_text(json.dumps(saved))
    assert "mean something else" in line()


def test_given_answers_are_taken_and_the_others_decoded(dataset, tokenizer, smollm2, tmp_path, monkeypatch):
    from made_decoding import Decoding

    from agd_vllm.pipeline import run as run_module
    from agd_vllm.pipeline.options import DecoderOptions
    from agd_vllm.pipeline.run import RunSettings, run_dataset
    from agd_vllm.prompts.prepare import Preparer

    def preparer(self):
        return Preparer(tokenizer, default_roi=None, guided=False, max_tokens=8, max_model_len=64)

    monkeypatch.setattr(Decoding, "preparer", preparer, raising=False)
    made = []

    def make(options):
        made.append(Decoding(options))
        made[0].output = tmp_path / "out"
        return made[0]

    monkeypatch.setattr(run_module, "Decoder", make)
    question = {"role": "user", "content": "Who?"}
    rows = [
        {"id": "given", "messages": [question, {"role": "assistant", "content": f" {ANSWER}"}], "metadata": 5},
        {"id": "asked", "messages": [question]},
        {"id": "raw", "prompt": "Once"},
        {"id": "empty", "messages": [question, {"role": "assistant", "content": ""}]},
        {"id": "long", "messages": [question, {"role": "assistant", "content": ANSWER * 20}]},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = RunSettings((str(source),), str(tmp_path / "out"), given_answers=True)
    assert run_dataset(settings, DecoderOptions.of(model=str(smollm2), strategy="greedy")) == 2
    assert made[0].offered == ["asked", "raw"]
    results = {row.id: row for row in RunReader(str(tmp_path / "out")).rows()}
    assert set(results) == {"given", "asked", "raw"}
    given = results["given"]
    assert given.finish_reason == "given"
    assert given.metadata == "5"
    assert tokenizer.decode(given.token_ids) == given.text
    assert given.text.strip() == ANSWER
    assert tokenizer.decode(given.prompt_token_ids).endswith("Who?<|im_end|>\n<|im_start|>assistant\n")
    errors = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert {error["id"]: error["error"]["type"] for error in errors} == {"empty": "answer", "long": "prompt_length"}
    assert {error["file"] for error in errors} == {str(source)}


def test_nothing_but_bad_rows_is_no_unusable_input(capsys, tmp_path, smollm2):
    (tmp_path / "rows.jsonl").write_text('{"id": "no words"}\n')
    given = (str(tmp_path / "rows.jsonl"), "--model", str(smollm2), "--output", str(tmp_path / "out"))
    assert run(capsys, "attribute", *given)[0] == 3
    assert json.loads((tmp_path / "out/errors.jsonl").read_text())["id"] == "no words"


@ray.remote
class FaultyWorker:
    """A worker that dies, once or always, or raises, by the first token of the row."""

    def __init__(self, marks):
        self._marks = marks

    def info(self):
        return WorkerInfo(False, None)

    def relevance(self, token_ids, targets):
        first = f"{self._marks}/{token_ids[0]}"
        if token_ids[0] == 13 or (token_ids[0] == 7 and not os.path.exists(first)):
            open(first, "w").close()
            os._exit(1)
        if token_ids[0] == 5:
            raise MemoryError("no room for 5")
        return [WorkerRelevance(float(token), np.float32(range(position + 1))) for position, token in targets]


def test_a_row_that_kills_its_worker_costs_no_other_row(tmp_path, monkeypatch):
    def make(cluster, index, model, settings, debug):
        options = {"num_cpus": 1, "max_restarts": -1, "scheduling_strategy": cluster.room.worker(index)}
        return FaultyWorker.options(**options).remote(str(tmp_path))

    monkeypatch.setattr(placement, "make_worker", make)
    tasks = [Task(str(first), [first, 1], [2, 3], [(0, 2), (1, 9)]) for first in (13, 7, 5, 4, 3)]
    with RelevanceFleet(None, AttributionSettings("lxt", "attnlrp", "float32"), 1, False) as fleet:
        ended = {done.task.id: done for done in fleet.attribute(iter(tasks)) if done is not None}
    assert set(ended) == {"13", "7", "5", "4", "3"}
    faults = {id: done.fault[0] for id, done in ended.items() if done.fault}
    assert faults == {"13": "poison", "5": "attribution"}
    assert "no room for 5" in ended["5"].fault[1]
    # Step 0 is predicted by the prompt's last token.
    assert [(found.logit, len(found.tokens)) for found in ended["7"].relevances] == [(2.0, 2), (9.0, 3)]


@pytest.fixture
def decoded_run(guided_run, tmp_path):
    """A real run: six rows of 24 tokens, float32."""
    return shutil.copytree(guided_run.output, tmp_path / "run")


def test_relevance_adds_up_to_the_scores_that_guided_a_real_run(decoded_run):
    done = attribute("--run", decoded_run, "--max-steps", 2)
    assert done.returncode == 0, done.stderr
    found = relevance_of(decoded_run)
    rows = {row.id: row for row in RunReader(str(decoded_run)).rows()}
    assert {id for id, _, _ in found} == set(rows)
    compared = 0
    for row in rows.values():
        steps = {step.step: step for step in row.steps}
        assert {step for id, step, _ in found if id == row.id} == set(selected_steps(row, 2))
        for step in selected_steps(row, 2):
            guided = steps[step]
            tokens = {token for id, at, token in found if (id, at) == (row.id, step)}
            assert tokens == {guided.chosen_id, guided.greedy_id}
            for token in tokens:
                relevance = found[row.id, step, token]["relevance"]
                assert len(relevance) == len(row.prompt_token_ids) + step
                summed = sum(span.weight * sum(relevance[span.start : span.end]) for span in row.roi_spans)
                score = guided.scores[guided.candidate_ids.index(token)]
                assert summed == pytest.approx(score, abs=1e-4 * max(map(abs, guided.scores)))
                compared += 1
    assert compared > 8  # some steps changed the token


@pytest.mark.parametrize("rule", ["cplrp", pytest.param("ig", marks=pytest.mark.long)])
def test_a_given_answer_is_attributed_token_by_token(smollm2, tmp_path, rule):
    """What each relevance explains is the logit that plain Transformers computes there."""
    import torch
    from transformers import AutoModelForCausalLM

    row = {
        "id": "a",
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The keeper."}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + '{"id": "b"}\n')
    arguments = ("--model", smollm2, "--output", tmp_path / "out", "--dtype", "float32", "--rule", rule)
    done = attribute(tmp_path / "rows.jsonl", *arguments)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    (answer,) = RunReader(str(tmp_path / "out")).rows()
    found = relevance_of(tmp_path / "out")
    assert list(found) == [("a", step, token) for step, token in enumerate(answer.token_ids)]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = len(answer.prompt_token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([answer.prompt_token_ids + answer.token_ids])).logits[0]
    for (_, step, token), relevance in found.items():
        assert relevance["logit"] == pytest.approx(logits[prompt + step - 1, token].item(), abs=1e-3)
        assert len(relevance["relevance"]) == prompt + step
        if rule == "cplrp":
            # CP-LRP conserves, as the model has no biases.
            assert sum(relevance["relevance"]) == pytest.approx(relevance["logit"], abs=1e-3)
    described = json.loads((tmp_path / "out/relevance.json").read_text())
    assert (described["rule"], described["steps"]) == (rule, len(answer.token_ids))
