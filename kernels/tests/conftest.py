"""The GPU bodies run in Triton's interpreter, which must be chosen before triton is imported; fresh memory is NaN."""

import importlib.util
import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from tersor.kernels import backend


def _needs(module: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@pytest.fixture(
    params=["reference", pytest.param("cpu", marks=_needs("numba")), pytest.param("gpu", marks=_needs("triton"))]
)
def body(request):
    """Every body in turn, forced."""
    with backend(request.param):
        yield request.param


@pytest.fixture(params=[256, 512])
def vectors(request, monkeypatch):
    """The bits in a vector of the CPU's bodies, where they have code for both."""
    simd512 = pytest.importorskip("tersor.kernels.simd512", reason="numba is not installed")
    if request.param == 256:
        monkeypatch.setattr(simd512, "_sound", lambda *features: False)
    elif not simd512.available("bf16", "vnni", "vbmi2"):
        pytest.skip("this processor has no AVX-512 with products of bytes and bfloat16, and places for bytes")
    return request.param


@pytest.fixture(autouse=True)
def _holes_show():
    """`torch.empty` is full of NaN, or of the largest integer, so that an element that nobody wrote shows."""
    # the public function imports torch's compiler, which takes seconds
    torch._C._set_deterministic_algorithms(True)
    yield
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture
def guarded():
    """Copies of tensors inside larger ones full of NaN or 0xFF, at an odd offset; they must be intact afterwards."""
    fences = []

    def guard(tensor: torch.Tensor) -> torch.Tensor:
        fence = torch.full(
            (tensor.numel() + 203,), float("nan") if tensor.is_floating_point() else 255, dtype=tensor.dtype
        )
        inside = fence[101 : 101 + tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        fences.append((fence, fence.clone()))
        return inside

    yield guard
    for fence, before in fences:
        assert torch.equal(fence.nan_to_num(), before.nan_to_num())
