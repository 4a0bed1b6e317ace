"""`agd-vllm ...` in the test's own process."""

import pytest
import ray

from agd_vllm.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `agd-vllm ...`, in this process; it must not have started Ray."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ray.is_initialized()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def fails(capsys, status: int, *arguments: str) -> str:
    """The one line that `agd-vllm ...` fails with."""
    code, _, err = run(capsys, *arguments)
    (line,) = [line for line in err.splitlines() if line.startswith("agd-vllm")]
    assert code == status, line
    assert "Traceback" not in err
    return line
