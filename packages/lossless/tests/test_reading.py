"""open_packed: single tensors, and only their bytes; the statistics are those of the file."""

import numpy as np
import pytest
import torch

from tersor.lossless import Recipe, open_packed, pack
from tersor.lossless.container import Frames, frames, packed

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts what is read of packed files."""
    counted = [0]

    def counting(file, offset, nbytes, where):
        counted[0] += nbytes
        return original(file, offset, nbytes, where)

    original = frames.read_exactly
    monkeypatch.setattr(frames, "read_exactly", counting)
    monkeypatch.setattr(packed, "read_exactly", counting)
    return counted


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7)], ids=str)
def test_tensors_have_the_dtype_shape_and_bits_of_the_file(tmp_path, write_safetensors, shape):
    noise = np.random.default_rng(0).integers(0, 2, 8 * 35, np.uint8).tobytes()  # 0 and 1: valid bools too
    data = {name: noise[: int(np.prod(shape)) * dtype.itemsize] for name, dtype in TORCH_DTYPES.items()}
    source = write_safetensors(tmp_path / "all", [(name, name, shape, data[name]) for name in data])
    reader = pack(source, tmp_path / "packed")
    assert sorted(reader.keys()) == sorted(data)
    for name, dtype in TORCH_DTYPES.items():
        tensor = reader.get_tensor(name)
        assert (tensor.dtype, tensor.shape) == (dtype, shape)
        assert reader.info(name) == (name, shape, len(data[name]), "all")
        assert bytes(tensor.untyped_storage()) == data[name] == reader.get_bytes(name).tobytes()


def test_a_tensor_costs_its_own_bytes_only(tmp_path, write_safetensors, gaussian_bf16, bytes_read):
    tensors = [(f"layer.{i}", "BF16", (256, 512), gaussian_bf16(256, 512, i).tobytes()) for i in range(8)]
    path = pack(write_safetensors(tmp_path / "m.safetensors", tensors), tmp_path / "packed").path
    bytes_read[0] = 0
    reader = open_packed(path)
    assert bytes_read[0] < 6000  # header, manifest and the header of the packed file, no frame of a tensor
    bytes_read[0] = 0
    assert reader.get_bytes("layer.5").tobytes() == tensors[5][3]
    begin, end = reader._ranges["layer.5"]
    assert bytes_read[0] == end - begin
    assert end - begin < 0.7 * len(tensors[5][3])


def test_damage_elsewhere_does_not_matter(tmp_path, write_safetensors, random_bytes):
    tensors = [(f"{i}", "U8", (5000,), random_bytes("U8", (5000,), i)) for i in range(3)]
    path = pack(write_safetensors(tmp_path / "m.safetensors", tensors), tmp_path / "packed").path
    data = bytearray(path.read_bytes())
    data[open_packed(path)._ranges["1"][0] + 2000] ^= 1
    path.write_bytes(data)
    reader = open_packed(path)
    assert reader.get_bytes("0").tobytes() == tensors[0][3]
    with pytest.raises(ValueError, match=r"packed: tensor '1', block 0: checksum"):
        reader.get_bytes("1")


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_large_tensors_are_read_by_several_threads(tmp_path, write_safetensors, gaussian_bf16, threads):
    weight = gaussian_bf16(100, 300)
    source = write_safetensors(tmp_path / "m.safetensors", [("w", "BF16", weight.shape, weight.tobytes())])
    reader = pack(source, tmp_path / "packed", Recipe(container=Frames(10)))
    tensor = reader.get_tensor("w", threads)
    assert np.array_equal(tensor.view(torch.uint16).numpy(), weight)
    tensor.zero_()  # its own memory: writable
    reader.verify(threads)


def test_unknown_names_are_refused_with_a_hint(tmp_path, model_directory):
    reader = pack(model_directory, tmp_path / "packed")
    with pytest.raises(KeyError, match="no tensor 'downs'; did you mean 'down'"):
        reader.get_tensor("downs")
    with pytest.raises(KeyError, match=r"no file 'conf'; it has .*config\.json"):
        reader.get_file("conf")


def test_dtypes_below_a_byte_are_read_as_bytes(tmp_path, write_safetensors):
    reader = pack(write_safetensors(tmp_path / "m", [("w", "F4", (4,), b"\x12\x34")]), tmp_path / "packed")
    assert reader.get_bytes("w").tolist() == [0x12, 0x34]
    with pytest.raises(NotImplementedError, match=r"w: torch has no tensor of dtype F4; use get_bytes"):
        reader.get_tensor("w")


def test_statistics_add_up_to_the_files(tmp_path, model_directory, tree):
    reader = pack(model_directory, tmp_path / "packed")
    stats = reader.stats
    assert stats.bytes_out == reader.nbytes == (tmp_path / "packed").stat().st_size
    assert stats.bytes_in == sum(len(data) for data in tree(model_directory).values() if data is not None)
    assert sum(share.bytes_out for share in stats.shares.values()) == stats.bytes_out
    assert sum(share.bytes_in for share in stats.shares.values()) == stats.bytes_in
    assert stats.shares["BF16 exponent"].bytes_in == stats.shares["BF16 sign+mantissa"].bytes_in == 48 * 64
    assert stats.shares["BF16 exponent"].bytes_out < 0.45 * 48 * 64
