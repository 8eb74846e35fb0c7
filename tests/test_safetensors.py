"""The safetensors reader: against the safetensors library, and on damaged files."""

import json
import os
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from functional_llm.formats.safetensors_reader import (
    INDEX_NAME,
    SafetensorsFolder,
    open_safetensors,
)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def weights(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (321, 513),
        "layer.0.q": (8, 2, 4),
        "norm": (7,),
        "scale": (),
        "none": (0, 3),
    }
    return {name: np.asarray(rng.normal(size=s)).astype(dtype) for name, s in shapes.items()}


def save_shards(folder: Path, shards: dict[str, dict[str, np.ndarray]], **moved: str) -> Path:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    placed = {name: file for file, tensors in shards.items() for name in tensors}
    write_index(folder, {"metadata": {"total_size": 1}, "weight_map": placed | moved})
    return folder


def write_index(folder: Path, index: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps(index))


def read_all(path: Path) -> SafetensorsFolder:
    folder = open_safetensors(path)
    for name, shape in folder.shapes.items():
        assert folder.read(name, "float32").shape == shape
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_every_type_to_every_type(tmp_path: Path, stored: str, dtype: str) -> None:
    tensors = weights(DTYPES[stored])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    folder = open_safetensors(tmp_path)
    assert folder.shapes == {name: value.shape for name, value in tensors.items()}
    for name, value in tensors.items():
        received = folder.read(name, dtype)
        assert received.dtype == DTYPES[dtype]
        assert received.shape == value.shape
        assert np.array_equal(received, value.astype(DTYPES[dtype]))


def test_shards(tmp_path: Path) -> None:
    tensors = weights()
    names = list(tensors)
    shards = {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[:2]},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[2:]},
    }
    folder = open_safetensors(save_shards(tmp_path, shards))
    assert set(folder.shapes) == set(tensors)
    for name in names:
        assert np.array_equal(folder.read(name, "float32"), tensors[name])


@pytest.mark.parametrize("as_file", [True, False])
def test_a_single_file_of_another_name(tmp_path: Path, as_file: bool) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file(weights(), path)
    assert "norm" in open_safetensors(path if as_file else tmp_path).shapes


