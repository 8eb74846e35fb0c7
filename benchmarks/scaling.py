r"""Compiles a training step for more devices than there are, and reads the program.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --presets llama3.1_8b --meshes fsdp=8 data=8,fsdp=8,model=8

Prints what each device of a mesh has: memory of weights and optimizer and what a step needs beside,
operations of its products, and the bytes of each kind of collective. Nothing is allocated: weights
have shapes only. The devices are simulated on this computer, which compiles for CPUs. Two numbers
of layers are compiled, one and two, and what the others add is extrapolated: layers must be alike.

Figures of a device:
- state: weights and optimizer, GB;
- step: what XLA needs beside, GB;
- TFLOP: of its products, those of loops as often as they run; `x ideal`: beside the products of
  one device's step with all rows, divided by the devices;
- collectives: the results of each kind, GB, the sum of a step.

The program computes in float32, because one for CPUs would in bfloat16, too. On GPUs and TPUs in
mixed_bfloat16, the state is the same, activations and gathered weights are half as large.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

MESHES = (
    *("fsdp=8", "fsdp=4,model=2"),
    *("fsdp=64", "fsdp=8,model=8"),
    *("data=8,fsdp=64", "data=8,fsdp=8,model=8"),
)
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FIGURES = ("state", "step", "TFLOP", *KINDS)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--presets", nargs="+", default=["llama3.1_8b", "llama3.1_70b"], help="handles")
    add("--meshes", nargs="+", default=MESHES, help="what --mesh takes (six, of 8, 64 and 512)")
    add("--dtype", default="float32", help="of the numbers (float32)")
    add("--rows", type=int, default=1, help="of each part of a batch (1)")
    add("--tokens", type=int, default=2048, help="of a row (2048)")
    add("--remat", default="layer", help="nothing, products, layer (layer)")
    add("--hlo", type=Path, help="folder for the texts of the programs")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    most = max(size_of(mesh) for mesh in arguments.meshes)
    # The code for CPUs itself is not wanted: without optimising it, compiling takes half the time.
    flags = f"--xla_force_host_platform_device_count={most} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    print(f"{arguments.rows} rows of {arguments.tokens} tokens for each part of a batch,", end=" ")
    print(f"{arguments.dtype}, remat {arguments.remat}, AdamW on all weights")
    head = ("model", "mesh", "state", "step", "TFLOP", "x ideal", *KINDS, "s to compile")
    print("| " + " | ".join(head) + " |\n|---|---|" + "---:|" * (len(head) - 2), flush=True)
    for preset in arguments.presets:
        one = measure_all_layers(preset, "data=1", arguments)["TFLOP"]
        for mesh in arguments.meshes:
            begun = time.perf_counter()
            found = measure_all_layers(preset, mesh, arguments)
            ideal = one * parts_of(mesh) / size_of(mesh)
            cells = [f"{found[name]:.4g}" for name in FIGURES]
            cells.insert(3, f"{found['TFLOP'] / ideal:.3f}")
            seconds = f"{time.perf_counter() - begun:.0f}"
            print("| " + " | ".join([preset, mesh, *cells, seconds]) + " |", flush=True)
    return 0


def sizes_of(mesh: str) -> dict[str, int]:
    """Returns name of an axis -> devices along it."""
    return {name: int(size) for name, size in (part.split("=") for part in mesh.split(","))}


def size_of(mesh: str) -> int:
    """Returns how many devices a mesh has."""
    product = 1
    for size in sizes_of(mesh).values():
        product *= size
    return product


def parts_of(mesh: str) -> int:
    """Returns in how many parts the rows of a batch fall."""
    sizes = sizes_of(mesh)
    return sizes.get("data", 1) * sizes.get("fsdp", 1)


def measure_all_layers(preset: str, mesh: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Returns the figures of a device: those of one layer, and what each other adds."""
    from functional_llm.presets.sources import read_numbers

    total = read_numbers(preset)[1].num_layers
    one, two = (measure(preset, layers, mesh, arguments) for layers in (1, 2))
    return {name: one[name] + (total - 1) * (two[name] - one[name]) for name in FIGURES}


