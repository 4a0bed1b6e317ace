"""How the package is laid out for its users, `kernels` as `agd_vllm.kernels` only, and on which Python it is set up."""

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


def test_a_python_that_is_not_served_is_told_so_before_anything_is_installed(tmp_path):
    for name in ("pyproject.toml", "requirements"):
        (shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copy)(CHECKOUT / name, tmp_path / name)
    project = tmp_path / "pyproject.toml"
    project.write_text(
        project.read_text().replace('requires-python = ">=3.11,<3.13"', 'requires-python = ">=3.8,<3.10"')
    )
    before = set(tmp_path.rglob("*"))
    command = [sys.executable, str(tmp_path / "requirements/set_up.py"), str(tmp_path / "venv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    version = "{}.{}".format(*sys.version_info)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"set-up: Python {version} is not served, 3.8 or 3.9 is: PYTHON=python3.8\n"
    assert set(tmp_path.rglob("*")) == before
