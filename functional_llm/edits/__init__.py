"""Edits: functions from one graph to another that are neither adapters nor formats.

May import: graph, kernels, layers, formats, stock, xla.

Offers: `quantize`.
"""
