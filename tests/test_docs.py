"""What the documents name exists: files, headings, modules, tests, targets of make, commands and their options."""

import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import CHECKOUT

from agd_vllm.cli import cli

FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)|(?:href|src)=\"([^\"]+)\"", re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
# Paths of the checkout by their first folder; `kernels/` and the others stand at its top.
PATH = re.compile(r"(?<![\w./-])(?:agd_vllm|benchmarks|docs|examples|jobs|kernels|requirements|tests)/[\w./*-]*")
BENCHMARK = re.compile(r"\bbenchmarks\.([a-z]\w*)")
SELECTED = re.compile(r"pytest (tests/\S+\.py) -k (\w+)")
MAKE = re.compile(r"^(?:\$ )?make ([\w-]+)", re.MULTILINE)
COMMAND = re.compile(r"(?:^(?:\$ )?(?:[A-Z_]+=\S+ )*agd-vllm ([a-z][\w-]*)|python jobs/decode\.py)(.*)$", re.MULTILINE)


def documents(checkout: Path) -> list[Path]:
    return [checkout / "README.md", checkout / "CONTRIBUTING.md", *sorted((checkout / "docs").glob("*.md"))]


def code(text: str) -> str:
    """Fenced blocks and code spans, one under the other; a command that goes on over lines is one line."""
    fences = [re.sub(r"^ *```.*$", "", fence, flags=re.MULTILINE) for fence in FENCE.findall(text)]
    spans = [span.replace("\n", " ") for span in SPAN.findall(FENCE.sub("", text))]
    return re.sub(r" \\\n *", " ", "\n".join(fences + spans))


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, by GitHub's rules."""
    found: list[str] = []
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


def broken_links(document: Path, text: str) -> list[str]:
    found = []
    for groups in LINK.findall(SPAN.sub("", FENCE.sub("", text))):
        link = "".join(groups)
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(f"link {link}")
    return found


def unknown_names(checkout: Path, text: str) -> list[str]:
    text = code(text)
    targets = re.findall(r"^([\w-]+):", (checkout / "Makefile").read_text(), re.MULTILINE)
    found = [f"path {path}" for path in PATH.findall(text) if not list(checkout.glob(path.rstrip("./")))]
    found += [f"benchmark {m}" for m in BENCHMARK.findall(text) if not (checkout / f"benchmarks/{m}.py").exists()]
    found += [
        f"test {word} of {path}"
        for path, word in SELECTED.findall(text)
        if (checkout / path).exists() and not re.search(rf"def test_\w*{word}", (checkout / path).read_text())
    ]
    found += [f"make {name}" for name in MAKE.findall(text) if name not in targets]
    for name, arguments in COMMAND.findall(text):
        command = cli.commands.get(name or "decode")  # the job takes the options of decode
        if command is None:
            found.append(f"command {name}")
        elif name not in ("lm-eval", "model"):  # their options are lm-eval's own, and a subcommand's
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            known |= {"--help"}
            options = re.findall(r"(?<!\S)--[a-z][\w-]*", arguments)
            found += [f"option {option} of {name or 'decode'}" for option in options if option not in known]
    return found


def faults(checkout: Path) -> list[str]:
    """What the documents name and is not there, in words."""
    found = []
    for document in documents(checkout):
        text = document.read_text()
        found += [f"{document.name}: {f}" for f in broken_links(document, text) + unknown_names(checkout, text)]
    return found


def test_what_the_documents_name_exists():
    assert faults(CHECKOUT) == []


def test_every_page_is_linked_and_every_wing_has_its_row():
    readme, contributing = ((CHECKOUT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    assert [page.name for page in documents(CHECKOUT)[2:] if f"](docs/{page.name})" not in readme] == []
    wings = [path.parent.name for path in (CHECKOUT / "agd_vllm").glob("*/__init__.py")]
    assert [wing for wing in wings if f"{wing}/`" not in contributing] == []


@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        ("see [it](docs/nothing.md)", "link docs/nothing.md"),
        ("![a picture](examples/nothing.png)", "link examples/nothing.png"),
        ("see [it](docs/guide.md#no-such-heading)", "link docs/guide.md#no-such-heading"),
        ("see [`it`](#no-such-heading)", "link #no-such-heading"),
        ("[it]: docs/nothing.md", "link docs/nothing.md"),
        ("`python -m benchmarks.nothing --json X`", "benchmark nothing"),
        ("`pytest tests/engine/test_nothing.py -k x`", "path tests/engine/test_nothing.py"),
        ("`agd_vllm/nothing.py`", "path agd_vllm/nothing.py"),
        ("```sh\nmake nothing    # a comment\n```", "make nothing"),
        ("`agd-vllm nothing`", "command nothing"),
        ("```sh\nagd-vllm decode X \\\n    --nothing\n```", "option --nothing of decode"),
        ("`pytest tests/engine/test_engine.py -k nothing`", "test nothing of tests/engine/test_engine.py"),
        ("`ray job submit -- python jobs/decode.py X --nothing`", "option --nothing of decode"),
    ],
)
def test_what_does_not_exist_is_found(tmp_path, planted, fault):
    write(tmp_path, planted)
    assert faults(tmp_path) == [f"README.md: {fault}"]


@pytest.mark.parametrize(
    "planted",
    [
        "see [it](docs/guide.md#what-is-it-2-words), [again](docs/guide.md#twice-1), [out](https://x.org/y#z)",
        "`make demo`, nothing will make nothing; `[a](b)` is code, `tests/engine/` a folder",
        "`pytest tests/engine/test_engine.py -k alike`",
        "```sh\n$ RAY_ADDRESS=auto agd-vllm decode X --no-resume \\\n    --output Y   # agd-vllm nothing\n```",
        "# Here\n[up](#here) ![a picture](examples/report.png)",
    ],
)
def test_what_exists_is_no_fault(tmp_path, planted):
    write(tmp_path, planted)
    assert faults(tmp_path) == []


def write(checkout: Path, readme: str) -> None:
    for name in ("docs", "examples", "jobs", "tests/engine"):
        (checkout / name).mkdir(parents=True)
    shutil.copy(CHECKOUT / "Makefile", checkout)
    (checkout / "README.md").write_text(readme)
    (checkout / "CONTRIBUTING.md").write_text("")
    (checkout / "docs/guide.md").write_text("# What is it: `2` words?\n## Twice\n## Twice\n")
    (checkout / "examples/report.png").write_bytes(b"\x89PNG\xff")
    (checkout / "jobs/decode.py").write_text("")
    (checkout / "tests/engine/test_engine.py").write_text("def test_both_decode_alike():\n    pass\n")
