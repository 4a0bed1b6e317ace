"""The kernels' shared library: compiled when it is first used, wherever it can be, and done without where it cannot."""

import logging
import os
import subprocess
import sys

import pytest
from conftest import CHECKOUT

from agd_vllm.kernels import compiled


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """As in a new process, with a cache folder of its own. Without optimisation it is compiled sooner."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("AGD_VLLM_CFLAGS", "-O0")
    compiled.available.cache_clear()
    compiled.library.cache_clear()
    yield
    compiled.available.cache_clear()
    compiled.library.cache_clear()


def libraries(tmp_path):
    return sorted((tmp_path / "agd-vllm").glob("*"))


def test_it_is_compiled_once_and_nothing_else_is_left(tmp_path):
    assert compiled.available()
    (library,) = libraries(tmp_path)
    written = library.stat().st_mtime_ns
    compiled.library.cache_clear()
    assert compiled.library().agd_gated
    assert libraries(tmp_path) == [library] and library.stat().st_mtime_ns == written


def test_a_damaged_library_is_compiled_anew(tmp_path):
    library = tmp_path / "agd-vllm" / f"kernels-{compiled._key()}.so"
    library.parent.mkdir()
    library.write_bytes(b"")
    assert compiled.library().agd_gated
    assert library.stat().st_size > 0


def test_the_compiler_may_have_arguments(monkeypatch):
    monkeypatch.setenv("CC", "env LANG=C cc")
    assert compiled.available()


def test_flags_for_the_compiler_are_taken_and_make_another_library(monkeypatch):
    plain = compiled._key()
    monkeypatch.setenv("AGD_VLLM_CFLAGS", "-O0 -DNOTHING='a b'")
    assert compiled.available() and compiled._key() != plain
    compiled.available.cache_clear()
    compiled.library.cache_clear()
    monkeypatch.setenv("AGD_VLLM_CFLAGS", "-fno-such-flag")
    assert not compiled.available()


@pytest.mark.long
def test_no_kernel_reads_or_writes_beside_its_tensors(tmp_path):
    """The kernels' own tests, in a process whose allocations the sanitizers of the compiler watch."""
    runtime = subprocess.run(["cc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout
    environment = os.environ | {
        "AGD_VLLM_CFLAGS": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    # Compiled before: with the sanitizers' library in its own process the compiler takes minutes. The library is not
    # loaded there: that needs its sanitizer first, and ends the process.
    program = "from agd_vllm.kernels import compiled; compiled.available()"
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=CHECKOUT, capture_output=True, timeout=200)
    assert list((tmp_path / "agd-vllm").glob("*.so"))
    names = ("kernels/test_gate_kernel", "inline/test_paged_attention")
    files = [str(CHECKOUT / "tests" / f"{name}.py") for name in (*names, "attribution/test_streams")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *files]
    environment["LD_PRELOAD"] = runtime.strip()
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CHECKOUT, timeout=550)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("where", ["nowhere", "a file"])
def test_without_a_folder_to_keep_it_in_it_is_used_all_the_same(tmp_path, monkeypatch, where):
    if where == "nowhere":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(compiled.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        (tmp_path / "agd-vllm").write_text("")
    assert compiled.library().agd_gated


def test_without_a_compiler_it_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv("CC", "false")
    with caplog.at_level(logging.WARNING, "agd_vllm"):
        assert not compiled.available() and not compiled.available()
    (record,) = caplog.records
    assert record.message.startswith("scoring is slower without a C compiler (gcc with OpenMP, or CC): ")


def test_what_the_compiler_says_is_told(monkeypatch, caplog, tmp_path):
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\necho 'In function x:' >&2\necho 'x.c:1: error: no such thing' >&2\nexit 1\n")
    os.chmod(script, 0o755)
    monkeypatch.setenv("CC", str(script))
    with caplog.at_level(logging.WARNING, "agd_vllm"):
        assert not compiled.available()
    assert caplog.records[0].message.endswith(": x.c:1: error: no such thing")
