"""A tiny Llama in float64 PyTorch whose attention runs over the whole matrix of shifted positions."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from farspan.kernels import reference
from safetensors.torch import load_file


@dataclass(frozen=True)
class Shift:
    """The options of `string`, and the sparse mask under which prompts are read."""

    shift: int
    window: int
    logit_scale: float = 1.0
    sparse_block: int | None = None
    """Prompts see their own block of that many tokens and the first one; None for all keys."""


class ShiftedLlama:
    """Greedy tokens of a checkpoint under shifted positions; no pages, no chunks, no batch."""

    def __init__(self, folder: Path, shift: Shift, rope: dict[str, Any] | None = None) -> None:
        """rope: `rope_parameters` in place of the checkpoint's."""
        self.shift = shift
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: each.double() for name, each in load_file(folder / "model.safetensors").items()}
        head_dim = self.config["head_dim"]
        self.inv_freq = self.config["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        self.magnitude = 1.0
        """Of rotated queries, and of rotated keys."""
        if rope is not None:
            from transformers import LlamaConfig
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            config = LlamaConfig(**{**self.config, "rope_parameters": rope})
            self.inv_freq, self.magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The most likely tokens behind `prompt`, one by one."""
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        tokens = list(prompt)
        new = tokens
        for _ in range(max_tokens):
            logits = self.forward(torch.tensor(new), is_prompt=new is tokens)
            new = [int(logits.argmax())]
            tokens = tokens + new
        return tokens[len(prompt) :]

    def forward(self, tokens: torch.Tensor, is_prompt: bool) -> torch.Tensor:
        """Logits of the last of the tokens, [vocab]; keys and values of all go into the cache."""
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            hidden = hidden + self.attention(layer, self.norm(hidden, f"{prefix}.input_layernorm"), is_prompt)
            hidden = hidden + self.feed_forward(prefix, self.norm(hidden, f"{prefix}.post_attention_layernorm"))
        return self.linear(self.norm(hidden[-1:], "model.norm"), "lm_head")[0]

    def attention(self, layer: int, hidden: torch.Tensor, is_prompt: bool) -> torch.Tensor:
        head_dim = self.config["head_dim"]
        query, key, value = (
            self.linear(hidden, f"model.layers.{layer}.self_attn.{name}_proj").unflatten(1, (-1, head_dim))
            for name in "qkv"
        )
        if layer in self.cache:
            key, value = (torch.cat(pair) for pair in zip(self.cache[layer], (key, value), strict=True))
        self.cache[layer] = key, value
        mask = None
        if is_prompt and self.shift.sparse_block is not None:
            block = torch.arange(len(key)) // self.shift.sparse_block
            mask = (block[:, None] == block) | (block == 0)
        out, _ = reference.string_attention(
            query,
            key,
            value,
            self.inv_freq,
            self.shift.logit_scale * self.magnitude**2 * head_dim**-0.5,
            shift=self.shift.shift,
            window=self.shift.window,
            is_neox=True,
            mask=mask,
        )
        return self.linear(out.flatten(1), f"model.layers.{layer}.self_attn.o_proj")

    def feed_forward(self, prefix: str, hidden: torch.Tensor) -> torch.Tensor:
        """Of one network, or of the best experts of each token, whose weights sum to 1."""
        router = f"{prefix}.block_sparse_moe.gate"
        if f"{router}.weight" not in self.weights:
            return self.network(hidden, *(f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down")))
        best = self.linear(hidden, router).topk(self.config["num_experts_per_tok"])
        shares = torch.zeros(len(hidden), self.config["num_local_experts"]).double()
        shares.scatter_(1, best.indices, best.values.softmax(-1))
        experts = [f"{prefix}.block_sparse_moe.experts.{expert}" for expert in range(shares.shape[1])]
        outs = [self.network(hidden, *(f"{expert}.{name}" for name in ("w1", "w3", "w2"))) for expert in experts]
        return (torch.stack(outs, dim=1) * shares[..., None]).sum(1)

    def network(self, hidden: torch.Tensor, gate: str, up: str, down: str) -> torch.Tensor:
        return self.linear(torch.nn.functional.silu(self.linear(hidden, gate)) * self.linear(hidden, up), down)

    def linear(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        return inputs @ self.weights[f"{name}.weight"].T

    def norm(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        variance = inputs.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]
        return inputs * variance.rsqrt() * self.weights[f"{name}.weight"]
