"""The verb: attaching, giving back, counting, and never doing nothing in silence."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

from tersor.diffcache import Recipe, cached, granularity, predictor, recipes, trigger
from tersor.diffcache.errors import UnsupportedModel
from tersor.diffcache.granularity import Blocks, SubModules
from tersor.diffcache.testing import ToyDiT, euler
from tersor.diffcache.trigger import Interval

pytestmark = pytest.mark.filterwarnings("error:the cache on")

GRANULARITIES = [getattr(granularity, name)() for name in granularity.__all__]
by_granularity = pytest.mark.parametrize("pieces", GRANULARITIES, ids=lambda piece: type(piece).__name__)


def sample(batch: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, 8, 8, generator=generator), torch.arange(batch) % 4


def fingerprint(model: nn.Module):
    """Everything that an attachment could leave behind."""
    return (
        list(model.state_dict()),
        [(name, sorted(module.__dict__), module.forward.__func__) for name, module in model.named_modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


# ------------------------------------------------------------------------------------------------ attach and detach


@by_granularity
def test_detach_leaves_the_model_as_it_was(model, pieces):
    before, output = fingerprint(model), euler(model, *sample(), steps=5)
    with cached(model, Recipe(pieces)):
        euler(model, *sample(), steps=5)
    assert fingerprint(model) == before
    assert torch.equal(euler(model, *sample(), steps=5), output)


@by_granularity
def test_detach_after_an_exception_leaves_the_model_as_it_was(model, pieces):
    before = fingerprint(model)

    def decode(latent):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), cached(model, Recipe(pieces)):
        decode(euler(model, *sample(), steps=5))
    assert fingerprint(model) == before


def test_detach_after_an_exception_inside_a_block_leaves_the_model_as_it_was(model):
    before, (noise, labels) = fingerprint(model), sample()
    with pytest.raises(RuntimeError), cached(model, recipes.fora()):
        euler(model, noise[:, :, :6], labels, steps=3)  # the positional embedding does not fit
    assert fingerprint(model) == before


def test_detach_restores_an_own_forward(model):
    site, calls = model.blocks[0].attn, []
    original = site.forward

    def own(x):
        calls.append(1)
        return original(x)

    site.forward = own
    with cached(model, recipes.fora(2)):
        euler(model, *sample(), steps=4)
    assert site.__dict__["forward"] is own
    assert len(calls) == 2, "the forward that was there runs at computed steps"


def test_state_dict_while_attached_is_the_same(model):
    keys, tensors = list(model.state_dict()), list(model.state_dict().values())
    with cached(model, recipes.fora()):
        euler(model, *sample(), steps=4)
        assert list(model.state_dict()) == keys
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tensors))


def test_signature_while_attached_is_the_same(model):
    import inspect

    before = inspect.signature(model.forward)
    with warnings.catch_warnings(action="ignore"), cached(model, recipes.fora()):
        assert inspect.signature(model.forward) == before


def test_second_cache_is_refused(model):
    with cached(model, recipes.fora(2)):
        with pytest.raises(RuntimeError, match="ToyDiT has a cache attached already"), cached(model, recipes.fora()):
            pass
        euler(model, *sample(), steps=4)
    with cached(model, recipes.fora(2)) as session:
        euler(model, *sample(), steps=4)
    assert session.stats.skipped


def test_second_cache_on_shared_blocks_is_refused(model):
    wrapper = nn.Module()
    wrapper.blocks = model.blocks
    with warnings.catch_warnings(action="ignore"), cached(model, recipes.fora()):
        message = r"blocks.0.attn \(SelfAttention\) has a cache attached already"
        with pytest.raises(RuntimeError, match=message), cached(wrapper, recipes.fora()):
            pass


def test_forward_replaced_while_attached_stays_and_is_reported(model):
    (noise, labels), output = sample(), euler(model, *sample(), steps=5)

    def offload_and_sample():
        with cached(model, recipes.fora(2)) as session:
            inner = model.forward
            model.forward = lambda *args: inner(*args)
            euler(model, noise, labels, steps=5)
        return session

    with pytest.warns(RuntimeWarning, match=r"ToyDiT.forward: replaced by something else"):
        session = offload_and_sample()
    assert torch.equal(euler(model, noise, labels, steps=5), output), "the cache inside does nothing any more"
    assert session.stats.calls == 5
    assert "forward" not in model.blocks[0].attn.__dict__


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps])
def test_attached_model_refuses_to_be_copied(model, take):
    with cached(model, recipes.fora()):
        euler(model, *sample(), steps=2)
        with pytest.raises(RuntimeError, match="cannot be copied or pickled"):
            take(model)
    take(model)


def test_pipeline_instead_of_transformer_is_refused():
    with pytest.raises(TypeError, match=r"pass `pipeline.transformer`"), cached(object(), recipes.fora()):
        pass


# ------------------------------------------------------------------------------------------------------- exactness


@by_granularity
def test_computing_every_step_equals_the_bare_model(model, pieces):
    with warnings.catch_warnings(action="ignore"), cached(model, Recipe(pieces, trigger=Interval(1))):
        outputs = euler(model, *sample(), steps=6)
    assert torch.equal(outputs, euler(model, *sample(), steps=6))


@by_granularity
@pytest.mark.parametrize("n", [2, 3, 5])
def test_features_that_are_constant_in_time_are_reused_exactly(pieces, n):
    model = ToyDiT().eval()
    for block in model.blocks:
        block.modulation.weight.zero_()  # the gate stays put
        block.modulation.bias.normal_(generator=torch.Generator().manual_seed(1))
        block.attn.out.weight.zero_()
        block.attn.out.bias.fill_(0.3)
        block.mlp[2].weight.zero_()
        block.mlp[2].bias.fill_(-0.2)
    full = euler(model, *sample(), steps=7)
    with cached(model, Recipe(pieces, trigger=Interval(n))) as session:
        outputs = euler(model, *sample(), steps=7)
    assert session.stats.skipped
    if isinstance(pieces, SubModules):
        assert torch.equal(outputs, full)
    else:
        # in + (out - in) is out up to the rounding of two additions per block
        torch.testing.assert_close(outputs, full, rtol=0, atol=7 * 4 * 2**-22)


@by_granularity
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(pieces, dtype):
    model = ToyDiT().eval().to(dtype)
    noise, labels = sample()
    with cached(model, Recipe(pieces, trigger=Interval(2))) as session:
        outputs = euler(model, noise.to(dtype), labels, steps=6)
    assert outputs.dtype == dtype
    assert outputs.isfinite().all()
    assert session.stats.ratio == 0.5


@by_granularity
def test_second_generation_repeats_the_first(model, pieces):
    with cached(model, Recipe(pieces)) as session:
        first = euler(model, *sample(), steps=7)
        euler(model, *sample(seed=1), steps=4)
        assert torch.equal(euler(model, *sample(), steps=7), first)
    assert session.stats.runs == 3


@by_granularity
def test_generation_in_another_batch_size_equals_one_in_a_fresh_session(model, pieces):
    def generate(*batches):
        with cached(model, Recipe(pieces)):
            return [euler(model, *sample(batch), steps=7) for batch in batches]

    for batch, outputs in zip((2, 3, 1), generate(2, 3, 1)):
        assert torch.equal(outputs, *generate(batch))


@by_granularity
@pytest.mark.parametrize("change", [lambda x: x[1:], lambda x: x.double()], ids=["batch", "dtype"])
def test_inputs_that_change_shape_or_dtype_on_the_way_are_computed(pieces, change):
    model, (x, labels) = ToyDiT().eval(), sample(4)
    t = torch.ones(4)
    with cached(model, Recipe(pieces, trigger=Interval(9))) as session:
        for step in range(2):
            with session.step(step):
                model(x, t, labels)
        x, t = change(x), change(t)
        labels, model = labels[: len(x)], model.to(x.dtype)
        with session.step(2):
            outputs = model(x, t, labels)
    assert session.stats.runs == 1
    assert session.stats.executed == 2 * session.stats.skipped > 0
    assert torch.equal(outputs, model(x, t, labels))


class WritesInPlace(nn.Module):
    """A block that scales what its modules return where it lies."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, t):
        x = x + self.attn(x).mul_(t)
        return x + self.mlp(x).mul_(t)


