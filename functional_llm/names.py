"""The public names: `functional_llm` offers them as its own."""

from functional_llm import peft, sharding, training
from functional_llm.edits.quantization import quantize
from functional_llm.evaluation.perplexity import Perplexity, perplexity
from functional_llm.evaluation.scorer import Score, Scorer, score
from functional_llm.formats.model_card import CardFacts
from functional_llm.formats.upload import push_folder as push_to_hub
from functional_llm.generation import samplers
from functional_llm.generation.chat import Chat
from functional_llm.generation.prompt_cache import PromptCache
from functional_llm.graph.capturing import capture
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.freezing import Freezable
from functional_llm.graph.keeping_values import KeepsValues
from functional_llm.graph.looking.drawing import plot
from functional_llm.graph.looking.page import explore
from functional_llm.graph.looking.tree_view import tree_view
from functional_llm.graph.rewiring import rewire, shared_copy
from functional_llm.graph.selection import select, walk
from functional_llm.kernels import AttentionFacts, AttentionKernel, Mask, register_attention
from functional_llm.layers.attention import AttentionDotProduct, AttentionMask, KVCacheLookup
from functional_llm.layers.cache import make_cache
from functional_llm.layers.explaining import (
    attention_choices,
    expert_choices,
    explain_attention,
    explain_experts,
)
from functional_llm.presets import Backbone, TextGenerator, Tokenizer
from functional_llm.presets.family_table import list_families
from functional_llm.presets.keras_hub import from_keras_hub, to_keras_hub
from functional_llm.presets.table import list_presets, preset_names
from functional_llm.stock.lowering import register_lowering

# Names of 0.1 that its users may have written.
twin, Past = shared_copy, PromptCache

__all__ = [
    "AttentionDotProduct",
    "AttentionFacts",
    "AttentionKernel",
    "AttentionMask",
    "Backbone",
    "CardFacts",
    "Chat",
    "CompositeLayer",
    "Freezable",
    "KVCacheLookup",
    "KeepsValues",
    "Mask",
    "Perplexity",
    "PromptCache",
    "Past",
    "Score",
    "Scorer",
    "TextGenerator",
    "Tokenizer",
    "attention_choices",
    "expert_choices",
    "explain_attention",
    "explain_experts",
    "explore",
    "from_keras_hub",
    "list_families",
    "list_presets",
    "capture",
    "make_cache",
    "peft",
    "perplexity",
    "plot",
    "preset_names",
    "push_to_hub",
    "quantize",
    "register_attention",
    "register_lowering",
    "rewire",
    "samplers",
    "score",
    "select",
    "to_keras_hub",
    "sharding",
    "training",
    "tree_view",
    "shared_copy",
    "twin",
    "walk",
]
