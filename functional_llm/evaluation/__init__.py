"""Evaluation: how probable a model finds given text, and what that says of it.

May import: graph, xla, tokenizers, layers, generation, training, presets.

Offers: `Scorer`, `score`, `perplexity`, `plot_routing`; `lm_eval`, a model of
lm-evaluation-harness, which is imported only where somebody asks for it.
"""
