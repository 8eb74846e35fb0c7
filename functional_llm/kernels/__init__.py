"""Kernels: attention by one explicit definition, and in other ways where they cost less.

May import: no other room.

Offers: `Mask`, which says what each query sees; `attend_explicitly`, the definition;
`choose_attention`, which picks a kernel by what is known of a call, and says why;
`register_attention` for kernels of one's own; `keeps_attended` for rematerialisation.
"""

from functional_llm.kernels.choice import (
    AttentionFacts,
    AttentionKernel,
    choose_attention,
    register_attention,
)
from functional_llm.kernels.explicit import Scoring, attend_explicitly
from functional_llm.kernels.kept import keeps_attended
from functional_llm.kernels.mask import Mask

__all__ = [
    "AttentionFacts",
    "AttentionKernel",
    "Mask",
    "Scoring",
    "attend_explicitly",
    "choose_attention",
    "keeps_attended",
    "register_attention",
]
