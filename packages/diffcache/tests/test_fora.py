"""FORA on a model that has learnt something."""

import pytest
import torch

from tersor.diffcache import Recipe, cached, recipes
from tersor.diffcache.granularity import Blocks, SubModules
from tersor.diffcache.predictor import Reuse
from tersor.diffcache.testing import ToyDiT, euler, trained_toy
from tersor.diffcache.trigger import Interval


@pytest.fixture(scope="module")
def trained():
    return trained_toy()


def error(model, recipe, guidance=None):
    """Relative L2 distance from the run without cache."""
    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % 4
    with torch.no_grad():
        full = euler(model, noise, labels, 24, guidance)
        with cached(model, recipe):
            outputs = euler(model, noise, labels, 24, guidance)
    return ((outputs - full).norm() / full.norm()).item()


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_error_grows_with_the_interval(trained, guidance):
    errors = [error(trained, recipes.fora(n), guidance) for n in (2, 4, 8)]
    assert 0 < errors[0] * 1.5 < errors[1]
    assert errors[1] * 1.5 < errors[2]
    assert errors[0] < 0.1


def test_error_of_blocks_grows_with_the_interval(trained):
    errors = [error(trained, Recipe(Blocks(), trigger=Interval(n))) for n in (2, 4, 8)]
    assert 0 < errors[0] * 1.5 < errors[1]
    assert errors[1] * 1.5 < errors[2]


def test_fora_is_reuse_of_attention_and_mlp_at_an_interval():
    assert recipes.fora(4) == Recipe(SubModules(), Reuse(), Interval(4))
    with pytest.raises(ValueError, match="n must be at least 1"):
        recipes.fora(0)


def test_current_gate_multiplies_the_reused_output():
    """Before the gate: at a reused step, the block adds gate(t now) * output(t then)."""
    model = ToyDiT(depth=1).eval()
    block, (x, condition) = model.blocks[0], (torch.randn(1, 16, 32), torch.randn(2, 1, 32))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = model.blocks

        def forward(self, x, t):
            return self.blocks[0](x, condition[int(t)])

    net = Net().eval()
    with torch.no_grad(), cached(net, recipes.fora(2)):
        net(x, 0)
        reused = net(x, 1)
    with torch.no_grad():
        then, now = (block.modulation(c)[:, None].chunk(6, -1) for c in condition)
        attention = block.attn(block.norm1(x) * (1 + then[1]) + then[0])
        between = x + then[2] * attention
        mlp = block.mlp(block.norm2(between) * (1 + then[4]) + then[3])
        torch.testing.assert_close(reused, x + now[2] * attention + now[5] * mlp)
