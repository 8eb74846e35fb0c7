"""Pre-tokenizers: how the byte-pair vocabulary of a GGUF file cuts text into words.

A GGUF file stores no regular expression, only llama.cpp's name for it (`tokenizer.ggml.pre`). The
names here are those of models that this library loads or is to load; the name is often that of the
first model which cut text so: files of SmolLM3 say "smaug-bpe", those of Granite 3 "refact". The
expressions are those of the models' own tokenizer.json where these are known, in Oniguruma's
syntax. They apply in turn: each cuts the pieces that the one before it left; its matches, and the
text between them, are the new pieces.

Reference: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """The cut into words, and what else llama.cpp derives from its name.

    Args:
        patterns: Regular expressions, applied in turn.
        byte_level: Whether words are written in GPT-2's byte alphabet. Otherwise spaces become "▁"
            and characters outside the vocabulary become byte tokens.
        ignore_merges: Whether a word that is in the vocabulary is one token, whatever the merges
            say.
        add_bos: Whether the model expects a BOS token if the file does not say.
    """

    patterns: tuple[str, ...]
    byte_level: bool = True
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN35 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + _SPACES
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(upper: str, lower: str, suffix: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}|"


_GPT4O = (
    _cased_words(_UPPER, _LOWER, _CONTRACTIONS + "?")
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + _SPACES
)
_TEKKEN = _cased_words(_UPPER, _LOWER, "") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_KIMI_K2 = (
    r"\p{Han}+|"
    + _cased_words(
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
        _CONTRACTIONS + "?",
    )
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    + _SPACES
)
_ASCII_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"
_LETTERS_AND_MARKS = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
_DEEPSEEK3 = _ASCII_WORD + _LETTERS_AND_MARKS + r" ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_SEED_CODER = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES
_MINICPM5 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES

# The letters with case of the Unicode version that DeepSeek's tokenizer was made with.
_DEEPSEEK_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_gpt2 = PreTokenizer(patterns=(_GPT2,))
_digits_then_gpt2 = PreTokenizer(patterns=(r"\p{N}", _GPT2))
_llama3 = PreTokenizer(patterns=(_LLAMA3,))
_llama3_bos = PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)
_qwen2 = PreTokenizer(patterns=(_QWEN2,))
_gpt4o = PreTokenizer(patterns=(_GPT4O,))
_deepseek3 = PreTokenizer(patterns=(r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK3))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # llama.cpp's choice for a file without a name: files from before there were names.
    "default": PreTokenizer(
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    "bloom": PreTokenizer(patterns=(_BLOOM,)),
    "deepseek-coder": PreTokenizer(
        patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")
    ),
    "deepseek-llm": PreTokenizer(
        patterns=(
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            rf"\s?[{_DEEPSEEK_PUNCTUATION}]+",
            r"\s+$",
            _DEEPSEEK_CJK,
            r"\p{N}+",
        )
    ),
    "falcon": PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "gemma4": PreTokenizer(patterns=(r"[^\n]+|\n+",), byte_level=False, add_bos=True),
    "glm4": PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True),
    "kimi-k2": PreTokenizer(patterns=(_KIMI_K2,)),
    "minicpm5": PreTokenizer(patterns=(r"\p{N}{1,3}", _MINICPM5), ignore_merges=True),
    "qwen35": PreTokenizer(patterns=(_QWEN35,)),
    "seed-coder": PreTokenizer(patterns=(_SEED_CODER,)),
    "tekken": PreTokenizer(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
    "tiny_aya": PreTokenizer(patterns=(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    "viking": PreTokenizer(patterns=(_BLOOM, r"\p{N}")),
    **dict.fromkeys("a.x-4.0 exaone4 gpt-2 mellum mpt olmo phi-2 trillion".split(), _gpt2),
    **dict.fromkeys("command-r minerva-7b refact smollm starcoder".split(), _digits_then_gpt2),
    **dict.fromkeys("chatglm-bpe dbrx smaug-bpe".split(), _llama3),
    **dict.fromkeys(
        "falcon-h1 falcon3 lfm2 llama-bpe llama-v3 llama3 midm-2.0 pixtral".split(), _llama3_bos
    ),
    **dict.fromkeys("deepseek-r1-qwen hunyuan kormo megrez qwen2 stablelm2".split(), _qwen2),
    **dict.fromkeys("gpt-4o llama4".split(), _gpt4o),
    **dict.fromkeys("deepseek-v3 hunyuan-dense".split(), _deepseek3),
}
