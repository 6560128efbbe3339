"""The Hadamard transform: orthonormal, its own inverse, the same from every body."""

import hashlib

import pytest
import torch

from tersor.kernels import backend, hadamard
from tersor.kernels.hadamard.matrix import hadamard_matrix, is_order

# every power of two, then orders of each construction (Paley I: 12, 20, 44; Paley II: 28, 36, 76, of the squares of
# primes: 52, 100; propus: 156, 172), alone and times 2^k
ORDERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 12, 20, 28, 36, 44, 76, 52, 100, 156, 172, 24, 160, 896, 208, 1376]
# what larger orders are made of
BASES = [order for order in range(4, 257, 8) if is_order(order)]
# order:digest of the signs of each of them, as bytes
DIGESTS = """
    4:14edb060 12:6361e31c 20:de9a17dd 28:a24c9c59 36:1a7aed2f 44:f7e1567a 52:40fafe37 60:fd9db4dd 68:c134bcdc
    76:290dc2c5 84:8fa8e2be 100:90fc68f7 108:53c898e0 124:afa026e6 132:21e8401e 140:73f47d03 148:1a8964df
    156:d781e06c 164:604f5de8 172:d322f10c 180:9d2f60f7 196:1a89befa 204:53e0e2c5 212:d3747fe3 220:f0261f6d
    228:22d3e0bd 244:48c1b138 252:bdbda38d
"""
# relative error of one rounding
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def dense(x, order):
    """The blocked transform as one product with a dense matrix, from the reference on the identity."""
    with backend("reference"):
        H = hadamard(torch.eye(order, dtype=torch.float64))
    return (x.double().unflatten(-1, (-1, order)) @ H).flatten(-2)


def sylvester(order):
    i = torch.arange(order)
    parity = torch.tensor([[bin(a & b).count("1") % 2 for b in i.tolist()] for a in i.tolist()])
    return (1.0 - 2.0 * parity).double()


@pytest.mark.parametrize("order", ORDERS)
def test_matrix_is_symmetric_orthogonal_and_plus_minus_one(order):
    with backend("reference"):
        H = hadamard(torch.eye(order, dtype=torch.float64)) * order**0.5
    torch.testing.assert_close(H.abs(), torch.ones_like(H), rtol=0, atol=1e-12)
    assert torch.equal(H, H.T)
    torch.testing.assert_close(H @ H.T, order * torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-9)


def signs(order):
    H = hadamard_matrix(order, torch.float64, torch.device("cpu")) * order**0.5
    return H.round().to(torch.int64)


@pytest.mark.parametrize("order", BASES)
def test_bases_are_symmetric_and_orthogonal_to_the_last_bit(order):
    H = signs(order)
    assert H.abs().eq(1).all()
    assert torch.equal(H, H.T)
    assert torch.equal(H @ H.T, order * torch.eye(order, dtype=torch.int64))


def test_all_bases_up_to_256_but_four_are_built():
    """Propus arrays of these four are known as well (arXiv:2101.05429), but not built."""
    assert [order for order in range(4, 257, 8) if order not in BASES] == [92, 116, 188, 236]


def test_bases_stay_what_they_are():
    """Checkpoints hold a seed and not the matrix: another one of the same order would make noise of their weights."""
    digests = (hashlib.sha256(signs(order).to(torch.int8).numpy().tobytes()).hexdigest() for order in BASES)
    assert [f"{order}:{digest[:8]}" for order, digest in zip(BASES, digests, strict=True)] == DIGESTS.split()


@pytest.mark.parametrize("order", [1, 2, 8, 64])
def test_powers_of_two_are_sylvesters(body, order):
    H = hadamard(torch.eye(order)) * order**0.5
    torch.testing.assert_close(H.double(), sylvester(order), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_one_rounding(body, generator, order, dtype):
    x = torch.randn(3, order, generator=generator).to(dtype)
    y = hadamard(x)
    assert y.dtype == dtype
    with backend("reference"):
        expected = hadamard(x.double())
    # Triton's interpreter cuts bfloat16 off instead of rounding
    bound = ROUNDING[dtype] * (2 if body == "gpu" and dtype == torch.bfloat16 else 1)
    assert (y.double() - expected).norm() <= bound * x.double().norm()


@pytest.mark.parametrize("order", [2048, 4096, 5504, 11008, 2**14])
def test_large_orders(body, generator, order):
    x = torch.randn(2, order, generator=generator)
    with backend("reference"):
        expected = hadamard(x.double())
    torch.testing.assert_close(hadamard(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 96), (96,)], ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 12, 32, 48])
