"""The needle model for training: a Llama in few lines, with transformers' parameter names.

transformers' `LlamaForCausalLM` gives the same logits from the same weights, which a test checks.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from .tokenizer import save_tokenizer

# Initial weights of the first layer: the gain of the logit at the wanted distance, and the lowest rotary frequency that
# takes part, in radians per token.
LOOK_BACK_GAIN = 10.0
LOOK_BACK_MIN_FREQUENCY = 1e-4
LOCAL_WINDOW = 128


@dataclass(frozen=True)
class NeedleShape:
    """Shape of the model. With this `rope_theta` about half of the frequencies hardly rotate within 128K tokens."""

    vocab_size: int = 1152
    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e10
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072

    def to_config(self) -> dict:
        """The `config.json` of transformers and vLLM."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{name: value for name, value in asdict(self).items() if name != "rope_theta"},
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "initializer_range": 0.02,
            "use_cache": True,
            "dtype": "bfloat16",
        }


class Attention(nn.Module):
    """Projections of one attention layer."""

    def __init__(self, shape: NeedleShape):
        """Allocate the four projections."""
        super().__init__()
        q_size, kv_size = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)


class Mlp(nn.Module):
    """Projections of one gated MLP."""

    def __init__(self, shape: NeedleShape):
        """Allocate the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)


class Norm(nn.Module):
    """Weight of one RMSNorm."""

    def __init__(self, shape: NeedleShape):
        """Start at one."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden_size]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: NeedleShape):
        """Allocate attention, MLP and their norms."""
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Mlp(shape)
        self.input_layernorm = Norm(shape)
        self.post_attention_layernorm = Norm(shape)
        self.shape = shape

    def forward(self, x, cos, sin, sampled=None):
        """One layer's output, and the stray attention of the queries at the `sampled` positions (None without them).

        x: [batch, tokens, hidden]; cos, sin: [batch or 1, 1, tokens, head_dim]; sampled: [num_sampled] int64.
        """
        batch, num_tokens, _ = x.shape
        attn, mlp, head_dim = self.self_attn, self.mlp, self.shape.head_dim
        h = self.input_layernorm(x)
        q, k, v = (
            _linear(h, projection).view(batch, num_tokens, -1, head_dim).transpose(1, 2)
            for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        stray = None if sampled is None else stray_attention(q, k, sampled)
        x = x + _linear(out.transpose(1, 2).reshape(batch, num_tokens, -1), attn.o_proj)
        h = self.post_attention_layernorm(x)
        return x + _linear(F.silu(_linear(h, mlp.gate_proj)) * _linear(h, mlp.up_proj), mlp.down_proj), stray


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, shape: NeedleShape):
        """Allocate all layers."""
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape)


class NeedleNet(nn.Module):
    """Llama with tied embeddings; float32 master weights, computing in `dtype`."""

    def __init__(self, shape: NeedleShape, dtype: torch.dtype = torch.float32):
        """Allocate and initialise from torch's current seed."""
        super().__init__()
        self.model = Decoder(shape)
        self.shape = shape
        self.dtype = dtype
        residual_scale = (2 * shape.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 if "embed_tokens" in name else parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= residual_scale
                nn.init.normal_(parameter, std=std)
        self._look_back()

    @property
    def layers(self) -> list[Layer]:
        """The decoder layers, from the first."""
        return cast(list[Layer], list(self.model.layers))

    @torch.no_grad()
    def _look_back(self) -> None:
        """Initialise the first layer's heads to look 1, 2, 3, … tokens back; training can change that.

        Retrieval in later layers needs such heads, which otherwise take long to appear. All embeddings share one
        direction; the keys map it to a vector of high rotary frequencies, the queries to that vector rotated.
        """
        shape = self.shape
        shared = torch.randn(shape.hidden_size).sign()
        self.model.embed_tokens.weight += 0.02 * shared
        half = shape.head_dim // 2
        frequency = shape.rope_theta ** (-torch.arange(half).float() / half)
        amplitude = LOOK_BACK_GAIN * frequency.sqrt() * (frequency > LOOK_BACK_MIN_FREQUENCY)
        attn = self.layers[0].self_attn
        group_size = shape.num_attention_heads // shape.num_key_value_heads
        for head in range(shape.num_attention_heads):
            angle = (head % group_size + 1) * frequency
            turned = torch.cat((amplitude * angle.cos(), -amplitude * angle.sin()))
            rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
            attn.q_proj.weight[rows] *= 0.3
            attn.q_proj.weight[rows] += turned[:, None] * shared / shape.hidden_size
        for head in range(shape.num_key_value_heads):
            rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
            plain = torch.cat((amplitude, torch.zeros(half)))
            attn.k_proj.weight[rows] *= 0.3
            attn.k_proj.weight[rows] += plain[:, None] * shared / shape.hidden_size
        attn.o_proj.weight *= (2 * shape.num_hidden_layers) ** 0.5

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Final hidden states [batch, tokens, hidden]. tokens: [batch, tokens]; positions: [batch or 1, tokens]."""
        return self.hidden_and_stray(tokens, positions, None)[0]

    def hidden_and_stray(self, tokens, positions, sampled):
        """As `hidden`, and the mean over layers of `stray_attention` at the `sampled` positions, None without them."""
        cos, sin = self.rotary(positions)
        x = F.embedding(tokens, self.model.embed_tokens.weight.to(self.dtype))
        strays = []
        for layer in self.layers:
            x, stray = layer(x, cos, sin, sampled)
            strays.append(stray)
        return self.model.norm(x), None if sampled is None else torch.stack(strays).mean()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., hidden] -> [..., vocab]."""
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each [batch or 1, 1, tokens, head_dim], in the model's dtype."""
        half = self.shape.head_dim // 2
        frequency = self.shape.rope_theta ** (-torch.arange(half, device=positions.device).float() / half)
        angle = positions[:, None, :, None].float() * frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)


def export(net: NeedleNet, folder: Path) -> None:
    """Write the bf16 weights, configuration and tokenizer as a model folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in net.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(net.shape.to_config(), indent=2) + "\n")
    generation = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(folder)


def load_network(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> NeedleNet:
    """The network of an exported model folder."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    shape = NeedleShape(**{name: config[name] for name in NeedleShape.__dataclass_fields__})
    net = NeedleNet(shape, dtype)
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return net.to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [batch, heads, tokens, head_dim], halves paired as in Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def stray_attention(q: torch.Tensor, k: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """Mean attention mass of sampled queries outside of the last `LOCAL_WINDOW` tokens and the first token: a scalar.

    q: [batch, heads, tokens, head_dim], k: [batch, kv_heads, tokens, head_dim], both rotated; sampled: [n] int64.
    """
    batch, num_kv_heads, num_tokens, head_dim = k.shape
    queries = q[:, :, sampled].reshape(batch, num_kv_heads, -1, head_dim)
    scores = (queries @ k.transpose(2, 3)).float() * head_dim**-0.5
    query = sampled.repeat(q.shape[1] // num_kv_heads)[:, None]
    key = torch.arange(num_tokens, device=k.device)
    mass = scores.masked_fill(key > query, -torch.inf).softmax(dim=-1)
    return (mass * ((key > 0) & (key <= query - LOCAL_WINDOW))).sum(dim=-1).mean()


def _linear(x: torch.Tensor, projection: nn.Linear) -> torch.Tensor:
    return F.linear(x, projection.weight.to(x.dtype))
