"""Context-aware decoding on vLLM's side: two rows of the batch, whose contrast is sampled (arXiv 2305.14739, eq. 2).

The two rows of a pair hold the same output after different prompts. While both are in the batch at the same step, each
samples from the contrast of the two, so they stay in step with no pause. Where one is there alone (chunked prefills,
the token budget of a step), its logits are kept and it pauses; once the other one comes to that step, it pauses as
well, the token chosen is reported, and the host resumes both with it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import torch

from agd_vllm.engine.channel import SOCKET_VARIABLE, Choice, GateSender
from agd_vllm.engine.penalty import penalize
from agd_vllm.engine.row_processor import Row, RowProcessor

EXTRA_ARG = "agd_contrast"


class ContrastParams(msgspec.Struct, frozen=True):
    """What both requests of a pair carry in `SamplingParams.extra_args["agd_contrast"]`.

    `key` names the pair in reports. `slot` is the pair's own while it lives, so that what is kept for pairs is bounded.
    `prompt_len` is the length of this sequence's original prompt. At `first_step`, the one that the session begins
    with, logits may be those of an unfinished chunked prefill, whose sample vLLM discards. The `repetition_penalty` is
    that of the contrast, for tokens of the prompt with the region and of the output.
    """

    key: int
    slot: int
    with_region: bool
    prompt_len: int
    first_step: int
    pause_id: int
    alpha: float
    repetition_penalty: float = 1.0

    def as_extra_args(self) -> dict[str, dict[str, Any]]:
        return {EXTRA_ARG: msgspec.to_builtins(self)}


class _Kept(NamedTuple):
    key: int
    step: int
    logits: torch.Tensor  # [vocab]
    token_ids: torch.Tensor | None  # of prompt and output, where they are penalised


Side = tuple[int, bool]  # slot, with the region


class Contrast:
    """Over the rows of one batch after another, which `process` gets."""

    extra_arg, kind = EXTRA_ARG, ContrastParams

    def __init__(self, device: torch.device, reports: bool):
        self._rows: Mapping[int, Row] = {}
        self._indices: dict[Side, int] = {}
        self._kept: dict[Side, _Kept] = {}
        self._device = device
        self._sender = GateSender(os.environ[SOCKET_VARIABLE]) if reports else None

    @staticmethod
    def check(params: ContrastParams) -> None:
        if not (params.alpha >= 0 and math.isfinite(params.alpha)):
            raise ValueError("a contrast needs a finite alpha >= 0")
        if not (params.repetition_penalty > 0 and math.isfinite(params.repetition_penalty)):
            raise ValueError("a contrast needs a finite repetition_penalty > 0")

    def process(self, logits: torch.Tensor, rows: Mapping[int, Row]) -> None:
        """The contrast in both rows of a pair in step, else PAUSE."""
        self._rows = rows
        self._indices = {(row.params.slot, row.params.with_region): index for index, row in rows.items()}
        together = [pair for slot, with_region in self._indices if with_region and (pair := self._in_step(slot))]
        if together:
            self._write_contrasts(logits, together)
        in_step = {index for pair in together for index in pair}
        choices = self._pause(logits, [index for index in rows if index not in in_step])
        if self._sender is not None:
            self._sender.send_choices(choices)

    def _in_step(self, slot: int) -> tuple[int, int] | None:
        """Both rows of a pair, with the region first, where what they sample is heeded."""
        pair = self._indices.get((slot, True)), self._indices.get((slot, False))
        if None in pair:
            return None
        one, other = (self._rows[index] for index in pair)
        later = one.step > one.params.first_step
        return pair if later and one.params.key == other.params.key and one.step == other.step else None

    def _write_contrasts(self, logits: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
        params = [self._rows[one].params for one, _ in pairs]
        both = torch.tensor(pairs, device=self._device)
        alpha = torch.tensor([p.alpha for p in params], dtype=logits.dtype, device=self._device)
        pause = torch.tensor([p.pause_id for p in params], device=self._device)
        contrasts = contrast(logits[both[:, 0]], logits[both[:, 1]], alpha, pause)
        if any(p.repetition_penalty != 1 for p in params):
            tokens = [self._rows[one].token_ids() for one, _ in pairs]
            contrasts = penalize(contrasts, tokens, [p.repetition_penalty for p in params])
        logits[both[:, 0]] = contrasts
        logits[both[:, 1]] = contrasts
        for p in params:
            self._kept.pop((p.slot, True), None)
            self._kept.pop((p.slot, False), None)

    def _pause(self, logits: torch.Tensor, indices: list[int]) -> list[Choice]:
        """Keeps the logits of rows that are not in step and pauses them; tokens of pairs that are complete now."""
        for index in indices:
            row = self._rows[index]
            params = row.params
            penalized = params.with_region and params.repetition_penalty != 1
            token_ids = row.token_ids().clone() if penalized else None
            self._kept[params.slot, params.with_region] = _Kept(params.key, row.step, logits[index].clone(), token_ids)
            logits[index, params.pause_id] = torch.finfo(logits.dtype).max
        slots = {self._rows[index].params.slot: self._rows[index].params for index in indices}
        return [choice for params in slots.values() if (choice := self._choice(params))]

    def _choice(self, params: ContrastParams) -> Choice | None:
        # At a first step both stay kept: either may yet come again with its whole prompt.
        one, other = self._kept.get((params.slot, True)), self._kept.get((params.slot, False))
        if one is None or other is None or one[:2] != other[:2]:
            return None
        alpha = torch.tensor([params.alpha], dtype=one.logits.dtype, device=self._device)
        pause = torch.tensor([params.pause_id], device=self._device)
        contrasts = contrast(one.logits[None], other.logits[None], alpha, pause)
        if one.token_ids is not None:
            contrasts = penalize(contrasts, [one.token_ids], [params.repetition_penalty])
        return params.key, one.step, int(contrasts.argmax())


def contrast(
    with_region: torch.Tensor, without: torch.Tensor, alpha: torch.Tensor, pause: torch.Tensor
) -> torch.Tensor:
    """(1 + alpha) * with_region - alpha * without (arXiv 2305.14739, eq. 2); what is masked in either, and `pause`,
    stays impossible. Logits [pairs, vocab], `alpha` and `pause` (token ids) [pairs]."""
    masked = with_region.isneginf() | without.isneginf()
    contrasts = (1 + alpha[:, None]) * with_region - alpha[:, None] * without
    return contrasts.masked_fill_(masked, float("-inf")).scatter_(1, pause[:, None], float("-inf"))


class ContrastProcessor(RowProcessor):
    """vLLM's logits processor for pairs of rows."""

    work = Contrast
