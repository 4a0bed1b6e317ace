"""`agd-vllm vectors`: steering vectors from pairs of answers, for `decode --strategy steer`."""

from __future__ import annotations

import sys

import click

from agd_vllm.commands import options as shared
from agd_vllm.commands.process import quiet_unless


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@shared.model_option
@click.option(
    "--method",
    type=click.Choice(["grains", "caa", "random"]),
    required=True,
    help="grains: what the prompt's tokens that speak for the preferred answer add to the state, less what those "
    "against it add (by integrated gradients); caa: the state after the preferred answer less that after the other; "
    "random: a control, as long as caa's.",
)
@click.option("--layers", required=True, metavar="I,J,...", help="Decoder layers whose output is steered, from 0.")
@click.option("--output", required=True, metavar="FILE", help="safetensors file, local or any fsspec URL.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random's draws.")
@shared.limit_option
@shared.dtype_option
@shared.process_options
def vectors(
    inputs: tuple[str, ...],
    model: str,
    method: str,
    layers: str,
    output: str,
    seed: int,
    limit: int | None,
    dtype: str,
    trust_remote_code: bool,
    debug: bool,
) -> None:
    """Make steering vectors of a model from pairs of answers; `decode --strategy steer --steering FILE` takes them.

    INPUT holds rows as for decode whose metadata is {"preferred": "...", "dispreferred": "..."}: two answers to the
    row's prompt, taken letter by letter (after a raw `prompt`, begin them with the space that should stand there).
    grains takes some seconds a pair for a small model on two cores, the others a fraction of that.

    \b
    agd-vllm vectors pairs.jsonl --model M --method caa --layers 11,15 --output v.safetensors
    agd-vllm decode prompts.jsonl --model M --strategy steer --steering v.safetensors --output runs/steered
    """
    quiet_unless(debug)
    from transformers.utils.logging import disable_progress_bar

    from agd_vllm.models.inspect import inspect_model
    from agd_vllm.steering.arguments import check_layers
    from agd_vllm.steering.extraction import extract, pad_token
    from agd_vllm.steering.pairs import read_pairs
    from agd_vllm.steering.vector_file import SteeringVectors, check_place, write_vectors

    numbers = _numbers(layers)
    info, tokenizer = inspect_model(model, attribution=True, trust_remote_code=trust_remote_code)
    check_layers("--layers", numbers, info.num_layers)
    pairs = read_pairs(inputs, limit, tokenizer, info.max_model_len)
    pad_id = pad_token(tokenizer)
    check_place(output)
    from agd_vllm.attribution.integrated_gradients import IntegratedGradients

    disable_progress_bar()
    gradients = IntegratedGradients(model, dtype=dtype, trust_remote_code=trust_remote_code)

    def progress(items):
        with click.progressbar(items, label="pairs", file=sys.stderr) as shown:
            yield from shown

    found = extract(method, gradients, pairs, numbers, pad_id=pad_id, seed=seed, progress=progress)
    write_vectors(output, SteeringVectors(found, method, model, info.digest))
    lengths = ", ".join(f"{layer} (length {vector.norm():.2f})" for layer, vector in sorted(found.items()))
    click.echo(f"{method} vectors of layers {lengths} from {len(pairs)} pairs in {output}")


def _numbers(layers: str) -> list[int]:
    parts = layers.split(",")
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{layers!r}: numbers of layers such as 11,15", param_hint="'--layers'")
    return sorted({int(part) for part in parts})
