"""Formats: the files that others write, read and written by engines that name no family.

May import: files, graph, tokenizers, blocks, backbones.

Offers: safetensors, GGUF, `config.json`, weight tables, downloads.
"""
