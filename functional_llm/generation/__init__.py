"""Generation: prompts in, text or ids out, by compiled programs.

May import: files, graph, xla, tokenizers, layers, formats.

Offers: `TextGenerator`, `Chat`, `PromptCache`, samplers.
"""
