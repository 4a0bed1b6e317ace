"""What inline attribution cannot do ends with one line before anything is loaded."""

import functools
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from command_line import fails
from conftest import CHECKOUT, RUNNER_V2, python_path

from agd_vllm import Decoder
from agd_vllm.engine.engine import Engine
from agd_vllm.engine.settings import EngineSettings
from agd_vllm.evaluation.strategies import parse_strategies
from agd_vllm.inline import engine_args
from agd_vllm.inline.supported import SCHEDULER, check_config
from agd_vllm.models.inspect import inspect_model
from agd_vllm.trace import Tracer


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--strategy", "cad", "scorer: strategy cad has no such option"),
        ("--attribution-workers", "2", "scorer inline has none"),
        ("--attribution-dtype", "float32", "in the engine's dtype"),
        ("--engine-arg", "tensor_parallel_size=2", "tensor_parallel_size"),
        ("--engine-arg", "pipeline_parallel_size=2", "pipeline_parallel_size"),
        ("--engine-arg", "enable_lora=true", "enable_lora"),
        ("--engine-arg", "quantization=fp8", "quantization"),
        ("--engine-arg", "kv_cache_dtype=fp8", "kv_cache_dtype"),
        ("--engine-arg", "enable_batch_sharded_sampling=true", "enable_batch_sharded_sampling"),
        ("--engine-arg", "scheduler_cls=mine.Scheduler", "scheduler_cls"),
        ("--engine-arg", 'speculative_config={"num_speculative_tokens": 1}', "speculative_config"),
    ],
)
def test_options(capsys, tmp_path, smollm2, option, value, words):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "prompt": "Hi"}) + "\n")
    command = ["decode", str(tmp_path / "rows.jsonl"), "--model", str(smollm2), "--output", str(tmp_path / "out")]
    line = fails(capsys, 2, *command, "--scorer", "inline", option, value)
    assert words in line
    assert not (tmp_path / "out").exists()


def model_with(smollm2, folder, **changes):
    """The demo model's files, with another configuration."""
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM"),
    ],
)
def test_models(smollm2, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        Decoder(model_with(smollm2, tmp_path / "model", **changes), scorer="inline")
    assert "\n" not in str(error.value)


def config_of(**changes):
    """What vLLM's worker sees of an engine that `engine_args` started, but for these `changes` (dotted names)."""
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel, enable_batch_sharded_sampling=None),
        model_config=SimpleNamespace(dtype=torch.bfloat16, quantization=None, get_head_size=lambda: 64),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        scheduler_config=SimpleNamespace(scheduler_cls=SCHEDULER),
        compilation_config=SimpleNamespace(mode=0),
        device_config=SimpleNamespace(device=torch.device("cpu")),
        lora_config=None,
        speculative_config=None,
        use_v2_model_runner=True,
    )
    for path, value in changes.items():
        *owners, name = path.split("__")
        setattr(functools.reduce(getattr, owners, config), name, value)
    return config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel_config__tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size=2"),
        ({"parallel_config__enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling=True"),
        ({"lora_config": object()}, "enable_lora=True"),
        ({"model_config__quantization": "fp8"}, "quantization=fp8"),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ({"speculative_config": "ngram"}, "speculative_config=ngram"),
        ({"scheduler_config__scheduler_cls": None}, "scheduler_cls"),
        ({"compilation_config__mode": 3}, "compilation_config"),
        ({"model_config__dtype": torch.float16}, "dtype float16"),
    ],
)
def test_configurations_of_somebodys_own_engine(changes, words):
    check_config(config_of())
    check_config(config_of(cache_config__cache_dtype="bfloat16"))
    with pytest.raises(ValueError, match=words) as error:
        check_config(config_of(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "capability", "words"),
    [
        ({"model_config__dtype": torch.float32}, (9, 0), "on a GPU inline attribution has bfloat16 only"),
        ({}, (7, 5), "no kernel for heads of 64 on this GPU"),
        ({"model_config__get_head_size": lambda: 512}, (9, 0), "no kernel for heads of 512 on this GPU"),
        ({"use_v2_model_runner": False}, (9, 0), "needs vLLM's Model Runner V2; leave VLLM_USE_V2_MODEL_RUNNER out"),
    ],
)
def test_gpus(monkeypatch, changes, capability, words):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    on_gpu = {"device_config__device": torch.device("cuda")}
    with pytest.raises(ValueError, match=words) as error:
        check_config(config_of(**on_gpu | changes))
    assert "\n" not in str(error.value)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    check_config(config_of(**on_gpu))


