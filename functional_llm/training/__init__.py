"""Training: datasets, packing, the loss, and the loop around Keras's own `fit`.

May import: files, graph, xla, kernels, tokenizers, layers, formats.

Offers: `train`, `LossModel`, `make_examples`, `pack`, `balance_experts`, `draw_experts`; for data
that do not fit into memory, `stream_records`, `interleave`, `StreamedRows`.
"""

from functional_llm.training.balancing import balance_experts
from functional_llm.training.callbacks import (
    Checkpoints,
    History,
    Progress,
    TensorBoard,
    import_writer,
)
from functional_llm.training.checkpoints import load_checkpoint, save_checkpoint
from functional_llm.training.drawing import draw_experts
from functional_llm.training.examples import (
    Example,
    Examples,
    check_length,
    make_examples,
    split_examples,
)
from functional_llm.training.loop import Settings, check_resume, compile_model, train
from functional_llm.training.loss import LossModel
from functional_llm.training.memory import StepMemory, keep_memory, predict_memory
from functional_llm.training.mixing import STOPPING_STRATEGIES, hold_out, interleave
from functional_llm.training.optimizer import make_optimizer, make_schedule
from functional_llm.training.packing import Batches, Rows, pack
from functional_llm.training.plan import Plan, plan_run
from functional_llm.training.plotting import plot_losses
from functional_llm.training.record_files import FileRecords
from functional_llm.training.record_sources import EntryRecords, read_records, stream_records
from functional_llm.training.records import Record, RecordStream
from functional_llm.training.rematerialize import REMAT, REMAT_XLA_FLAG, SAVING_FLAG
from functional_llm.training.streaming import StreamedBatches, StreamedRows, StreamState

__all__ = [
    "REMAT",
    "REMAT_XLA_FLAG",
    "SAVING_FLAG",
    "STOPPING_STRATEGIES",
    "Batches",
    "Checkpoints",
    "EntryRecords",
    "Example",
    "Examples",
    "FileRecords",
    "History",
    "LossModel",
    "Plan",
    "Progress",
    "Record",
    "RecordStream",
    "Rows",
    "Settings",
    "StepMemory",
    "StreamState",
    "StreamedBatches",
    "StreamedRows",
    "TensorBoard",
    "balance_experts",
    "check_length",
    "check_resume",
    "compile_model",
    "draw_experts",
    "hold_out",
    "import_writer",
    "interleave",
    "keep_memory",
    "load_checkpoint",
    "make_examples",
    "make_optimizer",
    "make_schedule",
    "pack",
    "plan_run",
    "plot_losses",
    "predict_memory",
    "read_records",
    "save_checkpoint",
    "split_examples",
    "stream_records",
    "train",
]
