import pytest
import torch

from tersor.tokencomp.reducer import Merge, Prune
from tersor.tokencomp.state import TokenState

CASES = [(Merge(), 6), (Merge(proportional=False), 6), (Prune(), 1)]


def reduce_repeatedly(reducer, dim, dtype=torch.float32, num_protected=2):
    """Three reductions of random tokens: yields x and state after each, with the original tokens."""
    generator = torch.Generator().manual_seed(0)
    x0 = x = torch.randn(3, 21, 8, generator=generator).to(dtype)
    state = TokenState.start(x, num_protected)
    for r in (5, 4, 3):
        scores = torch.randn(3, x.shape[1], dim, generator=generator)
        x, state = reducer.reduce(x, state, scores, r)
        yield x0, x, state


@pytest.mark.parametrize(("reducer", "dim"), CASES, ids=str)
def test_protected_tokens_stay_in_front_unchanged(reducer, dim):
    for x0, x, state in reduce_repeatedly(reducer, dim):
        assert torch.equal(x[:, :2], x0[:, :2])
        assert torch.equal(state.size[:, :2], torch.ones(3, 2))
        assert state.index[:, :2].tolist() == [[0, 1]] * 3
        assert state.source[:, :2].tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(("reducer", "dim"), CASES, ids=str)
def test_sizes_count_the_members_of_each_token(reducer, dim):
    for x0, x, state in reduce_repeatedly(reducer, dim):
        assert x.shape[1] == state.num_tokens
        assert state.num_original == x0.shape[1]
        for image in range(3):
            members = state.source[image][state.source[image] >= 0].bincount(minlength=state.num_tokens)
            assert torch.equal(members.float(), state.size[image])
        if isinstance(reducer, Merge):
            assert state.size.sum(1).tolist() == [state.num_original] * 3


def test_a_merged_token_is_the_mean_of_its_members():
    for x0, x, state in reduce_repeatedly(Merge(), 6):
        for image in range(3):
            for token in range(state.num_tokens):
                members = x0[image][state.source[image] == token]
                # float32, at most four members and three steps
                torch.testing.assert_close(x[image, token], members.mean(0), rtol=1e-5, atol=1e-6)
                assert state.source[image, state.index[image, token]] == token


def test_untouched_tokens_and_copies_keep_their_bits():
    for x0, x, state in reduce_repeatedly(Merge(), 6, torch.bfloat16):
        alone = state.size == 1
        assert torch.equal(x[alone], x0[torch.arange(3)[:, None], state.index][alone])
    x = torch.full((1, 9, 4), 0.1)
    state = TokenState.start(x, 0)
    for r in (4, 2, 1):
        x, state = Merge().reduce(x, state, torch.randn(1, x.shape[1], 3), r)
    assert torch.equal(x, torch.full_like(x, 0.1))


def test_unmerge_copies_a_token_to_all_its_members():
    *_, (_, x, state) = reduce_repeatedly(Merge(), 6)
    full = state.unmerge(x)
    assert full.shape == (3, 21, 8)
    for image in range(3):
        for original in range(21):
            assert torch.equal(full[image, original], x[image, state.source[image, original]])


def test_unmerge_after_pruning_says_that_values_are_gone():
    *_, (_, x, state) = reduce_repeatedly(Prune(), 1)
    with pytest.raises(ValueError, match="some tokens were pruned"):
        state.unmerge(x)


def test_prune_drops_the_lowest_and_keeps_the_order():
    x = torch.arange(7.0)[None, :, None]
    scores = torch.tensor([-9.0, 5, 1, 4, 1, 2, 3])[None, :, None]
    kept, state = Prune().reduce(x, TokenState.start(x, 1), scores, 3)
    assert kept.flatten().tolist() == [0, 1, 3, 6]
    assert state.source.tolist() == [[0, 1, -1, 2, -1, -1, 3]]


def test_bias_is_the_logarithm_of_the_size():
    x = torch.randn(1, 9, 4)
    state = TokenState.start(x, 1)
    assert Merge().attention_bias(state) is None
    _, state = Merge().reduce(x, state, torch.randn(1, 9, 3), 4)
    assert torch.equal(Merge().attention_bias(state), state.size.log())
    assert Merge(proportional=False).attention_bias(state) is None


def test_scores_of_the_wrong_kind_are_refused():
    x = torch.randn(1, 9, 4)
    with pytest.raises(ValueError, match="use Prune"):
        Merge().reduce(x, TokenState.start(x, 1), torch.randn(1, 9, 1), 2)
    with pytest.raises(ValueError, match="use Merge"):
        Prune().reduce(x, TokenState.start(x, 1), torch.randn(1, 9, 3), 2)
