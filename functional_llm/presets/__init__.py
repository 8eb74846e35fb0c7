"""Presets: the only place that knows families, weights and tokenizers together.

May import: every room above.

Offers: `Backbone`, `Tokenizer`; `open_source`, from a handle to what is behind it; `list_presets`;
`from_keras_hub`, `to_keras_hub`.
"""

from functional_llm.presets.backbone import Backbone
from functional_llm.presets.tokenizer import Tokenizer

__all__ = ["Backbone", "Tokenizer"]
