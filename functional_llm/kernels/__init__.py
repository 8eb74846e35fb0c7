"""Kernels: attention and experts by one explicit definition each, and in ways that cost less.

May import: no other room.

Offers: `Mask`, which says what each query sees; `attend_explicitly`, the definition;
`choose_attention`, which picks a kernel by what is known of a call, and says why;
`register_attention` for kernels of one's own; `keeps_attended` for rematerialisation;
`choose_experts`, the same for products with the matrices of experts.
"""

from functional_llm.kernels.choice import (
    AttentionFacts,
    AttentionKernel,
    choose_attention,
    register_attention,
)
from functional_llm.kernels.experts import (
    ExpertFacts,
    ExpertKernel,
    choose_experts,
    expert_kernels,
)
from functional_llm.kernels.explicit import Scoring, attend_explicitly
from functional_llm.kernels.kept import keeps_attended
from functional_llm.kernels.mask import Mask

__all__ = [
    "AttentionFacts",
    "AttentionKernel",
    "ExpertFacts",
    "ExpertKernel",
    "Mask",
    "Scoring",
    "attend_explicitly",
    "choose_attention",
    "choose_experts",
    "expert_kernels",
    "keeps_attended",
    "register_attention",
]
