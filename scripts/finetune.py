"""Fine-tunes a language model on a dataset: adapters or all weights, with Keras's own `fit`."""

import argparse
import math
import os
import sys
from typing import Any

import command_line


def main() -> int:
    """Parses, then trains."""
    arguments = command_line.parse_finetune(__doc__)
    return command_line.run_command(
        "finetune.py",
        lambda: run(arguments),
        advice="stopped. --resume goes on from the last checkpoint.",
    )


def run(arguments: argparse.Namespace) -> None:
    """Loads, trains, saves."""
    import functional_llm as flm  # before Keras, whose backend it chooses

    # isort: split
    import keras

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
    settings = command_line.make_settings(arguments, len(rows))
    model = command_line.adapt(backbone, arguments)
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
    save(model, tokenizer, arguments, flm.peft)
    print(f"Saved in {arguments.output}")


def save(model: Any, tokenizer: Any, arguments: argparse.Namespace, peft: Any) -> None:
    """Saves the adapter, or the model with it merged in."""
    if arguments.save == "adapter":
        return peft.save_adapter(model, arguments.output)
    merged = model if arguments.method == "full" else peft.merge(model)
    if arguments.save == "keras":
        return merged.save(arguments.output / "model.keras", tokenizer=tokenizer)
    return merged.save_preset(arguments.output, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
