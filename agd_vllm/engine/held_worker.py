"""vLLM's worker of this platform, which looks at its device's memory only once the engine is let go."""

from __future__ import annotations

from vllm.platforms import current_platform

from agd_vllm.engine import hold
from agd_vllm.engine.orphans import end_with_actor

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class HeldWorker(Worker):
    """vLLM's worker, which takes memory of its GPU once it is released."""

    def init_device(self) -> None:
        end_with_actor()
        hold.wait()
        super().init_device()
