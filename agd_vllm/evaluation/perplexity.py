"""Perplexity of all strategies' answers, under a copy of the model that they share."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.utils.logging import disable_progress_bar

from agd_vllm.engine.model_copies import check_for_copies, overrides_for_copies
from agd_vllm.evaluation.outcomes import Outcome
from agd_vllm.pipeline.options import DecoderOptions


def perplexities(
    options: DecoderOptions, outcomes: Mapping[str, Mapping[str, Outcome]]
) -> tuple[dict[str, float | None], str]:
    """By strategy, and in words what was measured.

    None where a copy of the model does not follow the engine's arguments: it would be the perplexity under another
    model than the one that answered.
    """
    try:
        check_for_copies(options.engine_args, options.dtype)
    except ValueError as error:
        return dict.fromkeys(outcomes), f"perplexity was not measured: {error}"
    from agd_vllm.evaluation.quality import PerplexityModel

    disable_progress_bar()
    model = PerplexityModel(
        options.model,
        dtype=options.dtype,
        revision=options.engine_args.get("revision"),
        trust_remote_code=options.trust_remote_code,
        overrides=overrides_for_copies(options.engine_args),
    )
    texts = {
        name: [(outcome.prompt_token_ids, outcome.token_ids) for outcome in rows.values()]
        for name, rows in outcomes.items()
    }
    measured = f"perplexity of the generated tokens under the unguided model, Hugging Face, {model.dtype}"
    return model.perplexities(texts), measured
