"""Fixtures shared by all tests: the real demo model."""

from pathlib import Path

import pytest

from agd_vllm import demo_model

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as `make demo` prepares it."""
    return demo_model.fetch("smollm2-135m-instruct", CHECKOUT / ".cache/models/smollm2-135m-instruct")
