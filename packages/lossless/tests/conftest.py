"""Safetensors files made by hand: every dtype, order and padding that the format allows, those that torch lacks too."""

import json
from math import prod

import numpy as np
import pytest

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@pytest.fixture(scope="session")
def dtype_bits() -> dict[str, int]:
    return BITS


@pytest.fixture(scope="session")
def write_safetensors():
    """write(path, [(name, dtype, shape, bytes)], metadata, backwards, spaces): the header may list names backwards."""

    def write(path, tensors, metadata=None, backwards=False, spaces=0):
        header, at = {}, 0
        for name, dtype, shape, data in tensors:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
            at += len(data)
        if backwards:
            header = dict(reversed(header.items()))
        if metadata is not None:
            header["__metadata__"] = metadata
        text = json.dumps(header).encode() + b" " * spaces
        body = b"".join(data for *_, data in tensors)
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        return path

    return write


@pytest.fixture(scope="session")
def random_bytes():
    def make(dtype: str, shape: tuple[int, ...], seed: int = 0) -> bytes:
        nbytes = prod(shape) * BITS[dtype] // 8
        return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8).tobytes()

    return make


@pytest.fixture(scope="session")
def gaussian_bf16():
    """Bits of bfloat16 weights (rows, cols), uint16: Gaussian rows of different scales, as in trained matrices."""

    def make(rows: int, cols: int, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        scale = 0.02 * np.exp(0.3 * rng.standard_normal((rows, 1)))
        weight = (scale * rng.standard_normal((rows, cols))).astype(np.float32)
        return ((weight.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)

    return make


@pytest.fixture
def model_directory(tmp_path, write_safetensors, gaussian_bf16, random_bytes):
    """A small model on disk: two shards, their index, configuration, tokenizer, an empty file and directory."""
    model = tmp_path / "model"
    (model / "original" / "empty").mkdir(parents=True)
    up = ("up", "BF16", (48, 64), gaussian_bf16(48, 64).tobytes())
    down = ("down", "F32", (64, 48), (gaussian_bf16(64, 48).astype(np.uint32) << 16).tobytes())
    norm = ("norm", "F32", (64,), random_bytes("F32", (64,)))
    write_safetensors(model / "model-00001-of-00002.safetensors", [up, norm], {"format": "pt"}, spaces=5)
    write_safetensors(model / "model-00002-of-00002.safetensors", [down], {"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"up": "model-00001-of-00002"}}))
    (model / "config.json").write_text('{"hidden_size": 64}\n' * 40)
    (model / "original" / "tokenizer é.model").write_bytes(random_bytes("U8", (700,)))
    (model / "original" / "nothing").write_bytes(b"")
    return model


@pytest.fixture(scope="session")
def tree():
    """Everything below a directory: relative path to bytes, None for a directory."""

    def read(directory) -> dict[str, bytes | None]:
        paths = sorted(directory.rglob("*"))
        return {p.relative_to(directory).as_posix(): p.read_bytes() if p.is_file() else None for p in paths}

    return read
