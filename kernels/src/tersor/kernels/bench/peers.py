"""Linear layers of other libraries, and of torch itself, with n x n weights that no cache holds.

Each function returns the call to time: a product with `rows` rows of x.
"""

import copy
import importlib
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tersor.kernels.bench.case import Call, copies, num_copies

BF16 = torch.bfloat16
GROUP = ("bitsandbytes", "optimum-quanto", "zipnn", "zstandard")  # the dependency group `peers`


class AbsentPeer(ImportError):
    """A library that ours is compared with cannot take part; the message says which, why, and the way out."""


def peer(distribution: str, module: str) -> Any:
    """The module of a library that ours is compared with, but that nothing depends on.

    Raises:
        AbsentPeer: it is not installed, or does not work with what else is.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        group = ", or in the repository uv sync --all-packages --group peers" if distribution in GROUP else ""
        raise AbsentPeer(f"{distribution} cannot be imported ({error}): pip install {distribution}{group}") from error


def dense(n: int, rows: int, dtype: torch.dtype) -> Call:
    x, weights = torch.randn(rows, n, dtype=dtype), copies(torch.randn(n, n, dtype=dtype))
    return lambda: linear(x, *next(weights))


def aten_int4(n: int, rows: int, group_size: int) -> Call:
    codes = torch.randint(0, 16, (n, n), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    weights = copies(packed, torch.rand(n // group_size, n, 2, dtype=BF16))
    x = torch.randn(rows, n, dtype=BF16)

    def run() -> Tensor:
        packed, scales_and_zeros = next(weights)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_zeros)

    return run


def aten_int8(n: int, rows: int) -> Call:
    x, scale = torch.randn(rows, n, dtype=BF16), torch.rand(n, dtype=BF16)
    weights = copies(torch.randint(-128, 128, (n, n), dtype=torch.int8))
    return lambda: torch.ops.aten._weight_int8pack_mm(x, next(weights)[0], scale)


def aten_int_mm(n: int, rows: int) -> Call:
    """int8 times int8, the integers alone."""
    x = torch.randint(-128, 128, (rows, n), dtype=torch.int8)
    weights = copies(torch.randint(-128, 128, (n, n), dtype=torch.int8))
    return lambda: torch._int_mm(x, next(weights)[0].T)


def bitsandbytes_nf4(n: int, rows: int) -> Call:
    """In groups of 64, its default."""
    bitsandbytes = peer("bitsandbytes", "bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(n, n, bias=False, compute_dtype=BF16, quant_type="nf4")
    return _bitsandbytes(layer, torch.randn(rows, n, dtype=BF16))


def bitsandbytes_int8(n: int, rows: int) -> Call:
    bitsandbytes = peer("bitsandbytes", "bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(n, n, bias=False, has_fp16_weights=False)
    # it computes in float16, and says so at every call if it gets another type
    return _bitsandbytes(layer, torch.randn(rows, n, dtype=torch.float16))


def _bitsandbytes(layer: nn.Module, x: Tensor) -> Call:
    dense = nn.Linear(x.shape[-1], x.shape[-1], bias=False, dtype=x.dtype)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu").eval()  # which quantises
    layers = [copy.deepcopy(layer) for _ in range(num_copies(sum(p.nbytes for p in layer.parameters())))]
    for one in layers:  # the first call puts the weights into the order of the fastest kernel
        one(x)
    turn = itertools.cycle(layers)
    return lambda: next(turn)(x)


def quanto(n: int, rows: int, qtype: str) -> Call:
    """optimum-quanto's weights, `qtype` "qint2", "qint4" or "qint8": groups of 128, or a scale per channel for 8 bits."""
    library = peer("optimum-quanto", "optimum.quanto")
    layer = library.QLinear.from_module(nn.Linear(n, n, bias=False, dtype=BF16), weights=getattr(library, qtype))
    layer.freeze()
    x, weight = torch.randn(rows, n, dtype=BF16), layer.weight.detach()
    try:
        linear(x, weight)
    except RuntimeError as error:  # its first call may compile C++
        raise AbsentPeer(f"optimum-quanto does not compute with {qtype} here: {str(error).splitlines()[0]}") from error
    turn = itertools.cycle([_clone(weight) for _ in range(num_copies(_nbytes(weight)))])
    return lambda: linear(x, next(turn))


def _inner(tensor: Any) -> dict[str, Tensor]:
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def _clone(tensor: Any) -> Tensor:
    """What `clone` does for plain tensors; the library's own decodes its tensors."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.clone()
    inner = {name: _clone(part) for name, part in _inner(tensor).items()}
    return type(tensor).__tensor_unflatten__(inner, tensor.__tensor_flatten__()[1], tensor.size(), tensor.stride())


def _nbytes(tensor: Any) -> int:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    return sum(_nbytes(part) for part in _inner(tensor).values())
