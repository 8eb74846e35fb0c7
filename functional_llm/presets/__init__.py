"""Presets: the only place that knows families, weights and tokenizers together.

May import: every room above.

Offers: `Backbone`, `Tokenizer`, `TextGenerator`; `open_source`, from a handle to what is behind it;
`list_presets`; `from_keras_hub`, `to_keras_hub`.
"""

from functional_llm.presets.backbone import Backbone
from functional_llm.presets.text_generator import TextGenerator
from functional_llm.presets.tokenizer import Tokenizer

__all__ = ["Backbone", "TextGenerator", "Tokenizer"]
