"""GPTQ of llm-compressor with the settings that it has by default: ordered columns, groups fitted beforehand."""

from typing import Any

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import Tensor

from .protocol import Decoded, body

DISTRIBUTION = "llmcompressor"


def quantise(model: Any, calibration: Tensor, bits: int, group_size: int) -> Decoded:
    rows, seq_len = calibration.shape
    grid = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    modifier = GPTQModifier(config_groups={"body": {"targets": ["Linear"], "weights": grid}}, ignore=["lm_head"])
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": calibration.tolist()}),
        recipe=modifier,
        num_calibration_samples=rows,
        max_seq_length=seq_len,
        batch_size=8,
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    # until they are saved, the layers hold the decoded weights
    weights = {name: linear.weight.data for name, linear in body(model)}
    return Decoded(weights, bits + (16 + bits) / group_size)
