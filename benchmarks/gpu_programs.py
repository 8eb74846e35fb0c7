r"""Counts what a GPU would run, without a GPU: compiles for an H100 and reads the program.

    python -m pip install --target FOLDER --no-deps nvidia-cuda-nvcc-cu12
    python -m pip install --target FOLDER --no-deps jax-cuda12-{plugin,pjrt}==VERSION
    python -m benchmarks.gpu_programs --cuda FOLDER

VERSION is that of the installed JAX; the folder, of half a gigabyte, lies outside the repository.

Prints, for the decode loop (a step of it) and for a LoRA training step, of whole rows and of
packed ones: the kernels that start; results as large as a layer's keys, which are copies of whole
caches; products that XLA computes as a multiplication and a reduction; calls of cuDNN's attention;
the temporary memory. Two numbers of layers are compiled, and what the others add is extrapolated,
so the layers must be alike (`--layers` sets the numbers: 6 12 for a pattern of 6; with the model's
own number as the second one, its counts are exact: the first layers are fused otherwise). What a
real GPU does may differ: here nothing is tuned by measuring.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

TARGET = Path(__file__).with_name("h100.txtpb")
TRAINING, PACKED = "lora_step", "packed_step"
COUNTS = ("kernels", "cache_copies", "larger", "multiplied", "cudnn", "temporary_mb")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_programs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", default="llama3.2_1b", help="any handle; its weights are not read")
    add("--dtype", default="bfloat16", help="of the weights (bfloat16)")
    add("--quantize", choices=["int8"], help="quantise the weights")
    add("--layers", type=int, nargs=2, default=[3, 5], help="that are compiled (3 5)")
    add("--batch", type=int, nargs="+", default=[1, 8, 64], help="rows that are decoded (1 8 64)")
    add("--slots", type=int, default=512, help="of the cache (512)")
    add("--sampler", default="greedy", help="its name (greedy)")
    add("--train", type=int, nargs=2, default=[4, 2048], help="rows and tokens of a step (4 2048)")
    add("--remat", default="nothing", help="of a step: nothing, products, layer (nothing)")
    add("--only", choices=["decode", TRAINING, PACKED], help="one of the programs")
    add("--cuda", type=Path, help="folder with the CUDA packages, if they are not installed")
    add("--hlo", type=Path, help="folder for the texts of the programs")
    return parser.parse_args()


@contextmanager
def for_h100() -> Iterator[None]:
    """Inside, the library and JAX find an H100 with cuDNN where they ask what to compile for."""
    import jax
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from functional_llm.layers import attention

    answers: list[tuple[Any, str, Any]] = [
        (jax, "default_backend", "gpu"),
        (attention, "_capability", (9, 0)),
        (cudnn, "check_cudnn_version", 91000),
        (cudnn, "check_compute_capability", True),
        (cudnn, "is_cuda_compute_capability_equal", False),
    ]
    with ExitStack() as stack:
        for module, name, answer in answers:
            stack.enter_context(mock.patch.object(module, name, lambda *_, x=answer: x))
        yield


def main() -> int:
    arguments = parse_arguments()
    if arguments.cuda:
        sys.path.append(str(arguments.cuda))  # behind all others
    packages = ("jax_plugins.xla_cuda12", "jax_cuda12_plugin", "nvidia.cuda_nvcc")
    missing = [name for name in packages if not _is_there(name)]
    if missing:
        print(f"Cannot compile for GPUs: {', '.join(missing)} not found. See --help.")
        return 1
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    with for_h100():
        print("| program | layers | " + " | ".join(COUNTS) + " |")
        print("|---|---:|" + "---:|" * len(COUNTS), flush=True)
        if arguments.only in (None, "decode"):
            for rows in arguments.batch:
                report(f"decode_{rows}", arguments, lambda n, b=rows: count_decode(n, b, arguments))
        for name in (TRAINING, PACKED):
            if arguments.only in (None, name):
                report(name, arguments, lambda n, name=name: count_training(n, name, arguments))
    return 0


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def report(name: str, arguments: argparse.Namespace, count: Callable[[int], list[float]]) -> None:
    """Prints the counts of two numbers of layers, of one layer, and of the whole model."""
    few, more = arguments.layers
    low, high = count(few), count(more)
    layer = [(b - a) / (more - few) for a, b in zip(low, high, strict=True)]
    total = read_config(arguments.preset)[1].num_layers
    whole = [a + (total - few) * x for a, x in zip(low, layer, strict=True)]
    for label, figures in (("one", layer), (f"all {total}", whole)):
        cells = " | ".join(f"{x:.5g}" for x in figures)
        print(f"| {name} | {label} | {cells} |", flush=True)


def read_config(preset: str) -> tuple[Any, Any]:
    """Returns the family of a handle, and its config."""
    from functional_llm.presets.sources import read_numbers

    return read_numbers(preset)[:2]


def build(layers: int, arguments: argparse.Namespace) -> Any:
    """Returns a model of the preset's shape with so many layers."""
    import functional_llm as flm

    family, config = read_config(arguments.preset)
    cut = {
        field.name: value[:layers]
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
        if isinstance(value, tuple) and len(value) == config.num_layers
    }
    config = dataclasses.replace(config, num_layers=layers, **cut)
    backbone = flm.Backbone._build(family, config, arguments.dtype)
    return flm.quantize(backbone, arguments.quantize) if arguments.quantize else backbone


