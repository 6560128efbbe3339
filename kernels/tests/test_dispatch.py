"""The dispatcher: who serves, who declines, who breaks, and what it costs to import."""

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.kernels import backend, dequant_matmul, explain, hadamard, pack_bits, unpack_bits

REFERENCE = """
from tersor.kernels.dispatch import op

@op("(Tensor x) -> Tensor", check=lambda x: None, fake=lambda x: x.new_empty(x.shape))
def {name}(x):
    return x + 1
"""


@pytest.fixture
def make_op(tmp_path, monkeypatch):
    """Makes an op in a package of its own, from the source of its CPU body."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, cpu: str | None):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text(REFERENCE.format(name=name))
        if cpu is not None:
            (package / "cpu.py").write_text(cpu)
        return getattr(importlib.import_module(name), name)

    return make


def python(code: str, **env: str | None) -> subprocess.CompletedProcess:
    """Run code in a process of its own; None removes an environment variable."""
    merged = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    return subprocess.run([sys.executable, "-c", code], env=merged, capture_output=True, text=True)


def test_body_of_the_device_serves(make_op):
    toy = make_op("toy_serves", "def toy_serves(x): return x + 2")
    assert toy(torch.zeros(1)) == 2
    with backend("reference"):
        assert toy(torch.zeros(1)) == 1
    assert explain(toy, torch.zeros(1)) == ("toy_serves", "cpu", {"gpu": "serves cuda tensors, got cpu"})


def test_reference_serves_what_a_body_declines(make_op):
    toy = make_op("toy_declines", "def toy_declines(x): return x + 2 if x.numel() == 1 else NotImplemented")
    assert torch.equal(toy(torch.zeros(2)), torch.ones(2))
    assert explain(toy, torch.zeros(2)).body == "reference"
    assert explain(toy, torch.zeros(2)).declined["cpu"] == "does not serve these arguments"
    with backend("cpu"), pytest.raises(NotImplementedError, match="toy_declines: the cpu body is forced, but declines"):
        toy(torch.zeros(2))


def test_fallback_is_logged_once_per_op_and_reason(make_op, caplog):
    source = "from tersor.kernels.dispatch import Declined\ndef toy_logs(x): return Declined(f'{len(x)} elements')"
    toy = make_op("toy_logs", source)
    with caplog.at_level(logging.INFO, "tersor.kernels"):
        for n in (2, 2, 3, 2):
            toy(torch.zeros(n))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"toy_logs: the cpu body declines, the reference serves: {n} elements" for n in (2, 3)]


def test_op_without_other_bodies(make_op):
    toy = make_op("toy_alone", None)
    assert toy(torch.zeros(1)) == 1
    assert explain(toy, torch.zeros(1)).declined["cpu"] == "there is no such body"
    for body in ("cpu", "gpu"):
        with backend(body), pytest.raises(NotImplementedError, match="there is no such body"):
            toy(torch.zeros(1))


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import tersor.kernels.no_such_module", ModuleNotFoundError),
        ("from torch import no_such_name", ImportError),
        ("1 / 0", ZeroDivisionError),
        ("def {name}(x): raise RuntimeError('inside')", RuntimeError),
    ],
)
def test_broken_body_raises(make_op, source, error, request):
    name = f"toy_breaks_{error.__name__.lower()}"
    toy = make_op(name, source.format(name=name))
    for _ in range(2):
        with pytest.raises(error):
            toy(torch.zeros(1))


def test_missing_dependency_is_a_warning_and_a_fallback(make_op, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    toy = make_op("toy_needs_numba", "import numba\ndef toy_needs_numba(x): return x + 2")
    for _ in range(2):
        assert toy(torch.zeros(1)) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "numba is not installed (pip install 'tersor-kernels[cpu]')" in caplog.text


def test_backend_nests_and_is_restored_after_errors(make_op):
    toy = make_op("toy_nests", "def toy_nests(x): return x + 2")
    with backend("reference"):
        with pytest.raises(ZeroDivisionError), backend("cpu"):
            1 / 0  # noqa: B018
        assert toy(torch.zeros(1)) == 1
        with backend("cpu"):
            assert toy(torch.zeros(1)) == 2
    assert toy(torch.zeros(1)) == 2


def test_backend_is_the_threads_own(make_op):
    toy = make_op("toy_threads", "def toy_threads(x): return x + 2")
    seen = []
    with backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(toy(torch.zeros(1)).item()))
        thread.start()
        thread.join()
    assert seen == [2]


def test_unknown_body_is_named():
    with pytest.raises(ValueError, match="must be one of reference, cpu, gpu, got 'cuda'"), backend("cuda"):
        pass


def test_gpu_body_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with backend("gpu"), pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1 is not set"):
        hadamard(torch.ones(4))


def test_other_devices_are_the_references_or_traced():
    x = torch.ones(3, 8, device="meta")
    assert hadamard(x).device.type == "meta"
    assert unpack_bits(pack_bits(x.byte(), 3), 3, 8).shape == (3, 8)


def test_arguments_may_be_named_or_left_out():
    x = torch.ones(2, 4)
    assert torch.equal(hadamard(x=x), hadamard(x, block_size=None))
    with pytest.raises(RuntimeError, match="x"):
        hadamard()
    with pytest.raises(RuntimeError, match="codes"):
        pack_bits([1, 2], 3)


def test_whoever_watches_torch_sees_the_op():
    """A call without gradient, tracing or mode goes straight to its body; all others go through torch."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        hadamard(torch.ones(2, 4))
    assert torch.ops.tersor.hadamard.default in seen
    assert make_fx(lambda x: hadamard(x))(torch.ones(2, 4)).code.count("tersor.hadamard") == 1
    with FakeTensorMode() as mode:
        assert isinstance(hadamard(mode.from_tensor(torch.ones(2, 4))), FakeTensor)
    assert hadamard(torch.ones(2, 4, device="meta")).device.type == "meta"
    assert hadamard(torch.ones(2, 4, requires_grad=True)).requires_grad
    with pytest.raises(RuntimeError, match="x"):
        hadamard([1.0, 2.0])


