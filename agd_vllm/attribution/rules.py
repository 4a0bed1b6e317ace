"""Tangent rules: AttnLRP, CP-LRP and gradient x input pushed forward instead of backward.

lxt.efficient computes relevance as gradient x input of a network with modified local derivatives. That modified
backward pass is linear, so its transpose does the same forward: with J the modified Jacobian from the embeddings E to
the last hidden state, m the region's weights on tokens and u_c the unembedding row of candidate c,

    S(c, R) = < J^T u_c , m * E > = < u_c , J (m * E) >

so one tangent, seeded with m * E, scores the whole vocabulary. Every rule here is the transpose of a rule of AttnLRP
(arXiv 2402.05602) for one operation.

Streams are stacked on the first axis, [S, ...]: stream 0 is the value x, the others are tangents x'. Residual
connections and RoPE are linear without a bias, so they treat all streams alike; the embedding scale is part of E.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Activation(NamedTuple):
    """An activation phi by its ratio phi(g) / g (1/2 at g = 0) and its derivative phi'(g), both elementwise."""

    name: str
    ratio: Callable[[torch.Tensor], torch.Tensor]
    derivative: Callable[[torch.Tensor], torch.Tensor]


class Norm(NamedTuple):
    """RMSNorm: the gain as it multiplies (float32 [d]) and epsilon."""

    gain: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Rule:
    """Where the attribution rules differ.

    `scores` scales the tangent of the attention scores and `values` the term a v' of the attention output.
    `through_norm`: the RMS is differentiated, not held constant. `gate` gives the two factors of a gated product.
    """

    name: str
    scores: float
    values: float
    through_norm: bool
    gate: Callable[[Activation, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor | None, torch.Tensor]]


def linear(streams: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y = W x + b, y' = W x': [S, N, in] to [S, N, out], in the dtype of the weight.

    The bias carries no tangent: epsilon-LRP with the bias as an input of its own (eq. 8).
    """
    rows = streams.flatten(0, 1).to(weight.dtype)
    out = _product(rows, weight).unflatten(0, streams.shape[:2])
    if bias is not None:
        out[0] += bias
    return out


def rms_norm(streams: torch.Tensor, gain: torch.Tensor, eps: float, rule: Rule) -> torch.Tensor:
    """y = g x r with r = 1 / rms(x), over the last axis; y' = g x' r: the identity rule holds r constant (Prop. 3.4).

    I x G differentiates r too: y' = g r (x' - x r^2 mean(x x')).
    """
    value = streams[0]
    scale = value.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    out = streams * (scale * gain)
    if rule.through_norm:
        along = (streams[1:] * value).mean(-1, keepdim=True) * scale.square()
        out[1:] -= out[0] * along
    return out


def rope(streams: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads [S, N, H, D] by their positions: linear, y' = rope(x'). `signed_sin` is -sin in its first half."""
    half = streams.shape[-1] // 2
    return torch.addcmul(streams * cos, streams.roll(half, -1), signed_sin)


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hide: Callable[[torch.Tensor], object],
    rule: Rule,
) -> torch.Tensor:
    """Softmax attention of one sequence and its tangents; all heads of a group read the same keys and values.

    queries [K, S, G, D] (K key-value heads, G the queries of each: heads of the group x tokens; scaled by 1 / sqrt(d)),
    keys and values [K, S, L, D]; `hide` sets the scores [K, G, L] that the mask forbids to -inf, in place.
    Returns [K, S, G, D].

    s' = f (q' k + q k'), with f = 1/4: the uniform rule at q k and again at a v (Prop. 3.3);
    a' = a * (s' - sum(a * s')): the softmax, by Deep Taylor Decomposition (Prop. 3.1);
    o' = h a v' + a' v with h = 1/2: the uniform rule at a v (Prop. 3.3).
    CP-LRP holds a constant: f = 0, h = 1, and q and k have their value only. I x G: f = h = 1.
    """
    num_streams, num_queries = values.shape[1], queries.shape[2]
    scores = _products(queries.flatten(1, 2), keys[:, 0]).unflatten(1, (-1, num_queries))
    hide(scores[:, 0])
    probabilities = torch.softmax(scores[:, 0], dim=-1, dtype=torch.float32)
    weights = torch.empty_like(scores) if rule.scores else torch.empty_like(scores[:, :1])
    weights[:, 0] = probabilities
    if rule.scores:
        for tangent in range(1, num_streams):
            change = (scores[:, tangent] + _products(queries[:, 0], keys[:, tangent])).float()
            change -= torch.linalg.vecdot(probabilities, change)[:, :, None]
            torch.mul(probabilities, change, out=weights[:, tangent])
    through_weights = _products(weights.flatten(1, 2), values[:, 0].mT).unflatten(1, (-1, num_queries))
    out = [through_weights[:, 0]]
    for tangent in range(1, num_streams):
        through_values = _products(weights[:, 0], values[:, tangent].mT).mul_(rule.values)
        if rule.scores:
            through_values.add_(through_weights[:, tangent], alpha=rule.scores)
        out.append(through_values)
    return torch.stack(out, dim=1)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation, rule: Rule) -> torch.Tensor:
    """y = phi(g) u, y' = A g' + B u': gate and up [S, N, I] to [S, N, I]; the factors A and B are the rule's."""
    ratio = activation.ratio(gate[0])
    on_gate, on_up = rule.gate(activation, ratio, gate[0], up[0])
    out = up * on_up
    if on_gate is not None:
        out[1:].addcmul_(gate[1:], on_gate)
    torch.mul(gate[0] * ratio, up[0], out=out[0])
    return out


