"""A directory as transformers writes it, with the tensors and the config of another library's quantised layers."""

from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.quant.export.layers import quantized
from tersor.quant.linear import QuantizedLinear


def write_checkpoint(
    model: Any,
    directory: Path,
    tokenizer: Any,
    config: dict[str, Any],
    tensors: Callable[[str, QuantizedLinear], dict[str, Tensor]],
) -> None:
    """Shards, config.json and, if there is one, the tokenizer.

    Args:
        config: `quantization_config` of config.json.
        tensors: what is stored for a layer of this name in place of its buffers, without its name in front.
    """
    state = model.state_dict()
    for name, layer in quantized(model).items():
        for buffer in layer.layout():
            del state[f"{name}.{buffer}"]
        state |= {f"{name}.{key}": tensor for key, tensor in tensors(name, layer).items()}
    # a model that transformers knows to be quantised is saved as its quantiser says, whatever the state
    plain = copy(model)
    plain.hf_quantizer, plain.config = None, deepcopy(model.config)
    plain.config.quantization_config = config
    plain.save_pretrained(directory, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
