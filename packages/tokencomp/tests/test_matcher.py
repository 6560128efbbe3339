import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.tokencomp.matcher import Bipartite


def slow_bipartite(features, r, num_protected):
    """The paper's five steps for one image, token by token: A even, B odd, protected ones apart."""
    m = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    free = range(num_protected, len(features))
    a, b = [i for i in free if i % 2 == 0], [i for i in free if i % 2 == 1]
    edges = []
    for i in a:
        best = max(b, key=lambda j: (round(float(m[i] @ m[j]), 6), -j))
        edges.append((float(m[i] @ m[best]), i, best))
    edges.sort(key=lambda edge: -edge[0])
    merged = edges[:r]
    gone = {i for _, i, _ in merged}
    kept = [*range(num_protected), *(i for i in a if i not in gone), *b]
    return [i for _, i, _ in merged], [j for *_, j in merged], kept


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(2, 24), num_protected=st.integers(0, 6), data=st.data())
def test_bipartite_equals_the_slow_reference(tokens, num_protected, data):
    num_protected = min(num_protected, tokens)
    limit = Bipartite().limit(tokens, num_protected)
    r = data.draw(st.integers(0, limit))
    if not limit:
        return
    features = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    match = Bipartite().match(features, r, num_protected)
    for image in range(2):
        source, target, kept = slow_bipartite(features[image], r, num_protected)
        assert match.source[image].tolist() == source
        assert match.target[image].tolist() == target
        assert match.kept[image].tolist() == kept


@pytest.mark.parametrize("num_protected", range(7))
@pytest.mark.parametrize("tokens", range(1, 20))
def test_limit_can_always_be_reached(tokens, num_protected):
    limit = Bipartite().limit(tokens, num_protected)
    assert limit == max(0, (tokens - num_protected) // 2)
    if limit:
        match = Bipartite().match(torch.randn(1, tokens, 4), limit, num_protected)
        assert match.source.unique().numel() == limit
        assert set(match.source[0].tolist()).isdisjoint(match.target[0].tolist())


def test_equal_tokens_tie_in_favour_of_the_earlier_one():
    match = Bipartite().match(torch.ones(1, 9, 4), 2, num_protected=1)
    assert match.source[0].tolist() == [2, 4]
    assert match.target[0].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_features_in_half_precision_give_no_nan(dtype):
    features = torch.zeros(1, 8, 4, dtype=dtype)
    features[0, 2:4] = 1.0
    match = Bipartite().match(features, 1, num_protected=0)
    assert match.source.tolist() == [[2]]
    assert match.target.tolist() == [[3]]


def test_macs_count_the_similarities():
    # 197 tokens, one protected: A has 98, B has 98, keys of 64
    assert Bipartite().macs(197, 1, 64) == 98 * 98 * 64
    assert Bipartite().macs(10, 0, 3) == 5 * 5 * 3