def measure(preset: str, layers: int, mesh: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Compiles a step of a model with so many layers; returns its figures."""
    import keras

    import functional_llm as flm
    from functional_llm.graph.keras_values import uninitialized
    from functional_llm.training.cross_entropy import choose_chunk_size

    sizes = sizes_of(mesh)
    devices = keras.distribution.list_devices()[: size_of(mesh)]
    device_mesh = keras.distribution.DeviceMesh([*sizes.values()], [*sizes], devices)
    backbone = build(preset, layers, arguments.dtype)
    # A key head for each of 8 devices, and 1 layer of 70B beside its embeddings: nothing to refuse.
    layout = flm.sharding.layout(backbone, device_mesh, most_replicated=1.0)
    with layout.scope():
        backbone = build(preset, layers, arguments.dtype)
        rows = arguments.rows * arguments.tokens
        chunk = choose_chunk_size("gpu", backbone.vocabulary_size, rows)
        settings = flm.training.Settings(steps=1000, remat=arguments.remat, chunk_size=chunk)
        model = flm.training.compile_model(backbone, settings)
        with uninitialized():
            model.optimizer.build(model.trainable_variables)
        compiled = compile_step(model, layout, parts_of(mesh) * arguments.rows, arguments.tokens)
    if arguments.hlo:
        arguments.hlo.mkdir(parents=True, exist_ok=True)
        (arguments.hlo / f"{preset}_{mesh}_{layers}.txt").write_text(compiled.as_text())
    return figures(compiled)


def build(preset: str, layers: int, dtype: str) -> Any:
    """Returns a model of the preset's shape with so many layers, whose weights have no values."""
    from dataclasses import fields, replace

    import functional_llm as flm
    from functional_llm.graph.keras_values import uninitialized
    from functional_llm.presets.sources import read_numbers

    family, config, _ = read_numbers(preset)
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    cut = {
        name: value[:layers]
        for name, value in values.items()
        if isinstance(value, tuple) and len(value) == config.num_layers
    }
    with uninitialized():
        return flm.Backbone._build(family, replace(config, num_layers=layers, **cut), dtype)


def compile_step(model: Any, layout: Any, rows: int, tokens: int) -> Any:
    """Returns the compiled step of a training on so many rows."""
    import jax

    from functional_llm.graph.keras_values import sharding_of

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, jax.numpy.dtype(x.dtype), sharding=sharding_of(x))

    state = tuple(
        [shape(x) for x in group]
        for group in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )
    sharding = layout.get_data_layout((rows, tokens)).backend_layout
    ids = jax.ShapeDtypeStruct((rows, tokens), "int32", sharding=sharding)
    results = (None, tuple([x.sharding for x in group] for group in state))
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=results)
    return step.lower(state, (ids, ids)).compile()


def figures(compiled: Any) -> dict[str, float]:
    """Returns the figures of a compiled program."""
    from benchmarks.hlo import Hlo

    memory = compiled.memory_analysis()
    hlo = Hlo(compiled.as_text())
    found: Counter[str] = Counter()
    for kernel, times in hlo.kernels(hlo.entry):
        for x in hlo.inside(kernel):
            if x.opcode == "dot":
                found["TFLOP"] += times * hlo.operations(x) / 1e12
        kind = kernel.opcode.removesuffix("-start")
        if kind in KINDS:
            found[kind] += times * kernel.bytes / 1e9
    return {
        "state": memory.argument_size_in_bytes / 1e9,
        "step": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
        - memory.alias_size_in_bytes / 1e9,
        **{name: found[name] for name in ("TFLOP", *KINDS)},
    }


if __name__ == "__main__":
    sys.exit(main())
