"""Presets: the only place that knows families, weights and tokenizers together.

May import: every room above.

Offers: `Backbone`, `Tokenizer`, `list_presets`, handles, the options of the commands.
"""

from functional_llm.presets.backbone import Backbone, Tokenizer

__all__ = ["Backbone", "Tokenizer"]
