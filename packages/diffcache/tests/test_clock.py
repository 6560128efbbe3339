"""The clock: steps, guidance branches and trajectories, told from calls."""

import pytest
import torch
from torch import nn

from tersor.diffcache import cached, recipes
from tersor.diffcache.clock import MAX_CONTEXTS, CallReader, Clock, Named
from tersor.diffcache.testing import ToyDiT, euler


class Denoiser(nn.Module):
    def forward(self, x, t=None, y=None, **kwargs):
        return x


def ticks(*calls, named=()):
    """(run, step, context) of calls given as (t, y)."""
    clock, read = Clock(), CallReader(Denoiser())
    names = list(named) or [None] * len(calls)
    seen = [clock.tick(read((torch.randn(1), t, y), {}), name) for (t, y), name in zip(calls, names)]
    return [tick if tick is None else tuple(tick[:3]) for tick in seen]


def test_timesteps_count_steps():
    assert ticks((9.0, 0), (5.0, 0), (1.0, 0)) == [(0, 0, "#0"), (0, 1, "#0"), (0, 2, "#0")]


@pytest.mark.parametrize("times", [(9.0, 5.0, 1.0), (0.0, 0.5, 0.9)], ids=["falling", "rising"])
def test_a_timestep_that_jumps_back_is_a_new_trajectory(times):
    assert [tick[:2] for tick in ticks(*((t, 0) for t in times * 2))] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip


def test_conditionings_are_contexts_in_any_order():
    cond, uncond = torch.tensor([1]), torch.tensor([4])
    calls = [(9.0, cond), (9.0, uncond), (5.0, uncond.clone()), (5.0, cond.clone()), (1.0, uncond)]
    assert [tick[1:] for tick in ticks(*calls)] == [(0, "#0"), (0, "#1"), (1, "#1"), (1, "#0"), (2, "#1")]


def test_guidance_that_begins_late_is_a_context_of_its_own():
    cond, uncond = torch.tensor([1]), torch.tensor([4])
    calls = [(9.0, cond), (5.0, uncond), (5.0, cond), (1.0, uncond), (1.0, cond)]
    assert [tick[2] for tick in ticks(*calls)] == ["#0", "#1", "#0", "#1", "#0"]


def test_labels_written_into_one_buffer_are_told_apart():
    clock, read, y, contexts = Clock(), CallReader(Denoiser()), torch.tensor([1]), []
    for t in (9.0, 5.0):
        for label in (1, 4):
            contexts.append(clock.tick(read((torch.randn(1), t, y.fill_(label)), {}), None).context)
    assert contexts == ["#0", "#1"] * 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"context": {"text": torch.ones(2)}}, {"context": {"text": torch.zeros(2)}}),
        ({"caption": [torch.ones(2)]}, {"caption": [torch.zeros(2)]}),
        ({"prompt": "a cat"}, {"prompt": ""}),
        ({"skip_layers": None}, {"skip_layers": [7, 8]}),
        ({"flag": True}, {"flag": False}),
        ({"label": torch.ones(1)}, {"label": torch.ones(2)}),
    ],
    ids=["dict", "list", "string", "skip-layer guidance", "flag", "shape"],
)
def test_every_kind_of_argument_tells_branches_apart(one, other):
    clock, read = Clock(), CallReader(Denoiser())
    contexts = [clock.tick(read((torch.randn(1), t), kw), None).context for t in (2.0, 1.0) for kw in (one, other)]
    assert contexts == ["#0", "#1"] * 2


def test_arguments_behind_a_star_tell_branches_apart():
    class Starred(nn.Module):
        def forward(self, *args, **kwargs):
            return args[0]

    clock, read = Clock(), CallReader(Starred())
    seen = [clock.tick(read((torch.randn(1), y), {"timestep": t}), None) for t in (2, 1) for y in (0, 1)]
    assert [(tick.step, tick.context) for tick in seen] == [(0, "#0"), (0, "#1"), (1, "#0"), (1, "#1")]


def test_solver_that_evaluates_twice_at_a_step_gets_two_contexts():
    calls = [(t, 0) for t in (9.0, 5.0, 5.0, 1.0, 1.0)]  # Heun's
    assert [tick[1:] for tick in ticks(*calls)] == [(0, "#0"), (1, "#0"), (1, "#0.1"), (2, "#0"), (2, "#0.1")]


def test_nothing_from_a_first_step_that_was_repeated_is_used():
    # broken off and begun again, or tiles of one image: the step after must not see the features of either
    runs = [tick[:2] for tick in ticks((9.0, 0), (9.0, 0), (5.0, 0), (1.0, 0))]
    assert runs == [(0, 0), (1, 0), (2, 0), (2, 1)]


