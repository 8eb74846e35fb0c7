"""ERNIE 4.5 0.3B: a Llama whose RoPE turns pairs of neighbouring channels; a tied head.

The head size is a number of its own. Reference:
[ERNIE 4.5](https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf).
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import llama
from functional_llm.backbones.family import COMMON_KEYS, DecoderConfig, Family, complete_common_keys
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.rope import rotary_pairs
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of an ERNIE 4.5, beside those of `DecoderConfig`."""

    use_bias: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    bias, rotate = config.use_bias, rotary_pairs()
    decoder = partial(llama.build_decoder, rotate=rotate, bias=bias, mlp_bias=bias)
    return build_with_one_rope(config, decoder, ["full_attention"] * config.num_layers)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0}
    own |= {"use_bias": False, "tie_word_embeddings": True}
    keys = own | {"num_key_value_heads": 2, "head_dim": 128} | keys
    return complete_common_keys(keys)


FAMILY = Family(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    models="ERNIE 4.5 0.3B",
    config_class=Config,
    build=build,
    config_keys={**COMMON_KEYS, "use_bias": "use_bias"},
    config_nulls=("num_key_value_heads", "head_dim"),
    complete_keys=complete_keys,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="ernie4_5",
)
