"""Options that commands share: the model, its adapters, its precision, numbers.

Importing this file imports nothing of JAX or Keras.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from functional_llm.commands.processes import processes

QUANTIZED = ("int8", "int4")
DTYPES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
DEFAULT_PRESET = "smollm2_135m_instruct"
HANDLES = "preset name, directory in Hugging Face layout, .gguf or .keras file, hf://org/name"


def add_preset(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the model."""
    parser.add_argument(
        "--preset",
        metavar="MODEL",
        help=f"{HANDLES}, or an adapter's directory, with its base (unless --adapter has one: "
        f"{DEFAULT_PRESET}, a 4-bit file, whose weights are dequantised; the full ones are at "
        "hf://HuggingFaceTB/SmolLM2-135M-Instruct)",
    )


def add_adapters(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds the option that names adapters."""
    parser.add_argument(
        "--adapter",
        type=adapter,
        action="append",
        default=[],
        required=required,
        metavar="DIR[=WEIGHT]",
        help="directory that finetune or PEFT has written, or hf://org/name; may be repeated, with "
        "weights: --adapter a=0.7 --adapter b=0.3. The base is the one that it names, unless "
        "--preset gives it",
    )


def add_precision(parser: argparse.ArgumentParser, quantize: bool = True) -> None:
    """Adds the options that say in which numbers the model is loaded."""
    parser.add_argument("--dtype", choices=DTYPES[:3], default="float32", help="(%(default)s)")
    if quantize:
        explanation = "a byte a number, or half of one; int8 is fastest with --dtype bfloat16"
        parser.add_argument("--quantize", choices=QUANTIZED, help=explanation)


def add_mesh(parser: argparse.ArgumentParser, several: bool = True) -> None:
    """Adds the options that spread the model over several devices, and the work over processes.

    Args:
        parser: The command's.
        several: Whether it can be several processes.
    """
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="spread over all devices, as data=4,model=2: data splits the rows of a batch, fsdp "
        "these and the weights, model heads and MLPs, experts the experts (one device)",
    )
    if several:
        parser.add_argument(
            "--processes",
            type=processes,
            metavar="N",
            help="with --mesh, over the devices of all: start N processes on this machine; or "
            "'auto' where Slurm, Kubernetes or a TPU pod has started them; or which this one is, "
            "as 0/4@HOST:PORT of process 0",
        )


def check_model(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Checks the options that name the model, as far as no file is opened for it."""
    if getattr(arguments, "quantize", None) and arguments.dtype in ("float16", "mixed_float16"):
        parser.error("--quantize leaves the range of float16: use --dtype bfloat16")
    if getattr(arguments, "processes", None) is not None and arguments.mesh is None:
        parser.error("--processes: say what lies where: --mesh, as data=4")
    check_adapters(parser, arguments)
    if arguments.preset is None and not arguments.adapter:
        arguments.preset = DEFAULT_PRESET


def check_adapters(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Checks that adapters are there, each once; makes a dict of them."""
    weights: dict[str, float] = {}
    for name, weight in arguments.adapter:
        if "://" not in name and not Path(name, "adapter_config.json").is_file():
            parser.error(f"--adapter: {name} has no adapter_config.json")
        if name in weights:
            parser.error(f"--adapter: {name} is given twice")
        weights[name] = weight
    arguments.adapter = weights


def adapter(text: str) -> tuple[str, float]:
    """Returns the handle and the weight of `DIR=WEIGHT`, the weight 1 if there is none."""
    name, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    return name, _number(float, f"a number as the weight of {name}", lambda x: True)(weight)


def _number(
    kind: Callable[[str], float], expected: str, is_right: Callable[[float], bool]
) -> Callable[[str], Any]:
    """Returns what makes a number of an option's text, or says what was expected."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_right(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, received {text!r}")
        return value

    return parse


positive = _number(int, "a whole number above 0", lambda x: x > 0)
whole = _number(int, "a whole number, 0 or more", lambda x: x >= 0)
above_zero = _number(float, "a number above 0", lambda x: x > 0)
not_negative = _number(float, "a number, 0 or more", lambda x: x >= 0)
share = _number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)


def filled(text: str) -> str:
    """Returns a text of at least one character."""
    if not text:
        raise argparse.ArgumentTypeError("expected at least one character, received none")
    return text