def test_model_safetensors_comes_before_other_files(tmp_path: Path) -> None:
    save_file({"right": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    save_file({"wrong": np.zeros(1, np.float32)}, tmp_path / "consolidated.safetensors")
    assert list(open_safetensors(tmp_path).shapes) == ["right"]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_safetensors(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors file.*save_pretrained"):
        open_safetensors(tmp_path)
    for name in "ab":
        save_file(weights(), tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"'a\.safetensors', 'b\.safetensors'"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("stored", [np.int8, np.int64, np.bool_, "float8_e4m3fn"])
def test_other_types_are_named(tmp_path: Path, stored: Any) -> None:
    stored = ml_dtypes.float8_e4m3fn if isinstance(stored, str) else stored
    tensors = {"odd": np.zeros((2, 2), stored), "fine": np.ones(2, np.float32)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    folder = open_safetensors(tmp_path)
    assert folder.shapes == {"odd": (2, 2), "fine": (2,)}
    assert folder.read("fine", "float32").tolist() == [1, 1]
    with pytest.raises(
        ValueError, match=r"'odd'.*F64, F32, F16, BF16\. Received: (I8|I64|BOOL|F8_E4M3)\."
    ):
        folder.read("odd", "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_float64_is_rounded_as_torch_rounds_it(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    numbers = np.random.default_rng(0).normal(size=4096) * 10.0 ** np.arange(-3, 1).repeat(1024)
    numbers[:2] = 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40  # near the middle of two
    save_file({"w": numbers}, tmp_path / "model.safetensors")
    received = open_safetensors(tmp_path).read("w", dtype).astype("float64")
    expected = torch.tensor(numbers).to(getattr(torch, dtype)).double().numpy()
    np.testing.assert_array_equal(received, expected)


def test_unknown_name_and_dtype(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    folder = open_safetensors(tmp_path)
    with pytest.raises(ValueError, match=r"'embed'.*Received: 'nothing'"):
        folder.read("nothing", "float32")
    with pytest.raises(ValueError, match=r"Expected dtype to be one of float32.*'float64'"):
        folder.read("norm", "float64")


def test_float16_overflow_is_an_error(tmp_path: Path) -> None:
    for dtype in (np.float32, ml_dtypes.bfloat16):
        save_file({"big": np.array([1, -7e4], dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"'big'.* does not fit float16.*bfloat16"):
            open_safetensors(tmp_path).read("big", "float16")


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def content(header: Any, data: int = 8, claimed: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + bytes(data)


DAMAGED = {
    "empty": (b"", "no header"),
    "short": (b"\x10\0\0", "no header"),
    "absurd header": (content({"w": entry()}, claimed=2**63), str(2**63)),
    "long header": (content({"w": entry()}, claimed=500), "500 bytes"),
    "not JSON": (content(b"{'w': 1}"), "JSON object"),
    "not UTF-8": (content(b'{"\xff": 1}'), "UTF-8"),
    "deep": (content(b"[" * 100_000), "JSON object"),
    "a list": (content([1]), "list"),
    "name twice": (content(b'{"w": 1, "w": 2}'), "given twice: 'w'"),
    "no fields": (content({"w": 3}), "dtype, shape and data_offsets for 'w'"),
    "missing field": (content({"w": {"dtype": "F32"}}), "for 'w'"),
    "extra field": (content({"w": entry() | {"x": 1}}), "for 'w'"),
    "unknown dtype": (content({"w": entry(dtype="Q9")}), "'w'.*'Q9'"),
    "dtype list": (content({"w": entry(dtype=["F32"])}), "known type for 'w'"),
    "negative": (content({"w": entry(shape=[-2])}), r"'w'.*\[-2\]"),
    "boolean": (content({"w": entry(shape=[True, 2])}), "'w'.*True"),
    "float": (content({"w": entry(shape=[2.0])}), r"'w'.*2\.0"),
    "absurd dimension": (content({"w": entry(shape=[2**62, 0], offsets=[0, 0])}, 0), "fits"),
    "many dimensions": (content({"w": entry(shape=[1] * 100)}), "fits the file for 'w'"),
    "shape and size": (content({"w": entry(shape=[3])}), r"12 bytes for 'w'.*8 bytes"),
    "reversed": (content({"w": entry(offsets=[8, 0])}), "data_offsets"),
    "three offsets": (content({"w": entry(offsets=[0, 4, 8])}), "data_offsets"),
    "past the end": (content({"w": entry(shape=[4], offsets=[0, 16])}), "data_offsets"),
    "absurd offset": (content({"w": entry(offsets=[2**70, 2**70 + 8])}), "data_offsets"),
    "overlap": (content({"v": entry(), "w": entry(shape=[1], offsets=[4, 8])}), "'w' to begin"),
    "hole": (content({"w": entry(offsets=[8, 16])}, 16), "'w' to begin"),
    "rest": (content({"w": entry()}, 9), "as its header says"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_header(tmp_path: Path, case: str) -> None:
    data, message = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            open_safetensors(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert "Received: " in str(error.value)
    assert len(str(error.value)) < 1000


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((3, 5), np.float32), "b": np.ones(7, np.float16)}, path)
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            open_safetensors(tmp_path)


def test_random_damage_gives_value_error_or_a_file(tmp_path: Path) -> None:
    data = save({"a": np.ones((3, 5), np.float32), "b.c": np.ones(7, np.float16)})
    header_size = 8 + struct.unpack("<Q", data[:8])[0]
    rng = random.Random(0)
    path = tmp_path / "model.safetensors"
    start = time.monotonic()
    refused = 0
    for count in [1] * 1500 + [3] * 500:
        damaged = bytearray(data)
        for _ in range(count):
            choice = rng.choice([*b'0129-.eE[]{}",: \x00\xff', rng.randrange(256)])
            damaged[rng.randrange(header_size)] = choice
        path.write_bytes(damaged)
        try:
            read_all(tmp_path)
        except ValueError:
            refused += 1
        else:
            load_file(path)  # nothing is accepted that the library refuses
    assert refused > 500
    assert time.monotonic() - start < 60


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights(), path)
    folder = open_safetensors(tmp_path)
    os.truncate(path, folder.entries["embed"].offset + 5)
    with pytest.raises(ValueError, match=r"'embed'.*end of the file"):
        folder.read("embed", "float32")


SHARDS = {"a.safetensors": ["x", "y"], "b.safetensors": ["z"]}


def two_shards(folder: Path, **moved: str) -> Path:
    one = np.ones(1, np.float32)
    shards = {file: dict.fromkeys(names, one) for file, names in SHARDS.items()}
    return save_shards(folder, shards, **moved)


def test_missing_shard(tmp_path: Path) -> None:
    (two_shards(tmp_path) / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 shards.*Missing: 'b\.safetensors'"):
        open_safetensors(tmp_path)


def test_an_index_says_which_shards_there_are_and_they_what_is_in_them(tmp_path: Path) -> None:
    """As Transformers reads it: an index may name a buffer that nobody stored."""
    two_shards(tmp_path, inv_freq="b.safetensors")
    assert set(open_safetensors(tmp_path).shapes) == {"x", "y", "z"}
    write_index(tmp_path, {"weight_map": {"x": "b.safetensors", "z": "a.safetensors"}})
    assert set(open_safetensors(tmp_path).shapes) == {"x", "y", "z"}


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    two_shards(tmp_path)
    save_file(dict.fromkeys("xz", np.ones(1, np.float32)), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="in two shards: 'x'"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "JSON object"),
        ({}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"x": 3}}, "name of a file"),
        ({"weight_map": {"x": "../a.safetensors"}}, "name of a file"),
        ({"weight_map": {"x": "/etc/passwd"}}, "name of a file"),
    ],
)
def test_damaged_index(tmp_path: Path, index: Any, message: str) -> None:
    write_index(tmp_path, index)
    with pytest.raises(ValueError, match=message):
        open_safetensors(tmp_path)


def test_truncated_index(tmp_path: Path) -> None:
    text = (two_shards(tmp_path) / INDEX_NAME).read_text()
    (tmp_path / INDEX_NAME).write_text(text[:-9])
    with pytest.raises(ValueError, match=INDEX_NAME):
        open_safetensors(tmp_path)


def test_reading_holds_one_tensor_in_its_final_type(tmp_path: Path) -> None:
    save_file({"w": np.ones((2048, 1024), np.float32)}, tmp_path / "model.safetensors")
    folder = open_safetensors(tmp_path)
    tracemalloc.start()
    try:
        received = folder.read("w", "bfloat16")
        assert tracemalloc.get_traced_memory()[1] < received.nbytes + 2_000_000
    finally:
        tracemalloc.stop()


def test_stories260k_equals_the_library(material: Path) -> None:
    path = material / "stories260K"
    folder = open_safetensors(path)
    expected = load_file(path / "model.safetensors")
    assert folder.shapes == {name: value.shape for name, value in expected.items()}
    for name, value in expected.items():
        assert np.array_equal(folder.read(name, "float32"), value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_rows_are_read(dtype: str, tmp_path: Path) -> None:
    """As they are stored, and converted; the others are neither read nor filled."""
    tensors = weights()
    save_file(tensors, tmp_path / "model.safetensors")
    folder = open_safetensors(tmp_path)
    for name, rows in (("embed", slice(100, 300)), ("layer.0.q", slice(3, 8)), ("none", slice(0))):
        received = folder.read_rows(name, dtype, slice(rows.start or 0, rows.stop))
        assert received.shape == tensors[name].shape
        np.testing.assert_array_equal(received[rows], folder.read(name, dtype)[rows])
    begin = bytes_read()
    folder.read_rows("embed", dtype, slice(5, 7))
    ahead = 2 * 4096  # of a buffered file
    assert bytes_read() - begin < 3 * tensors["embed"][0].nbytes + ahead < tensors["embed"].nbytes


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])
