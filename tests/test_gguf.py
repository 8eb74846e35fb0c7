"""The GGUF reader: against the gguf package's writer and reader, and on damaged files."""

import os
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quantize

from functional_llm.formats.gguf_file import GGUFFile, open_gguf
from functional_llm.formats.safetensors_reader import open_safetensors

Kind = GGMLQuantizationType
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
QUANTISED = [
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4),
]
# The package can only dequantise these: random bytes are valid blocks.
RANDOM = [
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS),
    *(Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL, Kind.IQ4_XS, Kind.NVFP4),
]
UNREADABLE = [Kind.Q8_1, Kind.Q8_K, Kind.I8, Kind.I16, Kind.I32, Kind.I64, Kind.Q1_0]


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Any]], **fields: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in fields.items():
        writer.add_key_value(key, value, kind)
    for name, (data, raw_type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_file(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 64)).astype(np.float32)
    return write(
        folder / "small.gguf",
        {
            "a.weight": (weights, None),
            "b.weight": (quantize(weights, Kind.Q4_0), Kind.Q4_0),
            "norm": (weights[0].astype(np.float16), None),
        },
        **{
            "general.alignment": (GGUFValueType.UINT32, 32),
            "llama.rope": (GGUFValueType.FLOAT32, 10000.0),
            "llama.flag": (GGUFValueType.BOOL, True),
            "tokenizer.tokens": (GGUFValueType.ARRAY, ["<s>", "é", ""]),
            "tokenizer.types": (GGUFValueType.ARRAY, [1, 2, 3]),
        },
    )


def read_all(path: Path) -> GGUFFile:
    file = open_gguf(path)
    for name, shape in file.shapes.items():
        assert file.read(name, "float32").shape == shape
    return file


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_quantised_types_equal_the_package(tmp_path: Path, kind: Kind, dtype: str) -> None:
    # More than one block of the reader, and a tail that does not fill it.
    weights = np.random.default_rng(1).normal(size=(3, 171, 256)).astype(np.float32)
    path = write(tmp_path / "m.gguf", {"w": (quantize(weights, kind), kind)})
    (tensor,) = gguf.GGUFReader(path).tensors
    expected = dequantize(tensor.data, kind).reshape(weights.shape).astype(DTYPES[dtype])
    file = open_gguf(path)
    received = file.read("w", dtype)
    assert file.shapes == {"w": weights.shape}
    assert received.dtype == DTYPES[dtype]
    assert np.array_equal(bits(received), bits(expected))


@pytest.mark.parametrize("kind", RANDOM, ids=lambda kind: kind.name)
def test_types_without_quantiser_equal_the_package(tmp_path: Path, kind: Kind) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (700, 256 // block * size), np.uint8)
    path = write(tmp_path / "m.gguf", {"w": (data, kind)})
    with np.errstate(all="ignore"):
        expected = dequantize(data, kind)
    received = open_gguf(path).read("w", "float32")
    assert received.shape == (700, 256)
    np.testing.assert_array_equal(received, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [*DTYPES.values(), np.float64], ids=lambda x: x.__name__)
def test_plain_types(tmp_path: Path, stored: Any, dtype: str) -> None:
    weights = np.random.default_rng(3).normal(size=(2, 3, 5)).astype(stored)
    raw_type = Kind.BF16 if stored is ml_dtypes.bfloat16 else None
    data = weights.view(np.uint8) if raw_type else weights
    received = open_gguf(write(tmp_path / "m.gguf", {"w": (data, raw_type)})).read("w", dtype)
    assert received.dtype == DTYPES[dtype]
    assert np.array_equal(received, weights.astype(DTYPES[dtype]))


def test_metadata_is_plain_python(tmp_path: Path) -> None:
    values = {
        "u8": (GGUFValueType.UINT8, 200), "i8": (GGUFValueType.INT8, -3),
        "u16": (GGUFValueType.UINT16, 60000), "i16": (GGUFValueType.INT16, -300),
        "u32": (GGUFValueType.UINT32, 2**32 - 1), "i32": (GGUFValueType.INT32, -(2**31)),
        "u64": (GGUFValueType.UINT64, 2**64 - 1), "i64": (GGUFValueType.INT64, -(2**63)),
        "f32": (GGUFValueType.FLOAT32, 0.5), "f64": (GGUFValueType.FLOAT64, 0.1),
        "yes": (GGUFValueType.BOOL, True), "text": (GGUFValueType.STRING, "Grüße 🤗"),
        "names": (GGUFValueType.ARRAY, ["a", "", "ж"]), "ints": (GGUFValueType.ARRAY, [1, -2]),
        "floats": (GGUFValueType.ARRAY, [0.5, 2.0]), "flags": (GGUFValueType.ARRAY, [True, False]),
    }  # fmt: skip
    metadata = open_gguf(write(tmp_path / "m.gguf", {}, **values)).metadata
    expected = {
        "general.architecture": "llama",
        **{key: value for key, (_, value) in values.items()},
    }
    assert metadata == expected
    for key, value in expected.items():
        assert type(metadata[key]) is type(value)
        if isinstance(value, list):
            assert [type(x) for x in metadata[key]] == [type(x) for x in value]


def test_version_2_is_read(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    path.write_bytes(data)
    assert len(read_all(path).shapes) == 3


def test_float16_overflow_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"big": (np.array([1.0, 7e4], np.float32), None)})
    assert open_gguf(path).read("big", "bfloat16").dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match=r"'big'.* does not fit float16.*70000.*bfloat16"):
        open_gguf(path).read("big", "float16")


