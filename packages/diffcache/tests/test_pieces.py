"""Predictors, triggers and granularities by themselves, and a piece of one's own in a recipe."""

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from tersor.diffcache import Recipe, cached, predictor
from tersor.diffcache.clock import Signals, Tick
from tersor.diffcache.errors import UnsupportedModel
from tersor.diffcache.granularity import Blocks, SubModules
from tersor.diffcache.granularity.site import Feeder, Output, Residual, rebuild, structure
from tersor.diffcache.history import History
from tersor.diffcache.predictor import Reuse
from tersor.diffcache.testing import ToyDiT
from tersor.diffcache.trigger import Interval

PREDICTORS = [getattr(predictor, name)() for name in predictor.__all__]


@dataclass(frozen=True)
class Linear:
    """The README's example of a new predictor: the line through the two newest features."""

    history: ClassVar[int] = 2

    def weights(self, times: Sequence[float], t: float) -> list[float]:
        if len(times) == 1:
            return [1.0]
        r = (t - times[0]) / (times[0] - times[1])
        return [1 + r, -r]


# ------------------------------------------------------------------------------------------------------- predictors


@pytest.mark.parametrize("piece", [*PREDICTORS, Linear()], ids=repr)
@pytest.mark.parametrize("times", [[4.0], [4.0, 1.0], [4.0, 3.0, 1.0]])
def test_weights_sum_to_one(piece, times):
    weights = piece.weights(times[: piece.history], 6.0)
    assert len(weights) == min(piece.history, len(times))
    assert sum(weights) == pytest.approx(1)


def test_reuse_returns_the_newest():
    assert Reuse().weights([5.0], 7.0) == [1.0]


def test_predictions_are_summed_in_float32():
    history = History((), None, macs=0)
    older, newest = torch.full((4,), 255.0, dtype=torch.bfloat16), torch.full((4,), 256.0, dtype=torch.bfloat16)
    history.push(0.0, [older, older.double(), None], keep=2)
    history.push(1.0, [newest, newest.double(), None], keep=2)
    line, wide, absent = history.predict(Linear(), 3.0)
    # 3 a - 2 b = 258; in bf16, 3 a = 768 and 2 b = 510 would be exact, but 1.5 a - 0.5 b = 256.5 is not
    assert torch.equal(line, torch.full((4,), 258.0, dtype=torch.bfloat16))
    assert wide.dtype == torch.float64
    assert absent is None


def test_a_single_weight_of_one_copies_nothing():
    history, feature = History((), None, macs=0), [torch.randn(4), None]
    history.push(0.0, feature, keep=1)
    assert all(again is kept for again, kept in zip(history.predict(Reuse(), 1.0), feature))


# --------------------------------------------------------------------------------------------------------- triggers


