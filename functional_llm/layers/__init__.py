"""Layers: the three that depend on which inputs are given, experts, the cache, a call's inputs.

May import: graph, kernels.

Offers: `AttentionMask`, `KVCacheLookup`, `AttentionDotProduct`; `ExpertScores`, `ExpertDispatch`,
`ExpertDense`, `ExpertCombine`; `make_cache` and what works on caches; `complete_inputs`.
"""

from functional_llm.layers.attention import AttentionDotProduct, AttentionMask, KVCacheLookup
from functional_llm.layers.experts import (
    ExpertCombine,
    ExpertDense,
    ExpertDispatch,
    ExpertScores,
)

__all__ = [
    "AttentionDotProduct",
    "AttentionMask",
    "ExpertCombine",
    "ExpertDense",
    "ExpertDispatch",
    "ExpertScores",
    "KVCacheLookup",
]
