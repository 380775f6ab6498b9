"""The needle model over a paged KV cache, chunk by chunk, through the engine's own selection and kernels.

What a vLLM engine computes for one request, without vLLM's runner: prefill by the method of the options, the answer
with exact attention over the whole cache, as decode does. Made for sweeps over many options, and to look inside.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from farspan.engine_ext.config import DensePrefill, FarspanConfig, FlexPrefill, Prefill
from farspan.engine_ext.dispatch import choose_dense_kernel, make_launcher
from farspan.engine_ext.metadata import TILE_SIZE, PrefillGroup
from farspan.engine_ext.selection.methods import FlexSelector, LayerShape
from farspan.kernels.flex.coverage import measure_coverage, sample_rows
from farspan.kernels.tiles import BlockLists, make_prefill_tiles

from .network import Layer, NeedleNet, rotate

PAGE_SIZE = 128

OnLists = Callable[[int, PrefillGroup, BlockLists], None]


class PagedNeedle:
    """One request at a time. Computes in the network's dtype, on its device."""

    def __init__(self, net: NeedleNet, max_len: int) -> None:
        """Allocate a cache for `max_len` tokens."""
        self.net = net
        self.shape = net.shape
        self.device = next(net.parameters()).device
        self.config = FarspanConfig()
        self.launcher = make_launcher(self.config, self.device, self.shape.head_dim, net.dtype)
        self.dense_kernel = choose_dense_kernel(self.config, self.device, self.shape.head_dim, net.dtype)
        num_pages = -(-max_len // PAGE_SIZE)
        cache_shape = (num_pages, self.shape.num_key_value_heads, PAGE_SIZE, 2 * self.shape.head_dim)
        self.caches = [torch.zeros(cache_shape, dtype=net.dtype, device=self.device) for _ in net.layers]
        self.rows_per_step = 0
        self.block_table = torch.arange(num_pages, dtype=torch.int32, device=self.device)[None]

    def selectors(self, prefill: Prefill) -> list[FlexSelector] | None:
        """Fresh selectors, one a layer; None for dense prefill."""
        if not isinstance(prefill, FlexPrefill):
            return None
        return [
            FlexSelector(
                prefill,
                LayerShape(
                    layer_index=index,
                    num_q_heads=self.shape.num_attention_heads,
                    num_kv_heads=self.shape.num_key_value_heads,
                    total_num_kv_heads=self.shape.num_key_value_heads,
                    scale=self.shape.head_dim**-0.5,
                    tp_rank=0,
                    tp_size=1,
                    device=self.device,
                ),
            )
            for index in range(self.shape.num_hidden_layers)
        ]

    @torch.no_grad()
    def answer_logprobs(
        self,
        prompt: torch.Tensor,
        completion: torch.Tensor,
        chunk: int | None,
        prefill: Prefill,
        selectors: list[FlexSelector] | None,
        on_lists: OnLists | None = None,
        measured_rows: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each completion token, and whether it is the most likely one: two [num_completion].

        prompt, completion: 1-d int64 token ids on the device; greedy decoding writes the completion exactly where all
            of its tokens are the most likely ones.
        chunk: prompt tokens a step; None for the whole prompt.
        selectors: from `selectors(prefill)`; they add up density and coverage over the calls.
        on_lists: told the layer, the step and the block lists of every sparse launch.
        measured_rows: query rows of the prompt on which coverage is measured where the options do not ask for it
            themselves; neither repair nor the closed loop of budgets runs.
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
        selectors: list[FlexSelector] | None,
        on_lists: OnLists | None,
    ) -> torch.Tensor:
        """Run tokens [start, start + len(tokens)) of the request: [num_tokens, hidden]."""
        net, num_tokens = self.net, len(tokens)
        x = F.embedding(tokens, net.model.embed_tokens.weight.to(net.dtype))
        if num_tokens == 0:
            return x
        positions = torch.arange(start, start + num_tokens, device=self.device)
        cos, sin = net.rotary(positions[None])
        group = self._group(prefill, start, num_tokens)
        for index, layer in enumerate(net.layers):
            x = self._layer(index, layer, x, cos, sin, positions, group, selectors, on_lists)
        return x

    def _group(self, prefill: Prefill, start: int, num_tokens: int) -> PrefillGroup:
        seq_len = start + num_tokens
        needs_tiles = isinstance(prefill, FlexPrefill) or self.dense_kernel == "triton"
        return PrefillGroup(
            prefill=prefill,
            token_start=0,
            num_tokens=num_tokens,
            query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor([seq_len], dtype=torch.int32, device=self.device),
            block_table=self.block_table,
            max_query_len=num_tokens,
            max_seq_len=seq_len,
            tiles=make_prefill_tiles([0, num_tokens], [seq_len], TILE_SIZE, self.device) if needs_tiles else None,
            request_ids=torch.zeros(1, dtype=torch.int32, device=self.device),
        )

    def _layer(
        self,
        index: int,
        layer: Layer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        group: PrefillGroup,
        selectors: list[FlexSelector] | None,
        on_lists: OnLists | None,
    ) -> torch.Tensor:
        attn, mlp, cache = layer.self_attn, layer.mlp, self.caches[index]
        h = layer.input_layernorm(x)
        query, key, value = (
            _linear(h, projection).view(len(x), -1, self.shape.head_dim)
            for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        query, key = (rotate(t.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1) for t in (query, key))
        self.launcher.write_kv(key.contiguous(), value, cache, positions)
        query = query.contiguous()
        out = torch.empty_like(query)
        scale = self.shape.head_dim**-0.5
        if selectors is None:
            self.launcher.prefill(query, cache, group, None, scale, None, out)
        else:
            selector = selectors[index]
            lists = selector.block_lists_for(query, cache, group)
            lse = torch.empty(query.shape[1], len(query), dtype=torch.float32, device=self.device)
            self.launcher.prefill(query, cache, group, lists, scale, None, out, lse)
            if selector.measures:
                short = selector.measure(query, cache, group, lse)
                if short is not None:
                    self.launcher.prefill(query, cache, group, None, scale, None, out, lse, short)
            elif self.rows_per_step:
                rows = sample_rows(group.query_start_loc, self.rows_per_step)
                batch = (query, cache, group.block_table, group.seq_lens, group.query_start_loc)
                selector.stats.add_coverage(measure_coverage(*batch, scale, lse, rows))
            if on_lists is not None:
                on_lists(index, group, lists)
        x = x + _linear(out.flatten(1), attn.o_proj)
        h = layer.post_attention_layernorm(x)
        return x + _linear(F.silu(_linear(h, mlp.gate_proj)) * _linear(h, mlp.up_proj), mlp.down_proj)


def _linear(x: torch.Tensor, projection: torch.nn.Linear) -> torch.Tensor:
    return F.linear(x, projection.weight.to(x.dtype))
