"""Numbers that a run is asked for, checked before any of them is compared or computed with."""

from __future__ import annotations

import math
import reprlib
from dataclasses import fields
from typing import Any

from agd_vllm.records import FLOAT32_MAX

INT32_MAX = 2**31 - 1
MAX_SEED = 2**32 - 1  # numpy, which vLLM seeds, takes no other


def check_numbers(options: Any) -> None:
    """Checks every number of a dataclass: Python passes on what the command line would not read as one."""
    for option in fields(options):
        value = getattr(options, option.name)
        if option.type == "float":
            check_real(option.name, value)
        elif option.type == "int" or (option.type == "int | None" and value is not None):
            check_whole(option.name, value)


def check_whole(name: str, value: Any) -> None:
    """Raises ValueError, in one line, unless `value` is an int of int32 (a seed: of uint32)."""
    if type(value) is not int:
        raise ValueError(f"{name} {_shown(value)}: must be a whole number, not {type(value).__name__}")
    low, high = (0, MAX_SEED) if name == "seed" else (-INT32_MAX, INT32_MAX)
    if not low <= value <= high:
        raise ValueError(f"{name} {_shown(value)}: must lie between {low} and {high}")


def check_real(name: str, value: Any) -> None:
    """Raises ValueError, in one line, unless `value` is a number, finite in float32; tau may be infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} {_shown(value)}: must be a number, not {type(value).__name__}")
    if name == "tau" and value == math.inf:
        return
    if not abs(value) <= FLOAT32_MAX:  # not a number, too
        raise ValueError(f"{name} {_shown(value)}: must be a finite number within float32")


def _shown(value: Any) -> str:
    """On one line, and short; Python prints no integers of more than 4,300 digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "(a huge integer)"
    return " ".join(reprlib.repr(value).split())
