"""Imports run one way: by wing, and by module without a circle, those inside functions and for type checkers too."""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import CHECKOUT

# Lowest first. A module imports from its own level or lower ones; a level's wings are strangers unless BESIDE says so.
LEVELS = [
    ("records", "faults", "low_memory", "trace", "version"),
    ("kernels",),
    ("input", "prompts"),
    ("output", "models"),
    ("attribution", "engine"),
    ("inline", "dola", "steering"),
    ("strategies",),
    ("pipeline",),
    ("evaluation", "reporting"),
    ("commands",),
    ("cli", "jobs"),
    ("__main__",),
]
LEVEL = {wing: level for level, wings in enumerate(LEVELS) for wing in wings}
BESIDE = {("faults", "low_memory"), ("prompts", "input"), ("jobs", "cli")}
# Inline attribution stands beside the engine and the workers: of these it knows so much.
OF_THE_WINGS_BELOW = {
    "inline": {
        "agd_vllm.attribution.operations",
        "agd_vllm.attribution.paged_twin",
        "agd_vllm.attribution.regions",
        "agd_vllm.attribution.rules",
        "agd_vllm.engine.batch_rows",
        "agd_vllm.engine.channel",
        "agd_vllm.engine.gate_reports",
        "agd_vllm.engine.last_words",
        "agd_vllm.engine.orphans",
        "agd_vllm.engine.penalty",
    }
}


def modules(checkout: Path) -> dict[str, Path]:
    """Dotted name to file of everything that is imported or run."""
    package = {path: path.relative_to(checkout) for path in (checkout / "agd_vllm").rglob("*.py")}
    package |= {path: Path("agd_vllm/kernels", path.name) for path in (checkout / "kernels").glob("*.py")}
    package |= {path: path.relative_to(checkout) for path in (checkout / "jobs").glob("*.py")}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for path, name in package.items()}


def imported(source: str, known: set[str]) -> set[str]:
    """The modules of this project that a file imports, at whatever place."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {name if (name := f"{node.module}.{a.name}") in known else node.module for a in node.names}
    return found & known


def wing(module: str) -> str:
    return module.removeprefix("agd_vllm.").split(".")[0]


def faults(checkout: Path) -> list[str]:
    """Imports against the order, and a circle if there is one, in words."""
    files = modules(checkout)
    graph = {name: imported(path.read_text(), set(files)) for name, path in files.items()}
    # The package's own __init__ names Decoder for its users, lazily; nothing below may go through it.
    del graph["agd_vllm"]
    found = []
    for name, targets in graph.items():
        targets.discard("agd_vllm")
        for target in targets:
            here, there = wing(name), wing(target)
            down = LEVEL[there] < LEVEL[here] or here == there or (here, there) in BESIDE
            if here in OF_THE_WINGS_BELOW and there in ("attribution", "engine"):
                down = target in OF_THE_WINGS_BELOW[here]
            if not down:
                found.append(f"{name} imports {target}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        found.append(f"a circle: {' -> '.join(circle.args[1])}")
    return found


def test_imports_run_one_way():
    assert faults(CHECKOUT) == []


@pytest.mark.parametrize(
    "planted",
    [
        "from agd_vllm.pipeline.decoder import Decoder",
        "def f():\n    from agd_vllm.cli import main",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import agd_vllm.engine.session",
        "from agd_vllm.output import storage",
    ],
)
def test_a_forbidden_import_is_found(tmp_path, planted):
    for folder in ("agd_vllm/input", "agd_vllm/kernels", "kernels", "jobs"):
        (tmp_path / folder).mkdir(parents=True)
    for name in files_named_by(planted):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "agd_vllm/__init__.py").write_text("")
    (tmp_path / "agd_vllm/input/reader.py").write_text(planted)
    (fault,) = faults(tmp_path)
    assert fault.startswith("agd_vllm.input.reader imports agd_vllm.")


def files_named_by(planted: str) -> list[str]:
    names = ("pipeline/decoder", "cli", "engine/session", "output/storage")
    return [f"agd_vllm/{name}.py" for name in names if name.replace("/", ".") in planted or "storage" in planted]


def test_a_circle_is_found(tmp_path):
    for folder in ("agd_vllm/engine", "kernels", "jobs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "agd_vllm/__init__.py").write_text("")
    (tmp_path / "agd_vllm/engine/gate.py").write_text("import agd_vllm.engine.reports")
    (tmp_path / "agd_vllm/engine/reports.py").write_text("def f():\n    from agd_vllm.engine.gate import Gate")
    (fault,) = faults(tmp_path)
    assert fault.startswith("a circle: ")


def test_what_runs_on_a_gpu_without_vllm_does_not_import_it():
    """In the way of pytest --noconftest: with `tests/` on the path."""
    program = "import sys; sys.modules['vllm'] = None; import benchmarks.kernels, test_on_gpu"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(CHECKOUT), str(CHECKOUT / "tests")))}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
