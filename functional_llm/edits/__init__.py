"""Edits: functions from one graph to another that are neither adapters nor formats.

May import: graph, kernels, layers, stock.

Offers: `quantize`.
"""
