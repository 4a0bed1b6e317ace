"""The AGD gate over a batch of next-token logits: entropy, candidates, decision (arXiv 2509.26307, section 3).

On an NVIDIA GPU the kernel of `gate_triton`, for float32 on a CPU the one of gate.c, else their twin in PyTorch here.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from agd_vllm.kernels import compiled, triton_support
from agd_vllm.kernels.gate_decision import GateDecision

ROWS_PER_PASS = {"cpu": 4, "cuda": 64}
"""A few rows of a 50k to 150k vocabulary stay in a core's cache, a whole batch does not."""

KERNEL_TOP_K = 64
"""The kernel of a GPU finds candidates one after another; beyond so many the twin is used."""


def gate(
    logits: torch.Tensor,
    rows: torch.Tensor,
    tau: torch.Tensor,
    top_k: int,
    min_prob: torch.Tensor,
    pause: torch.Tensor | None,
) -> GateDecision:
    """Opens for the rows whose entropy is at least `tau` and that have at least two candidates.

    Candidates are the `top_k` most probable tokens with probability >= `min_prob`, `pause` never among them; entropy
    and probabilities are those of the full distribution. A row of nothing but -inf (its entropy is NaN) stays closed.

    `logits` [batch, vocab], float32, bfloat16 or float16, rows of any stride, changed in place: `pause` becomes the
    argmax where the gate opens, impossible where it does not. `rows` [rows]: which of them are gated, ascending; the
    others are left alone. `tau` (nats) and `min_prob` [rows] float32; `pause` [rows] token ids, None: every token may
    be a candidate, and the logits stay as they are. On a GPU nothing waits for the result.
    """
    if logits.is_cuda and top_k <= KERNEL_TOP_K and triton_support.available():
        from agd_vllm.kernels import gate_triton

        return gate_triton.gate(logits, rows, tau, top_k, min_prob, pause)
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and compiled.available():
        return gate_compiled(logits, rows, tau, top_k, min_prob, pause)
    return gate_twin(logits, rows, tau, top_k, min_prob, pause)


def gate_compiled(
    logits: torch.Tensor,
    rows: torch.Tensor,
    tau: torch.Tensor,
    top_k: int,
    min_prob: torch.Tensor,
    pause: torch.Tensor | None,
) -> GateDecision:
    """As `gate`, for float32 logits on a CPU, where `compiled.available()`."""
    if logits.stride(1) != 1:
        raise ValueError("the logits of a row must lie side by side")
    num_rows = len(rows)
    decision = GateDecision(
        entropy=torch.empty(num_rows),
        log_sum_exp=torch.empty(num_rows),
        open=torch.empty(num_rows, dtype=torch.bool),
        candidate_ids=torch.empty(num_rows, top_k, dtype=torch.int32),
        candidate_probs=torch.empty(num_rows, top_k),
        candidate_count=torch.empty(num_rows, dtype=torch.int32),
    )
    rows, tau, min_prob = rows.long().contiguous(), tau.contiguous(), min_prob.contiguous()
    pause = None if pause is None else pause.long().contiguous()
    _function()(
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[1],
        rows.data_ptr(),
        num_rows,
        tau.data_ptr(),
        top_k,
        min_prob.data_ptr(),
        None if pause is None else pause.data_ptr(),
        *(tensor.data_ptr() for tensor in decision),
    )
    return decision


def gate_twin(
    logits: torch.Tensor,
    rows: torch.Tensor,
    tau: torch.Tensor,
    top_k: int,
    min_prob: torch.Tensor,
    pause: torch.Tensor | None,
) -> GateDecision:
    """As `gate`, in PyTorch on any device; looks for candidates only where the entropy is high enough."""
    everyone = len(rows) == logits.shape[0]
    gated = logits if everyone else logits[rows]
    entropy, log_sum_exp = entropy_and_log_sum_exp(gated)
    candidate_ids = rows.new_full((len(rows), top_k), -1, dtype=torch.int32)
    candidate_probs = entropy.new_zeros(candidate_ids.shape)
    count = rows.new_zeros(len(rows), dtype=torch.int32)
    uncertain = (entropy >= tau).nonzero().squeeze(-1)
    if len(uncertain):
        choices = gated[uncertain].float()
        if pause is not None:
            choices.scatter_(1, pause[uncertain, None].long(), float("-inf"))
        values, ids = _most_probable(choices, min(top_k, logits.shape[-1]))
        probs = (values - log_sum_exp[uncertain, None]).exp()
        # A floor of 0 lets in what is improbable, not what is impossible.
        chosen = (probs >= min_prob[uncertain, None]) & (values > float("-inf"))
        width = values.shape[1]
        candidate_ids[uncertain, :width] = torch.where(chosen, ids, -1).int()
        candidate_probs[uncertain, :width] = torch.where(chosen, probs, 0)
        count[uncertain] = chosen.sum(-1, dtype=torch.int32)
    opened = count >= 2
    if pause is not None:
        paused = torch.where(opened, torch.finfo(logits.dtype).max, float("-inf"))
        logits[rows, pause.long()] = paused.to(logits.dtype)
    return GateDecision(entropy, log_sum_exp, opened, candidate_ids, candidate_probs, count)


def entropy_and_log_sum_exp(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy (nats) and log-sum-exp of each row's softmax, both [rows] float32, in float32 throughout.

    `logits` [rows, vocab], any floating dtype; -inf is allowed, a row of nothing but -inf gives NaN.
    With z = x - max and s = sum(exp z):  H = log s - sum(z exp z) / s.
    """
    entropies, log_sums = [], []
    for rows in logits.split(ROWS_PER_PASS[logits.device.type]):
        top = rows.amax(-1, keepdim=True).float()
        z = rows.float() - top
        e = z.exp()
        total = e.sum(-1)
        # exp(-1e4) is 0 in float32: the clamp changes nothing but 0 * -inf, which would be NaN.
        weighted = z.clamp_(min=-1e4).mul_(e).sum(-1)
        log_total = total.log()
        entropies.append(log_total - weighted / total)
        log_sums.append(top.squeeze(-1) + log_total)
    return torch.cat(entropies), torch.cat(log_sums)


def _most_probable(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest of each row and their ids: in descending order, the lower id first among equals.

    bfloat16 logits are often equal, and `topk` then takes any of them, in any order.
    """
    values, ids = logits.topk(min(count + 1, logits.shape[-1]))
    if values.shape[1] > count:
        edge = values[:, count - 1]
        crowded = (values[:, count] == edge) & (edge > float("-inf"))
        values, ids = values[:, :count], ids[:, :count]
        for row in crowded.nonzero().squeeze(-1).tolist():
            above = int((values[row] > edge[row]).sum())
            ids[row, above:] = (logits[row] == edge[row]).nonzero().squeeze(-1)[: count - above]
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


@functools.cache
def _function():
    function = compiled.library().agd_gate
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.restype = None
    function.argtypes = [pointer, number, number, pointer, number, pointer, number, *[pointer] * 8]
    return function
