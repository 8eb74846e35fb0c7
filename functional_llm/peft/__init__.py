"""PEFT: parameter-efficient fine-tuning, graph in and graph out.

May import: files, graph, layers, formats, stock, edits.

Offers: `lora`, `dora`, `svf`, `ia3`, `bitfit`, `attach` for a method of your own; `retrain` and
`train_tokens` for what trains beside one; `merge`, `unmerge`; `save_adapter`, `load_adapter`,
`push_to_hub`.
"""

import functional_llm.peft.stock_export  # noqa: F401  (registers how adapters are lowered)
from functional_llm.peft.adapter import Adapter, activate, adapter_names, attach
from functional_llm.peft.adapter_files import load_adapter, push_to_hub, save_adapter
from functional_llm.peft.bitfit import BitFit, bitfit
from functional_llm.peft.dora import DoRA, dora
from functional_llm.peft.ia3 import IA3, ia3
from functional_llm.peft.linear import Linear
from functional_llm.peft.lora import LoRA, lora
from functional_llm.peft.merging import merge, unmerge
from functional_llm.peft.retrained import Retrained, retrain
from functional_llm.peft.svf import SVF, svf
from functional_llm.peft.tokens import TrainedTokens, train_tokens

__all__ = [
    "IA3",
    "SVF",
    "Adapter",
    "BitFit",
    "DoRA",
    "Linear",
    "LoRA",
    "Retrained",
    "TrainedTokens",
    "activate",
    "adapter_names",
    "attach",
    "bitfit",
    "dora",
    "ia3",
    "load_adapter",
    "lora",
    "merge",
    "push_to_hub",
    "retrain",
    "save_adapter",
    "svf",
    "train_tokens",
    "unmerge",
]
