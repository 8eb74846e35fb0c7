"""Backbones: one small file for each family of models.

May import: graph, layers, blocks.

Offers: a `FAMILY` in each file; `Family`, what such a file says; `FAMILIES`, the table of them;
KerasHub's words for the same, in `keras_hub/`.
"""
