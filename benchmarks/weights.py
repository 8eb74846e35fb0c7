"""SmolLM2's weights as a directory in Hugging Face layout that every engine reads.

`python -m benchmarks.weights` writes it, in a process of its own: it needs torch.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from functional_llm.formats.download import cache_directory
from functional_llm.presets.sources import locate

PRESET = "smollm2_135m_instruct"


def prepare_weights() -> Path:
    """Returns the directory; makes it at first."""
    folder = cache_directory() / "benchmarks" / PRESET
    if not folder.is_dir():
        subprocess.run([sys.executable, "-m", "benchmarks.weights", str(folder)], check=True)
    return folder


def write_weights(folder: Path) -> None:
    """Writes what the GGUF file of the preset holds, dequantised to float32 by Transformers."""
    import torch
    import transformers

    gguf = locate(PRESET)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):  # a model that came from a GGUF refuses to be saved
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    raw = json.loads((part / "config.json").read_text())
    raw["rope_theta"] = raw["rope_parameters"]["rope_theta"]  # the spelling before Transformers 5
    (part / "config.json").write_text(json.dumps(raw, indent=2))
    part.rename(folder)


if __name__ == "__main__":
    write_weights(Path(sys.argv[1]))