def test_names_win_over_conditioning():
    named = [Named("cond"), Named("uncond")] * 2
    calls = [(9.0, 0), (9.0, 0), (5.0, 1), (5.0, 2)]
    assert [tick[1:] for tick in ticks(*calls, named=named)] == [
        (0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"),
    ]  # fmt: skip


def test_given_steps_win_over_timesteps():
    named = [Named("cond", i) for i in (0, 1, 2, 0, 1)]
    assert [tick[:2] for tick in ticks(*[(None, 0)] * 5, named=named)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_conditioning_that_changes_at_each_step_is_reported_and_bounded():
    calls = [(float(-t), torch.tensor([t])) for t in range(20)]
    clock, read = Clock(), CallReader(Denoiser())
    seen = [clock.tick(read((torch.randn(1), t, y), {}), None) for t, y in calls]
    assert [tick is None for tick in seen] == [False] * MAX_CONTEXTS + [True] * (20 - MAX_CONTEXTS)
    assert "some argument changes from call to call" in clock.trouble
    assert clock.nbytes == MAX_CONTEXTS * 8


@pytest.mark.parametrize("t", [None, torch.tensor([9.0, 5.0])], ids=["no timestep", "one per sample"])
def test_no_clock_is_reported(t):
    clock = Clock()
    assert clock.tick(CallReader(Denoiser())((torch.randn(2), t), {}), None) is None
    assert "with session.step(i)" in clock.trouble


@pytest.mark.parametrize(
    "t", [7, 7.0, torch.tensor(7), torch.full((3,), 7), torch.tensor([[0, 7, 7], [0, 7, 7]])], ids=repr
)
def test_timesteps_in_any_form(t):
    assert CallReader(Denoiser())((torch.randn(2), t), {}).timestep == 7


def test_timestep_is_found_by_name_behind_any_forward():
    class Named(nn.Module):
        def forward(self, hidden_states, encoder_hidden_states, pooled, timestep, r_timestep=None):
            return hidden_states

    x, text, pooled = torch.randn(1), torch.randn(2), torch.randn(3)
    call = CallReader(Named())((x, text), {"timestep": 3, "pooled": pooled, "r_timestep": torch.ones(1)})
    assert call.timestep == 3
    assert call.conditioning == {"encoder_hidden_states": text, "pooled": pooled}


# ------------------------------------------------------------------------------------------------ with a real model


def prescribed(i):
    """The input of step i, whatever the model returned before."""
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(i)), torch.full((2,), 1 - i / 8)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("order", [(1, 4), (4, 1)])
def test_branches_of_guidance_get_their_own_features(model, n, order):
    """Where one state serves both, the unconditional call at a reused step returns the conditional's features."""
    alone = {}
    for label in order:
        with cached(model, recipes.fora(n)):
            alone[label] = [model(*prescribed(i), torch.full((2,), label)) for i in range(8)]
    with cached(model, recipes.fora(n)) as session:
        for i in range(8):
            for label in order:
                assert torch.equal(model(*prescribed(i), torch.full((2,), label)), alone[label][i])
    assert session.stats.executed == 2 * 4 * -(-8 // n)


def test_guidance_in_one_batch_equals_guidance_in_two_calls(model):
    class Batched(nn.Module):
        """Both branches in one call."""

        def __init__(self):
            super().__init__()
            self.model, self.num_classes = model, model.num_classes
            self.blocks = model.blocks

        def forward(self, x, timestep, labels):
            return self.model(x, timestep, labels)

    noise, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    with cached(model, recipes.fora(3)) as two:
        expected = euler(model, noise, labels, steps=8, guidance=3.0)
    batched, x = Batched().eval(), noise
    with cached(batched, recipes.fora(3)) as one:
        for i in range(8):
            both = torch.cat([labels, torch.full_like(labels, 4)])
            c, u = batched(torch.cat([x, x]), torch.full((4,), 1 - i / 8), both).chunk(2)
            x = x - (u + 3.0 * (c - u)) / 8
    # sums of another batch size are ordered differently: float32 rounding over 8 steps and guidance 3
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    assert one.stats.executed * 2 == two.stats.executed == 2 * 4 * 3
    unguided = euler(model, noise, labels, steps=8)
    assert (x - unguided).norm() > 0.1 * unguided.norm(), "guidance does something here"


def test_guidance_that_was_off_for_a_while_is_computed_when_it_returns(model):
    ran, current = [], ()
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: ran.append(current))
    with cached(model, recipes.fora(3)):
        for i in range(12):
            for label in (1,) if 1 <= i <= 6 else (1, 4):
                current = (label, i)
                model(torch.randn(2, 1, 8, 8), torch.full((2,), 1 - i / 12), torch.full((2,), label))
    assert [i for label, i in ran if label == 1] == [0, 3, 6, 9]
    assert [i for label, i in ran if label == 4] == [0, 7, 9], "at 7 its feature would be 7 steps old"


def test_explicit_steps_serve_a_model_without_timestep():
    class NoTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = ToyDiT().blocks

        def forward(self, x, c):
            for block in self.blocks:
                x = block(x, c)
            return x

    model, x, c = NoTime().eval(), torch.randn(1, 16, 32), torch.randn(1, 32)
    with cached(model, recipes.fora(2)) as session:
        for i in range(6):
            for context in ("cond", "uncond"):
                with session.step(i, context):
                    model(x, c)
    assert session.stats.ratio == 0.5
    with pytest.warns(RuntimeWarning) as caught, cached(model, recipes.fora(2)) as session:
        [model(x, c) for _ in range(6)]
    assert session.stats.skipped == 0
    assert len(caught) == 2
    assert all("the step is unknown" in str(w.message) for w in caught)


def test_an_exception_in_the_model_begins_a_new_trajectory(model):
    (x, t), labels = prescribed(0), torch.tensor([0, 1])
    with cached(model, recipes.fora(4)) as session:
        model(x, t, labels)
        with pytest.raises(IndexError):
            model(x, t - 0.1, torch.tensor([0, 99]))
        expected = ToyDiT().eval()(x, t - 0.2, labels)
        assert torch.equal(model(x, t - 0.2, labels), expected), "computed, not reused"
        model(x, t - 0.3, labels)
    assert session.stats.skipped == 4


def test_reset_begins_a_new_trajectory(model):
    (x, t), labels = prescribed(0), torch.tensor([0, 1])
    with cached(model, recipes.fora(4)) as session:
        model(x, t, labels)
        session.reset()
        assert torch.equal(model(x, t - 0.5, labels), ToyDiT().eval()(x, t - 0.5, labels))
        model(x, t - 0.6, labels)
    assert session.stats.runs == 2
