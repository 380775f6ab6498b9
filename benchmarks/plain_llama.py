"""A Llama or Qwen 2 in plain PyTorch whose attention is given from outside: for peers and masks that no engine has.

One sequence, no pages, no batch. Tokens may stand at any positions; what they see is the business of `attend`.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.record import BenchmarkError

WEIGHT_STD = 0.02  # as Llama models are initialised

MLP_ROWS = 16384

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Layer, rotated query [num_tokens, num_q_heads, head_dim], rotated key and value [num_tokens, num_kv_heads, head_dim]
-> out, as the query."""

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class PlainLlama:
    """A checkpoint's weights and its forward."""

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        """config: of config.json; weights: by transformers' names, one dtype and device."""
        self.config, self.weights = config, weights
        self.num_layers: int = config["num_hidden_layers"]
        self.num_heads: int = config["num_attention_heads"]
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.scale = self.head_dim**-0.5
        self.dtype = weights["model.embed_tokens.weight"].dtype
        self.device = weights["model.embed_tokens.weight"].device
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        half = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        self.inv_freq = (theta**-half).to(self.device)

    @classmethod
    def from_folder(
        cls, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> "PlainLlama":
        """Load a folder with config.json and one file of weights; device: the CPU if None.

        Raises BenchmarkError for another architecture, and for rotary positions that are scaled.
        """
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text())
        if not {"LlamaForCausalLM", "Qwen2ForCausalLM"} & set(config["architectures"]):
            raise BenchmarkError(f"{folder}: {config['architectures']}; needs LlamaForCausalLM or Qwen2ForCausalLM")
        if config.get("rope_scaling"):
            raise BenchmarkError(f"{folder}: rope_scaling={config['rope_scaling']}; needs a model without")
        place = torch.device("cpu") if device is None else device
        weights = {name: each.to(place, dtype) for name, each in load_file(folder / "model.safetensors").items()}
        return cls(config, weights)

    @classmethod
    def random(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0) -> "PlainLlama":
        """Seeded weights of a usual scale, the same in every process."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, WEIGHT_STD, generator=generator)

        hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        ones = torch.ones(hidden, dtype=dtype, device=device)
        weights = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden), "model.norm.weight": ones}
        weights["lm_head.weight"] = normal(config["vocab_size"], hidden)
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            weights[f"{prefix}.input_layernorm.weight"] = weights[f"{prefix}.post_attention_layernorm.weight"] = ones
            heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
            heads["v"] = heads["k"]
            for name, count in heads.items():
                weights[f"{prefix}.self_attn.{name}_proj.weight"] = normal(count * head_dim, hidden)
            weights[f"{prefix}.self_attn.o_proj.weight"] = normal(hidden, heads["q"] * head_dim)
            weights[f"{prefix}.mlp.gate_proj.weight"] = normal(inner, hidden)
            weights[f"{prefix}.mlp.up_proj.weight"] = normal(inner, hidden)
            weights[f"{prefix}.mlp.down_proj.weight"] = normal(hidden, inner)
        return cls(config, weights)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Final hidden states [num_tokens, hidden_size] of tokens [num_tokens] at positions [num_tokens], any order."""
        angle = positions.to(self.device).double()[:, None, None] * self.inv_freq
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        hidden = self.weights["model.embed_tokens.weight"][tokens.to(self.device)]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            normed = self.norm(hidden, f"{prefix}.input_layernorm")
            query, key, value = (
                self.linear(normed, f"{prefix}.self_attn.{name}_proj").unflatten(1, (-1, self.head_dim))
                for name in "qkv"
            )
            out = attend(layer, rotate(query, cos, sin), rotate(key, cos, sin), value)
            hidden = hidden + self.linear(out.flatten(1), f"{prefix}.self_attn.o_proj")
            normed = self.norm(hidden, f"{prefix}.post_attention_layernorm")
            # In pieces, as its inner activations are the widest of all.
            for rows, part in zip(hidden.split(MLP_ROWS), normed.split(MLP_ROWS), strict=True):
                gate = F.silu(self.linear(part, f"{prefix}.mlp.gate_proj"))
                gate *= self.linear(part, f"{prefix}.mlp.up_proj")
                rows += self.linear(gate, f"{prefix}.mlp.down_proj")
        return self.norm(hidden, "model.norm")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, vocab_size] of hidden states [num_tokens, hidden_size]."""
        tied = self.config.get("tie_word_embeddings", False)
        return self.linear(hidden, "model.embed_tokens" if tied else "lm_head")

    def linear(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(inputs, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(inputs, inputs.shape[-1:], self.weights[f"{name}.weight"], self.config["rms_norm_eps"])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [num_tokens, num_heads, head_dim], halves paired; cos, sin: [num_tokens, 1, head_dim/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def partial_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of adjacent queries over one set of keys, and its LSE: FlashAttention 3, or PyTorch's on the CPU.

    query: [num_tokens, num_q_heads, head_dim]; key, value: [num_keys, num_kv_heads, head_dim], at least one key.
    causal: query i sees keys [0, i], of as many keys as queries; otherwise all.
    Returns out, as the query, and lse [num_q_heads, num_tokens] float32, natural log.
    """
    if query.is_cuda:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        starts = [starts_of(len(each), query.device) for each in (query, key)]
        out, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=starts[0],
            cu_seqlens_k=starts[1],
            max_seqlen_q=len(query),
            max_seqlen_k=len(key),
            softmax_scale=scale,
            causal=causal,
            return_softmax_lse=True,
            fa_version=3,
        )
        return out, lse
    group = query.shape[1] // key.shape[1]
    heads = [each.transpose(0, 1)[None] for each in (query, *(x.repeat_interleave(group, 1) for x in (key, value)))]
    out, lse = _cpu_flash(*heads, is_causal=causal, scale=scale)
    return out[0].transpose(0, 1), lse[0]


