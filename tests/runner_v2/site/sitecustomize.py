"""Lets vLLM run its Model Runner V2 on a CPU, in processes that have this folder on PYTHONPATH: its Triton kernels are
interpreted (TRITON_INTERPRET=1), and asynchronous scheduling, which vLLM turns off on CPUs, stays as asked for."""

import importlib.util
import sys
from types import SimpleNamespace

from triton.backends import backends

# vLLM takes Triton for usable on a CPU where it has a backend of that name; interpreted, nothing is asked of it.
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


class KeepAsyncScheduling:
    """Finds vLLM's CPU platform when it is first imported."""

    def find_spec(self, name, path, target=None):
        if name != "vllm.platforms.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            platform = module.CpuPlatform
            update = platform.check_and_update_config

            def check_and_update_config(config):
                asked_for = config.scheduler_config.async_scheduling
                update(config)
                config.scheduler_config.async_scheduling = asked_for

            platform.check_and_update_config = staticmethod(check_and_update_config)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, KeepAsyncScheduling())
