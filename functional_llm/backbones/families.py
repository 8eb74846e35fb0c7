"""The families that there are: a new one is a line here."""

from functional_llm.backbones import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    phi,
    phi3,
    qwen2,
    qwen3,
    starcoder2,
)
from functional_llm.backbones.family import Family

_MODULES = (
    llama,
    mistral,
    qwen2,
    qwen3,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    starcoder2,
    phi,
    phi3,
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
