"""Makes the virtual environment that `make` works in: `PYTHON requirements/set_up.py .venv`.

Runs under whatever Python 3 is given, that of an environment which is there already, too, with the standard library
alone. A Python that cannot be served ends it with one line, and nothing is left behind.
"""

import os
import re
import shutil
import subprocess
import sys

LOCK = "requirements/cpu.lock"
# The package index has torch's CUDA build only, of several gigabytes; PyTorch's own index has the lock's.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
VERSION = "{}.{}".format(*sys.version_info)


def read(name: str) -> str:
    with open(name, encoding="utf-8") as file:
        return file.read()


def served_versions() -> list:
    lowest, above = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', read("pyproject.toml")).groups()
    return [f"3.{minor}" for minor in range(int(lowest), int(above))]


def pip(python: str, *arguments: str) -> str:
    """What `pip install` said where it failed. Its warnings, hundreds of lines on some machines, are left out."""
    command = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    return (done.stderr or f"pip ended with {done.returncode}\n") if done.returncode else ""


def install_torch(python: str) -> str:
    (pin,) = re.findall(r"^torch==\S+", read(LOCK), re.MULTILINE)
    for where in ([], ["--index-url", TORCH_INDEX, "--retries", "1", "--timeout", "30"]):
        said = pip(python, *where, pin)
        # The second is said where pip is given constraints.
        if not re.search("No matching distribution|ResolutionImpossible", said):
            return said
    return (
        f"set-up: no {pin} for Python {VERSION}, neither at {TORCH_INDEX} nor in the folders of PIP_FIND_LINKS: "
        f"put its wheel there, or take another Python (make ... PYTHON=python{served_versions()[0]})\n"
    )


def main() -> None:
    (folder,) = sys.argv[1:]
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if VERSION not in served_versions():
        first, *rest = served_versions()
        sys.exit(f"set-up: Python {VERSION} is not served, {' or '.join([first, *rest])} is: PYTHON=python{first}")
    python = os.path.join(folder, "bin", "python")
    print(f"set-up: {folder} for Python {VERSION} from {LOCK}, in some minutes", flush=True)
    is_new = not os.path.exists(python)
    if is_new:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    said = install_torch(python)
    if said and is_new:
        shutil.rmtree(folder)
    # Exact pins without what vLLM's metadata asks for and nobody imports (requirements/overrides.txt): no dependencies.
    said = said or pip(python, "-r", LOCK) or pip(python, "--no-build-isolation", "-e", ".")
    if said:
        sys.exit(said.rstrip())


if __name__ == "__main__":
    main()
