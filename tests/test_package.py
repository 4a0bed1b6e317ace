"""How the package is laid out for its users: `kernels` exists as `agd_vllm.kernels` only."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import CHECKOUT

PROGRAM = """
import importlib.metadata, importlib.util
import agd_vllm.kernels.gate
spec = importlib.util.find_spec("kernels")
# In the checkout the bare folder may be seen, as a namespace without a file, which is nobody's package.
assert spec is None or spec.origin is None, spec
assert "kernels" not in importlib.metadata.packages_distributions()
from transformers.utils import is_kernels_available
assert not is_kernels_available()
"""


@pytest.mark.parametrize("where", ["checkout", "elsewhere", "path"])
def test_kernels_are_part_of_the_package_and_no_module_of_their_own(tmp_path, where):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if where == "path":
        environment["PYTHONPATH"] = str(CHECKOUT)
    folder = CHECKOUT if where == "checkout" else tmp_path
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


SUFFIXES = (".py", ".c", ".h", ".html", ".css", ".js")


def test_a_wheel_holds_every_module(tmp_path):
    """The installation in the checkout is an editable one, which would hide a file that is left out."""
    source = tmp_path / "source"
    shutil.copytree(CHECKOUT / "agd_vllm", source / "agd_vllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], cwd=source, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if name.endswith(SUFFIXES)}
    files = [path for suffix in SUFFIXES for path in (source / "agd_vllm").rglob(f"*{suffix}")]
    assert packed == {str(path.relative_to(source)) for path in files}
