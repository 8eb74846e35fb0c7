"""A reference zoo of language models for Keras 3 on JAX: every model is one editable graph."""

from functional_llm import samplers
from functional_llm.cache import make_cache
from functional_llm.composite import CompositeLayer
from functional_llm.generate import Past, TextGenerator
from functional_llm.handles import preset_names
from functional_llm.layers import AttentionDotProduct, AttentionMask, KVCacheLookup
from functional_llm.presets import Backbone, Tokenizer

__version__ = "0.1.0"

__all__ = [
    "AttentionDotProduct",
    "AttentionMask",
    "Backbone",
    "CompositeLayer",
    "KVCacheLookup",
    "Past",
    "TextGenerator",
    "Tokenizer",
    "make_cache",
    "preset_names",
    "samplers",
]
