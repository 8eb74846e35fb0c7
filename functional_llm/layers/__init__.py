"""Layers: the three that depend on which inputs are given, the cache, and the inputs of a call.

May import: graph, kernels.

Offers: `AttentionMask`, `KVCacheLookup`, `AttentionDotProduct`; `make_cache` and what works on
caches; `complete_inputs`.
"""

from functional_llm.layers.attention import AttentionDotProduct, AttentionMask, KVCacheLookup

__all__ = ["AttentionDotProduct", "AttentionMask", "KVCacheLookup"]
