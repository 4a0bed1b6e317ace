"""Where requests and tokens meet in vLLM's Model Runner V2, which GPUs have.

What depends on requests lies in buffers that are made once, by slot; before each forward pass the model state looks up
whose tokens are whose and fills the buffers by token, which the pass reads: in a CUDA graph, too.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor, UvaBackedTensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from agd_vllm.attribution.regions import heads_by_layer, token_weights
from agd_vllm.inline.attention import DualAttention
from agd_vllm.inline.params import InlineParams, inline_params
from agd_vllm.inline.runner import NAME, Step
from agd_vllm.kernels import paged_attention_gpu
from agd_vllm.kernels.paged_attention import PagedBatch
from agd_vllm.kernels.paged_attention_gpu import GpuBatch
from agd_vllm.kernels.to_device import to_device

NO_SET = -1


class RunnerV2:
    """One for each engine: `of` gives it, whoever asks first."""

    def __init__(self):
        self.tangents = self.unembedding = torch.empty(0, 0)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> RunnerV2:
        return vllm_config.compilation_config.static_forward_context.setdefault(NAME, cls())

    def serve(self, layer: DualAttention, num_layers: int) -> None:
        self._layer, self._num_layers = layer, num_layers

    def allocate(self, max_rows: int, max_tokens: int, max_model_len: int, device: torch.device) -> None:
        """For so many rows side by side, and tokens of one pass. Before the first pass."""
        # Read for prompts only: it may lie in the host's memory, as vLLM's table of token ids does.
        self._weights = StagedWriteTensor((max_rows, max_model_len), torch.float32, device, uva_instead_of_gpu=True)
        # How far a row's weights reach: what an earlier row of its slot had beyond is not read.
        self._reach = UvaBackedTensor(max_rows, torch.int32)
        self._set_of_row = UvaBackedTensor(max_rows, torch.int32)
        self._set_of_row.np[:] = NO_SET
        self._set_of_row.copy_to_uva()
        self._sets = torch.zeros(max_rows, self._num_layers, self._layer.num_heads, device=device)
        self._numbers = torch.arange(max_tokens, dtype=torch.int32, device=device)
        self._token_weights = torch.zeros(max_tokens, device=device)
        self._set_of_token = torch.full((max_tokens,), NO_SET, dtype=torch.int32, device=device)

    def enter(self, row: int, params: InlineParams | None, prompt_len: int) -> None:
        """A request enters the slot `row`, with or without a region."""
        self._reach.np[row], self._set_of_row.np[row] = 0, NO_SET
        if params is None:
            return
        roi = params.roi
        reach = min(prompt_len, max((span.end for span in roi.spans), default=0))
        self._weights.stage_write(row, 0, token_weights(roi, 0, reach).tolist())
        self._reach.np[row] = reach
        heads = heads_by_layer(roi)
        if heads:
            members = torch.zeros(self._sets.shape[1:])
            for layer, indices in heads.items():
                members[layer, indices] = 1
            self._sets[row].copy_(to_device(members, self._sets.device))
            self._set_of_row.np[row] = row

    def apply_staged_writes(self) -> None:
        self._weights.apply_write()
        self._reach.copy_to_uva()
        self._set_of_row.copy_to_uva()

    def assign(self, starts: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, num_tokens: int) -> None:
        """Weight and head set of each token of the next pass, and none for the padding behind the `num_tokens`.

        `starts` [R + 1] and `rows` [R]: where the tokens of the batch's requests begin, and their slots; `positions`
        [N] of all tokens, padding included.
        """
        numbers = self._numbers[: len(positions)]
        owner = torch.searchsorted(starts[1 : len(rows) + 1], numbers, right=True).clamp_(max=len(rows) - 1)
        row = rows.long()[owner]
        real = numbers < num_tokens
        inside = real & (positions < self._reach.gpu[row])
        weights = self._weights.gpu[row, positions.masked_fill(~inside, 0)].masked_fill_(~inside, 0)
        self._token_weights[: len(positions)].copy_(weights)
        self._set_of_token[: len(positions)].copy_(self._set_of_row.gpu[row].masked_fill(~real, NO_SET))

    def step(self, positions: torch.Tensor) -> Step:
        weights = self._token_weights[: len(positions)]
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return Step(weights, None)
        batch = metadata[self._layer.name]
        set_of = self._set_of_token[: len(positions)]
        paged = GpuBatch(
            batch.block_table, batch.starts, batch.ends, batch.slots, positions, self._sets, set_of, batch.singles
        )
        return Step(weights, paged if self._layer.kernel is paged_attention_gpu else _on_host(paged))

    def keep(self, tangents: torch.Tensor, unembedding: torch.Tensor) -> None:
        self.tangents, self.unembedding = tangents, unembedding


def _on_host(batch: GpuBatch) -> PagedBatch:
    """The same batch as the kernel of a CPU takes it."""
    counts = batch.starts.long().diff()
    heads, chosen = None, batch.set_of.long()
    if bool((chosen != NO_SET).any()):
        heads = batch.sets[chosen.clamp(min=0)] * (chosen != NO_SET)[:, None, None]
        heads = heads.transpose(0, 1).contiguous()
    lengths = batch.ends.long() - counts
    return PagedBatch(batch.block_table, lengths, counts, batch.slots, batch.positions, heads)


class InlineState(DefaultModelState):
    """What vLLM's runner keeps of each request beside its own."""

    def __init__(self, vllm_config: VllmConfig, model, encoder_cache, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self._runner = RunnerV2.of(vllm_config)
        self._runner.allocate(self.max_num_reqs, self.max_num_tokens, self.max_model_len, device)

    def add_request(self, req_index: int, new_req_data) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        found = None if params is None else inline_params(params)
        self._runner.enter(req_index, found, new_req_data.prompt_len)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self._runner.apply_staged_writes()

    def prepare_inputs(self, input_batch, req_states) -> dict:
        batch = input_batch
        self._runner.assign(batch.query_start_loc, batch.idx_mapping, batch.positions, batch.num_tokens)
        return super().prepare_inputs(input_batch, req_states)
