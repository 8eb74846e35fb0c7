"""RWKV-7 as a Transformers model, which has none: the reference of the property tests.

Its modules are those of flash-linear-attention, whose code needs Triton. What it computes, from
token to token as the paper has it, is what KerasHub's computes: test_rwkv7.py.
"""

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import normalize, relu
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput


@strict
class RWKV7Config(PreTrainedConfig):
    """The keys of a `config.json` of flash-linear-attention, with its defaults."""

    model_type = "rwkv7"
    vocab_size: int = 32_000
    hidden_size: int = 2048
    hidden_ratio: float | None = 4.0
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    head_dim: int | None = 64
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    hidden_act: str = "sqrelu"
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-5
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False


class _LowRank(nn.Module):
    def __init__(self, width: int, rank: int, activation: nn.Module, bias: bool = True) -> None:
        super().__init__()
        down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=bias)
        self.lora = nn.Sequential(down, activation, up)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class _Attention(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        width, self.size = config.hidden_size, config.head_dim
        for name in "rwkvag":
            setattr(self, f"x_{name}", nn.Parameter(torch.rand(1, 1, width)))
        self.k_k = nn.Parameter(torch.ones(width))
        self.k_a = nn.Parameter(torch.ones(width))
        self.r_k = nn.Parameter(torch.zeros(width // self.size, self.size))
        for name in "rkvo":
            setattr(self, f"{name}_proj", nn.Linear(width, width, bias=False))
        self.w_lora = _LowRank(width, config.decay_low_rank_dim, nn.Tanh())
        self.a_lora = _LowRank(width, config.a_low_rank_dim, nn.Identity())
        self.g_lora = _LowRank(width, config.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        if index:
            self.v_lora = _LowRank(width, config.v_low_rank_dim, nn.Identity())
        groups, epsilon = width // self.size, self.size * config.norm_eps
        self.g_norm = nn.GroupNorm(groups, width, epsilon)

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns what the branch adds to x (B, T, D), and the first layer's values (B, T, D)."""

        def in_heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.size))

        step = _before(x) - x
        r, w, k, v, a, g = (x + step * getattr(self, f"x_{name}") for name in "rwkvag")
        receptance = in_heads(self.r_proj(r))
        decay = in_heads(torch.exp(-math.exp(-0.5) * torch.sigmoid(self.w_lora(w).float())))
        key, value = self.k_proj(k), self.v_proj(v)
        if first is None:
            first = value
        else:
            value = value + (first - value) * torch.sigmoid(self.v_lora(v))
        rate = torch.sigmoid(self.a_lora(a))
        direction = normalize(in_heads(key * self.k_k).float(), dim=-1)
        key, value = in_heads(key * (1 + (rate - 1) * self.k_a)), in_heads(value)
        read = _evolve(receptance, decay, key, value, direction, in_heads(rate))
        # Groups of channels, each token by itself.
        y = self.g_norm(read.to(x.dtype).flatten(0, 1).flatten(1)).view_as(x)
        bonus = (receptance * key * self.r_k).sum(-1, keepdim=True) * value
        return self.o_proj((y + bonus.flatten(2)) * self.g_lora(g)), first


def _before(x: Tensor) -> Tensor:
    """What stands before each token."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def _evolve(*of_tokens: Tensor) -> Tensor:
    """Returns what a state (B, H, V, K) makes of the receptance of each token."""
    columns = [x.float().unbind(1) for x in of_tokens]
    batch, heads, size = columns[0][0].shape
    state, read = torch.zeros(batch, heads, size, size), []
    for receptance, decay, key, value, direction, rate in zip(*columns, strict=True):
        known = state @ direction[..., None]
        state = state * decay[..., None, :]
        state = state - known @ (rate * direction)[..., None, :]
        state = state + value[..., None] @ key[..., None, :]
        read.append((state @ receptance[..., None])[..., 0])
    return torch.stack(read, dim=1)


class _FeedForward(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.rand(config.hidden_size))
        width = config.intermediate_size
        if width is None:
            width = math.ceil(int(config.hidden_size * config.hidden_ratio) / 32) * 32
        self.key = nn.Linear(config.hidden_size, width, bias=False)
        self.value = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(relu(self.key(x + (_before(x) - x) * self.x_k)) ** 2)


class _Block(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        if index == 0:
            self.pre_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attn_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = _Attention(config, index)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.ffn = _FeedForward(config)


class _Model(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, first = self.embeddings(input_ids), None
        for i, block in enumerate(self.layers):
            x = block.pre_norm(x) if i == 0 else x
            y, first = block.attn(block.attn_norm(x), first)
            x = x + y
            x = x + block.ffn(block.ffn_norm(x))
        return self.norm(x)


class RWKV7ForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of texts without padding."""

    config_class = RWKV7Config
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = _Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _Attention):  # slow decays: what is far away counts
            nn.init.uniform_(module.w_lora.lora[2].bias, -6, -1)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)))


AutoConfig.register("rwkv7", RWKV7Config)
AutoModelForCausalLM.register(RWKV7Config, RWKV7ForCausalLM)
