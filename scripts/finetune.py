"""Fine-tunes a language model on a dataset: adapters or all weights, with Keras's own `fit`."""

import argparse
import math
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

METHODS = ("lora", "dora", "svf", "ia3", "bitfit", "full")


def main() -> int:
    """Parses, loads, trains, saves."""
    arguments = parse_arguments()
    import functional_llm as flm  # after --help; before Keras, whose backend it chooses

    # isort: split
    import keras

    try:
        run(arguments, flm, keras)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfinetune.py: stopped. --resume goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    """Returns what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="smollm2_135m_instruct", help="preset, folder, .gguf, .keras, hf://...")
    add("--dataset", required=True, help=".jsonl, .json, .csv, .parquet, .txt, or a hub name")
    add("--split", default="train", help="split of a hub dataset")
    add("--held-out", type=float, default=0.1, help="share of the examples to evaluate on")
    add("--output", type=Path, required=True, help="directory for the result")
    add("--save", choices=["adapter", "merged", "keras"], help="merged for full, else adapter")
    add("--resume", action="store_true", help="go on from the checkpoint in the output directory")
    add("--method", choices=METHODS, default="lora", help="what is trained")
    add("--rank", type=int, default=8, help="of LoRA and DoRA")
    add("--alpha", type=float, default=16.0, help="of LoRA and DoRA")
    add("--dropout", type=float, default=0.0, help="of LoRA and DoRA")
    add("--targets", nargs="+", help="layers by name or path: query decoder_*/mlp/*; or all")
    add("--dtype", default="float32", help="float32, bfloat16, mixed_bfloat16 or float16")
    add("--length", type=int, default=512, help="tokens of a row; longer examples are cut")
    add("--no-packing", dest="packing", action="store_false", help="an example a row")
    add("--epochs", type=float, default=3.0, help="passes over the data, where --steps is silent")
    add("--steps", type=int, help="updates of the weights")
    add("--batch-size", type=int, default=4, help="rows of a batch")
    add("--accumulate", type=int, default=1, help="batches that make one step")
    add("--learning-rate", type=float, default=1e-3, help="the highest")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="its course")
    add("--warmup-steps", type=int, default=0, help="steps in which the learning rate rises")
    add("--weight-decay", type=float, default=0.0, help="of AdamW")
    add("--clip-norm", type=float, default=1.0, help="longest gradient; 0 for no limit")
    add("--seed", type=int, default=0, help="of adapters, dropout and the order of the data")
    add("--chunk-size", type=int, default=512, help="tokens whose logits exist at a time")
    add("--remat", action="store_true", help="less memory, more time")
    add("--checkpoint-every", type=int, default=50, help="steps between checkpoints; 0: none")
    add("--evaluate-every", type=int, default=0, help="steps between evaluations; 0: at the end")
    add("--tensorboard", action="store_true", help="write logs for TensorBoard")
    arguments = parser.parse_args()
    arguments.save = arguments.save or ("merged" if arguments.method == "full" else "adapter")
    if arguments.method == "full" and arguments.save == "adapter":
        parser.error("--method full has no adapter: save `merged` or `keras`")
    if arguments.method == "full" and arguments.dtype in ("bfloat16", "float16"):
        parser.error(f"steps are lost in {arguments.dtype} weights: use --dtype mixed_bfloat16")
    return arguments


def run(arguments: argparse.Namespace, flm: Any, keras: Any) -> None:
    """Loads, trains, saves."""
    training = flm.training
    training.keep_memory()
    if arguments.remat:  # before XLA starts; its default order of work on CPUs undoes the saving
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {training.REMAT_XLA_FLAG}"
    keras.utils.set_random_seed(arguments.seed)
    tokenizer = flm.Tokenizer.from_preset(arguments.preset)
    records = training.read_records(arguments.dataset, arguments.split)
    examples = training.make_examples(records, tokenizer, arguments.length)
    if cut := examples.describe(arguments.length):
        print(cut)
    backbone = flm.Backbone.from_preset(arguments.preset, dtype=arguments.dtype)
    training.check_length(arguments.length, backbone.config.max_sequence_length)
    kept, held = training.split_examples(examples.items, arguments.held_out, arguments.seed)
    rows, held_out = (
        training.pack(part, arguments.length, join=arguments.packing) if part else None
        for part in (kept, held)
    )
    settings = make_settings(arguments, len(rows), training.Settings)
    model = adapt(backbone, arguments, flm)
    if arguments.method == "bitfit" and arguments.save == "merged":  # known before training
        flm.peft.merge(model, keep=False).check_preset()
    trainable = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    print(
        f"{len(kept)} examples in {len(rows)} rows of {rows.token_ids.shape[1]} tokens, "
        f"{len(held)} held out; {settings.steps} steps on {trainable:,} of "
        f"{model.count_params():,} weights"
    )
    names = ["preset", "method", "rank", "alpha", "dropout", "targets", "dtype"]
    names += ["dataset", "split", "held_out", "length", "packing"]
    history = training.train(
        model,
        rows,
        held_out,
        settings,
        arguments.output / "training",
        resume=arguments.resume,
        arguments={name: getattr(arguments, name) for name in names},
        tensorboard=arguments.tensorboard,
    )
    training.plot_losses(arguments.output / "loss.png", history.losses, history.held_out)
    save(model, tokenizer, arguments, flm)
    print(f"Saved in {arguments.output}")


def make_settings(arguments: argparse.Namespace, num_rows: int, settings: Any) -> Any:
    """Returns the numbers of the run."""
    rows_a_step = arguments.batch_size * arguments.accumulate
    numbers = {x.name: getattr(arguments, x.name) for x in fields(settings)}
    if numbers["steps"] is None:
        numbers["steps"] = max(1, round(arguments.epochs * num_rows / max(rows_a_step, 1)))
    return settings(**numbers)


def adapt(backbone: Any, arguments: argparse.Namespace, flm: Any) -> Any:
    """Returns the model to train."""
    if arguments.method == "full":
        return backbone
    names = ("rank", "alpha", "dropout") if arguments.method in ("lora", "dora") else ()
    numbers = {name: getattr(arguments, name) for name in names}
    if arguments.targets:
        numbers["targets"] = "all" if arguments.targets == ["all"] else arguments.targets
    return getattr(flm.peft, arguments.method)(backbone, **numbers)


def save(model: Any, tokenizer: Any, arguments: argparse.Namespace, flm: Any) -> None:
    """Saves the adapter, or the model with it merged in."""
    if arguments.save == "adapter":
        return flm.peft.save_adapter(model, arguments.output)
    merged = model if arguments.method == "full" else flm.peft.merge(model)
    if arguments.save == "keras":
        return merged.save(arguments.output / "model.keras", tokenizer=tokenizer)
    return merged.save_preset(arguments.output, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