@lru_cache(maxsize=512)
def starts_of(num_tokens: int, device: torch.device) -> torch.Tensor:
    """[0, num_tokens] int32; kept, as every copy to a device waits for it."""
    return torch.tensor([0, num_tokens], dtype=torch.int32, device=device)


class Merged:
    """Attention over disjoint sets of keys, added one by one, in float32. Source: arXiv 2501.01005, section 2.2."""

    def __init__(self, query: torch.Tensor) -> None:
        """query: [num_tokens, num_q_heads, head_dim], of which no key has been seen."""
        self.out = torch.zeros_like(query, dtype=torch.float32)
        self.lse = query.new_full((query.shape[1], len(query)), -math.inf, dtype=torch.float32)

    def add(self, out: torch.Tensor, lse: torch.Tensor, rows: slice = slice(None)) -> None:
        """Take in what `partial_attention` gave for some of the queries."""
        mine, my_lse = self.out[rows], self.lse[:, rows]
        # Nothing is left of zeros whose LSE is minus infinity, as the other LSE is finite.
        new_lse = torch.logaddexp(my_lse, lse)
        mine.mul_((my_lse - new_lse).exp().T[..., None])
        mine.addcmul_(out.float(), (lse - new_lse).exp().T[..., None])
        my_lse.copy_(new_lse)


class KVCache:
    """Keys and values of tokens that have been read, by layer; what an `attend` may see before its own tokens."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if layer in self.layers:
            before = self.layers[layer]
            key, value = torch.cat((before[0], key)), torch.cat((before[1], value))
        self.layers[layer] = key, value

    def rows(self, begin: int, end: int) -> "KVCache":
        """Those of tokens [begin, end)."""
        part = KVCache()
        part.layers = {layer: (key[begin:end], value[begin:end]) for layer, (key, value) in self.layers.items()}
        return part

    def extended(self, other: "KVCache", num_rows: int) -> "KVCache":
        """A copy with those of another behind it, and room for `num_rows` more."""
        whole = KVCache()
        for layer, mine in self.layers.items():
            room = mine[0].new_empty(num_rows, *mine[0].shape[1:])
            key, value = (torch.cat((*each, room)) for each in zip(mine, other.layers[layer], strict=True))
            whole.layers[layer] = key, value
        return whole


def attend_last(model: PlainLlama, cache: KVCache, num_keys: int) -> Attend:
    """Attention of one token that sees the first `num_keys` of a cache, in whose next row its own are written."""

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys, values = (each[: num_keys + 1] for each in cache.layers[layer])
        keys[num_keys], values[num_keys] = key[0], value[0]
        return partial_attention(query, keys, values, model.scale, causal=False)[0]

    return attend


def attend_behind(model: PlainLlama, seen: Sequence[KVCache], own: KVCache) -> Attend:
    """Causal attention among the tokens, behind all of `seen` and of `own`, to which their keys are appended."""

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        before = [cache.layers[layer] for cache in (*seen, own) if layer in cache.layers]
        parts = [partial_attention(query, *each, model.scale, causal=False) for each in before if len(each[0])]
        parts.append(partial_attention(query, key, value, model.scale, causal=True))
        own.append(layer, key, value)
        if len(parts) == 1:
            return parts[0][0]
        merged = Merged(query)
        for part in parts:
            merged.add(*part)
        return merged.out.to(query.dtype)

    return attend
