"""AutoRound (arXiv:2309.05516) with the settings that it has by default: 200 steps per block."""

from typing import Any

from auto_round import AutoRound
from torch import Tensor
from transformers import AutoTokenizer

from .protocol import Decoded, body

DISTRIBUTION = "auto-round"


def quantise(model: Any, calibration: Tensor, bits: int, group_size: int) -> Decoded:
    rows, seq_len = calibration.shape
    rounding = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(model.name_or_path),
        bits=bits,
        group_size=group_size,
        sym=False,
        dataset=list(calibration.split(8)),
        nsamples=rows,
        seqlen=seq_len,
        batch_size=8,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    quantised, _ = rounding.quantize()
    # until they are saved, the layers hold the decoded weights
    weights = {name: linear.weight.data for name, linear in body(quantised)}
    return Decoded(weights, bits + (16 + bits) / group_size)
