"""What an engine is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class GateSettings:
    """AGD's gate: threshold `tau` in nats, candidate set size `top_k`, candidate floor `min_prob` (pi_min)."""

    tau: float = 1.734
    top_k: int = 5
    min_prob: float = 0.05


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is started with; `engine_args` go to vLLM's AsyncEngineArgs as they are and win.

    `cores`: the CPU cores that vLLM's threads are bound to (CPU only; None leaves it to vLLM). `deadline_s`: a session
    that gives no token for so long, while others do, is opened anew; it must bear the prefill of many long prompts.
    `plain`: rows are plain requests, which never pause; no gate is installed then. `processors`: logits processors
    beside the gate. `kv_planes`: vectors of each head that the KV cache has for a token, more than keys and values
    where tangents are beside them.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    deadline_s: float = 1200.0
    processors: tuple[str, ...] = ()
    plain: bool = False
    kv_planes: int = 2
    cores: list[int] | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)
