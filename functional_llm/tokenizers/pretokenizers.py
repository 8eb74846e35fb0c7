"""How byte-pair vocabularies of GGUF files cut text into words, by llama.cpp's name for it.

A GGUF file stores no regular expression, only a name (`tokenizer.ggml.pre`). The expressions are
those of the models' own tokenizer.json where these are known, in Oniguruma's syntax. They apply in
turn: each cuts the pieces that the one before it left; matches and what lies between are pieces.

Reference: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """The cut into words, and what else llama.cpp derives from its name.

    Args:
        patterns: regular expressions, applied in turn.
        byte_level: words are written in GPT-2's byte alphabet; otherwise spaces become "▁" and
            characters outside the vocabulary become byte tokens.
        ignore_merges: a word that is in the vocabulary is a token, whatever the merges say.
        add_bos: the model expects a BOS token where the file does not say.
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
_ONE_DIGIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _CONTRACTIONS + "|" + _ONE_DIGIT
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
_YOUTU = (
    _cased_words(_UPPER, _LOWER, _CONTRACTIONS + "?")
    + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + _SPACES
)
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
_SPARK = _ASCII_WORD + _LETTERS_AND_MARKS + r" ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_JAIS2 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    + "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED_CODER = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES
_EXAONE_MOE = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    + r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_MINICPM5 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_LINES = r"[^\n]+|\n+"

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
_AFMOE_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff"
    "\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_ASIAN = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _HAN_AND_KANA
)

_gpt2 = PreTokenizer(patterns=(_GPT2,))
_digits_then_gpt2 = PreTokenizer(patterns=(r"\p{N}", _GPT2))
_llama3 = PreTokenizer(patterns=(_LLAMA3,))
_llama3_bos = PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)
_glm4 = PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True)
_qwen2 = PreTokenizer(patterns=(_QWEN2,))
_gpt4o = PreTokenizer(patterns=(_GPT4O,))
_deepseek3 = PreTokenizer(patterns=(r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK3))
_bloom = PreTokenizer(patterns=(_BLOOM,))
_bailing = PreTokenizer(patterns=(_BAILING,))
_gemma4 = PreTokenizer(patterns=(_LINES,), byte_level=False, add_bos=True)
_tiny_aya = PreTokenizer(patterns=(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # What llama.cpp takes where the file has no name: files from before there were names.
    "default": PreTokenizer(
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    "afmoe": PreTokenizer(
        # Groups of three digits counted from the right.
        patterns=(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _AFMOE_ASIAN, _DEEPSEEK3)
    ),
    "chameleon": PreTokenizer(
        patterns=(
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
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
    "exaone-moe": PreTokenizer(patterns=(_EXAONE_MOE,)),
    "falcon": PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "granite-embed-multi-97m": PreTokenizer(patterns=(_GPT4O,), ignore_merges=True),
    "jais-2": PreTokenizer(patterns=(_JAIS2,)),
    "kimi-k2": PreTokenizer(patterns=(_KIMI_K2,)),
    "laguna": PreTokenizer(patterns=(_LINES, _QWEN2)),
    "minicpm5": PreTokenizer(patterns=(r"\p{N}{1,3}", _MINICPM5), ignore_merges=True),
    "qwen35": PreTokenizer(patterns=(_QWEN35,)),
    "sarvam-moe": PreTokenizer(patterns=(_LINES,), byte_level=False),
    "seed-coder": PreTokenizer(patterns=(_SEED_CODER,)),
    "spark2_5": PreTokenizer(patterns=(r"\p{N}{1,3}", _HAN_AND_KANA, _SPARK, r"\p{N}")),
    "superbpe": PreTokenizer(patterns=(r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "tekken": PreTokenizer(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
    "ufakzeka": PreTokenizer(patterns=(_ONE_DIGIT,)),
    "viking": PreTokenizer(patterns=(_BLOOM, r"\p{N}")),
    "youtu": PreTokenizer(patterns=(_YOUTU_ASIAN, _YOUTU), ignore_merges=True),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _bailing),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), _bloom),
    **dict.fromkeys(("chatglm-bpe", "dbrx", "smaug-bpe"), _llama3),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"), _deepseek3),
    **dict.fromkeys(("gemma4", "granite-embed-multi-311m"), _gemma4),
    **dict.fromkeys(("glm4", "glm5"), _glm4),
    **dict.fromkeys(("gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie"), _gpt4o),
    **dict.fromkeys(("cohere2moe", "tiny_aya"), _tiny_aya),
    **dict.fromkeys(
        "codeshell command-r exaone mellum2 minerva-7b refact smollm starcoder".split(),
        _digits_then_gpt2,
    ),
    **dict.fromkeys(
        (
            "a.x-4.0 exaone4 gigachat gpt-2 granite-docling jais jina-de jina-es jina-v1-en "
            "jina-v2-code jina-v2-de jina-v2-es mellum modern-bert mpt olmo phi-2 roberta-bpe "
            "trillion"
        ).split(),
        _gpt2,
    ),
    **dict.fromkeys(
        "falcon-h1 falcon3 jina-v5-nano lfm2 llama-bpe llama-v3 llama3 midm-2.0 pixtral".split(),
        _llama3_bos,
    ),
    **dict.fromkeys(
        "deepseek-r1-qwen f2llmv2 grok-2 hunyuan kormo megrez qwen2 solar-open stablelm2".split(),
        _qwen2,
    ),
}