def _attnlrp_gate(activation: Activation, ratio: torch.Tensor, gate: torch.Tensor, up: torch.Tensor):
    """Identity rule on phi (eq. 9), uniform rule on the product (Prop. 3.2): A = phi(g) / g u / 2, B = phi(g) / 2."""
    half = ratio * 0.5
    return half * up, half * gate


def _cplrp_gate(activation: Activation, ratio: torch.Tensor, gate: torch.Tensor, up: torch.Tensor):
    """The gate is held constant, as attention weights are (Ali et al., ICML 2022): A = 0, B = phi(g)."""
    return None, ratio * gate


def _ixg_gate(activation: Activation, ratio: torch.Tensor, gate: torch.Tensor, up: torch.Tensor):
    """The ordinary derivative of the product: A = phi'(g) u, B = phi(g)."""
    return activation.derivative(gate) * up, ratio * gate


RULES = {
    "attnlrp": Rule("attnlrp", scores=1 / 4, values=1 / 2, through_norm=False, gate=_attnlrp_gate),
    "cplrp": Rule("cplrp", scores=0, values=1, through_norm=False, gate=_cplrp_gate),
    "ixg": Rule("ixg", scores=1, values=1, through_norm=True, gate=_ixg_gate),
}


def _silu_derivative(g: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(g)
    return sigmoid * (1 + g * (1 - sigmoid))


_GELU_SCALE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh(g: torch.Tensor) -> torch.Tensor:
    return torch.tanh(_GELU_SCALE * (g + _GELU_CUBIC * g**3))


def _gelu_tanh_derivative(g: torch.Tensor) -> torch.Tensor:
    tanh = _gelu_tanh(g)
    return (1 + tanh) / 2 + g * (1 - tanh**2) * (_GELU_SCALE / 2) * (1 + 3 * _GELU_CUBIC * g**2)


ACTIVATIONS = {
    "silu": Activation("silu", torch.sigmoid, _silu_derivative),
    "gelu_pytorch_tanh": Activation("gelu_pytorch_tanh", lambda g: (1 + _gelu_tanh(g)) / 2, _gelu_tanh_derivative),
}


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows [M, in] times the transpose of weight [out, in]."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # torch sends float32 products to MKL, which keeps to AVX2 on AMD and is slow for a few rows everywhere.
        # oneDNN in full float32, as Inductor calls it, is 2 to 4 times faster on the same weights.
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return F.linear(rows, weight)


def _products(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """For each of a batch, rows [B, M, in] times the transpose of weights [B, out, in]."""
    if len(rows) == 1:
        return _product(rows[0], weights[0])[None]
    return torch.bmm(rows, weights.mT)