def test_blocks_are_transformed_each_for_itself(body, generator, shape, block_size):
    x = torch.randn(shape, generator=generator)
    y = hadamard(x, block_size)
    assert y.shape == x.shape
    torch.testing.assert_close(y.double(), dense(x, block_size), rtol=0, atol=1e-5)
    torch.testing.assert_close(hadamard(y, block_size), x, rtol=0, atol=1e-5)


def test_strided_inputs(body, generator):
    x = torch.randn(64, 6, generator=generator).T
    assert torch.equal(hadamard(x), hadamard(x.contiguous()))


@pytest.mark.parametrize("order", [4, 12, 64, 512])
def test_nothing_outside_is_read_or_written(body, generator, guarded, order):
    x = torch.randn(5, order, generator=generator)
    assert torch.equal(hadamard(guarded(x)), hadamard(x))


@pytest.mark.parametrize("order", [4, 64, 512])
def test_nan_stays_in_its_block(body, order):
    x = torch.ones(3, 2 * order)
    x[1, order] = float("nan")
    holes = hadamard(x, order).isnan()
    assert holes[1, order:].all()
    assert holes.sum() == order


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)], ids=str)
def test_empty_tensors(body, shape):
    assert hadamard(torch.ones(shape)).shape == shape


def test_result_is_never_the_input(body):
    x = torch.ones(3, 1)
    hadamard(x).zero_()
    assert torch.equal(x, torch.ones(3, 1))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"no Hadamard matrix of order 11776 .* largest block .* block_size = 512"):
        hadamard(torch.ones(2, 11776))
    with pytest.raises(ValueError, match=r"largest block that divides n = 460 is block_size = 20"):
        hadamard(torch.ones(2, 460))
    with pytest.raises(ValueError, match="block_size = 32 does not divide x's last dimension, n = 48"):
        hadamard(torch.ones(48), 32)
    for block_size in (0, -4):
        with pytest.raises(ValueError, match=f"block_size = {block_size} does not divide"):
            hadamard(torch.ones(48), block_size)
    with pytest.raises(ValueError, match="order 6 is"):
        hadamard(torch.ones(48), 6)
    with pytest.raises(TypeError, match="x must be float16, bfloat16, float32 or float64, got torch.int64"):
        hadamard(torch.arange(8))
    with pytest.raises(ValueError, match="x must have at least one dimension"):
        hadamard(torch.tensor(1.0))


def test_widths_of_common_models_are_orders():
    # Llama, Qwen, Gemma, Phi: hidden and intermediate
    widths = [
        576,
        640,
        768,
        896,
        1152,
        1536,
        2048,
        2560,
        3072,
        3200,
        3584,
        4096,
        4864,
        5120,
        5504,
        6912,
        8960,
        11008,
        13824,
        14336,
        18944,
        25600,
        28672,
    ]
    assert [n for n in widths if not is_order(n)] == []


def test_gradient_is_the_transform(body, generator):
    x = torch.randn(2, 24, generator=generator, requires_grad=True)
    upstream = torch.randn(2, 24, generator=generator)
    hadamard(x, 12).backward(upstream)
    assert torch.equal(x.grad, hadamard(upstream, 12))


def test_gradients_of_both_orders(generator):
    x = torch.randn(2, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    for block_size in (None, 12, 8):
        assert torch.autograd.gradcheck(hadamard, (x, block_size))
        assert torch.autograd.gradgradcheck(hadamard, (x, block_size))


def test_modes_of_the_caller_do_not_stick():
    with torch.inference_mode(), torch.device("meta"):
        hadamard(torch.ones(2, 60, device="cpu"))
    x = torch.ones(2, 60, requires_grad=True)
    hadamard(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_registration_is_sound(generator):
    op = torch.ops.tersor.hadamard.default
    torch.library.opcheck(op, (torch.randn(3, 24, generator=generator, requires_grad=True), 12))
    torch.library.opcheck(op, (torch.randn(2, 3, 16, generator=generator).bfloat16(),))


def test_compiles_into_one_graph(generator):
    x = torch.randn(3, 32, generator=generator, requires_grad=True)
    compiled = torch.compile(lambda x: hadamard(x * 2, block_size=16).square(), fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, hadamard(x * 2, 16).square())
    y.sum().backward()
    torch.testing.assert_close(x.grad, 8 * x.detach())  # |2 x|^2 is kept
