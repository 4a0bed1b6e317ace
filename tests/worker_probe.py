"""An extension of vLLM's worker that counts the tokens it is told to compute."""


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
