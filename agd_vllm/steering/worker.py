"""What vLLM's worker can be told while it steers."""

from __future__ import annotations


class SteeringWorker:
    """Made a part of vLLM's worker by `worker_extension_cls`."""

    def set_steering_strength(self, strength: float) -> None:
        """From now on. What is cached of prompts is of the strength before, and no row may be in flight."""
        self.get_model().set_steering_strength(strength)
