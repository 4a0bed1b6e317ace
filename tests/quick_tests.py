"""`make quick`: tests that start neither vLLM nor Ray and take less than five seconds of CPU time each, which does not
depend on what else runs. With `--quick` only they are run, and one that starts or takes more fails."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
from counted_starts import Starts

LIMIT_S = 5.0
# What is not quick, beside long tests: files, and tests of the others by name.
SLOW_FILES = (
    "attribution/test_forward.py",
    "attribution/test_integrated_gradients.py",
    "attribution/test_long_contexts.py",
    "attribution/test_reference.py",
    "attribution/test_smollm2.py",
    "attribution/test_static_pass.py",
    "benchmarks/test_workers_benchmark.py",
    "commands/test_attribute.py",
    "commands/test_ray_job.py",
    "engine/test_engine.py",
    "evaluation/test_lm_eval.py",
    "inline/test_command_line.py",
    "inline/test_inline.py",
    "inline/test_models.py",
    "inline/test_raw_parameters.py",
    "kernels/test_triton_kernels.py",
    "output/test_writer.py",
    "pipeline/test_agd_equals_paper.py",
    "pipeline/test_calibrate.py",
    "pipeline/test_chaos.py",
    "pipeline/test_decoder.py",
    "pipeline/test_first_steps.py",
    "pipeline/test_pressure.py",
    "pipeline/test_strategies.py",
    "pipeline/test_teams.py",
    "test_counted_starts.py",
    "test_group_fixtures.py",
    "test_quick_tests.py",
)
SLOW_TESTS: tuple[str, ...] = (
    "attribution/test_paged_cache.py::test_random_calls_find_in_the_cache_what_belongs_there",
    "benchmarks/test_inline_benchmark.py::test_weights_are_written_by_a_process_that_ends",
    "commands/test_cli.py::test_a_dry_run_on_a_terminal_of_another_encoding",
    "commands/test_cli.py::test_bad_rows_are_reported_and_the_rest_is_decoded",
    "dola/test_dola.py::test_vllm_generates_what_was_recorded",
    "evaluation/test_heads.py::test_the_command_writes_a_head_set_for_decode",
    "inline/test_paged_attention.py::test_it_attends_and_fills_the_cache_as_its_twin",
    "pipeline/test_ray_token.py::test_a_local_ray_starts_without_a_home",
    "prompts/test_traced.py::test_they_are_the_same_strings_and_their_runs_are_true",
    "steering/test_vectors.py::test_grains_is_what_the_named_tokens_add_to_the_state",
    "steering/test_steering.py::test_logits_are_those_of_hooks_on_transformers",
    "test_imports.py::test_what_runs_on_a_gpu_without_vllm_does_not_import_it",
)


def is_quick(item: pytest.Item) -> bool:
    name = item.nodeid.removeprefix("tests/").partition("[")[0]
    return not (item.get_closest_marker("long") or name.startswith(SLOW_FILES) or name in SLOW_TESTS)


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Limits:
    def __init__(self, starts: Starts) -> None:
        self._starts = starts

    def _held_to(self) -> Iterator[None]:
        begun, before = cpu_seconds(), len(self._starts.all())
        done = yield
        if found := self._starts.all()[before:]:
            pytest.fail(f"a quick test starts {', '.join(found)}; name it in tests/quick_tests.py", pytrace=False)
        if (seconds := cpu_seconds() - begun) > LIMIT_S:
            pytest.fail(f"a quick test takes {seconds:.1f} s; name it in tests/quick_tests.py", pytrace=False)
        return done

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        return (yield from self._held_to())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        return (yield from self._held_to())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only quick tests, held to their limits")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    own = config.pluginmanager.get_plugin("own starts")
    if config.getoption("--quick") and own is not None:
        config.pluginmanager.register(Limits(own))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        slow = [item for item in items if not is_quick(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if is_quick(item)]
