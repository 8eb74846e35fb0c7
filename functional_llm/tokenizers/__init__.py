"""Tokenizers: text <-> token ids.

`TextTokenizer` holds what every model needs: special ids, chat template, streaming. The cut of text
into tokens is left to one of two engines: `TokenizersEngine` (a tokenizer.json, or the byte-pair
vocabulary of a GGUF file) and `SentencePieceEngine` (a .model, or the vocabulary with scores of a
GGUF file). An engine encodes, and says which bytes a token stands for; decoding is one for all.
"""

from functional_llm.tokenizers.engines import Engine, SentencePieceEngine, TokenizersEngine
from functional_llm.tokenizers.saving import TOKENIZER_FILES, save_tokenizer
from functional_llm.tokenizers.stream import StreamDecoder
from functional_llm.tokenizers.text import TextTokenizer

__all__ = [
    "TOKENIZER_FILES",
    "Engine",
    "SentencePieceEngine",
    "StreamDecoder",
    "TextTokenizer",
    "TokenizersEngine",
    "save_tokenizer",
]