def count_decode(layers: int, rows: int, arguments: argparse.Namespace) -> list[float]:
    """Returns the counts of one step of the decode loop."""
    import numpy as np

    from functional_llm.generation import samplers
    from functional_llm.generation.programs import CompiledPrograms

    programs = CompiledPrograms(build(layers, arguments))
    call = programs.decode_shapes(
        rows, arguments.slots, samplers.get(arguments.sampler), np.full(8, -1, "int32")
    )
    compiled = compile_for_gpu(call.traceable(), call.arguments, call.donated)
    keys = arguments.slots * rows * _size_of_keys(programs)
    return counts(compiled, keys, arguments, f"decode_{rows}_{layers}")


def _size_of_keys(programs: Any) -> int:
    """Returns how many numbers a layer keeps of a token's keys."""
    import jax

    from functional_llm.layers.cache import make_cache

    cache = jax.eval_shape(lambda: make_cache(programs.backbone, 1, 1))
    return min(x.size for x in jax.tree.leaves(cache) if x.dtype != "int32")


def count_training(layers: int, name: str, arguments: argparse.Namespace) -> list[float]:
    """Returns the counts of one LoRA training step of all linear layers."""
    import jax
    import jax.numpy as jnp

    import functional_llm as flm

    model = flm.peft.lora(build(layers, arguments), rank=16, alpha=32, targets="all", seed=0)
    settings = flm.training.Settings(
        steps=1000,
        learning_rate=1e-4,
        schedule="constant",
        clip_norm=0,
        remat=arguments.remat,
    )
    loss = flm.training.compile_model(model, settings)
    loss.optimizer.build(loss.trainable_variables)
    state = [
        [v.value for v in variables]
        for variables in (
            loss.trainable_variables,
            loss.non_trainable_variables,
            loss.optimizer.variables,
            loss.metrics_variables,
        )
    ]
    ids = jax.ShapeDtypeStruct(tuple(arguments.train), jnp.int32)
    rows = {"token_ids": ids, "segment_ids": ids, "positions": ids} if name == PACKED else ids
    compiled = compile_for_gpu(loss.train_step, (tuple(state), (rows, ids)), 0)
    return counts(compiled, 0, arguments, f"{name}_{layers}")


def compile_for_gpu(
    function: Callable[..., Any], inputs: tuple[Any, ...], donated: int | Sequence[int]
) -> Any:
    """Returns a function compiled for the target."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(
        "h100", "cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs
    )
    traced = jax.jit(function, donate_argnums=donated).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).compile()


def counts(compiled: Any, keys: int, arguments: argparse.Namespace, name: str) -> list[float]:
    """Returns the figures of `COUNTS`."""
    from benchmarks.hlo import Hlo

    text = compiled.as_text()
    if arguments.hlo:
        arguments.hlo.mkdir(parents=True, exist_ok=True)
        (arguments.hlo / f"{name}.txt").write_text(text)
    hlo = Hlo(text)
    body = hlo.loop_body() if keys else hlo.entry
    return [
        sum(times for _, times in hlo.kernels(body)),
        len(hlo.copies(body, keys)) if keys else 0,
        len(hlo.large_results(body, keys)) if keys else 0,
        hlo.multiplied_products(body),
        sum(times for x, times in hlo.kernels(body) if "__cudnn$fmha" in x.text),
        compiled.memory_analysis().temp_size_in_bytes / 1e6,
    ]


if __name__ == "__main__":
    sys.exit(main())