class Wrapper(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x, t)
        return x


def test_blocks_that_write_in_place_do_not_spoil_the_cache():
    model, x = Wrapper(WritesInPlace()).eval(), torch.randn(3, 4)
    block = model.blocks[0]
    with cached(model, recipes.fora(3)):
        model(x, 3.0)
        a, m = block.attn.weight @ x.T, None
        for t in (2.0, 1.0):
            attention = (a + block.attn.bias[:, None]).T
            first = x + 3.0 * attention
            m = block.mlp.weight @ first.T
            mlp = (m + block.mlp.bias[:, None]).T
            torch.testing.assert_close(model(x, t), x + t * attention + t * mlp)


def test_module_that_runs_twice_in_a_call_keeps_both_values(model):
    shared = WritesInPlace()
    twice, x = Wrapper(shared, shared).eval(), torch.randn(3, 4)
    with cached(twice, recipes.fora(2)) as session:
        with session.step(0):
            first = twice(x, 0.5)
        with session.step(1):
            assert torch.equal(twice(x, 0.5), first)
    assert (session.stats.executed, session.stats.skipped) == (4, 4)


# ---------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("steps", [1, 6, 7])
def test_each_module_runs_ceil_steps_over_n_times(model, n, steps):
    calls = {}
    for i, block in enumerate(model.blocks):
        for name, inner in (("attn", block.attn.qkv), ("mlp", block.mlp[0])):
            inner.register_forward_hook(lambda *_, key=(i, name): calls.update({key: calls.get(key, 0) + 1}))
    with warnings.catch_warnings(action="ignore"), cached(model, recipes.fora(n)) as session:
        euler(model, *sample(), steps=steps)
    assert set(calls.values()) == {-(-steps // n)}
    assert len(calls) == 4
    assert session.stats.executed == sum(calls.values())
    assert session.stats.executed + session.stats.skipped == 4 * steps
    assert session.stats.by_site["blocks.1.mlp"] == (-(-steps // n), steps - -(-steps // n))


@by_granularity
def test_macs_are_those_of_the_linears_inside_the_sites(model, pieces):
    with cached(model, Recipe(pieces, trigger=Interval(4))) as session:
        euler(model, *sample(batch=2), steps=8)
    width, tokens = 32, 2 * 16
    block = tokens * (3 + 1 + 4 + 4) * width**2  # qkv, out, up, down
    if isinstance(pieces, Blocks):
        block += 2 * 6 * width**2  # one modulation per image
    assert session.stats.macs_executed == 2 * 2 * block
    assert session.stats.macs_skipped == 6 * 2 * block


@by_granularity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nbytes_is_the_sum_of_the_cached_tensors(pieces, dtype):
    model = ToyDiT(depth=3).eval().to(dtype)
    noise, labels = sample(batch=2)
    tensors_per_block = 2 if isinstance(pieces, SubModules) else 1
    feature = 2 * 16 * 32 * dtype.itemsize  # (batch, tokens, width)
    with cached(model, Recipe(pieces)) as session:
        assert session.nbytes == 0
        euler(model, noise.to(dtype), labels, steps=4)
        one_context = 3 * tensors_per_block * feature + labels.nbytes
        assert session.nbytes == one_context
        euler(model, noise.to(dtype), labels, steps=4, guidance=2.0)
        assert session.nbytes == 2 * one_context
        session.reset()
        assert session.nbytes == 0
        euler(model, noise.to(dtype), labels, steps=4)
    assert session.nbytes == 0, "detaching frees the features"
    assert session.stats.peak_nbytes == 2 * one_context


def test_stats_can_be_read_by_a_person(model):
    with cached(model, recipes.fora(3)) as session:
        euler(model, *sample(), steps=9)
    assert str(session.stats).startswith("12 of 36 evaluations ran (33%) in 9 calls of 1 trajectories")
    assert session.stats.ratio == 1 / 3


# ------------------------------------------------------------------------------- nothing silently does nothing


def reused_nothing(reason):
    return pytest.warns(RuntimeWarning, match=f"the cache on ToyDiT reused nothing: .*{reason}")


def test_never_called_warns(model):
    with reused_nothing("the model was not called"), cached(model, recipes.fora()):
        pass


def test_single_step_trajectories_warn(model):
    with reused_nothing("first step of a trajectory"), cached(model, recipes.fora()):
        for seed in range(20):
            euler(model, *sample(seed=seed), steps=1)


def test_trigger_that_always_computes_warns(model):
    with reused_nothing(r"Interval\(n=1, warmup=0\) computed every step"), cached(model, recipes.fora(1)):
        euler(model, *sample(), steps=5)


@torch.enable_grad()
def test_gradients_compute_everything_and_warn(model):
    with pytest.warns(RuntimeWarning) as caught, cached(model, recipes.fora()) as session:
        outputs = euler(model, *sample(), steps=4)
    assert torch.equal(outputs, euler(model, *sample(), steps=4))
    assert session.stats.skipped == 0
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2, "once at the first call, once at the end"
    assert all("gradients are on" in message and "torch.no_grad()" in message for message in messages)
    outputs.sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_training_mode_computes_everything_and_warns(model):
    message = r"in training mode.*model.eval\(\)"
    with pytest.warns(RuntimeWarning, match=message), cached(model.train(), recipes.fora()) as session:
        euler(model, *sample(), steps=4)
    assert session.stats.skipped == 0


def test_an_exception_is_not_covered_by_the_warning(model):
    with warnings.catch_warnings(action="error"), pytest.raises(KeyError), cached(model, recipes.fora()):
        raise KeyError


def test_inference_mode_works(model):
    full = euler(model, *sample(), steps=6)
    with torch.inference_mode(), cached(model, recipes.fora(2)) as session:
        inside = euler(model, *sample(), steps=6)
    with cached(model, recipes.fora(2)):
        assert torch.equal(euler(model, *sample(), steps=6), inside)
    assert session.stats.ratio == 0.5
    assert not torch.equal(inside, full)


def test_model_without_known_blocks_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList([nn.Linear(2, 2)])

    message = r"Net has none of the block lists transformer_blocks.*its module lists are: stages"
    with pytest.raises(UnsupportedModel, match=message), cached(Net(), recipes.fora()):
        pass


def test_blocks_without_known_modules_are_refused():
    model = Wrapper(nn.Sequential(nn.Linear(4, 4)))
    message = r"no block of Wrapper has a child named attn, .*blocks.0 \(Sequential\) has: 0"
    with pytest.raises(UnsupportedModel, match=message), cached(model, recipes.fora()):
        pass


# ---------------------------------------------------------------------------------------------------------- recipe


def test_axes_list_their_pieces():
    assert [granularity.__all__, predictor.__all__, trigger.__all__] == [
        ["Blocks", "SubModules"],
        ["Reuse"],
        ["Interval"],
    ]


def test_recipe_is_a_value():
    assert recipes.fora() == recipes.fora(3) != recipes.fora(4)
    assert hash(recipes.fora()) == hash(recipes.fora(3))
    assert "Interval(n=3, warmup=0)" in repr(recipes.fora())


@pytest.mark.parametrize("axis", ["granularity", "predictor", "trigger"])
@pytest.mark.parametrize("piece", [3, "fora", None, Interval])
def test_recipe_refuses_what_is_not_a_piece(axis, piece):
    with pytest.raises(TypeError, match=f"{axis} must be an object with .*see tersor.diffcache.{axis}"):
        Recipe(**{axis: piece})


# --------------------------------------------------------------------------------------------------------- threads


def test_two_models_in_two_threads(model):
    models = [model, ToyDiT(seed=1).eval()]

    def alone(model):
        with cached(model, recipes.fora(3)):
            return euler(model, *sample(), steps=9)

    expected = [alone(m) for m in models]
    results: dict[int, torch.Tensor] = {}

    def work(i):
        with torch.no_grad(), cached(models[i], recipes.fora(3)):
            results[i] = euler(models[i], *sample(), steps=9)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(2))


def test_two_calls_of_one_model_at_a_time_are_refused(model):
    noise, labels = sample()
    t = torch.ones(2)
    raised = []

    def second_call(*_):
        try:
            model(noise, t, labels)
        except RuntimeError as error:
            raised.append(str(error))

    model.patch_embed.register_forward_hook(second_call)
    with cached(model, recipes.fora(2)):
        euler(model, noise, labels, steps=4)
    assert len(raised) == 4
    assert "a cache serves one call at a time" in raised[0]


# --------------------------------------------------------------------------------------------------------- compiled


def test_compiled_blocks_work_with_blocks_and_are_refused_by_submodules(model):
    plain = Recipe(Blocks(), trigger=Interval(2))
    with cached(model, plain):
        expected = euler(model, *sample(), steps=6)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    with cached(model, plain) as session:
        torch.testing.assert_close(euler(model, *sample(), steps=6), expected)
    assert session.stats.ratio == 0.5
    with pytest.raises(UnsupportedModel, match=r"blocks.0 is compiled.*use Blocks\(\)"), cached(model, recipes.fora()):
        pass


def test_model_compiled_as_a_whole_is_refused(model):
    message = "OptimizedModule is compiled as a whole"
    with pytest.raises(UnsupportedModel, match=message), cached(torch.compile(model, backend="eager"), recipes.fora()):
        pass


def test_a_block_called_by_itself_is_not_cached(model):
    x, condition = torch.randn(1, 16, 32), torch.randn(1, 32)
    with cached(model, recipes.fora(2)) as session:
        euler(model, *sample(), steps=4)
        before = session.stats
        assert torch.equal(model.blocks[0](x, condition), ToyDiT().eval().blocks[0](x, condition))
        assert session.stats == before
