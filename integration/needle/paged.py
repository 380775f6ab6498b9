"""The needle model over a paged KV cache, chunk by chunk, through the engine's own selection and kernels.

This computes what a vLLM engine computes for one request, without vLLM's runner: prefill by the method of the options,
and the answer with exact attention over the whole cache, as in decode. It serves sweeps over many options, and tells
what selection chose.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FarspanConfig, FlexPrefill, Prefill
from farspan.engine_ext.launch import attend, choose_dense_kernel, measure_coverage, write_kv
from farspan.engine_ext.pass_maker import PassMaker
from farspan.engine_ext.passes import LayerContext, Pass, SampledRows, Sparse
from farspan.engine_ext.selection.methods import Chunks, DeviceSelections, FlexSelector
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.engine_ext.splits import num_multiprocessors
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.tiles import BlockLists, PrefillTiles

from .network import Layer, NeedleNet, rotate

PAGE_SIZE = 128

OnLists = Callable[[int, PrefillTiles, BlockLists], None]


class ListeningSelector(FlexSelector):
    """Flex's selector, which also calls `on_lists` with the lists that it chose."""

    def __init__(self, layer: int, stats: SelectionStats) -> None:
        super().__init__(stats)
        self.layer = layer
        self.on_lists: OnLists | None = None

    def block_lists(
        self, prefill: FlexPrefill | BlockSparsePrefill, chunks: Chunks, select: DeviceSelections
    ) -> BlockLists:
        """See `FlexSelector`."""
        lists = super().block_lists(prefill, chunks, select)
        if self.on_lists is not None:
            self.on_lists(self.layer, chunks.tiles, lists)
        return lists


class PagedNeedle:
    """One request at a time. Computes in the network's dtype, on its device."""

    def __init__(self, net: NeedleNet, max_len: int) -> None:
        """Allocate a cache for `max_len` tokens."""
        self.net = net
        self.shape = net.shape
        self.device = next(net.parameters()).device
        self.maker = PassMaker(
            num_kv_heads=self.shape.num_key_value_heads,
            dense_kernel=choose_dense_kernel(FarspanConfig(), self.device, self.shape.head_dim, net.dtype),
            num_sms=num_multiprocessors(self.device),
            workspace=None,
            has_turn=False,
            device=self.device,
        )
        num_pages = -(-max_len // PAGE_SIZE)
        cache_shape = (num_pages, self.shape.num_key_value_heads, PAGE_SIZE, 2 * self.shape.head_dim)
        self.caches = [torch.zeros(cache_shape, dtype=net.dtype, device=self.device) for _ in net.layers]
        self.rows_per_step = 0
        self.block_table = torch.arange(num_pages, dtype=torch.int32, device=self.device)[None]

    def selectors(self, prefill: Prefill) -> list[ListeningSelector] | None:
        """Fresh selectors, one per layer; None for dense prefill."""
        if not isinstance(prefill, FlexPrefill):
            return None
        num_heads = self.shape.num_attention_heads
        return [
            ListeningSelector(index, SelectionStats(num_heads, self.device))
            for index in range(self.shape.num_hidden_layers)
        ]

    @torch.no_grad()
    def answer_logprobs(
        self,
        prompt: torch.Tensor,
        completion: torch.Tensor,
        chunk: int | None,
        prefill: Prefill,
        selectors: list[ListeningSelector] | None,
        on_lists: OnLists | None = None,
        measured_rows: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each completion token, and whether it is the most likely one: two [num_completion].

        prompt, completion: 1-d int64 token ids on the device; greedy decoding writes the completion exactly where all
            of its tokens are the most likely ones.
        chunk: prompt tokens per step; None for the whole prompt.
        selectors: from `selectors(prefill)`; they add up density and coverage over the calls.
        on_lists: told the layer, the step and the block lists of every sparse launch.
        measured_rows: query rows of the prompt on which coverage is measured where the options do not ask for it
            themselves.
        """
        step = chunk or len(prompt)
        self.rows_per_step = -(-measured_rows * step // len(prompt))
        hidden = None
        for start in range(0, len(prompt), step):
            hidden = self._step(prompt[start : start + step], start, prefill, selectors, on_lists)
        assert hidden is not None
        rest = self._step(completion[:-1], len(prompt), DensePrefill(), None, None)
        logits = self.net.logits(self.net.model.norm(torch.cat([hidden[-1:], rest]))).float()
        logprobs = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        return logprobs, logits.argmax(-1) == completion

    def _step(
        self,
        tokens: torch.Tensor,
        start: int,
        prefill: Prefill,
        selectors: list[ListeningSelector] | None,
        on_lists: OnLists | None,
    ) -> torch.Tensor:
        """Run tokens [start, start + len(tokens)) of the request: [num_tokens, hidden]."""
        net, num_tokens = self.net, len(tokens)
        x = F.embedding(tokens, net.model.embed_tokens.weight.to(net.dtype))
        if num_tokens == 0:
            return x
        positions = torch.arange(start, start + num_tokens, device=self.device)
        cos, sin = net.rotary(positions[None])
        each = self._pass(prefill, start, num_tokens)
        samples = None
        if self.rows_per_step and isinstance(each.work, Sparse) and each.work.samples is None:
            samples = self.maker.sample(each.batch, [0, num_tokens], [start + num_tokens], self.rows_per_step)
        for index, layer in enumerate(net.layers):
            selector = None if selectors is None else selectors[index]
            if selector is not None:
                selector.on_lists = on_lists
            x = self._layer(index, layer, x, cos, sin, positions, each, selector, samples)
        return x

    def _pass(self, prefill: Prefill, start: int, num_tokens: int) -> Pass:
        chunk_end = start + num_tokens
        batch = PagedBatch(
            query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device),
            kv_lens=torch.tensor([chunk_end], dtype=torch.int32, device=self.device),
            block_table=self.block_table,
            max_query_len=num_tokens,
            max_kv_len=chunk_end,
        )
        return self.maker.prefill(prefill, batch, [0, num_tokens], [chunk_end], 0, turns=False)

    def _layer(
        self,
        index: int,
        layer: Layer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        each: Pass,
        selector: ListeningSelector | None,
        samples: SampledRows | None,
    ) -> torch.Tensor:
        attn, mlp, cache = layer.self_attn, layer.mlp, self.caches[index]
        h = layer.input_layernorm(x)
        query, key, value = (
            _linear(h, projection).view(len(x), -1, self.shape.head_dim)
            for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        query, key = (rotate(t.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1) for t in (query, key))
        write_kv(key.contiguous(), value, cache, positions)
        query, kv, scale = query.contiguous(), KVView(cache), self.shape.head_dim**-0.5
        out = torch.empty_like(query)
        lse = attend(each, query, kv, LayerContext(index, None, None, selector), scale, out)
        if samples is not None and selector is not None and selector.stats is not None:
            coverage = measure_coverage(query, kv, samples, scale, None, lse)[:, None]
            selector.stats.add_coverage(coverage, slice(0, query.shape[1]))
        x = x + _linear(out.flatten(1), attn.o_proj)
        h = layer.post_attention_layernorm(x)
        return x + _linear(F.silu(_linear(h, mlp.gate_proj)) * _linear(h, mlp.up_proj), mlp.down_proj)


def _linear(x: torch.Tensor, projection: torch.nn.Linear) -> torch.Tensor:
    return F.linear(x, projection.weight.to(x.dtype))
