"""Checkpoints that other engines load: `export(model, target, format)`."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from tersor.quant.export import awq, compressed_tensors, gguf, gptq
from tersor.quant.export.layers import Unexportable, quantized
from tersor.quant.export.target import beside, check_target

__all__ = ["FORMATS", "Unexportable", "export"]

FORMATS = {"compressed-tensors": compressed_tensors, "gptq": gptq, "awq": awq, "gguf": gguf}


@torch.no_grad()
def export(model: Any, target: str | Path, format: str = "compressed-tensors", *, tokenizer: Any = None) -> None:
    """Write a quantised `model` as other engines load it: the same codes, scales and zero points in their layout.

    Args:
        model: what `quantize` returned, or loaded from its checkpoint.
        target: directory, or for "gguf" file, that does not exist yet. It appears once all is written.
        format: "compressed-tensors" (vLLM, SGLang, transformers), "gptq" (also GPTQModel), "awq" or "gguf" (llama.cpp).
        tokenizer: goes with the model; a tokenizer of transformers, or what `AutoTokenizer.from_pretrained` takes.

    Raises:
        Unexportable: the format has no place for something that the model holds. Nothing was written.
        FileExistsError: there is something at `target`.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}")
    layers = quantized(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantised layer; quantize it first")
    target = Path(target)
    check_target(target)
    FORMATS[format].check(model, layers)
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    with beside(target) as part:
        FORMATS[format].write(model, part, tokenizer)
