"""The low-rank term: equal to the sum that it stands for, of any shape, with gradients for everything."""

import pytest
import torch

from tersor.kernels import add_low_rank


def problem(generator, shape, n, rank, out, dtype=torch.float64):
    shapes = ((*shape, out), (*shape, n), (n, rank), (rank, out))
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize(("n", "rank", "out"), [(16, 4, 24), (7, 1, 5), (3, 0, 4), (0, 2, 3), (4, 2, 0)])
def test_term_is_added(generator, shape, n, rank, out):
    y, x, down, up = problem(generator, shape, n, rank, out)
    torch.testing.assert_close(add_low_rank(y, x, down, up), y + x @ down @ up)


def test_full_rank_restores_the_dense_layer(generator):
    _, x, compressed, weight = problem(generator, (5,), 8, 8, 8)
    U, S, Vh = torch.linalg.svd(weight - compressed)
    torch.testing.assert_close(add_low_rank(x @ compressed, x, U * S, Vh), x @ weight)


def test_gradient_of_every_argument(generator):
    arguments = [t.requires_grad_() for t in problem(generator, (2, 3), 5, 2, 4)]
    assert torch.autograd.gradcheck(add_low_rank, arguments)


def test_compiles_into_one_graph(generator):
    arguments = problem(generator, (3,), 5, 2, 4)
    compiled = torch.compile(add_low_rank, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), add_low_rank(*arguments))


def test_bad_arguments_are_named(generator):
    y, x, down, up = problem(generator, (3,), 5, 2, 4)
    with pytest.raises(TypeError, match=r"up is torch.float32, but x is torch.float64; use up.to\(x.dtype\)"):
        add_low_rank(y, x, down, up.float())
    with pytest.raises(ValueError, match="down is on meta, but x is on cpu"):
        add_low_rank(y, x, down.to("meta"), up)
    with pytest.raises(ValueError, match=r"got \(3, 5\), \(2, 5\) and \(2, 4\)"):
        add_low_rank(y, x, down.T, up)
    with pytest.raises(ValueError, match=r"y must be \(3, 4\), got \(4,\)"):
        add_low_rank(y[0], x, down, up)
