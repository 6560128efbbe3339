"""The Triton kernels through NVIDIA's compiler, without a device: the interpreter takes what the compiler does not."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPILE = """
import importlib, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import tersor.kernels

def compile(package, name, types, **constants):
    kernel = getattr(importlib.import_module(f"tersor.kernels.{package}.gpu"), name)
    types = iter(types.split())
    signature = {n: "constexpr" if n in constants else next(types) for n in kernel.arg_names}
    positions = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, positions), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]

def transform(dtype, a, b):
    rows, columns = max(a, 16), max(b, 16)
    compile("hadamard", "_transform", f"*{dtype} *{dtype} i32 fp32", A=a, B=b, ROWS=rows, COLUMNS=columns, PRECISION="tf32x3")

def multiply(dtype, bits, one_group):
    compile("dequant_matmul", "_multiply", f"*{dtype} *u8 *fp32 *fp32 *{dtype}" + 6 * " i32", BITS=bits, BLOCK_M=16,
        BLOCK_N=32, BLOCK_T=min(16 * (bits & -bits), 64), ONE_GROUP=one_group, INTERPRET=False, PRECISION="tf32x3",
        codebook=None)

def lookup(dtype, bits):
    compile("dequant_matmul", "_multiply", f"*{dtype} *u8 *fp32 *fp32 *{dtype}" + 6 * " i32", BITS=bits, BLOCK_M=16,
        BLOCK_N=32, BLOCK_T=min(16 * (bits & -bits), 64), ONE_GROUP=True, INTERPRET=False, PRECISION="tf32x3",
        zero_point=None)
"""


def run(code: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE + code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_of_each_kernel_compiles():
    run(
        "compile('bits', '_pack', '*u8 *u8 i32 i32 i32', BITS=3, BLOCK=1024)\n"
        "compile('bits', '_unpack', '*u8 *u8 i32 i32 i32', BITS=3, BLOCK=1024)\n"
        "transform('bf16', 16, 16)\n"
        "multiply('bf16', 8, True)\n"
        "multiply('bf16', 4, True)\n"
        "lookup('bf16', 4)\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_variant_compiles(dtype):
    run(
        f"for bits in range(1, 9):\n"
        f"    for one_group in (True, False): multiply({dtype!r}, bits, one_group)\n"
        f"for a, b in ((1, 1), (1, 64), (1, 128), (64, 64)): transform({dtype!r}, a, b)\n"
    )


def test_selection_kernels_compile():
    run(
        "compile('gather_tokens', '_gather', '*i16 *i64 *i16' + 4 * ' i32', BLOCK=1024)\n"
        "compile('merge_tokens', '_merge', '*bf16 *fp32 *i64 *i64 *bf16 *fp32' + 3 * ' i32', BLOCK=1024)\n"
        "compile('bipartite_match', '_match', '*fp32 *fp32 *fp32 *i64' + 4 * ' i32', BLOCK_A=64, BLOCK_B=64,\n"
        "    BLOCK_DIM=32, PRECISION='tf32x3')\n"
        "compile('topk_mask', '_mask', '*fp32 *i64 *u8 i32', BLOCK=4096)\n"
        "for transpose in (False, True):\n"
        "    compile('butterfly', '_transform', '*bf16 *bf16 *fp32 *fp32 i32 i32', HALF=2048, TRANSPOSE=transpose)\n"
    )


def test_a_kernel_with_a_list_of_tensors_compiles():
    run(
        "from tersor.kernels.weighted_sum.gpu import _sum\n"
        "types = ('*fp32', ('*bf16',) * 3, '*bf16', *('i32',) * 3, *('constexpr',) * 3)\n"
        "constants = {(6,): True, (7,): 3, (8,): 1024}\n"
        "source = ASTSource(_sum, dict(zip(_sum.arg_names, types)), constants)\n"
        "assert triton.compile(source, target=GPUTarget('cuda', 90, 32)).asm['cubin']\n"
    )


ATTENTION = """
def attention(dtype, bits, channels):
    shared = dict(CHANNELS=channels, HAS_BIAS=True, INTERPRET=False, PRECISION="tf32x3")
    compile("merge_attention", "_merge", f"*{dtype} *fp32 *{dtype} *fp32 i32 i32 i32", ROWS=8, COLUMNS=channels)
    compile("attend_quantized", "_attend", f"*{dtype}" + 2 * " *u8 *fp16 *fp16" + " *fp32 *fp32 *fp32 fp32" + 12 * " i32",
        KEY_BITS=bits, VALUE_BITS=4, ROWS=16, TOKENS=64, **shared)
    compile("tree_attention", "_attend", 3 * f"*{dtype} " + "*i1 *fp32 *fp32 *fp32 fp32" + 13 * " i32",
        ROWS=16, TOKENS=64, **shared)
    compile("received_attention", "_denominators", f"*{dtype} *{dtype} *fp32 *fp32 fp32" + 4 * " i32",
        BLOCK=64, IS_CAUSAL=True, **shared)
    compile("received_attention", "_sums", f"*{dtype} *{dtype}" + 4 * " *fp32" + " fp32" + 4 * " i32",
        BLOCK=64, IS_CAUSAL=True, HAS_WEIGHT=True, **shared)