def test_an_engines_arguments_depend_on_no_machine_and_touch_no_gpu(monkeypatch, smollm2):
    def touched():
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr("torch.cuda._lazy_init", touched)
    found = []
    for available in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        found.append(engine_args(str(smollm2)))
        Decoder(str(smollm2), scorer="inline", dtype="float32")
    assert found[0] == found[1]
    assert "max_num_batched_tokens" not in found[0]


@pytest.mark.parametrize(("given", "tokens"), [({}, 512), ({"max_num_batched_tokens": 4096}, 4096)])
def test_an_inline_engine_on_a_cpu_has_small_batches_unless_the_user_named_one(monkeypatch, smollm2, given, tokens):
    info, _ = inspect_model(str(smollm2))
    engine = Engine(info, EngineSettings(plain=True, engine_args=given), Tracer(False))
    assert engine._engine_args()["max_num_batched_tokens"] == tokens
    assert "max_num_batched_tokens" not in Engine(info, EngineSettings(), Tracer(False))._engine_args()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_gpu = Engine(info, EngineSettings(plain=True), Tracer(False))._engine_args()
    assert "max_num_batched_tokens" not in on_gpu


REFUSED = """
from vllm import LLM
from agd_vllm.inline import engine_args

if __name__ == "__main__":
    LLM(**engine_args({model!r}, dtype="float32"), max_model_len=512, kv_cache_memory_bytes=1 << 29, {given})
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("enable_lora=True", "enable_lora=True: inline attribution does not work with it"),
        ("pipeline_parallel_size=2", "pipeline_parallel_size=2: inline attribution does not work with it"),
    ],
)
def test_somebodys_own_engine_ends_before_weights_load(smollm2, tmp_path, given, line):
    (tmp_path / "script.py").write_text(REFUSED.format(model=str(smollm2), given=given))
    # A list of cores for each rank.
    environment = os.environ | {"PYTHONPATH": python_path(CHECKOUT), "VLLM_CPU_OMP_THREADS_BIND": "0|0"}
    if "parallel" not in given:
        del environment["VLLM_CPU_OMP_THREADS_BIND"]
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert line in said, said[-3000:]
    assert "Loading weights" not in said and "Loading safetensors" not in said


@pytest.mark.long
def test_the_command_ends_with_what_an_engine_of_its_own_process_refused(smollm2, tmp_path):
    """As on a GPU; vLLM tells its client no more than that a process failed."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "prompt": "Hi", "roi": [{"text": "Hi"}]}) + "\n")
    command = [sys.executable, "-m", "agd_vllm", "decode", str(tmp_path / "rows.jsonl"), "--model", str(smollm2)]
    command += [
        "--output",
        str(tmp_path / "out"),
        "--scorer",
        "inline",
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
    ]
    command += ["--engine-arg", "kv_cache_memory_bytes=33554432"]
    done = subprocess.run(
        command, cwd=CHECKOUT, env=os.environ | RUNNER_V2, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("agd-vllm: ")]
    assert "--max-model-len 1024 takes 0.09 GiB" in line, line


def test_workers_are_those_of_the_strategies_that_have_some():
    options = {"model": "m", "attribution_workers": 2, "attribution_dtype": "float32"}
    forward, inline = parse_strategies("agd,agd:scorer=inline", options)
    assert (forward.options.workers, inline.options.attribution_workers) == (2, None)
    with pytest.raises(ValueError, match="every strategy attributes inline"):
        parse_strategies("agd:scorer=inline,agd:scorer=inline:tau=0", options)
