"""Blocks of experts: each kind of router computes what Transformers' block computes.

Shapes: B batch, T tokens, D model, F width of an expert, E experts.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import ops

from functional_llm.blocks.experts import (
    BesideX,
    Router,
    ScoreCorrection,
    activated,
    clamped,
    expert_mlp,
    gated,
    normalized,
    scaled,
    softmax,
    within_groups,
)
from functional_llm.blocks.mlp import gated_mlp

D, F, E, K = 12, 10, 8, 3
SILU = activated("silu")


def _router(**parts: Any) -> Router:
    return Router(num_experts=E, num_chosen=K, **parts)


def _shared(width: int) -> Any:
    return gated_mlp(width, D, "silu", name="shared")


def _plain(norm: bool = True) -> BesideX:
    weights = [normalized()] if norm else []
    return expert_mlp(_router(scores=[softmax], weights=weights), F, D, SILU)


def _qwen2() -> BesideX:
    router = _router(scores=[softmax])
    return expert_mlp(router, F, D, SILU, shared=gated(_shared(14)))


def _deepseek_v2(groups: bool) -> BesideX:
    limits = [within_groups(4, 2, 1, 0.0)] if groups else []
    router = _router(scores=[softmax, *limits], weights=[scaled(2.5)])
    return expert_mlp(router, F, D, SILU, shared=_shared(2 * F))


def _deepseek_v3() -> BesideX:
    router = _router(
        scores=[ops.sigmoid],
        choice=[ScoreCorrection(), within_groups(4, 2, 2)],
        weights=[normalized(epsilon=1e-20), scaled(2.5)],
    )
    return expert_mlp(router, F, D, SILU, shared=_shared(2 * F))


def _gpt_oss() -> BesideX:
    router = _router(weights=[softmax], use_bias=True)
    return expert_mlp(router, F, D, clamped(1.702, 0.7), use_bias=True)


def _llama4() -> BesideX:
    router = _router(weights=[ops.sigmoid])
    return expert_mlp(router, F, D, SILU, weighs_inputs=True, shared=_shared(F))


def _ernie() -> BesideX:
    router = _router(
        scores=[softmax], choice=[ScoreCorrection()], weights=[normalized(minimum=0.5)]
    )
    return expert_mlp(router, F, D, SILU, shared=_shared(2 * F))


_LOCAL = {"num_local_experts": E, "num_experts_per_tok": K, "intermediate_size": F}
_OWN = {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": F}
_DEEP: dict[str, Any] = {
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "moe_intermediate_size": F,
}
_DEEP |= {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5}

# Transformers' module and block, its numbers, and ours.
KINDS: dict[str, tuple[str, str, dict[str, Any], Callable[[], BesideX]]] = {
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", _LOCAL, _plain),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        {**_OWN, "norm_topk_prob": True},
        _plain,
    ),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        {**_OWN, "shared_expert_intermediate_size": 14, "norm_topk_prob": False},
        _qwen2,
    ),
    "olmoe": (
        "olmoe",
        "OlmoeSparseMoeBlock",
        {"num_experts": E, "num_experts_per_tok": K, "intermediate_size": F},
        lambda: _plain(norm=False),
    ),
    "granitemoe": (
        "granitemoe",
        "GraniteMoeMoE",
        _LOCAL,
        lambda: expert_mlp(_router(weights=[softmax]), F, D, SILU),
    ),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2Moe",
        {**_DEEP, "topk_method": "greedy"},
        lambda: _deepseek_v2(groups=False),
    ),
    "deepseek_v2_groups": (
        "deepseek_v2",
        "DeepseekV2Moe",
        {**_DEEP, "topk_method": "group_limited_greedy"},
        lambda: _deepseek_v2(groups=True),
    ),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3MoE", _DEEP, _deepseek_v3),
    "gpt_oss": ("gpt_oss", "GptOssMLP", {**_LOCAL, "swiglu_limit": 0.7}, _gpt_oss),
    "llama4": ("llama4", "Llama4TextMoe", _LOCAL, _llama4),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        "Ernie4_5_MoeSparseMoeBlock",
        {
            "moe_num_experts": E,
            "moe_k": K,
            "moe_intermediate_size": F,
            "moe_num_shared_experts": 2,
            "moe_norm_min": 0.5,
        },
        _ernie,
    ),
}


def _reference(module: str, block: str, numbers: dict[str, Any]) -> Any:
    """Returns Transformers' block with random weights, corrections large enough to matter."""
    code = import_module(f"transformers.models.{module}.modeling_{module}")
    owner = block.removesuffix("SparseMoeBlock").removesuffix("MoE").removesuffix("Moe")
    owner = {"GraniteMo": "GraniteMoe", "GptOssMLP": "GptOss", "Granite": "GraniteMoe"}.get(
        owner, owner
    )
    names = (f"{owner}Config", f"{owner}TextConfig", f"{owner}MoeConfig")
    configs = import_module(f"transformers.models.{module}.configuration_{module}")
    config_class = next(getattr(configs, name) for name in names if hasattr(configs, name))
    sizes = {"hidden_size": D, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = config_class(**sizes, hidden_act="silu", **numbers)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    layer = getattr(code, block)(config).eval()
    with torch.no_grad():
        for name, x in [*layer.named_parameters(), *layer.named_buffers()]:
            x.copy_(torch.randn(x.shape) * (0.3 if "correction" in name else 0.5))
    return layer


def _weights(layer: Any, module: str) -> dict[str, np.ndarray]:
    """Returns the block's weights by the paths of our variables."""
    given = {name: x.detach().numpy() for name, x in layer.state_dict().items()}
    ours: dict[str, np.ndarray] = {}
    for name, x in given.items():
        if name.endswith("correction_bias"):
            ours["correction/bias"] = x.reshape(-1)
        elif name in ("gate.weight", "router.weight"):
            ours["router/kernel"] = x.T
        elif name == "router.bias":
            ours["router/bias"] = x
        elif name.startswith("shared_expert_gate"):
            ours["shared_gate/kernel"] = x.T
        elif name.startswith("shared_expert"):
            ours[f"shared/{name.split('.')[1].removesuffix('_proj')}/kernel"] = x.T
        else:
            kind = "bias" if name.endswith("_bias") else "kernel"
            is_transposed = module in ("gpt_oss", "llama4") or kind == "bias"
            x = x if is_transposed else x.swapaxes(1, 2)
            if "down" in name:
                ours[f"experts_down/{kind}"] = x
            else:
                one_by_one = (x[..., ::2], x[..., 1::2])
                parts = one_by_one if module == "gpt_oss" else np.split(x, 2, axis=-1)
                ours[f"experts_gate/{kind}"], ours[f"experts_up/{kind}"] = parts
    return ours


def _model(part: BesideX) -> Any:
    x, positions = keras.Input((None, D)), keras.Input((None,), dtype="int32")
    return keras.Model([x, positions], part(x, {"positions": positions}))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_equal_those_of_transformers(kind: str) -> None:
    module, block, numbers, make = KINDS[kind]
    reference = _reference(module, block, numbers)
    model, weights = _model(make()), _weights(reference, module)
    assert {v.path.removeprefix("mlp/") for v in model.variables} == set(weights)
    for variable in model.variables:
        variable.assign(weights[variable.path.removeprefix("mlp/")])
    x = np.random.default_rng(1).normal(size=(2, 9, D)).astype("float32")
    with torch.no_grad():
        expected = reference(torch.from_numpy(x))
    expected = expected[0] if isinstance(expected, tuple) else expected
    positions = np.tile(np.arange(9, dtype="int32"), (2, 1))
    received = np.asarray(model([x, positions]))
    np.testing.assert_allclose(received, expected.reshape(x.shape).numpy(), atol=1e-5, rtol=1e-5)
    if "correction/bias" in weights:  # large enough to change the choice
        next(v for v in model.variables if "correction" in v.path).assign(np.zeros(E))
        assert np.abs(np.asarray(model([x, positions])) - received).max() > 1e-3