def test_ops_keep_the_references_names_and_docs():
    for op in (hadamard, pack_bits, unpack_bits, dequant_matmul):
        assert op.__doc__
        assert op.__module__.startswith("tersor.kernels.")


def test_import_is_cheap_and_brings_no_compiler():
    """50 ms where torch takes 1.25 s: shares of its time, since both grow alike on slow and busy machines."""
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "import torch\n"
        "before, middle = set(sys.modules), time.process_time()\n"
        "import tersor.kernels\n"
        "print((time.process_time() - middle) / (middle - start))\n"
        "heavy = {m.split('.')[0] for m in set(sys.modules) - before} & {'numba', 'llvmlite', 'triton', 'numpy', 'scipy'}\n"
        "assert not heavy, heavy\n"
    )
    shares = []
    for _ in range(8):  # other work on the machine may disturb one, but hardly eight
        run = python(code)
        assert run.returncode == 0, run.stderr
        shares.append(float(run.stdout))
        if shares[-1] <= 0.04:
            return
    pytest.fail(f"importing tersor.kernels took {min(shares):.1%} of the time of importing torch")


def test_unknown_body_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("TERSOR_BACKEND", "fast")
    spec = importlib.util.find_spec("tersor.kernels.dispatch")
    with pytest.raises(ValueError, match="must be one of reference, cpu, gpu, got 'fast'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_everything_works_without_numba():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from tersor.kernels import *\n"
        "codes = torch.arange(2 * 24, dtype=torch.uint8).view(2, 24) % 16\n"
        "packed = pack_bits(codes, 4)\n"
        "assert torch.equal(unpack_bits(packed, 4, 24), codes)\n"
        "y = dequant_matmul(torch.eye(24), packed, torch.ones(2, 1), torch.zeros(2, 1), 4, 24)\n"
        "assert torch.equal(y, codes.T.float())\n"
        "print(explain(hadamard, torch.ones(4)).body, explain(dequant_matmul, torch.eye(24), packed, "
        "torch.ones(2, 1), torch.ones(2, 1), 4, 24).body)\n"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "cpu reference\n"
    assert "dequant_matmul: no cpu body, the slower reference serves: numba is not installed" in run.stderr


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_compiled_loops_stay_within_their_arrays(tmp_path):
    """Numba's own checks of every index, in a process where the environment forces the CPU bodies."""
    code = (
        "import torch; from tersor.kernels import *\n"
        "torch.set_num_threads(1)\n"
        "for n, group in ((128, 32), (20, 5), (7, 7)):\n"
        "    for bits in range(1, 9):\n"
        "        codes = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8)\n"
        "        packed = pack_bits(codes, bits)\n"
        "        assert torch.equal(unpack_bits(packed, bits, n), codes)\n"
        "        for rows in (1, 2, 9):\n"
        "            grid = torch.ones(3, n // group)\n"
        "            dequant_matmul(torch.ones(rows, n), packed, grid, grid, bits, group)\n"
        "print(explain(pack_bits, codes, 8).declined)\n"
    )
    run = python(code, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path), NUMBA_OPT="0", TERSOR_BACKEND="cpu")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "{'gpu': 'cpu is forced'}\n"
