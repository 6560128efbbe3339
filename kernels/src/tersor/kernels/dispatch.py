"""One op name, up to three bodies: the reference in PyTorch, the CPU's and the GPU's.

`op` makes a PyTorch function the reference of `tersor::<its name>`. Beside it, in the same package, the modules `cpu`
and `gpu` may hold a function of the same name: it serves tensors of that device, and answers `NotImplemented` (or
`Declined("why")`) for what it does not serve; the reference then does. Callers never ask about devices.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")  # a tensor, or a tuple of tensors

BODIES = ("reference", "cpu", "gpu")
_BODY_OF_DEVICE = {"cpu": "cpu", "cuda": "gpu"}
_WAY_OUT = {
    "numba": "pip install 'tersor-kernels[cpu]'",
    "llvmlite": "pip install 'tersor-kernels[cpu]'",
    "triton": "it comes with CUDA builds of torch",
}

# Python types of a schema's types
_KINDS: dict[str, type | tuple[type, ...]] = {
    "Tensor": torch.Tensor,
    "Optional[Tensor]": (torch.Tensor, type(None)),
    "int": int,
    "Optional[int]": (int, type(None)),
    "float": float,
    "bool": bool,
    "Optional[float]": (float, type(None)),
    "ScalarType": torch.dtype,
    "List[Tensor]": list,
}

_log = logging.getLogger("tersor.kernels")
_library = torch.library.Library("tersor", "FRAGMENT")


def _known(body: str) -> str:
    if body not in BODIES:
        raise ValueError(f"the body of an op must be one of {', '.join(BODIES)}, got {body!r}")
    return body


_forced: ContextVar[str | None] = ContextVar(
    "tersor_backend", default=_known(os.environ["TERSOR_BACKEND"]) if os.environ.get("TERSOR_BACKEND") else None
)
_record: ContextVar[dict[str, str] | None] = ContextVar("tersor_record", default=None)


class Declined(str):
    """A body's answer instead of a result: the reason why it does not serve these arguments."""


class Explanation(NamedTuple):
    op: str
    body: str
    declined: dict[str, str]  # body -> why it does not run


