"""PEFT: parameter-efficient fine-tuning, graph in and graph out.

May import: files, graph, formats, stock.

Offers: `lora`, `dora`, `svf`, `ia3`, `bitfit`, `attach` for a method of your own; `merge`,
`unmerge`; `save_adapter`, `load_adapter`.
"""

import functional_llm.peft.stock_export  # noqa: F401  (registers how adapters are lowered)
from functional_llm.peft.adapter import Adapter, activate, adapter_names, attach
from functional_llm.peft.adapter_files import load_adapter, save_adapter
from functional_llm.peft.bitfit import BitFit, bitfit
from functional_llm.peft.dora import DoRA, dora
from functional_llm.peft.ia3 import IA3, ia3
from functional_llm.peft.linear import Linear
from functional_llm.peft.lora import LoRA, lora
from functional_llm.peft.merging import merge, unmerge
from functional_llm.peft.svf import SVF, svf

__all__ = [
    "IA3",
    "SVF",
    "Adapter",
    "BitFit",
    "DoRA",
    "Linear",
    "LoRA",
    "activate",
    "adapter_names",
    "attach",
    "bitfit",
    "dora",
    "ia3",
    "load_adapter",
    "lora",
    "merge",
    "save_adapter",
    "svf",
    "unmerge",
]
