"""`finetune`: trains adapters or all weights on a dataset, with Keras's own `fit`."""

import argparse
import math
import os
import sys
from importlib.util import find_spec
from typing import Any

from functional_llm.commands import finetune_options
from functional_llm.commands.command import Command, first_line
from functional_llm.commands.loading import Model
from functional_llm.commands.processes import join
from functional_llm.files.processes import is_first


def run(arguments: argparse.Namespace) -> None:
    """Checks, loads, trains, saves."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # also in a log
    import keras

    from functional_llm import peft, training
    from functional_llm.formats.model_card import add_losses

    training.keep_memory()
    # Before XLA starts; its default order of work on CPUs undoes the saving.
    if arguments.remat != "nothing":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {training.REMAT_XLA_FLAG}"
    join(arguments)
    keras.utils.set_random_seed(arguments.seed)
    given = Model(arguments)
    arguments.preset = str(given.base)
    tokenizer, rows, held_out, settings = prepare(arguments, given, training)
    folder = arguments.output / "training"
    resume = {"resume": arguments.resume, "arguments": finetune_options.facts(arguments)}
    training.check_resume(folder, rows, held_out, settings, **resume)
    model = given.load()
    if not given.adapters:
        model = finetune_options.adapt(model, arguments)
    if arguments.method != "full" and arguments.save == "merged":  # known before training
        peft.merge(model, keep=False).check_preset()
    trainable = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    print(f"{trainable:,} of {model.count_params():,} weights train.")

    def save() -> None:
        how_to_load = save_result(
            model, tokenizer, arguments, finetune_options.facts_for_card(arguments, settings)
        )
        print(f"Saved in {arguments.output}. Try it: functional-llm chat {how_to_load}")

    history = training.train(
        model,
        rows,
        held_out,
        settings,
        folder,
        tensorboard=arguments.tensorboard,
        save=save,
        check_memory=arguments.check_memory,
        **resume,
    )
    last = {"training": history.losses[-1:], "held out": [x for _, x in history.held_out[-1:]]}
    if not is_first():
        return
    add_losses(arguments.output, {name: losses[0] for name, losses in last.items() if losses})
    if find_spec("matplotlib") is not None:
        draw(arguments.output / "loss.png", history, training)


def prepare(arguments: argparse.Namespace, given: Model, training: Any) -> Any:
    """Returns tokenizer, rows, held-out rows and settings: all that needs no model, checked."""
    from functional_llm.files.replacing import check_writable
    from functional_llm.presets.sources import read_numbers

    if arguments.tensorboard:
        training.import_writer()
    if find_spec("matplotlib") is None:
        print("No loss curve will be drawn: that needs matplotlib (pip install matplotlib).")
    check_writable(arguments.output / "training")
    _, config, _ = read_numbers(arguments.preset)
    training.check_length(arguments.length, config.max_sequence_length)
    finetune_options.check_targets(arguments)
    tokenizer = given.load_tokenizer()
    rows, held_out = finetune_options.read_data(arguments, tokenizer)
    size = len(rows) if isinstance(rows, training.Rows) else None
    return tokenizer, rows, held_out, finetune_options.make_settings(arguments, size)


def save_result(model: Any, tokenizer: Any, arguments: argparse.Namespace, facts: Any) -> str:
    """Saves the adapter, or the model with it merged in; returns the options that load it."""
    from functional_llm import peft

    output = arguments.output
    if arguments.save == "adapter":
        peft.save_adapter(model, output, facts=facts)
        return f"--preset {arguments.preset} --adapter {output}"
    merged = model if arguments.method == "full" else peft.merge(model)
    if arguments.save == "keras":
        merged.save(output / "model.keras", tokenizer=tokenizer)
        merged.write_card(output / "model.keras", facts)
        return f"--preset {output / 'model.keras'}"
    merged.save_preset(output, tokenizer, facts=facts)
    return f"--preset {output}"


def draw(path: Any, history: Any, training: Any) -> None:
    """Draws the losses, or says in a line why it cannot."""
    try:
        training.plot_losses(path, history.losses, history.held_out)
    except Exception as error:  # whatever a library for drawing raises: the result is saved
        print(f"No loss curve was drawn: {first_line(error)}")


COMMAND = Command(
    description="Fine-tunes a language model on a dataset: adapters or all weights.",
    add_options=finetune_options.add_options,
    check=finetune_options.check,
    run=run,
    advice="stopped. --resume goes on from the last checkpoint, if there is one.",
)