@pytest.mark.parametrize("kind", UNREADABLE, ids=lambda kind: kind.name)
def test_type_that_cannot_be_dequantised(tmp_path: Path, kind: Kind) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    path = write(tmp_path / "m.gguf", {"w": (np.zeros((2, 256 // block * size), np.uint8), kind)})
    file = open_gguf(path)
    assert file.shapes == {"w": (2, 256)}
    with pytest.raises(ValueError, match=rf"'w'\. Received: {kind.name}\."):
        file.read("w", "float32")


def test_unknown_name_and_dtype(tmp_path: Path) -> None:
    file = open_gguf(small_file(tmp_path))
    with pytest.raises(ValueError, match=r"'a\.weight'.*Received: 'nothing'"):
        file.read("nothing", "float32")
    with pytest.raises(ValueError, match=r"Expected dtype to be one of float32.*'int8'"):
        file.read("norm", "int8")


def header(tensors: int = 0, fields: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(
    name: bytes = b"w", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0
) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", kind, offset)
    )


ALIGN = text(b"general.alignment") + struct.pack("<I", 4)
DAMAGED = {
    "empty": (b"", "GGUF"),
    "not gguf": (b"PK\x03\x04" + bytes(64), r"begins with b'GGUF'.*b'PK"),
    "version 1": (header(version=1), "version 1"),
    "version 4": (header(version=4), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "number of tensors"),
    "absurd keys": (header(fields=2**60), rf"keys.*{2**60}"),
    "absurd tensors": (header(tensors=2**60), rf"tensors.*{2**60}"),
    "absurd string": (header(fields=1, rest=struct.pack("<Q", 2**63) + bytes(99)), str(2**63)),
    "absurd array": (
        header(fields=1, rest=text(b"k") + struct.pack("<IIQ", 9, 4, 2**61) + bytes(99)),
        rf"values of 'k'.*{2**61}",
    ),
    "nested array": (
        header(fields=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(99)),
        "numbers or strings in the array 'k'",
    ),
    "value type": (header(fields=1, rest=text(b"k") + struct.pack("<I", 77) + bytes(9)), "type 77"),
    "not UTF-8": (header(fields=1, rest=text(b"\xff\xfe") + bytes(20)), "UTF-8"),
    "key twice": (
        header(fields=2, rest=(text(b"k") + struct.pack("<IB", 7, 1)) * 2 + bytes(20)),
        "'k' twice",
    ),
    "bool of 2": (
        header(fields=1, rest=text(b"k") + struct.pack("<IB", 7, 2) + bytes(20)),
        "0 or 1 for 'k'",
    ),
    "alignment 0": (header(fields=1, rest=ALIGN + struct.pack("<I", 0)), "power of two"),
    "alignment 24": (header(fields=1, rest=ALIGN + struct.pack("<I", 24)), "power of two"),
    "split": (
        header(fields=1, rest=text(b"split.count") + struct.pack("<IH", 2, 3)),
        "one of 3 parts.*gguf-split",
    ),
    "tensor twice": (header(tensors=2, rest=tensor() + tensor(offset=32) + bytes(99)), "twice"),
    "5 dimensions": (header(tensors=1, rest=tensor(dims=(1,) * 5) + bytes(99)), "dimensions"),
    "absurd dimension": (header(tensors=1, rest=tensor(dims=(2**62,)) + bytes(99)), "fit the file"),
    "zero dimension": (header(tensors=1, rest=tensor(dims=(0, 4)) + bytes(99)), "fit the file"),
    "absurd product": (header(tensors=1, rest=tensor(dims=(512,) * 4) + bytes(99)), "hold 'w'"),
    "tensor type": (header(tensors=1, rest=tensor(kind=4) + bytes(99)), "'w'.*type 4"),
    "part of a block": (header(tensors=1, rest=tensor(dims=(8, 4), kind=2) + bytes(99)), "blocks"),
    "past the end": (header(tensors=1, rest=tensor(offset=320) + bytes(99)), "hold 'w'"),
    "absurd offset": (header(tensors=1, rest=tensor(offset=2**63) + bytes(99)), "hold 'w'"),
    "not aligned": (header(tensors=1, rest=tensor(offset=8) + bytes(99)), "multiple of 32"),
    "overlap": (
        header(tensors=2, rest=tensor(dims=(16,)) + tensor(b"v", offset=32) + bytes(199)),
        "'v' at a multiple of 32 from byte 64",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_header(tmp_path: Path, case: str) -> None:
    data, message = DAMAGED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert "Received: " in str(error.value)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    data = small_file(tmp_path).read_bytes()
    last = max(t.offset + t.size for t in open_gguf(tmp_path / "small.gguf").tensors.values())
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:last])  # the padding after the last tensor is not needed
    read_all(path)
    for length in reversed(range(last)):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            open_gguf(path)


def test_random_damage_gives_value_error_or_a_file(tmp_path: Path) -> None:
    data = small_file(tmp_path).read_bytes()
    header_size = min(t.offset for t in open_gguf(tmp_path / "small.gguf").tensors.values())
    rng = random.Random(0)
    path = tmp_path / "damaged.gguf"
    start = time.monotonic()
    refused = 0
    places = [[index] for index in range(header_size)]
    places += [rng.sample(range(header_size), rng.randint(2, 12)) for _ in range(600)]
    for indices in places:
        damaged = bytearray(data)
        for index in indices:
            damaged[index] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            read_all(path)
        except ValueError:
            refused += 1
    assert refused > len(places) // 3
    assert time.monotonic() - start < 60


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    file = open_gguf(path)
    path.write_bytes(path.read_bytes()[: file.tensors["b.weight"].offset + 5])
    with pytest.raises(ValueError, match=r"'b\.weight'.*end of the file"):
        file.read("b.weight", "float32")


def test_reading_holds_one_tensor_in_its_final_type(tmp_path: Path) -> None:
    weights = np.ones((2048, 1024), np.float32)
    path = write(tmp_path / "m.gguf", {"w": (quantize(weights, Kind.Q8_0), Kind.Q8_0)})
    file = open_gguf(path)
    file.read("w", "bfloat16")
    tracemalloc.start()
    try:
        received = file.read("w", "bfloat16")
        assert tracemalloc.get_traced_memory()[1] < received.nbytes + 4_000_000
    finally:
        tracemalloc.stop()


def test_stories260k_has_the_weights_of_its_safetensors(material: Path) -> None:
    folder = material / "stories260K"
    file = open_gguf(folder / "stories260K-f32.gguf")
    reference = open_safetensors(folder)
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for layer in range(5):
        for ours, theirs in {
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        }.items():  # fmt: skip
            pairs[f"blk.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    for ours, theirs in pairs.items():
        expected = reference.read(theirs, "float32")
        assert np.array_equal(file.read(ours, "float32"), expected), ours


@pytest.mark.real
def test_real_file_equals_the_package(smollm2_gguf: Path) -> None:
    file = open_gguf(smollm2_gguf)
    reader = gguf.GGUFReader(smollm2_gguf)
    fields = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == fields
    assert list(file.shapes) == [t.name for t in reader.tensors]
    for t in reader.tensors:
        assert file.shapes[t.name] == tuple(reversed(t.shape.tolist()))
    for t in [*reader.tensors[:9], reader.tensors[-1]]:
        expected = dequantize(t.data, t.tensor_type).reshape(file.shapes[t.name])
        for dtype in DTYPES:
            assert np.array_equal(file.read(t.name, dtype), expected.astype(DTYPES[dtype])), t.name
