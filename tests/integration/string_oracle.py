"""A tiny Llama in float64 PyTorch whose attention runs over the whole matrix of shifted positions."""

import json
from dataclasses import dataclass
from pathlib import Path

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

    def __init__(self, folder: Path, shift: Shift) -> None:
        self.shift = shift
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: each.double() for name, each in load_file(folder / "model.safetensors").items()}
        head_dim = self.config["head_dim"]
        self.inv_freq = self.config["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim)

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
            normed = self.norm(hidden, f"{prefix}.post_attention_layernorm")
            gate = torch.nn.functional.silu(self.linear(normed, f"{prefix}.mlp.gate_proj"))
            up = self.linear(normed, f"{prefix}.mlp.up_proj")
            hidden = hidden + self.linear(gate * up, f"{prefix}.mlp.down_proj")
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
            self.shift.logit_scale * head_dim**-0.5,
            shift=self.shift.shift,
            window=self.shift.window,
            is_neox=True,
            mask=mask,
        )
        return self.linear(out.flatten(1), f"model.layers.{layer}.self_attn.o_proj")

    def linear(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        return inputs @ self.weights[f"{name}.weight"].T

    def norm(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        variance = inputs.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]
        return inputs * variance.rsqrt() * self.weights[f"{name}.weight"]
