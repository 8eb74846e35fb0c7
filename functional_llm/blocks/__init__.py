"""Blocks: the parts that models are built from, as functions that return layers and graphs.

May import: graph, layers.

Offers: `attention`, `decoder`, `gated_mlp`, norms, RoPE, `causal_lm`; no family is named here.
"""
