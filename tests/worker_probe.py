"""An extension of vLLM's worker that counts the tokens it is told to compute, and ends where it compiles."""


class WorkerProbe:
    def start_counting(self) -> None:
        run = self.model_runner.execute_model
        self.computed = 0

        def counted(scheduler_output, *args, **kwargs):
            self.computed += scheduler_output.total_num_scheduled_tokens
            return run(scheduler_output, *args, **kwargs)

        self.model_runner.execute_model = counted

    def computed_tokens(self) -> int:
        return self.computed

    def fail_where_it_compiles(self) -> str | None:
        """jit_monitor_mode=error from now on, where vLLM has it from its own warm-up on. Gives VLLM_GPU_SYNC_CHECK as
        it holds in this process, None: not at all."""
        from vllm.utils import gpu_sync_debug, jit_monitor

        assert jit_monitor.is_active()
        jit_monitor._mode = "error"
        return gpu_sync_debug._SYNC_CHECK_MODE if gpu_sync_debug._sync_check_enabled else None
