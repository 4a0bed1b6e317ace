"""Do steering vectors do what they are made for? Log-odds of preferred over dispreferred answers against strength.

    python -m benchmarks.steering TRUTHFULQA.json --model M --json OUT.json --plot OUT.png

TRUTHFULQA.json is TruthfulQA's multiple choice (a list of {"question", "mc1_targets": {answer: 1 or 0}}). Of --pairs
questions, drawn by --seed, the true answer is preferred over the first false one. Vectors of each method come from the
first --making pairs; on all others log p(preferred) - log p(dispreferred) is measured with the vector added at every
token, as `--strategy steer` does, by the same rule on the Hugging Face model. How far the integrated gradients are from
adding up to what they explain, |sum - (F(x) - F(0))| / |F(x) - F(0)|, is measured on the pairs that vectors come from.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import matplotlib
import torch
from transformers.utils import logging

from agd_vllm.attribution.hf_model import HFModel
from agd_vllm.attribution.integrated_gradients import POINTS, IntegratedGradients
from agd_vllm.evaluation.bootstrap import paired_difference
from agd_vllm.models.inspect import inspect_model
from agd_vllm.steering.extraction import METHODS, TOP, extract, pad_token
from agd_vllm.steering.pairs import Pair, read_pairs
from agd_vllm.steering.rule import steered
from benchmarks.machine import write_result

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH_TOKENS = 1024


def rows(data: str, count: int, seed: int) -> Iterator[dict]:
    questions = random.Random(seed).sample(json.loads(Path(data).read_text()), count)
    for number, question in enumerate(questions):
        answers = question["mc1_targets"]
        true, false = (next(text for text, label in answers.items() if label == wanted) for wanted in (1, 0))
        yield {
            "id": str(number),
            "prompt": f"Q: {question['question']}\nA:",
            "metadata": {"preferred": f" {true}", "dispreferred": f" {false}"},
        }


class HeldOut:
    """Pairs as far as `layer`: the layers up to it run once for all strengths."""

    def __init__(self, hf: HFModel, pairs: Sequence[Pair], layer: int):
        self._hf, self._layer, self._batches = hf, layer, []
        self._jobs = [(pair.prompt, answer) for pair in pairs for answer in (pair.preferred, pair.dispreferred)]
        order = sorted(range(len(self._jobs)), key=lambda index: sum(map(len, self._jobs[index])))
        streams = []
        hook = hf.stack.layers[layer].register_forward_hook(lambda *given: streams.append(given[2]))
        while order:
            longest = sum(map(len, self._jobs[order[-1]]))
            batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
            ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.long)
            for row, index in enumerate(batch):
                tokens = [*self._jobs[index][0], *self._jobs[index][1]]
                ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
            with torch.inference_mode():
                hf.stack(input_ids=ids, attention_mask=mask, use_cache=False)
            self._batches.append((batch, streams.pop(), mask))
        hook.remove()

    @torch.inference_mode()
    def log_odds(self, offset: torch.Tensor, norm: bool) -> list[float]:
        """log p(preferred) - log p(dispreferred) of each pair, in nats, with every token's stream steered."""
        found, layers = torch.zeros(len(self._jobs)), self._hf.stack.layers
        self._hf.stack.layers = layers[self._layer + 1 :]
        for batch, stream, mask in self._batches:
            embeddings = steered(stream, offset, norm).to(stream.dtype)
            hidden = self._hf.stack(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
            for row, index in enumerate(batch):
                found[index] = log_probability(self._hf, hidden[row], *self._jobs[index])
        self._hf.stack.layers = layers
        return (found[0::2] - found[1::2]).tolist()


def log_probability(hf: HFModel, hidden: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = hidden[len(prompt) - 1 : len(prompt) + len(answer) - 1] @ hf.unembedding.T
    return logits.float().log_softmax(-1)[torch.arange(len(answer)), answer].sum()


def incompleteness(gradients: IntegratedGradients, pair: Pair) -> float:
    hf, explained = gradients.hf, gradients.answer(pair.prompt, pair.preferred)
    with torch.inference_mode():
        embeddings = hf.stack.embed_tokens(torch.tensor([[*pair.prompt, *pair.preferred]]))
        embeddings[:, : len(pair.prompt)] = 0
        hidden = hf.stack(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0]
        change = explained.log_probability - log_probability(hf, hidden, pair.prompt, pair.preferred).item()
    return abs(explained.tokens.sum().item() - change) / abs(change)


def plot(points: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=150, layout="constrained")
    for marker, method in zip("os^", METHODS, strict=True):
        own = [point for point in points if point["method"] == method]
        strengths, means = ([point[key] for point in own] for key in ("strength", "log_odds"))
        below = [point["difference"] - point["ci_low"] for point in own]
        above = [point["ci_high"] - point["difference"] for point in own]
        axes.errorbar(strengths, means, yerr=[below, above], marker=marker, capsize=3, label=method)
    axes.set(xlabel="steering strength", ylabel="log-odds of preferred over dispreferred, nats")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


@click.command(help=__doc__)
@click.argument("data")
@click.option("--model", required=True)
@click.option("--pairs", "count", default=100, show_default=True)
@click.option("--making", default=20, show_default=True, help="Pairs that vectors come from.")
@click.option("--layer", default=15, show_default=True)
@click.option("--strengths", default="-4,-2,0,2,4", show_default=True)
@click.option("--norm/--no-norm", default=True, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "output", required=True, type=click.Path(path_type=Path))
@click.option("--plot", "picture", required=True, type=click.Path(path_type=Path))
def main(data, model, count, making, layer, strengths, norm, seed, output, picture):
    started = time.perf_counter()
    logging.disable_progress_bar()
    info, tokenizer = inspect_model(model, attribution=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pairs.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(data, count, seed)))
        pairs = read_pairs([str(file)], None, tokenizer, info.max_model_len)
    gradients = IntegratedGradients(model)
    held_out, points, made = HeldOut(gradients.hf, pairs[making:], layer), [], {}
    plain = held_out.log_odds(torch.zeros(gradients.hf.config.hidden_size), norm)
    for method in METHODS:
        begun = time.perf_counter()
        vectors = extract(
            method, gradients, pairs[:making], [layer], pad_id=pad_token(tokenizer), seed=seed, progress=iter
        )
        made[method] = {"length": vectors[layer].norm().item(), "seconds": time.perf_counter() - begun}
        for strength in map(float, strengths.split(",")):
            odds = held_out.log_odds(strength * vectors[layer], norm) if strength else plain
            change = paired_difference(odds, plain, [1] * len(odds))
            point = {"method": method, "strength": strength, "log_odds": statistics.mean(odds)}
            point |= {"difference": change.difference, "ci_low": change.low, "ci_high": change.high}
            points.append(point | {"preferred": sum(each > 0 for each in odds) / len(odds)})
            click.echo(json.dumps(points[-1]), err=True)
    result = {
        "seconds": time.perf_counter() - started,
        "model": Path(model).name,
        "pairs_made_from": making,
        "pairs_held_out": count - making,
        "layer": layer,
        "norm": norm,
        "grains": {"points": POINTS, "tokens_of_each_sign": TOP},
        "vectors": made,
        "incompleteness_median": statistics.median(incompleteness(gradients, pair) for pair in pairs[:making:5]),
        "points": points,
    }
    write_result(output, result)
    plot(points, picture)


if __name__ == "__main__":
    main()
