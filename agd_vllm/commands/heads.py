"""`agd-vllm heads`: which attention heads answer from the context, and which from the weights."""

from __future__ import annotations

import json
from pathlib import Path

import click

from agd_vllm.commands import options as shared
from agd_vllm.commands.process import quiet_unless


@click.command()
@click.argument("source", metavar="INPUT")
@shared.model_option
@click.option("--kind", type=click.Choice(["in-context", "parametric"]), required=True)
@click.option("--top", type=click.IntRange(min=1), required=True, help="How many heads.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON file.")
@shared.limit_option
@shared.dtype_option
@shared.process_options
def heads(
    source: str,
    model: str,
    kind: str,
    top: int,
    output: Path,
    limit: int | None,
    dtype: str,
    trust_remote_code: bool,
    debug: bool,
) -> None:
    """Rank attention heads by their part in answers given with and without the context; `decode --roi-heads` takes
    the file.

    INPUT holds questions with their context: a Natural Questions file ({"question", "answers", "ctxs": [{"text"}]}), or
    rows whose metadata is {"question", "answers", "context"}; JSON or JSONL, also packed. In-context heads have a
    larger share of the AttnLRP relevance for the answer's tokens with the context than without, parametric heads a
    smaller one. A question takes a second or two for a small model on two cores.
    """
    quiet_unless(debug)
    from transformers.utils.logging import disable_progress_bar

    from agd_vllm.evaluation.head_ranking import HeadRanking, read_questions
    from agd_vllm.models.inspect import inspect_model

    questions = read_questions(source, limit)
    info, tokenizer = inspect_model(model, attribution=True, trust_remote_code=trust_remote_code)
    if top > info.num_layers * info.num_heads:
        raise ValueError(
            f"--top {top}: the model has {info.num_layers * info.num_heads} heads ({info.num_layers} layers of "
            f"{info.num_heads})"
        )
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: no such folder; make it first")
    from agd_vllm.attribution.reference import ReferenceScorer

    disable_progress_bar()
    scorer = ReferenceScorer(model, dtype=dtype, trust_remote_code=trust_remote_code)
    ranking = HeadRanking(scorer, tokenizer, info.max_model_len)
    with click.progressbar(questions, label="questions", file=click.get_text_stream("stderr")) as shown:
        ranking.add_all(shown)
    found = ranking.top(kind, top)
    content = {
        "kind": kind,
        "model": model,
        "heads": [list(head) for head, _ in found],
        "scores": [score for _, score in found],
    }
    output.write_text(json.dumps(content) + "\n")
    layers = sorted({layer for (layer, _), _ in found})
    click.echo(f"{len(found)} {kind} heads of layers {', '.join(map(str, layers))} in {output}")
