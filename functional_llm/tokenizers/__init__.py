"""Tokenizers: text to token ids and back, chat templates, streaming.

May import: files.

Offers: `TextTokenizer`, which holds what a model needs of its tokenizer; engines that cut text
into tokens, `TokenizersEngine` (a tokenizer.json, or the byte-pair vocabulary of a GGUF file) and
`SentencePieceEngine` (a .model, or the vocabulary with scores of a GGUF file), both as operations
of TensorFlow (`in_graph`) too; one of RWKV's vocabulary; `StreamDecoder`; `save_tokenizer`.
"""

from functional_llm.tokenizers.chat_template import RenderedChat
from functional_llm.tokenizers.directory_reader import TEMPLATE_FOLDER
from functional_llm.tokenizers.directory_writer import (
    TOKENIZER_FILES,
    copy_tokenizer,
    save_tokenizer,
)
from functional_llm.tokenizers.engines import Engine, TokenizersEngine
from functional_llm.tokenizers.plain_data import is_record
from functional_llm.tokenizers.sentencepiece_engine import SentencePieceEngine
from functional_llm.tokenizers.stream import StreamDecoder
from functional_llm.tokenizers.text import TextTokenizer

__all__ = [
    "TEMPLATE_FOLDER",
    "TOKENIZER_FILES",
    "Engine",
    "RenderedChat",
    "SentencePieceEngine",
    "StreamDecoder",
    "TextTokenizer",
    "TokenizersEngine",
    "copy_tokenizer",
    "is_record",
    "save_tokenizer",
]
