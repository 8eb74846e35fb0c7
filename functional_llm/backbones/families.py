"""The families that there are: a new one is a line here."""

from functional_llm.backbones import (
    cohere,
    cohere2,
    ernie4_5,
    gemma,
    gemma2,
    gemma3,
    glm4,
    gpt2,
    gptj,
    gpt_neox,
    llama,
    mistral,
    nemotron,
    opt,
    phi,
    phi3,
    qwen2,
    qwen3,
    stablelm,
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
    glm4,
    stablelm,
    cohere,
    cohere2,
    nemotron,
    gptj,
    opt,
    ernie4_5,
    gpt_neox,
)
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
