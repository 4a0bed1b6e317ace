"""`agd-vllm calibrate` against Transformers' own greedy decode, and what it refuses."""

import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_line import fails, run
from conftest import CHECKOUT
from real_runs import engine_options
from transformers import AutoModelForCausalLM, AutoTokenizer

from agd_vllm.pipeline import calibration
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.records import DecodedRow, RowError

PROMPTS = {"one": "The capital of France is", "two": "Once upon a time there was a", "long": "word and " * 90}
TOKENS, PERCENTILE = 12, 75


def entropies_of_transformers(model_path) -> dict[str, list[float]]:
    """Of each prompt's greedy tokens, by a cached forward in float32."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    options = {"do_sample": False, "max_new_tokens": TOKENS, "output_logits": True, "return_dict_in_generate": True}
    made = {
        name: model.generate(**tokenizer(prompt, return_tensors="pt"), **options) for name, prompt in PROMPTS.items()
    }
    return {
        name: [float(torch.distributions.Categorical(logits=logits[0]).entropy()) for logits in each.logits]
        for name, each in made.items()
    }


@pytest.fixture
def given(smollm2, tmp_path):
    """Rows of which two are bad, and what to call `agd-vllm` with; the files of an earlier calibration are there."""
    rows = [json.dumps({"id": name, "prompt": prompt}) for name, prompt in PROMPTS.items()]
    data, output = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("\n".join([rows[0], '{"id": "broken", ', *rows[1:], '{"id": "none"}']) + "\n")
    output.mkdir()
    (output / "tau.json").write_text("of an earlier calibration")
    arguments = ["calibrate", str(data), "--model", str(smollm2), "--output", str(output), "--dtype", "float32"]
    return [*arguments, "--percentile", f"{PERCENTILE}", "--max-tokens", f"{TOKENS}"], output


def test_calibration_on_a_running_engine(given, smollm2, tight_engine, monkeypatch, capsys):
    """The command in this process, with an engine that runs already; prompts are prefilled in chunks, whose unfinished
    parts report entropies, too."""

    class OnTheEngine(calibration.Decoder):
        def start(self): ...

        def outcomes(self, items):
            preparer = self.preparer(tight_engine.engine.max_model_len)
            yield from tight_engine.decode([preparer.prepare(row) for row in items], strategy=self._strategy)

    monkeypatch.setattr(calibration, "Decoder", OnTheEngine)
    arguments, output = given
    check_calibration(*run(capsys, *arguments), output, smollm2)


@pytest.mark.long
def test_calibration_end_to_end(given, smollm2):
    arguments, output = given
    command = [sys.executable, "-m", "agd_vllm", *arguments, *engine_options(max_num_batched_tokens=64)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=500)
    check_calibration(done.returncode, done.stdout, done.stderr, output, smollm2)


def check_calibration(status, out, err, output, model):
    assert status == 3, err
    assert "2 rows failed" in err
    assert "line 2" in err and "line 5 (none)" in err
    assert "Traceback" not in err

    table = pq.read_table(output / "entropy.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("id", "string"),
        ("step", "int32"),
        ("entropy", "float"),
    ]
    found = {name: {} for name in PROMPTS}
    for row in table.to_pylist():
        assert row["step"] not in found[row["id"]]
        found[row["id"]][row["step"]] = row["entropy"]
    for name, expected in entropies_of_transformers(model).items():
        assert list(found[name]) == list(range(len(expected)))
        assert list(found[name].values()) == pytest.approx(expected, abs=1e-3)

    tau = json.loads((output / "tau.json").read_text())
    entropies = table["entropy"].to_numpy()
    assert tau == {
        "percentile": PERCENTILE,
        "tau": pytest.approx(np.percentile(entropies, PERCENTILE)),
        "tokens": len(entropies),
    }
    assert f"tau {tau['tau']:.3f}" in out
    assert matplotlib.image.imread(output / "entropy.png").std() > 0
    assert {path.name for path in output.iterdir()} == {".lock", "entropy.parquet", "entropy.png", "tau.json"}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "one", "prompt": "Hi"}) + "\n")
    return path


def test_what_calibrate_refuses_before_a_model_is_loaded(capsys, smollm2, data, tmp_path):
    common = ("--model", str(smollm2), "--output", str(tmp_path / "out"))
    missing = str(tmp_path / "missing.jsonl")
    assert "missing.jsonl does not exist" in fails(capsys, 2, "calibrate", missing, *common)
    assert "percentile 101" in fails(capsys, 2, "calibrate", str(data), *common, "--percentile", "101")
    assert "percentile nan" in fails(capsys, 2, "calibrate", str(data), *common, "--percentile", "nan")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": \n[1]\n')
    line = fails(capsys, 2, "calibrate", str(broken), *common)
    assert "2 rows failed" in line and "line 1" in line
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("precious")
    assert "something else" in fails(capsys, 2, "calibrate", str(data), *common)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


class Decoding:
    """In the decoder's place, for what real engines hardly do: outcomes that a test makes up."""

    load_seconds, layout, waiting_for_attribution = 0.0, "1 engine", 0

    def __init__(self, outcomes):
        self._outcomes = outcomes
        self.model = self
        self.path = "model"

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def outcomes(self, rows):
        yield from self._outcomes


def decoded(name: str, entropies: list[float]) -> DecodedRow:
    return DecodedRow(name, "", [1] * len(entropies), [1], (), "length", [], entropies=entropies)


@pytest.fixture
def calibrate(monkeypatch, data, tmp_path):
    def run(*outcomes):
        monkeypatch.setattr(calibration, "Decoder", lambda options: Decoding(outcomes))
        settings = calibration.CalibrationSettings((str(data),), str(tmp_path / "out"))
        return calibration.calibrate(settings, DecoderOptions.of(model="model", strategy="greedy", entropies=True))

    run.output = tmp_path / "out"
    return run


def test_no_token_at_all_leaves_an_earlier_calibration_alone(calibrate):
    assert calibrate(decoded("a", [1.0, 2.0]), None) == 0
    before = {path.name: path.read_bytes() for path in calibrate.output.iterdir()}
    assert len(before) == 4, "the files and their lock"
    with pytest.raises(ValueError, match=r"no token was decoded: 1 rows failed, the first at line 1 \(one\): too long"):
        calibrate(RowError(None, 1, "one", "too_long", "too long"))
    with pytest.raises(RuntimeError, match="1 of 2 entropies are no numbers"):
        calibrate(decoded("a", [1.0, float("nan")]))
    assert {path.name: path.read_bytes() for path in calibrate.output.iterdir()} == before


def test_many_tokens_are_written_in_groups(calibrate, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "TOKENS_PER_GROUP", 100)
    values = np.random.default_rng(0).random((50, 7)).astype(np.float32)
    errors = [RowError(None, line, None, "kind", f"reason {line}") for line in range(1, 13)]
    assert calibrate(*(decoded(f"{i}", row.tolist()) for i, row in enumerate(values)), *errors) == 12
    file = pq.ParquetFile(calibrate.output / "entropy.parquet")
    assert file.num_row_groups == 4
    table = file.read()
    assert table["entropy"].to_numpy().tolist() == values.ravel().tolist()
    assert table["id"].to_pylist() == [f"{i}" for i in range(50) for _ in range(7)]
    assert table["step"].to_pylist() == list(range(7)) * 50
    tau = json.loads((calibrate.output / "tau.json").read_text())
    assert tau == {"percentile": 80.0, "tau": pytest.approx(np.percentile(values, 80)), "tokens": 350}
    err = capsys.readouterr().err
    assert "reason 10" in err and "reason 11" not in err and "2 more" in err
