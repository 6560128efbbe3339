"""GGUF files, as llama.cpp and what is built on it load them.

A layer becomes the smallest of the simple kinds that holds its codes as they are, blocks of 32 along `in`:

    Q4_0: symmetric, at most 4 bits          Q8_0: symmetric, or integer zero points and at most 7 bits
    Q4_1: zero points, at most 4 bits        MXFP4: MXFP4Grid

Larger groups repeat their scale. All hold the same weights but one: Q4_1 holds scale * code + minimum, and the minimum,
-scale * zero_point, is rounded to float16: off by at most 2^-11 of itself, less than 1 % of a step if zero points are
integers. What is not quantised keeps its dtype; vectors are float32. Within llama.cpp q and k of Llamas turn
neighbouring channels, not halves of a head: their rows are put in that order.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.kernels.bits import gguf as blocks
from tersor.quant.export.gguf_vocabulary import vocabulary, write_vocabulary
from tersor.quant.export.layers import Unexportable, bare, quantized, refuse_unless
from tersor.quant.grid import IntGrid
from tersor.quant.grid.microscaling import MXFP4Grid
from tersor.quant.linear import QuantizedLinear

_OF = "GGUF"
_ROPE_FACTORS = "rope_freqs.weight"
_OTHER = 'use another grid, or export to "compressed-tensors"'


class Architecture(NamedTuple):
    name: str  # of gguf.MODEL_ARCH
    activation: str  # what llama.cpp computes there, whatever the config says


_ARCHITECTURES = {
    "llama": Architecture("LLAMA", "silu"),
    "mistral": Architecture("LLAMA", "silu"),
    "qwen2": Architecture("QWEN2", "silu"),
    "qwen3": Architecture("QWEN3", "silu"),
    "gemma3_text": Architecture("GEMMA3", "gelu_pytorch_tanh"),
}


class Blocks(NamedTuple):
    kind: str
    data: Tensor  # (out, bytes), uint8


def check(model: Any, layers: Mapping[str, QuantizedLinear]) -> None:
    _library()
    _check_config(model.config)
    for name, layer in layers.items():
        bare(name, layer, _OF)
        grid = layer.scheme.grid
        integers = isinstance(grid, IntGrid) and (
            grid.symmetric or grid.bits <= 4 or (grid.bits <= 7 and not grid.float_zero)
        )
        fits = integers or isinstance(grid, MXFP4Grid)
        refuse_unless(fits, name, _OF, "MXFP4Grid, or integers that are symmetric or of few bits", grid, _OTHER)
        width = layer.in_features // grid.groups(layer.in_features)
        refuse_unless(width % 32 == 0, name, _OF, "groups of a multiple of 32", width, _OTHER)


def _check_config(config: Any) -> None:
    if config.model_type not in _ARCHITECTURES:
        raise Unexportable(f"GGUF export is built for {', '.join(_ARCHITECTURES)}, not for {config.model_type}")
    wants = _ARCHITECTURES[config.model_type].activation
    has = getattr(config, "hidden_act", None) or config.hidden_activation
    if has != wants:
        raise Unexportable(f"llama.cpp computes {config.model_type} with {wants}, the model with {has}")
    if (kind := _rope(config)["rope_type"]) not in ("default", "linear", "llama3"):
        raise Unexportable(f'GGUF export knows positions of type "default", "linear" and "llama3", not {kind!r}')
    if config.model_type == "gemma3_text":
        cycle = [(i + 1) % 6 != 0 for i in range(config.num_hidden_layers)]
        if [kind == "sliding_attention" for kind in config.layer_types] != cycle:
            raise Unexportable(
                "llama.cpp takes every sixth layer of gemma3 to see all tokens, which is not so in this one"
            )
        if config.query_pre_attn_scalar != config.head_dim:
            raise Unexportable(
                f"llama.cpp divides the scores of gemma3 by the root of head_dim = {config.head_dim}, the model by that "
                f"of query_pre_attn_scalar = {config.query_pre_attn_scalar}"
            )


def write(model: Any, file: Path, tokenizer: Any) -> None:
    gguf = _library()
    # raises if there is no place for it, before there is a file
    words = vocabulary(tokenizer, model.config.vocab_size) if tokenizer is not None else None
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[model.config.model_type].name]
    names, found = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers), {}
    for name, tensor in tensors(model).items():
        its_name = name if name == _ROPE_FACTORS else names.get_name(name, (".weight", ".bias"))
        if its_name is None:
            raise Unexportable(f"llama.cpp has no place for {name} in a model of type {model.config.model_type}")
        found[its_name] = tensor
    with closing(gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])) as writer:
        for name, tensor in found.items():
            if isinstance(tensor, Blocks):
                writer.add_tensor(name, tensor.data.numpy(), raw_dtype=gguf.GGMLQuantizationType[tensor.kind])
            elif tensor.dtype == torch.bfloat16:
                # numpy has no bfloat16
                writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, tensor.numpy())
        writer.add_name(type(model).__name__)
        kinds = Counter(tensor.kind for tensor in found.values() if isinstance(tensor, Blocks))
        most = kinds.most_common(1)[0][0]
        writer.add_file_type(gguf.LlamaFileType["MOSTLY_MXFP4_MOE" if most == "MXFP4" else f"MOSTLY_{most}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_metadata(writer, model.config)
        write_vocabulary(writer, words)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def tensors(model: Any) -> dict[str, Tensor | Blocks]:
    """All tensors of the model by its own names, with the values and in the order of rows that llama.cpp wants."""
    config, found = model.config, {}
    layers = quantized(model)
    for name, parameter in model.named_parameters():
        # tied weights are among them once
        found[name] = parameter.float() if parameter.ndim == 1 else parameter
        if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            found[name] = found[name] + 1
    found |= {f"{name}.weight": blocks_of(layer) for name, layer in layers.items()}
    if _ARCHITECTURES[config.model_type].name == "LLAMA":
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for name, tensor in found.items():
            if count := heads.get(name.split(".")[-2]):
                found[name] = _interleaved(tensor, count)
    if _rope(config)["rope_type"] == "llama3":
        frequencies = model.get_decoder().rotary_emb.inv_freq
        steps = torch.arange(len(frequencies)) / len(frequencies)
        found[_ROPE_FACTORS] = _rope(config)["rope_theta"] ** -steps / frequencies
    return {name: t if isinstance(t, Blocks) else t.detach().cpu().contiguous() for name, t in found.items()}


def blocks_of(layer: QuantizedLinear) -> Blocks:
    """The weight in the first kind that holds it."""
    grid, shape = layer.scheme.grid, layer.weight_shape
    codes, params = grid.unpack(layer.stored(), shape)
    repeats = shape[1] // 32 // params.scale.shape[1]
    if isinstance(grid, MXFP4Grid):
        exponent = grid.pack_scale(params)["scale_exponents"].repeat_interleave(repeats, 1)
        low, high = codes.unflatten(1, (-1, 2, 16)).unbind(2)
        return Blocks("MXFP4", torch.cat([exponent[..., None], low | high << 4], -1).flatten(1).cpu())
    scale, zero_point = (p.float().repeat_interleave(repeats, 1) for p in params)
    if grid.bits <= 4 and not grid.symmetric:
        return Blocks("Q4_1", blocks.encode(codes, scale, (-scale * zero_point).half().float(), "Q4_1").cpu())
    kind, middle = ("Q4_0", 8) if grid.bits <= 4 else ("Q8_0", 128)
    codes = codes.unflatten(1, (-1, 32)).float() - zero_point[..., None] + middle
    return Blocks(kind, blocks.encode(codes.flatten(1).to(torch.uint8), scale, -middle * scale, kind).cpu())


def _interleaved(rows: Tensor | Blocks, heads: int) -> Tensor | Blocks:
    """Rows 0 ... d - 1 of each head in the order 0, d / 2, 1, d / 2 + 1, ..."""
    if isinstance(rows, Blocks):
        return rows._replace(data=_interleaved(rows.data, heads))
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _write_metadata(writer: Any, config: Any) -> None:
    rope = _rope(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context, window = config.max_position_embeddings, _window(config)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(window)
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif window:
        # llama.cpp has no windows in these models: within one there is no difference
        context = min(context, window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope(config: Any) -> dict[str, Any]:
    """Parameters of the positions, of layers that see all tokens where there are others."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _window(config: Any) -> int | None:
    """Tokens that some layers see, if not all."""
    kinds = getattr(config, "layer_types", None)
    if kinds and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package: pip install 'tersor-quant[gguf]'") from error
    return gguf
