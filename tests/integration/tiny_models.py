"""Random-weight models of two layers whose greedy tokens depend on the whole prompt, as checkpoints on disk."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, LAYERS, VOCAB, HEAD_DIM = 128, 256, 2, 512, 64
WINDOW = 256
INTERLEAVED = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW}
"""A layer that sees all tokens, and one that sees WINDOW."""
ARCHITECTURES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "slash": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "mqa": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
    "interleaved": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **INTERLEAVED},
}
NUM_HEADS = {"llama": (4, 2), "qwen2": (7, 1), "qwen3": (4, 4), "slash": (4, 1), "mqa": (4, 1), "mixtral": (4, 2)}
NUM_HEADS["interleaved"] = NUM_HEADS["llama"]
"""Query and KV heads: groups of 2, 7, 1, 4, 4, 2 and 2."""
NUM_EXPERTS = 4
SLASH_HEAD, SLASH = 2, 1152
"""The query head of "slash" that looks SLASH tokens back; all others look at their own token."""


def write_model(folder: Path, architecture: str) -> Path:
    """Write config.json, model.safetensors and a tokenizer of the words t0 … t511; returns the folder."""
    folder.mkdir(parents=True)
    num_heads, num_kv_heads = NUM_HEADS[architecture]
    config = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    if has_biases(architecture):
        # Without it vLLM derives the head size from the hidden size.
        config["hidden_size"] = num_heads * HEAD_DIM
    if architecture == "mixtral":
        config |= {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "sliding_window": None}
    config |= ARCHITECTURES[architecture]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(make_weights(architecture, config["hidden_size"]), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def make_weights(architecture: str, hidden: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    num_heads, num_kv_heads = NUM_HEADS[architecture]

    def matrix(rows: int, columns: int, gain: float) -> torch.Tensor:
        """[rows, columns] that maps unit-variance inputs to outputs of standard deviation `gain`."""
        return torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    weights = {
        "model.embed_tokens.weight": torch.randn(VOCAB, hidden, generator=generator) * 0.3,
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": matrix(VOCAB, hidden, 1.0),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        # Logits with a standard deviation of 2.5: peaked enough that attention is not a mere average of the prompt.
        # What attention adds outweighs the token's own embedding, so that a wrong key changes the next token.
        weights |= {
            f"{prefix}.self_attn.q_proj.weight": matrix(num_heads * HEAD_DIM, hidden, 1.6),
            f"{prefix}.self_attn.k_proj.weight": matrix(num_kv_heads * HEAD_DIM, hidden, 1.6),
            f"{prefix}.self_attn.v_proj.weight": matrix(num_kv_heads * HEAD_DIM, hidden, 3.0),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, num_heads * HEAD_DIM, 2.0),
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
        }
        for mlp, names in mlp_names(architecture).items():
            for name in names[:2]:
                weights[f"{prefix}.{mlp}.{name}.weight"] = matrix(INTERMEDIATE, hidden, 1.0)
            weights[f"{prefix}.{mlp}.{names[2]}.weight"] = matrix(hidden, INTERMEDIATE, 0.5)
        if architecture == "mixtral":
            weights[f"{prefix}.block_sparse_moe.gate.weight"] = matrix(NUM_EXPERTS, hidden, 3.0)
        if has_biases(architecture):
            for name, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
                bias = torch.randn(heads * HEAD_DIM, generator=generator) * 0.1
                weights[f"{prefix}.self_attn.{name}_proj.bias"] = bias
        if architecture == "qwen3":
            weights[f"{prefix}.self_attn.q_norm.weight"] = torch.full((HEAD_DIM,), 1.6)
            weights[f"{prefix}.self_attn.k_norm.weight"] = torch.full((HEAD_DIM,), 1.6)
    if architecture == "slash":
        weights |= slash_projections(weights)
    return weights


def mlp_names(architecture: str) -> dict[str, tuple[str, str, str]]:
    """By feed-forward network of a layer: its gate, its way up and its way down."""
    if architecture == "mixtral":
        return {f"block_sparse_moe.experts.{expert}": ("w1", "w3", "w2") for expert in range(NUM_EXPERTS)}
    return {"mlp": ("gate_proj", "up_proj", "down_proj")}


def write_lora(folder: Path, architecture: str, rank: int = 8) -> Path:
    """Write an adapter of all query and value projections that changes the tokens; returns the folder."""
    folder.mkdir(parents=True)
    num_heads, num_kv_heads = NUM_HEADS[architecture]
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for layer in range(LAYERS):
        for name, heads in (("q_proj", num_heads), ("v_proj", num_kv_heads)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=generator) * HIDDEN**-0.5
            weights[f"{prefix}.lora_B.weight"] = torch.randn(heads * HEAD_DIM, rank, generator=generator)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "task_type": "CAUSAL_LM"}))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def has_biases(architecture: str) -> bool:
    return ARCHITECTURES[architecture]["model_type"] == "qwen2"


def slash_projections(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries and keys of heads that look at distances: rotary positions turn constant biases into that.

    weights: the model's, of whose content a little stays.
    """
    num_heads, num_kv_heads = NUM_HEADS["slash"]
    half, key_gain, peak = HEAD_DIM // 2, 2.0, 14.0
    frequency = 10000.0 ** (-torch.arange(half) / half)
    takes_part = (frequency > 1 / 32).float()
    distance = torch.zeros(num_heads, 1)
    distance[SLASH_HEAD] = SLASH
    angle = -frequency * distance
    gain = peak * math.sqrt(HEAD_DIM) / (key_gain * float(takes_part.sum()))
    query = torch.cat([angle.cos() * takes_part, angle.sin() * takes_part], dim=1) * gain
    key = torch.cat([torch.full((num_kv_heads, half), key_gain), torch.zeros(num_kv_heads, half)], dim=1)
    changed = {}
    for layer in range(LAYERS):
        for name, bias in (("q_proj", query), ("k_proj", key)):
            projection = f"model.layers.{layer}.self_attn.{name}"
            changed[f"{projection}.weight"] = weights[f"{projection}.weight"] * 0.05
            changed[f"{projection}.bias"] = bias.flatten().clone()
    return changed


def write_tokenizer(folder: Path) -> None:
    """Words t0, t1, …, separated by spaces, each its own number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", unk_token="t0")
    fast.save_pretrained(folder)