"""


def test_attention_kernels_compile():
    run(ATTENTION + "attention('bf16', 4, 64)")


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_of_attention_compiles(bits):
    run(ATTENTION + f"for dtype in ('bf16', 'fp32'): attention(dtype, {bits}, 128)")


def test_int8_and_codebook_kernels_compile():
    run(
        "tiles = dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=64)\n"
        "exact = dict(INTERPRET=False, PRECISION='tf32x3')\n"
        "compile('int8_linear', '_multiply', '*bf16 *i8 *fp32 *fp32 *bf16' + 5 * ' i32', ONE_GROUP=True,\n"
        "    **tiles, **exact)\n"
        "compile('int8_linear', '_multiply', '*fp32 *i8 *fp32 *fp32' + 5 * ' i32', ONE_GROUP=False, zero_point=None,\n"
        "    **tiles, **exact)\n"
        "compile('int8_linear', '_multiply_int8', '*i8 *fp32 *i8 *fp32 *bf16' + 3 * ' i32', **tiles)\n"
        "types = '*i8 *fp32 *u8 *fp32 {} *bf16' + 6 * ' i32'\n"
        "compile('w4a8_linear', '_multiply', types.format('*i8 *i8'), **tiles)\n"
        "compile('w4a8_linear', '_multiply', types.format(''), group_scale=None, zero_point=None, **tiles)\n"
        "for code in ('u8', 'u16'):\n"
        "    types = f'*bf16 *{code} *bf16 *fp32 *bf16' + 7 * ' i32'\n"
        "    compile('vector_codebook_linear', '_multiply', types, **tiles, **exact)\n"
    )


def test_kernels_with_activations_of_8_bits_compile():
    run(
        "compile('quantize_per_token', '_round', '*bf16 *i8 *fp32 i32 fp32 fp32', BLOCK=4096)\n"
        "for bits, block_t, one_group in ((4, 64, True), (3, 32, True), (8, 64, True), (4, 64, False)):\n"
        "    compile('wna8_linear', '_multiply', '*i8 *fp32 *u8 *fp32 *fp32 *bf16' + 7 * ' i32', BITS=bits, BLOCK_M=16,\n"
        "        BLOCK_N=32, BLOCK_T=block_t, ONE_GROUP=one_group, PRECISION='tf32x3')\n"
    )


def test_bit_plane_kernels_compile():
    run(
        "tiles = dict(BLOCK_M=16, BLOCK_N=32, BLOCK_BYTES=32)\n"
        "compile('bitplane_linear', '_multiply', '*u8 *fp32 *u8 *u8 *fp32 *u8 *bf16' + 5 * ' i32', X_BITS=8, BITS=2,\n"
        "    **tiles)\n"
        "compile('bitplane_linear', '_multiply', '*u8 *fp32 *u8 *fp32 *fp32' + 5 * ' i32', X_BITS=8, BITS=8, **tiles,\n"
        "    x_zero_point=None, zero_point=None)\n"
    )


def test_coding_kernels_compile():
    run(
        "for bits in (16, 32):\n"
        "    compile('planes', '_split', f'*i{bits} *u8 *u8 i32', BITS=bits, BLOCK=1024)\n"
        "    compile('planes', '_merge', f'*i{bits} *u8 *u8 i32', BITS=bits, BLOCK=1024)\n"
        "compile('tiered', '_decode', '*u8 *u8 *u8 *i64 *u8 i32 i32 i32', GROUPS=16)\n"
        "for bits in (3, 4):\n"
        "    compile('fixed_planes', '_decode', '*u8 *u8 *i64 *u8 i32 i32', BITS=bits, GROUPS=16)\n"
        "for dtype in ('bf16', 'fp16', 'fp32'):\n"
        "    types = f'*{dtype} *u8 *u8 *u8 *u8 *i64 *{dtype}' + 8 * ' i32'\n"
        "    compile('compressed_linear', '_multiply', types, BLOCK_M=16, BLOCK_N=16, BFLOAT16=dtype == 'bf16', "
        "PRECISION='tf32x3')\n"
    )
