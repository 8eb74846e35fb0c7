"""A reference zoo of language models for Keras 3 on JAX: every model is one editable graph."""

import os

# Keras chooses its backend when it is imported, TensorFlow unless told. Whoever imports Keras first
# or sets the variable keeps their choice.
os.environ.setdefault("KERAS_BACKEND", "jax")

from functional_llm import peft, samplers, training
from functional_llm.cache import make_cache
from functional_llm.capturing import capture
from functional_llm.composite import CompositeLayer
from functional_llm.drawing import plot, tree_view
from functional_llm.export import register_lowering
from functional_llm.freezing import Freezable
from functional_llm.fusing import fuse_projections
from functional_llm.generate import Past, TextGenerator
from functional_llm.handles import preset_names
from functional_llm.layers import AttentionDotProduct, AttentionMask, KVCacheLookup
from functional_llm.preset_table import list_presets
from functional_llm.presets import Backbone, Tokenizer
from functional_llm.quantizing import quantize
from functional_llm.rewiring import rewire, twin
from functional_llm.selecting import select, walk

__version__ = "0.1.0"

__all__ = [
    "AttentionDotProduct",
    "AttentionMask",
    "Backbone",
    "CompositeLayer",
    "Freezable",
    "KVCacheLookup",
    "Past",
    "TextGenerator",
    "Tokenizer",
    "list_presets",
    "capture",
    "fuse_projections",
    "make_cache",
    "peft",
    "plot",
    "preset_names",
    "quantize",
    "register_lowering",
    "rewire",
    "samplers",
    "select",
    "training",
    "tree_view",
    "twin",
    "walk",
]
