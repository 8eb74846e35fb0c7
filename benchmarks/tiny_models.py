"""How far the logits of the tests' tiny models are from Transformers', on whatever device JAX has.

`reference FOLDER` writes the models and their logits, computed by torch on the CPU; without torch
by this library on the CPU, which its tests compare with Transformers. `compare FOLDER` computes
them on the device, in float32 and in bfloat16. Each in a process of its own; in between, the folder
may go to another machine.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
_SHAPE = (2, 24)
_FEW = 2


def write_references(folder: Path, names: list[str]) -> None:
    """Writes checkpoints and logits, each into a folder of its own."""
    from configs import CONFIGS

    ids = np.random.default_rng(0).integers(0, 128, _SHAPE)
    has_torch = find_spec("torch") and find_spec("transformers")
    make, by = (_torch_logits, "Transformers") if has_torch else (_own_logits, "functional_llm")
    for name in names:
        (folder / name).mkdir(parents=True)
        logits = make(CONFIGS[name], folder / name, ids)
        np.savez(folder / name / "reference.npz", ids=ids, logits=logits, by=by)


def _torch_logits(config: dict[str, Any], folder: Path, ids: np.ndarray) -> np.ndarray:
    from reference import reference_logits, save_reference

    return reference_logits(save_reference(config, folder), ids)


def _own_logits(config: dict[str, Any], folder: Path, ids: np.ndarray) -> np.ndarray:
    import functional_llm as flm

    (folder / "config.json").write_text(json.dumps(config))
    backbone = flm.Backbone.from_preset(folder, load_weights=False)
    backbone.save_preset(folder)
    return np.asarray(backbone(ids.astype("int32")))


def compare(folder: Path) -> None:
    """Prints the largest difference of all models, in each dtype, and whose it is."""
    for dtype in ("float32", "bfloat16"):
        paths = sorted(folder.iterdir())
        # Python traces one model while XLA compiles others.
        with ThreadPoolExecutor() as pool:
            compiling = [pool.submit(_lowered(path, dtype).compile) for path in paths]
        worst, by = {}, set()
        for path, program in zip(paths, compiling, strict=True):
            kept = np.load(path / "reference.npz")
            by.add(str(kept["by"]))
            logits = np.asarray(program.result()(kept["ids"].astype("int32")), "float32")
            worst[path.name] = float(np.abs(logits - kept["logits"]).max())
        name = max(worst, key=lambda name: worst[name])
        print(
            f"tiny models, {dtype}: logits of {len(paths)} differ by at most {worst[name]:.1e} "
            f"({name}) from those of {' and '.join(sorted(by))} in float32 on a CPU"
        )


def _lowered(path: Path, dtype: str) -> Any:
    """Returns a model's forward pass, traced; the weights are constants in it."""
    import functional_llm as flm

    backbone = flm.Backbone.from_preset(path, dtype=dtype)
    import jax  # after the library, which chooses it for Keras

    return jax.jit(lambda ids: backbone(ids)).lower(np.zeros(_SHAPE, "int32"))


def main() -> None:
    from configs import CONFIGS

    step, folder, *few = sys.argv[1:]
    if step == "reference":
        os.environ["JAX_PLATFORMS"] = "cpu"
        write_references(Path(folder), list(CONFIGS)[: _FEW if few else None])
    else:
        compare(Path(folder))


if __name__ == "__main__":
    main()
