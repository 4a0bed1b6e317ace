"""What users read: help, messages and errors have the field's words, none of our old private ones."""

import ast
import re

import click
import pytest
from conftest import CHECKOUT

from agd_vllm.cli import cli

OLD = re.compile(
    r"\b(mend(s|ed|ing)?|heed(s|ed|ing)?|go(es|ing)? on|went on|said again|lets? go|letting go|in vain|last words)\b",
    re.IGNORECASE,
)
# Of a state that no user reads.
NO_MESSAGE = {("agd_vllm/engine/hold.py", "let go")}


def messages(source: str) -> list[str]:
    """The strings of a file, f-strings' parts among them, but no docstrings."""
    tree = ast.parse(source)
    bodies = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    bodies += [node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)]
    first = [node.body[0].value for node in bodies if node.body and isinstance(node.body[0], ast.Expr)]
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in strings if not any(node is docstring for docstring in first)]


def test_no_message_has_an_old_word():
    found = []
    for path in sorted((CHECKOUT / "agd_vllm").rglob("*.py")):
        name = str(path.relative_to(CHECKOUT))
        found += [(name, text) for text in messages(path.read_text()) if OLD.search(text)]
    assert set(found) <= NO_MESSAGE


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_no_help_has_an_old_word(name):
    command = cli.commands[name]
    for each in (command, *getattr(command, "commands", {}).values()):
        text = each.get_help(click.Context(each, info_name=name))
        assert len(text) > 100
        assert not OLD.search(text), OLD.search(text)


def test_an_old_word_is_found():
    assert [bool(OLD.search(text)) for text in messages('"""go on"""\nraise E(f"{x}: mend it")')] == [True]
