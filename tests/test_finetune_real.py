"""Fine-tuning SmolLM2 beside PEFT: the same start, the same batches, the same optimizer."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import functional_llm as flm
from functional_llm import training

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

NAME, AUTHOR = "Lumi", "the Keras team"
STEPS, BATCH_SIZE, RATE = 20, 4, 2e-3  # after so many, the model answers as taught
COMPARED = 4  # steps of PEFT, which take four times as long


@pytest.fixture(scope="module")
def data(identity_file: Path, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Rows to train on and rows to evaluate on, of the examples that are short."""
    text = identity_file.read_text(encoding="utf-8").replace("{{name}}", NAME)
    path = tmp_path_factory.mktemp("data") / "identity.json"
    path.write_text(text.replace("{{author}}", AUTHOR), encoding="utf-8")
    tokenizer = flm.Tokenizer.from_preset(smollm2_gguf)
    examples = training.make_examples(training.read_records(path), tokenizer, 512).items
    short = [x for x in examples if len(x.token_ids) <= 113]
    assert len(short) > 40
    kept, held = training.split_examples(short, 1 / 6)
    rows, held_out = (training.pack(part, 112, join=False) for part in (kept, held))
    return SimpleNamespace(rows=rows, held_out=held_out, tokenizer=tokenizer)


def _peft_losses(model: Any, batch: Any) -> tuple[Any, Any]:
    """Returns the sum of the losses of a batch, and the number of its labels."""
    x, y, _ = batch
    mask = torch.tensor((x["positions"] >= 0).astype("int64"))
    positions = torch.tensor(np.maximum(x["positions"], 0)).long()
    ids, labels = torch.tensor(x["token_ids"]).long(), torch.tensor(y).long()
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    loss = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=-1, reduction="sum"
    )
    return loss, (labels >= 0).sum()


def _train_with_peft(model: Any, data: Any) -> tuple[list[float], float]:
    """Returns the loss of each step, and the held-out loss after them."""
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    batches = training.Batches(data.rows, BATCH_SIZE, seed=0, stop=COMPARED)
    losses = []
    for step in range(COMPARED):
        total, count = _peft_losses(model, batches[step])
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append((total / count).item())
    batches = training.Batches(data.held_out, BATCH_SIZE)
    with torch.no_grad():
        sums = [_peft_losses(model, batches[i]) for i in range(len(batches))]
    return losses, float(sum(x for x, _ in sums) / sum(n for _, n in sums))


@pytest.mark.nightly  # by day, gradients of a tiny model are PEFT's: test_peft_interchange.py
def test_loss_falls_as_with_peft_and_the_model_answers_as_taught(
    data: Any, smollm2_gguf: Path, tmp_path: Path
) -> None:
    import transformers

    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    config = theirs.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    peft_model = theirs.get_peft_model(reference, config)
    peft_model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    backbone = flm.Backbone.from_preset(smollm2_gguf)
    model = flm.peft.load_adapter(backbone, tmp_path / "start")
    settings = training.Settings(
        steps=STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=RATE,
        schedule="constant",
        checkpoint_every=0,
        evaluate_every=COMPARED,
    )
    history = training.train(model, data.rows, data.held_out, settings, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another where other work runs beside
    try:
        losses, held_out = _train_with_peft(peft_model, data)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(history.losses[:COMPARED], losses, atol=0.05)
    (_, before), (step, compared), *later = history.held_out
    assert step == COMPARED
    assert compared == pytest.approx(held_out, abs=0.01)
    assert compared < before - 0.2
    assert later[-1][1] < before - 0.5
    merged = flm.peft.merge(model, keep=False)
    messages = [{"role": "user", "content": "Who are you?"}]
    ids = data.tokenizer.apply_chat_template(messages, tokenize=True)
    generators = [flm.TextGenerator(x, data.tokenizer) for x in (model, merged, backbone)]
    adapted, folded, original = ("".join(x.stream(ids, max_new_tokens=32)) for x in generators)
    assert adapted == folded
    assert NAME in adapted
    assert NAME not in original
