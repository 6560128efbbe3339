"""Experts of a mixture (MoE), which transformers holds in one parameter for all, as linears."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tersor.quant.blocks import matches


class SeparateExperts(nn.Module):
    """Mixed into a class of experts of transformers: each of them multiplies by linears of its own.

    The lists of linears bear the names of the parameters (experts, out, in) that they were taken from.
    """

    has_gate: bool
    down_proj: nn.ModuleList

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' outputs (tokens, hidden), weighted; both `top_k` are (tokens, experts per token)."""
        output = torch.zeros_like(hidden_states)
        this: Any = self  # the gate and the activation are those of the class that this is mixed into
        for index, (up, down) in enumerate(zip(getattr(self, _first(self)), self.down_proj)):
            tokens, place = (top_k_index == index).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            h = up(hidden_states[tokens])
            y = down(this._apply_gate(h) if self.has_gate else this.act_fn(h))
            output.index_add_(0, tokens, (y * top_k_weights[tokens, place, None]).to(output.dtype))
        return output


def separate_experts(model: nn.Module, keep: Sequence[str] = ()) -> list[nn.Module]:
    """Give every expert of `model` linears of its own, in place; what the model computes stays the same.

    Args:
        keep: experts that stay as they are, as in `quantize`.

    Returns:
        the modules whose experts were separated.
    """
    fused = [module for name, module in model.named_modules() if _is_fused(module) and not matches(name, keep)]
    for module in fused:
        _separate(module)
    return fused


@contextmanager
def separated_experts(model: nn.Module, keep: Sequence[str] = ()) -> Iterator[None]:
    """`separate_experts`, undone where what happens inside raises before any of the experts is replaced."""
    modules = separate_experts(model, keep)
    try:
        yield
    except BaseException:
        for module in modules:
            _fuse(module)
        raise


def has_fused_experts(model: nn.Module) -> bool:
    """Whether `separate_experts` would change anything."""
    return any(_is_fused(module) for module in model.modules())


def _is_fused(module: Any) -> bool:
    """Whether this is a class that transformers calls experts, with parameters as most models lay them out."""
    described = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "_apply_gate"))
    if not described or getattr(module, "has_post_expert_norm", False):
        return False
    parameters = [getattr(module, name, None) for name in (_first(module), "down_proj")]
    return all(isinstance(parameter, nn.Parameter) and parameter.ndim == 3 for parameter in parameters)


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _separate(module: Any) -> None:
    for name in (_first(module), "down_proj"):
        weights, biases = getattr(module, name), getattr(module, f"{name}_bias", None)
        delattr(module, name)
        if biases is not None:
            delattr(module, f"{name}_bias")
        linears = nn.ModuleList()
        for index, weight in enumerate(weights.detach()):
            weight = weight.T if module.is_transposed else weight
            linear = nn.Linear(*reversed(weight.shape), bias=biases is not None, device="meta", dtype=weight.dtype)
            linear.weight = nn.Parameter(weight, weights.requires_grad)
            if biases is not None:
                linear.bias = nn.Parameter(biases.detach()[index], biases.requires_grad)
            linears.append(linear)
        setattr(module, name, linears)
    # else transformers, as it loads a model, would look for the parameters that are gone
    module._is_hf_initialized = True
    kind = type(module)
    module.__class__ = type(kind.__name__, (SeparateExperts, kind), {})


def _fuse(module: Any) -> None:
    """One parameter for all experts again, if they are plain linears."""
    lists = {name: list(getattr(module, name)) for name in (_first(module), "down_proj")}
    if not all(type(linear) is nn.Linear for linears in lists.values() for linear in linears):
        return
    for name, linears in lists.items():
        delattr(module, name)
        weights = [linear.weight.detach().T if module.is_transposed else linear.weight.detach() for linear in linears]
        setattr(module, name, nn.Parameter(torch.stack(weights), linears[0].weight.requires_grad))
        if linears[0].bias is not None:
            biases = torch.stack([linear.bias.detach() for linear in linears])
            setattr(module, f"{name}_bias", nn.Parameter(biases, linears[0].bias.requires_grad))
    module.__class__ = type(module).__bases__[1]
