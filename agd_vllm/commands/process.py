"""What every command that decodes does to its process: exit statuses and logs."""

from __future__ import annotations

import os

# Exit statuses of the contract.
ROWS_FAILED, UNUSABLE, OTHER = 3, 2, 1


def quiet_unless(debug: bool) -> None:
    """Keeps vLLM's log to errors; to be called before anything imports vLLM."""
    if not debug:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
