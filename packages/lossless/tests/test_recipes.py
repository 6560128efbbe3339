"""Recipes: the catalogue's conventions, and the sizes that they claim, against bounds computed from the weights."""

import inspect
import re

import numpy as np
import pytest
import zstandard

from tersor.lossless import Recipe, pack, recipes
from tersor.lossless.container import Frames

NAMES = recipes.__all__


def entropy(symbols: np.ndarray) -> float:
    """Bits per symbol, order 0."""
    p = np.bincount(symbols.ravel()) / symbols.size
    return float(-(p[p > 0] * np.log2(p[p > 0])).sum())


def exponents(bf16: np.ndarray) -> np.ndarray:
    return (bf16 >> 7) & 0xFF


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_values_with_a_source(name):
    recipe = getattr(recipes, name)()
    assert isinstance(recipe, Recipe)
    assert recipe == getattr(recipes, name)()
    assert hash(recipe) == hash(getattr(recipes, name)())
    first = inspect.getdoc(getattr(recipes, name)).splitlines()[0]
    assert re.fullmatch(r"\S.* \((arXiv:\d{4}\.\d{5}|https://\S+)\): .+\.", first)


def test_pieces_are_checked():
    with pytest.raises(ValueError, match="block_log2 must be 10 to 24, got 9"):
        Frames(9)
    with pytest.raises(TypeError, match="coder must be a piece of tersor.lossless.coder, got 'zstd'"):
        Recipe(coder="zstd")  # pyright: ignore
    with pytest.raises(TypeError, match="container must be a piece"):
        Recipe(container=None)  # pyright: ignore


def test_zipnn_of_gaussian_bf16_is_near_the_entropy_of_its_exponents(tmp_path, write_safetensors, gaussian_bf16):
    weight = gaussian_bf16(1024, 1024)
    source = write_safetensors(tmp_path / "m.safetensors", [("w", "BF16", weight.shape, weight.tobytes())])
    bound = (8 + entropy(exponents(weight))) / 16
    plain = len(zstandard.compress(source.read_bytes(), 3)) / source.stat().st_size
    ratio = pack(source, tmp_path / "packed").stats.ratio
    assert bound < ratio < bound + 0.005  # 0.05 bits per exponent for Huffman's whole bits, and the container
    assert ratio < plain - 0.08
    assert pack(source, tmp_path / "plain", recipes.zstd()).stats.ratio == pytest.approx(plain, abs=0.003)


@pytest.mark.parametrize(("recipe", "above"), [(recipes.neuzip(), 0.004), (recipes.dfloat11(), 0.01)], ids=str)
def test_order_0_codes_of_gaussian_bf16_are_near_the_entropy_of_its_exponents(
    tmp_path, write_safetensors, gaussian_bf16, recipe, above
):
    weight = gaussian_bf16(512, 1024)
    source = write_safetensors(tmp_path / "m", [("w", "BF16", weight.shape, weight.tobytes())])
    packed = pack(source, tmp_path / "packed", recipe)
    bound = (8 + entropy(exponents(weight))) / 16
    assert bound < packed.stats.ratio < bound + above
    mantissa = packed.stats.shares["BF16 sign+mantissa"]
    assert mantissa.bytes_out == mantissa.bytes_in


def test_zipnn_of_a_trained_model_is_near_the_entropy_of_its_exponents(tmp_path, tiny_lm_path, write_safetensors):
    if not list(tiny_lm_path.glob("*.safetensors")):
        pytest.skip("the embedded model is not there")
    import torch
    from safetensors.torch import load_file, save_file

    state = {}
    for path in tiny_lm_path.glob("*.safetensors"):
        state |= {name: tensor.bfloat16().contiguous() for name, tensor in load_file(path).items()}
    save_file(state, tmp_path / "m.safetensors")
    size = (tmp_path / "m.safetensors").stat().st_size
    bits = sum((8 + entropy(exponents(t.view(torch.uint16).numpy()))) * t.numel() for t in state.values())
    bound = bits / sum(16 * t.numel() for t in state.values())
    plain = len(zstandard.compress((tmp_path / "m.safetensors").read_bytes(), 3)) / size
    stats = pack(tmp_path / "m.safetensors", tmp_path / "packed").stats
    container = stats.shares["container"].bytes_out / size  # a small model pays for its headers
    print(f"bf16: bound {bound:.4f}, zipnn {stats.ratio:.4f} (container {container:.4f}), zstd {plain:.4f}")
    assert stats.ratio - container < bound + 0.006
    assert stats.ratio < plain - 0.06


def test_zipnn_of_float16_beats_zstd(tmp_path, write_safetensors, gaussian_bf16):
    weight = (gaussian_bf16(512, 1024).astype(np.uint32) << 16).view(np.float32).astype(np.float16)
    source = write_safetensors(tmp_path / "m", [("w", "F16", weight.shape, weight.tobytes())])
    assert (
        pack(source, tmp_path / "packed").stats.ratio
        < pack(source, tmp_path / "plain", recipes.zstd()).stats.ratio - 0.02
    )


@pytest.mark.parametrize("recipe", [recipes.zipnn(), recipes.dfloat11(), recipes.neuzip()], ids=str)
def test_float32_that_was_bfloat16_costs_no_more_than_half(tmp_path, write_safetensors, gaussian_bf16, recipe):
    bf16 = gaussian_bf16(512, 1024)
    f32 = bf16.astype(np.uint32) << 16
    narrow = write_safetensors(tmp_path / "narrow", [("w", "BF16", bf16.shape, bf16.tobytes())])
    wide = write_safetensors(tmp_path / "wide", [("w", "F32", f32.shape, f32.tobytes())])
    ratio = pack(narrow, tmp_path / "packed-narrow", recipe).stats.ratio
    assert pack(wide, tmp_path / "packed-wide", recipe).stats.ratio < ratio / 2 + 0.002


def test_position_ids_nearly_vanish(tmp_path, write_safetensors):
    ids = np.arange(20_000, dtype=np.int64)
    source = write_safetensors(tmp_path / "ids", [("position_ids", "I64", ids.shape, ids.tobytes())])
    assert pack(source, tmp_path / "packed").stats.ratio < 0.2
