"""Generation: prompts in, text or ids out, by compiled programs.

May import: cpu, tokenizers, layers, formats.

Offers: `TextGenerator`, `PromptCache`, samplers.
"""
