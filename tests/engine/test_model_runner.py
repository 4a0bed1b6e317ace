"""What depends on the model runner that vLLM takes, with no engine started."""

import asyncio
from types import SimpleNamespace

import pytest

from agd_vllm.engine.engine import Engine
from agd_vllm.engine.settings import EngineSettings, GateSettings
from agd_vllm.records import PreparedRow, Roi, RowRefused
from agd_vllm.trace import Tracer

MODEL = SimpleNamespace(eos_ids=frozenset({1}), pause_id=2)


def config(use_v2_model_runner: bool, async_scheduling: bool = False) -> SimpleNamespace:
    """What the engine asks of vLLM's configuration."""
    return SimpleNamespace(
        use_v2_model_runner=use_v2_model_runner,
        scheduler_config=SimpleNamespace(async_scheduling=async_scheduling),
        model_config=SimpleNamespace(),
    )


def test_what_a_model_runner_cannot_do_is_refused():
    engine = Engine(MODEL, EngineSettings(), Tracer(False))
    with pytest.raises(ValueError, match="async_scheduling: only with vLLM's Model Runner V2"):
        engine._fit_model_runner(config(False, async_scheduling=True))
    for v2, name in ((True, "GateProcessorV2"), (False, "GateProcessorV1")):
        given = config(v2, async_scheduling=v2)
        engine._fit_model_runner(given)
        assert [processor.partition(":")[2] for processor in given.model_config.logits_processors] == [name]


@pytest.mark.parametrize(("min_tokens", "stops", "refused"), [(3, 126, False), (3, 127, True), (0, 500, False)])
def test_stop_tokens_that_vllm_could_not_hold_back_are_refused(min_tokens, stops, refused):
    """Of a GPU's model runner, which would end with such a row; the model's own and PAUSE count, too."""
    engine = Engine(MODEL, EngineSettings(), Tracer(False))
    engine._fit_model_runner(config(use_v2_model_runner=True))
    given = PreparedRow("a", [5], Roi(), 9, min_tokens, stop_token_ids=tuple(range(3, 3 + stops)))

    async def enter() -> None:
        async with engine.session(given, None, GateSettings()):
            pass

    if refused:
        with pytest.raises(RowRefused, match="make 129 stop tokens, with min_tokens vLLM takes at most 128"):
            asyncio.run(enter())
    else:
        engine._check_stops(given)
