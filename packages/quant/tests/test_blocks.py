"""Where the linears are."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from tersor.quant.blocks import UnsupportedModel, find_blocks, linears


class Block(nn.Module):
    def __init__(self, width: int, experts: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))


class Seer(nn.Module):
    """A decoder beside a taller vision tower."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(Block(16) for _ in range(12))
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Block(4) for _ in range(2))

    def get_decoder(self) -> nn.Module:
        return self.decoder


def test_the_blocks_of_every_kind_are_found(make_model, kind):
    model = make_model(kind)
    name, blocks = find_blocks(model)
    assert name == "model.layers"
    assert blocks is model.model.layers
    assert len(linears(blocks[0])) == 7


def test_experts_are_no_blocks_however_many():
    model = nn.Module()
    model.empty = nn.ModuleList()
    model.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model.layers = nn.ModuleList(Block(4, experts=20) for _ in range(2))
    assert find_blocks(model)[0] == "layers"


def test_a_vision_tower_is_not_taken_for_the_decoder():
    assert find_blocks(Seer())[0] == "decoder.layers"


def test_linears_with_a_forward_of_their_own_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    block = Block(4)
    block.scaled = Scaled(4, 4)
    assert list(linears(block, "layers.0")) == ["layers.0.first"]


def test_models_without_linears_in_blocks_are_named():
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 9, "n_positions": 8}
    with pytest.raises(UnsupportedModel, match=r"GPT2LMHeadModel has no nn\.ModuleList of blocks with nn\.Linear"):
        find_blocks(GPT2LMHeadModel(GPT2Config(**sizes)))


def test_encoders_with_decoders_are_named():
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    with pytest.raises(UnsupportedModel, match="only decoders are supported"):
        find_blocks(T5ForConditionalGeneration(config))
