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
        BLOCK_N=32, BLOCK_T=min(16 * (bits & -bits), 64), ONE_GROUP=one_group, INTERPRET=False, PRECISION="tf32x3")
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
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_variant_compiles(dtype):
    run(
        f"for bits in range(1, 9):\n"
        f"    for one_group in (True, False): multiply({dtype!r}, bits, one_group)\n"
        f"for a, b in ((1, 1), (1, 64), (1, 128), (64, 64)): transform({dtype!r}, a, b)\n"
    )
