"""The families that there are: a new one is a line here."""

from functional_llm.backbones import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    qwen2,
    qwen3,
    smollm3,
)
from functional_llm.backbones.family import Family

_MODULES = (llama, mistral, qwen2, qwen3, smollm3, gemma, gemma2, gemma3, gpt2)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
