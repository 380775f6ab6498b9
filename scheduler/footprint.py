"""What a model takes of a GPU's memory besides KV: weights, activations, and what CUDA keeps for itself.

Everything is per tensor-parallel rank. Weights are exact; activations and the rest are estimates with a margin, which
`docs/capacity.md` states and compares with measurements.
"""

from dataclasses import dataclass

ACTIVATION_MARGIN = 1.25
"""On the tensors counted here: what the allocator rounds up and cannot reuse."""
CUDA_BYTES = 650 * 2**20
"""CUDA context, loaded kernels, workspaces of libraries and small graphs."""
TENSOR_PARALLEL_BYTES = 512 * 2**20
"""Communication buffers on every GPU as soon as there is more than one."""
SAMPLER_BYTES = 24
"""For each candidate of each request: logits, probabilities and noise in float32, sorted values and their indices."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder, whole; numbers of parameters are numbers, not bytes."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int
    """Of the MLPs that one token goes through, together."""
    embedding_params: int
    """Input embeddings: looked up, not multiplied."""
    head_params: int
    """What the last hidden state is multiplied with; the embeddings themselves where they are tied."""
    is_tied: bool
    linear_params: int
    """All other parameters that every token meets."""
    expert_params: int
    """All routed experts of all layers; 0 for a dense model."""
    num_experts: int
    experts_per_token: int
    max_positions: int
    """Tokens of the longest context that vLLM serves with this configuration."""

    @property
    def stored_params(self) -> int:
        return self.embedding_params + (0 if self.is_tied else self.head_params) + self.layer_params

    @property
    def layer_params(self) -> int:
        return self.linear_params + self.expert_params

    @property
    def active_params(self) -> float:
        """Parameters in the layers that one token is multiplied with."""
        return self.linear_params + self.expert_params * self.experts_per_token / max(self.num_experts, 1)

    def read_params(self, num_tokens: int) -> float:
        """Parameters that a step reads, on average over where a router sends `num_tokens` tokens."""
        if not self.expert_params:
            return self.linear_params + self.head_params
        missed = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        return self.linear_params + self.head_params + self.expert_params * (1 - missed)


def kv_heads_of_rank(num_kv_heads: int, tensor_parallel_size: int) -> int:
    """KV heads of one rank: several ranks hold the same one where there are more ranks than heads."""
    return max(num_kv_heads // tensor_parallel_size, 1)


def weight_bytes(shape: ModelShape, element_bytes: int, layer_bits: float, tensor_parallel_size: int) -> int:
    """Weights of one rank.

    layer_bits: of each parameter in the layers, scales included; 8 * element_bytes where they are not quantized.
    """
    outside = (shape.stored_params - shape.layer_params) * element_bytes
    return int(outside + shape.layer_params * layer_bits / 8) // tensor_parallel_size


def activation_bytes(
    shape: ModelShape, element_bytes: int, max_num_batched_tokens: int, max_num_seqs: int, tensor_parallel_size: int
) -> int:
    """Most bytes of intermediate tensors in one step, margin included.

    Either inside a layer, with its hidden states and residual, or in the sampler, with the last layer's output.
    """
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // tensor_parallel_size
    attention = 2 * qkv + shape.hidden_size
    # Gate and up projection, their product, and the output: of every chosen expert before they are added.
    mlp = 3 * shape.intermediate_size // tensor_parallel_size + shape.hidden_size * max(shape.experts_per_token, 1)
    in_layer = max_num_batched_tokens * element_bytes * (2 * shape.hidden_size + max(attention, mlp))
    in_sampler = max_num_batched_tokens * element_bytes * 2 * shape.hidden_size
    in_sampler += max_num_seqs * shape.vocab_size * (element_bytes + SAMPLER_BYTES)
    return int(ACTIVATION_MARGIN * max(in_layer, in_sampler))


def fixed_bytes(tensor_parallel_size: int) -> int:
    """What neither the model nor the batch decides."""
    return CUDA_BYTES + (TENSOR_PARALLEL_BYTES if tensor_parallel_size > 1 else 0)
