"""A stock model as StableHLO."""

from pathlib import Path

import keras

from functional_llm.files.replacing import replaced_file


def export_stablehlo(model: keras.Model, path: Path) -> None:
    """Writes a stock model of token ids as StableHLO, weights inside, for any batch and length.

    `jax.export.deserialize(path.read_bytes()).call(token_ids)` gives the logits.

    Args:
        model: From `Lowering`.
        path: Where to.

    Raises:
        ImportError: If flatbuffers is missing.
    """
    import jax
    from jax import export  # which needs flatbuffers

    trained, others = (
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    program = jax.jit(lambda token_ids: model.stateless_call(trained, others, token_ids)[0])
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("batch, tokens"), "int32")
    exported = export.export(program, platforms=("cpu", "cuda", "tpu"))(shape)
    with replaced_file(path) as part:
        part.write_bytes(exported.serialize())
