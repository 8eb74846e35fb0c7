"""Stock Keras: the same model in built-in layers, for files and for other runtimes.

May import: graph, layers.

Offers: `register_lowering`, `Lowering`, `.keras` files, StableHLO.
"""
