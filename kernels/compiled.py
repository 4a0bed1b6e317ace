"""The kernels of a CPU: the C files beside this one, compiled by the machine's own compiler when they are first used.

The library is kept in the user's cache folder (XDG_CACHE_HOME). Every kernel has a twin in PyTorch that is used where
there is no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
COMPILE_S = 120

log = logging.getLogger("agd_vllm")


@functools.cache
def available() -> bool:
    """Whether the kernels can be used here. Warns once where there is no working C compiler."""
    try:
        library()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("scoring is slower without a C compiler (gcc with OpenMP): %s", _reason(error))
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """Raises OSError or SubprocessError where it cannot be compiled or loaded: see `available`."""
    return ctypes.CDLL(os.fspath(_compiled()))


def _compiled() -> Path:
    """The shared library for this machine's instructions, compiled if it is not there yet."""
    compiler, sources = os.environ.get("CC", "cc"), sorted(FOLDER.glob("*.c"))
    # Home folders are shared by machines of different kinds.
    key = hashlib.sha256(repr((compiler, FLAGS, platform.machine(), _cpu_flags())).encode())
    for path in (*sources, *sorted(FOLDER.glob("*.h"))):
        key.update(path.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agd-vllm"
    library = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: others may be compiling it as well.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *FLAGS, *map(os.fspath, sources), "-o", os.fspath(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
        made.rename(library)
    return library


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _reason(error: Exception) -> str:
    printed = (getattr(error, "stderr", None) or "").strip().splitlines()
    return printed[0] if printed else f"{error}"
