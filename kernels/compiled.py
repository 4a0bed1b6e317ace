"""The kernels of a CPU: the C files beside this one, compiled by the machine's own compiler when they are first used.

The library is kept in the user's cache folder (XDG_CACHE_HOME). Every kernel has a twin in PyTorch that is used where
there is no compiler. CC names the compiler, AGD_VLLM_CFLAGS more flags for it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
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
        log.warning("scoring is slower without a C compiler (gcc with OpenMP, or CC): %s", _reason(error))
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """Raises OSError or SubprocessError where it cannot be compiled or loaded: see `available`."""
    folder = _cache_folder()
    if folder is None:
        # Nowhere to keep it. Once loaded the file may go.
        with tempfile.TemporaryDirectory() as scratch:
            return ctypes.CDLL(os.fspath(_compile(Path(scratch) / "kernels.so")))
    path = folder / f"kernels-{_key()}.so"
    if path.exists():
        try:
            return ctypes.CDLL(os.fspath(path))
        except OSError as error:
            log.debug("compiling %s anew: %s", path, error)
    # Renamed when complete: others may be compiling it as well.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _compile(Path(scratch) / path.name).rename(path)
    return ctypes.CDLL(os.fspath(path))


def _cache_folder() -> Path | None:
    """The user's, made if it is missing; None where there is none that can be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agd-vllm"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _key() -> str:
    """Of the sources and of this machine: home folders are shared by machines of different kinds."""
    machine = (_compiler(), platform.machine(), platform.libc_ver(), _cpu_flags())
    key = hashlib.sha256(repr(machine).encode())
    for path in (*sorted(FOLDER.glob("*.c")), *sorted(FOLDER.glob("*.h"))):
        key.update(path.read_bytes())
    return key.hexdigest()[:16]


def _compile(path: Path) -> Path:
    command = [*_compiler(), *map(os.fspath, sorted(FOLDER.glob("*.c"))), "-o", os.fspath(path), "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
    return path


def _compiler() -> list[str]:
    """With its flags."""
    return [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *shlex.split(os.environ.get("AGD_VLLM_CFLAGS", ""))]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _reason(error: Exception) -> str:
    printed = (getattr(error, "stderr", None) or "").strip().splitlines()
    return next((line for line in printed if "error" in line), f"{error}")
