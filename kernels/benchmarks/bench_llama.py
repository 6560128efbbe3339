"""Linear layers beside llama.cpp's: pytest kernels/benchmarks/bench_llama.py --benchmark-only -m slow

Needs `pip install llama-cpp-python`, which compiles for minutes. A call is a product with each of many matrices, one graph
there, more than 150 MB in all, so that none is found in a cache. Its types have groups of 16 to 256 numbers, ours 128. As
there, each call rounds x to int8; `x as it is` is ours without.
"""

import ctypes
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import partial

import pytest
import torch

from tersor.kernels import dequant_matmul, int8_linear, pack_bits, quantize_per_token, wna8_linear
from tersor.kernels.bench.case import Call, Case, num_copies, ours
from tersor.kernels.bench.peers import peer

pytestmark = pytest.mark.slow

N, GROUP_SIZE = 4096, 128
SOME = 16  # rows that are quantised, which takes its time, and then repeated

# of ggml.h and ggml-cpu.h
FLOAT32, TYPES = 0, {"Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12}


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Plan(ctypes.Structure):
    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    )


SIGNATURES = {
    "ggml_init": (c_void_p, InitParams),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_graph_plan": (Plan, c_void_p, c_int, c_void_p),
    "ggml_graph_compute": (c_int, c_void_p, c_void_p),
}


def llama(name: str, rows: int, count: int) -> Call:
    ggml = peer("llama-cpp-python", "llama_cpp._ggml").libggml
    for function, (result, *arguments) in SIGNATURES.items():
        getattr(ggml, function).restype, getattr(ggml, function).argtypes = result, arguments
    # for matrices of at most 8.5 bits, and for x and the products, which are small
    memory = torch.empty((count + 1) * N * N * 9 // 8, dtype=torch.uint8)
    context = ggml.ggml_init(InitParams(memory.numel(), memory.data_ptr(), False))
    x = ggml.ggml_new_tensor_2d(context, FLOAT32, N, rows)
    ctypes.memset(ggml.ggml_get_data(x), 0, ggml.ggml_nbytes(x))
    matrices = [ggml.ggml_new_tensor_2d(context, TYPES[name], N, N) for _ in range(count)]
    numbers, some = torch.randn(SOME, N), torch.empty(SOME * N * 9 // 8, dtype=torch.uint8)
    nbytes = ggml.ggml_quantize_chunk(TYPES[name], numbers.data_ptr(), some.data_ptr(), 0, SOME, N, None)
    graph = ggml.ggml_new_graph(context)
    for matrix in matrices:
        for i in range(N // SOME):
            ctypes.memmove(ggml.ggml_get_data(matrix) + i * nbytes, some.data_ptr(), nbytes)
        ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(context, matrix, x))
    plan = ggml.ggml_graph_plan(graph, torch.get_num_threads(), None)
    work = torch.empty(max(plan.work_size, 1), dtype=torch.uint8)
    plan.work_data = work.data_ptr()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        assert ggml.ggml_graph_compute(graph, ctypes.byref(plan)) == 0
        return memory, work  # the graph's, as long as it is run

    return run


def packed_weights(bits: int, count: int) -> list[tuple[torch.Tensor, ...]]:
    packed = pack_bits(torch.randint(0, 2**bits, (N, N), dtype=torch.uint8), bits)
    return [(packed.clone(), *torch.rand(2, N, N // GROUP_SIZE)) for _ in range(count)]


def rounded(bits: int, rows: int, count: int) -> Call:
    x, weights = torch.randn(rows, N), packed_weights(bits, count)
    return lambda: [wna8_linear(*quantize_per_token(x), *weight, bits, GROUP_SIZE) for weight in weights]


def exact(bits: int, rows: int, count: int) -> Call:
    x, weights = torch.randn(rows, N), packed_weights(bits, count)
    return lambda: [dequant_matmul(x, *weight, bits, GROUP_SIZE) for weight in weights]


def int8(rows: int, count: int) -> Call:
    weights = [torch.randint(-128, 128, (N, N), dtype=torch.int8) for _ in range(count)]
    x, scale = torch.randn(rows, N), torch.rand(N, 1)
    return lambda: [int8_linear(x, weight, scale) for weight in weights]


def beside(name: str, bits: int, rows: int, bar: float) -> Case:
    nbytes = N * N * bits // 8
    count = num_copies(nbytes)
    contenders = {
        "ours": ours(partial(rounded, bits, rows, count)),
        "x as it is": partial(int8, rows, count) if bits == 8 else partial(exact, bits, rows, count),
        f"llama.cpp {name}": partial(llama, name, rows, count),
    }
    return Case(f"{bits} bits", f"{rows} x {N} x {N}", count * nbytes, contenders, {f"llama.cpp {name}": bar})


CASES = [
    beside("Q2_K", 2, 1, 1.6),
    beside("Q3_K", 3, 1, 1.5),
    beside("Q4_K", 4, 1, 1.3),
    beside("Q4_K", 4, 4, 3.0),
    beside("Q8_0", 8, 1, 1.35),
]


def test_llama(timed, case, contender):
    timed(case, contender)