@pytest.mark.parametrize(
    ("trigger", "computed"),
    [
        (Interval(1), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (Interval(3), [0, 3, 6]),
        (Interval(4), [0, 4, 8]),
        (Interval(4, warmup=3), [0, 1, 2, 3, 7]),
        (Interval(50), [0]),
    ],
)
def test_interval_computes_warmup_then_every_nth(trigger, computed):
    last, seen = 0, [0]
    for step in range(1, 9):
        if trigger.decide(Signals(Tick(0, step, "", None), last)):
            seen.append(last := step)
    assert seen == computed
    assert len(seen) == trigger.warmup + -(-(9 - trigger.warmup) // trigger.n)


@pytest.mark.parametrize(("n", "warmup"), [(0, 0), (-1, 0), (2, -1)])
def test_interval_refuses_nonsense(n, warmup):
    with pytest.raises(ValueError, match="must be at least"):
        Interval(n, warmup)


# ---------------------------------------------------------------------------------------------------- granularities

Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize("kind", [lambda a, b: a, lambda a, b: (a, b), lambda a, b: [a, None], Pair, lambda a, b: (b,)])
@pytest.mark.parametrize("port", [Output(), Residual(0), Residual(0, 1)], ids=repr)
def test_ports_give_back_what_they_took(port, kind):
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    output = kind(a, b)
    n_tensors = 1 if isinstance(output, torch.Tensor) else len(output)
    if isinstance(port, Residual) and n_tensors != (1 if port.text is None else 2):
        with pytest.raises(TypeError, match=r"say where they are with Blocks\(hidden=..., text=...\)"):
            port.take((a, b), {}, output)
        return
    features = port.take((a, b), {}, output)
    again = port.give((a, b), {}, features, structure(output))
    assert type(again) is type(output)
    for x, y in zip(again if n_tensors > 1 else [again], output if n_tensors > 1 else [output]):
        x, y = (x[0], y[0]) if isinstance(x, tuple) else (x, y)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y)
            assert x is not y, "the model may write to what it gets"


def test_residual_flows_through_the_current_input():
    port, text, image = Residual(1, 0), torch.randn(1, 2, 4), torch.randn(1, 5, 4)
    features = port.take((image, text), {}, (text + 1, image + 2))
    new = torch.randn(1, 5, 4)
    kwargs = {"hidden_states": new, "encoder_hidden_states": text}
    out_text, out_image = port.give((), kwargs, features, tuple)
    torch.testing.assert_close(out_image, new + 2)
    torch.testing.assert_close(out_text, text + 1)


def test_feeder_keeps_one_number_and_shows_when_it_is_read():
    feature = Feeder().take((), {}, torch.randn(8, 16))
    assert feature[0].untyped_storage().nbytes() == 4
    assert rebuild(feature, None).shape == (8, 16)
    assert rebuild(feature, None).isnan().all()


def test_unknown_structure_is_an_error_that_names_the_site():
    class Dicts(nn.Module):
        def forward(self, x):
            return {"x": x}

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Dicts()

        def forward(self, x):
            return self.attn(x)["x"]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, x, t):
            return self.blocks[0](x)

    model = Net().eval()
    message = r"blocks.0.attn \(Dicts\): a cached module must return a tensor or a tuple of tensors, got dict"
    with torch.no_grad(), pytest.raises(TypeError, match=message), cached(model, Recipe()):
        model(torch.randn(1), 1.0)


def test_granularity_names_its_sites():
    model = ToyDiT(depth=2)
    assert [site.name for site in SubModules().sites(model)] == [
        "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp",
    ]  # fmt: skip
    assert [site.name for site in SubModules(mlp=()).sites(model)] == ["blocks.0.attn", "blocks.1.attn"]
    assert [site.name for site in Blocks().sites(model)] == ["blocks.0", "blocks.1"]


def test_block_lists_may_lie_deeper():
    outer = nn.Module()
    outer.net = ToyDiT(depth=1)
    assert [site.name for site in Blocks(blocks=("net.blocks",)).sites(outer)] == ["net.blocks.0"]
    with pytest.raises(UnsupportedModel, match=r"its module lists are: net.blocks"):
        Blocks().sites(outer)


def test_granularities_refuse_nonsense():
    with pytest.raises(ValueError, match="both empty"):
        SubModules(attention=(), mlp=())
    with pytest.raises(ValueError, match="needs hidden"):
        Blocks(text=0)
    for hidden, text in ((1, None), (1, 1), (2, 0)):
        with pytest.raises(ValueError, match="0 and None, 0 and 1, or 1 and 0"):
            Blocks(hidden, text)


# ---------------------------------------------------------------------------------------------- a piece of one's own


class LinearInTime(nn.Module):
    """A module whose output is a line in the step number, whatever goes in."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.slope = clock, torch.tensor([[1.0, -2.0, 0.5, 3.0]])

    def forward(self, x):
        return 1 + self.slope * self.clock[0]


@pytest.mark.parametrize(("piece", "exact"), [(Linear(), True), (Reuse(), False)], ids=repr)
def test_a_predictor_sees_the_times_of_what_it_predicts(piece, exact):
    clock = [0]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = LinearInTime(clock)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, x, t):
            return self.blocks[0].attn(x)

    model, x = Net().eval(), torch.zeros(1, 4)
    computed = {0, 1, 2, 5, 8}  # uneven gaps
    errors = []
    with torch.no_grad(), cached(model, Recipe(predictor=piece, trigger=Interval(3, warmup=2))) as session:
        for step in range(11):
            clock[0] = step
            truth = 1 + model.blocks[0].attn.slope * step
            error = (model(x, 1 - step / 11) - truth).abs().max().item()
            assert step not in computed or error == 0
            errors.append(error)
    assert session.stats.executed == len(computed)
    assert (max(errors) < 1e-5) == exact
