"""OLMo 3: an OLMo 2 in which three of four layers see a window.

RoPE is stretched in the others only. Reference: [OLMo 3](https://arxiv.org/abs/2512.13961).
"""

from dataclasses import dataclass

from functional_llm.backbones import gemma3, llama, olmo2
from functional_llm.backbones.family import Family, check_windows
from functional_llm.backbones.stacks import build_around
from functional_llm.blocks.language_model import Graph
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(olmo2.Config):
    """The numbers of an OLMo 3, beside those of an OLMo 2."""

    local_rope_max_wavelength: float
    layer_types: tuple[str, ...]
    sliding_window: int | None


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [
        (kind, olmo2.build_decoder(config, f"decoder_{i}"))
        for i, kind in enumerate(config.layer_types)
    ]
    types = gemma3.two_ropes(config, config.local_rope_max_wavelength, config.sliding_window)
    return build_around(config, layers, types)


_THETA = 500000.0


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = keys.get("rope_parameters") or {}
    local = own.get("sliding_attention") if isinstance(own, dict) else None
    theta = keys.get("rope_theta", _THETA)
    if theta != _THETA and not (isinstance(local, dict) and "rope_theta" in local):
        raise ValueError(
            "config.json: expected a rope_theta in rope_parameters for each of full_attention and "
            f"sliding_attention, received only rope_theta={theta}: of that versions of "
            "Transformers make different things for layers with a window."
        )
    num_layers = keys["num_hidden_layers"]
    kinds = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(num_layers)]
    rope = {"rope_theta": _THETA, "rope_local_base_freq": _THETA}
    keys = {"layer_types": kinds, "sliding_window": 4096, **rope, **keys}
    check_windows(keys["layer_types"], keys["sliding_window"])
    return olmo2.complete_keys(keys)


def written_keys(config: Config) -> JSON:
    """Returns RoPE as Transformers reads it if the thetas are not those of the published models."""
    full, local = config.rope_max_wavelength, config.local_rope_max_wavelength
    if full == local == _THETA:
        return {}
    thetas = {"full_attention": full, "sliding_attention": local}
    parameters = {kind: {"rope_type": "default", "rope_theta": x} for kind, x in thetas.items()}
    return {"rope_theta": None, "rope_parameters": parameters}


def gguf_defaults(keys: JSON) -> JSON:
    """Returns llama.cpp's RoPE of layers with a window: with the same theta, not stretched."""
    return {"rope_parameters": {"sliding_attention": {"rope_theta": keys["rope_theta"]}}}


FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    models="OLMo 3",
    config_class=Config,
    build=build,
    config_keys={
        **olmo2.CONFIG_KEYS,
        "layer_types": "layer_types",
        "sliding_window": "sliding_window",
    },
    complete_keys=complete_keys,
    written_keys=written_keys,
    weights=olmo2.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="olmo2",
    gguf_told_by="attention.sliding_window",
    gguf_defaults=gguf_defaults,
)
