"""Stock Keras: the same model in built-in layers, for files and for other runtimes.

May import: files, graph, tokenizers, kernels, layers, backbones, formats.

Offers: `register_lowering`, `Lowering`, `.keras` files, StableHLO, SavedModels from text to text.
"""

import functional_llm.stock.own_layers  # noqa: F401  (which registers them)