def op(
    signature: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    no_gradient: str | None = None,
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Make the decorated PyTorch function the reference of op `tersor::<its name>`.

    Args:
        signature: the op's schema without the name, as in `torch.library.define`; the first argument is a tensor.
        check: called with the arguments before any body and before `fake`; raises if they do not fit together.
        fake: an empty result (or a tuple of them) of the right shape, dtype and device, for `torch.compile`.
        setup_context, backward: the gradient, as in `torch.library.register_autograd`; without them the op has none.
        no_gradient: what to do instead, for an op without one that takes floating-point tensors: it then raises in the
            backward pass and says so.
    """

    def register(reference: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        name = reference.__name__

        def run(*args: Any) -> Any:
            check(*args)
            return _run(reference, args)

        def checked_fake(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        _library.define(name + signature, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tersor::{name}", checked_fake, lib=_library)
        gradient = backward if no_gradient is None else _refusal(name, no_gradient)
        if gradient is not None:
            torch.library.register_autograd(f"tersor::{name}", gradient, setup_context=setup_context, lib=_library)
        overload = getattr(torch.ops.tersor, name).default

        # what torch passes on as it is; what it would refuse goes through torch
        kinds = [_KINDS.get(str(argument.real_type), ()) for argument in overload._schema.arguments]
        required = sum(not argument.has_default_value() for argument in overload._schema.arguments)

        @functools.wraps(reference)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if not torch.compiler.is_compiling() and not kwargs and required <= len(args) and _eager(args, kinds):
                return run(*args)
            return overload(*args, **kwargs)

        return call

    return register


@contextmanager
def backend(body: str) -> Iterator[None]:
    """Force one body ("reference", "cpu", "gpu") for the ops called inside; a body that declines raises.

    The environment variable `TERSOR_BACKEND` does the same for a whole process. With `TRITON_INTERPRET=1` set before
    the first GPU body runs, `backend("gpu")` also serves CPU tensors (slowly; for tests). The choice is the calling
    thread's: other threads, autograd's for CUDA tensors among them, are not affected.

    Raises:
        NotImplementedError: by the op, when the forced body does not serve the arguments.

    >>> import torch
    >>> from tersor.kernels import hadamard
    >>> with backend("reference"):
    ...     hadamard(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    tensor([2., 0., 0., 0.])
    """
    token = _forced.set(_known(body))
    try:
        yield
    finally:
        _forced.reset(token)


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which body serves `op(*args, **kwargs)`, and why the others do not. It calls the op once to find out.

    >>> import torch
    >>> from tersor.kernels import hadamard
    >>> explain(hadamard, torch.ones(4))
    Explanation(op='hadamard', body='cpu', declined={'gpu': 'serves cuda tensors, got cpu'})
    """
    record: dict[str, str] = {}
    token = _record.set(record)
    try:
        with torch.no_grad():
            op(*args, **kwargs)
    finally:
        _record.reset(token)
    return Explanation(op.__name__, record.pop("serves"), record)


def _refusal(name: str, instead: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{name} has no gradient: {instead}")

    return backward


def _eager(args: tuple[Any, ...], kinds: list[type | tuple[type, ...]]) -> bool:
    """Whether torch's dispatcher would only call the body: no gradient, no tracing, no mode, plain tensors.

    Going through it all the same takes three times as long as the rest of a call.
    """
    if (
        len(args) > len(kinds)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    grad = torch.is_grad_enabled()
    for arg, kind in zip(args, kinds):
        if not isinstance(arg, kind):
            return False
        for tensor in arg if kind is list else (arg,):
            if isinstance(tensor, torch.Tensor):
                if (grad and tensor.requires_grad) or tensor.is_meta:
                    return False
                if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                    return False
            elif kind is list:
                return False
    return True


def _run(reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    device = args[0].device.type
    forced = _forced.get()
    record = _record.get()
    if record is not None:
        _record.set(None)  # not for the ops that a body calls
        for body, served in (("cpu", "cpu"), ("gpu", "cuda")):
            record[body] = f"{forced} is forced" if forced else f"serves {served} tensors, got {device}"
    body = forced or _BODY_OF_DEVICE.get(device, "reference")
    if body != "reference":
        out = _attempt(reference, body, device, args)
        if out is NotImplemented:
            out = Declined("does not serve these arguments")
        if not isinstance(out, Declined):
            if record is not None:
                record.pop(body)
                record["serves"] = body
            return out
        if forced:
            raise NotImplementedError(f"{reference.__name__}: the {body} body is forced, but declines: {out}")
        if record is not None:
            record[body] = out
        _log_once(reference.__name__, body, out)
    if record is not None:
        record["serves"] = "reference"
    return reference(*args)


def _attempt(reference: Callable[..., Any], body: str, device: str, args: tuple[Any, ...]) -> Any:
    if _BODY_OF_DEVICE.get(device) != body:  # a forced body only
        if body == "gpu" and device == "cpu":
            if os.environ.get("TRITON_INTERPRET") != "1":
                return Declined("the tensors are on the CPU, and TRITON_INTERPRET=1 is not set")
        else:
            return Declined(f"the tensors are on {device}")
    return _load(reference.__module__, body, reference.__name__)(*args)


@functools.cache
def _load(package: str, body: str, name: str) -> Callable[..., Any]:
    module = f"{package}.{body}"
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        # only an absent body or an absent optional dependency: a broken body must not pass for an absent one
        if missing == module:
            found = None
        elif missing.split(".")[0] in _WAY_OUT:
            dependency = missing.split(".")[0]
            reason = Declined(f"{dependency} is not installed ({_WAY_OUT[dependency]})")
            _log.warning("%s: no %s body, the slower reference serves: %s", name, body, reason)
            return lambda *args: reason
        else:
            raise
    return found or (lambda *args: Declined("there is no such body"))


@functools.cache
def _log_once(name: str, body: str, reason: str) -> None:
    _log.info("%s: the %s body declines, the reference serves: %s", name, body, reason)
