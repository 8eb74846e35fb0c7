"""The same weights in the formats of engines that read no Hugging Face layout.

`converted` runs this file in a process of its own: what it needs, the engine's shall not hold.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def converted(weights: Path, form: str, precision: str) -> Path:
    """Returns the file or folder beside `weights`; makes it at first.

    Args:
        weights: From `prepare_weights`.
        form: `"gguf"` or `"ctranslate2"`.
        precision: Of the matrices.
    """
    target = weights.with_name(f"{weights.name}.{precision}.{form}")
    if not target.exists():
        command = [sys.executable, "-m", "benchmarks.conversions", str(weights), str(target)]
        subprocess.run([*command, form, precision], check=True)
    return target


def write_gguf(weights: Path, target: Path, precision: str) -> None:
    """Writes the preset's GGUF file anew: its weights dequantised, the matrices in `precision`."""
    import gguf

    from benchmarks.weights import PRESET
    from functional_llm.presets.sources import locate

    types = gguf.GGMLQuantizationType
    matrix_type = {
        "float32": types.F32,
        "bfloat16": types.BF16,
        "float16": types.F16,
        "int8": types.Q8_0,
    }[precision]
    file_type = {
        types.F32: gguf.LlamaFileType.ALL_F32,
        types.BF16: gguf.LlamaFileType.MOSTLY_BF16,
        types.F16: gguf.LlamaFileType.MOSTLY_F16,
        types.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    }[matrix_type]
    reader = gguf.GGUFReader(locate(PRESET))
    fields = {k: x for k, x in reader.fields.items() if not k.startswith("GGUF.")}
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture").contents())
    for key, field in fields.items():
        value = file_type if key == "general.file_type" else field.contents()
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, field.types[0], inner)
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = matrix_type if array.ndim > 1 else types.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_ctranslate2(weights: Path, target: Path, precision: str) -> None:
    """Runs CTranslate2's converter. Its models name their tokens: here each name is the id."""
    from ctranslate2.converters import TransformersConverter

    vocabulary_size = json.loads((weights / "config.json").read_text())["vocab_size"]
    names = {str(token): token for token in range(vocabulary_size)}

    class Converter(TransformersConverter):
        def load_tokenizer(self, tokenizer_class: Any, name: str, **kwargs: Any) -> Any:
            return SimpleNamespace(
                get_vocab=lambda: names, bos_token="1", eos_token="2", unk_token="0"
            )

    Converter(str(weights)).convert(str(target), quantization=precision)


def main() -> None:
    weights, target = Path(sys.argv[1]), Path(sys.argv[2])
    form, precision = sys.argv[3:]
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    {"gguf": write_gguf, "ctranslate2": write_ctranslate2}[form](weights, part, precision)
    part.rename(target)


if __name__ == "__main__":
    main()
