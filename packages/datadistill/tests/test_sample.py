import copy
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from tersor.datadistill import recipes, sample
from tersor.datadistill.sampling import SoftPrune


def mlp(seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
        )


def train(digits, epochs, seed, recipe=None, workers=0):
    """Test accuracy, the model and the batches; without a recipe plain training in the same order."""
    dataset = digits[0]
    model, generator = mlp(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = None
    if recipe is None:
        plain = BatchSampler(RandomSampler(dataset, generator=generator), 32, drop_last=False)
        loader = DataLoader(dataset, batch_sampler=plain)
    else:
        batches = sample(dataset, recipe, epochs=epochs, batch_size=32, generator=generator)
        loader = DataLoader(batches.dataset, batch_sampler=batches, num_workers=workers)
    for _ in range(epochs):
        for batch in loader:
            if batches is None:
                x, y = batch
                loss = cross_entropy(model(x), y)
            else:
                index, (x, y) = batch
                loss = batches.weigh(index, cross_entropy(model(x), y, reduction="none"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x, y = digits[1].tensors
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item(), model, batches


def linear_problem(n=200):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator).double()
    y = torch.randn(n, generator=generator).double()
    w = torch.randn(5, generator=generator).double()
    residual = x @ w - y
    return 2 * residual[:, None] * x, residual.square()  # gradient and loss of each example


@pytest.mark.parametrize("r", [0.3, 0.5, 0.9])
def test_the_weighted_gradient_is_unbiased(r):
    gradients, losses = linear_problem()
    generator = torch.Generator().manual_seed(1)
    sums = []
    for _ in range(2000):
        keep, weight = SoftPrune(r, delta=1).select(losses.float(), 3, 10, generator)
        sums.append((weight * keep)[:, None].double().mul(gradients).sum(0))
    sums = torch.stack(sums)
    error = (sums.mean(0) - gradients.sum(0)).abs()
    assert (error < 3 * sums.std(0) / len(sums) ** 0.5).all()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_weights_sum_to_the_examples_whatever_the_rounding(n):
    scores = torch.cat([torch.zeros(n), torch.ones(n)])
    for seed in range(10):
        keep, weight = SoftPrune(0.6, delta=1).select(scores, 0, 1, torch.Generator().manual_seed(seed))
        # so each of the low ones has the probability 1 / its weight: unbiased by symmetry
        assert float(weight[keep].sum()) == pytest.approx(2 * n, rel=1e-6)  # float32 weights
        assert keep[n:].all()
        assert torch.equal(weight[n:], torch.ones(n))
        assert int(keep[:n].sum()) == max(1, round(0.4 * n))


def test_only_examples_below_the_mean_of_the_known_losses_are_skipped():
    scores = torch.tensor([0.0, 1.0, 2.0, 9.0, torch.nan, torch.nan])  # mean of the known: 3
    skipped = torch.zeros(6, dtype=torch.bool)
    for seed in range(30):
        skipped |= ~SoftPrune(0.5, delta=1).select(scores, 0, 1, torch.Generator().manual_seed(seed)).keep
    assert skipped.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(("epochs", "delta", "full"), [(8, 0.875, 1), (6, 0.875, 1), (10, 0.5, 5), (4, 1.0, 0)])
def test_the_first_and_the_last_epochs_see_everything(epochs, delta, full):
    dataset = TensorDataset(torch.arange(50))
    batches = sample(dataset, recipes.infobatch(delta=delta), epochs=epochs, batch_size=8)
    for _ in range(epochs):
        for index, _ in DataLoader(batches.dataset, batch_sampler=batches):
            batches.weigh(index, index.float())
    kept = [epoch.kept for epoch in batches.stats.epochs]
    # losses 0 ... 49: 25 are below the mean, and round(12.5) = 12 of them are kept
    assert kept == [50] + [37] * (epochs - 1 - full) + [50] * full
    assert batches.stats.ratio == sum(kept) / (50 * epochs)


@pytest.mark.parametrize("recipe", [recipes.infobatch(r=0), recipes.infobatch(delta=0)], ids=["r=0", "delta=0"])
def test_without_skipping_it_is_plain_training_bit_by_bit(digits, recipe):
    with pytest.warns(UserWarning, match="left out nothing in 3 epochs"):
        _, model, batches = train(digits, 3, seed=5, recipe=recipe)
    _, plain, _ = train(digits, 3, seed=5)
    assert batches.stats.ratio == 1
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        assert torch.equal(mine, theirs)
    plain_order = BatchSampler(RandomSampler(digits[0], generator=torch.Generator().manual_seed(5)), 32, False)
    again = sample(digits[0], recipe, epochs=9, batch_size=32, generator=torch.Generator().manual_seed(5))
    assert list(again) == list(plain_order)


def test_fewer_examples_reach_the_same_accuracy(digits):
    plain, thinned, ratios = [], [], []
    for seed in range(3):
        plain.append(train(digits, 20, seed)[0])
        accuracy, _, batches = train(digits, 20, seed, recipes.infobatch())
        thinned.append(accuracy)
        ratios.append(batches.stats.ratio)
    assert max(ratios) < 0.7
    # one point: two standard errors of the mean of three runs over 500 test images
    assert sum(thinned) / 3 > sum(plain) / 3 - 0.01


def test_two_workers_give_losses_to_the_right_examples():
    dataset = TensorDataset(torch.arange(40) * 10.0)
    batches = sample(dataset, recipes.infobatch(), epochs=3, batch_size=4)
    for _ in range(2):
        for index, (value,) in DataLoader(batches.dataset, batch_sampler=batches, num_workers=2):
            batches.weigh(index, value)
        assert torch.equal(batches.scores, torch.arange(40) * 10.0)
    assert [epoch.kept for epoch in batches.stats.epochs] == [40, 30]


def test_the_returned_loss_is_the_weighted_mean_and_carries_the_gradient():
    batches = sample(TensorDataset(torch.zeros(8)), recipes.infobatch(r=0.75), epochs=4, batch_size=8)
    for index, _ in DataLoader(batches.dataset, batch_sampler=batches):
        batches.weigh(index, (index >= 4).float())
    (index, _), *_ = DataLoader(batches.dataset, batch_sampler=batches)
    assert len(index) == 5  # one of the four low ones, with weight 4
    losses = torch.ones(5, requires_grad=True)
    loss = batches.weigh(index, losses)
    assert loss.item() == pytest.approx((4 + 4) / 5)
    loss.backward()
    weight = torch.where(index < 4, 4.0, 1.0)
    assert torch.equal(losses.grad, weight / 5)
    assert torch.equal(losses, torch.ones(5))  # not touched in place


def test_your_own_sampler_is_filtered_in_its_order():
    dataset = TensorDataset(torch.arange(30))
    batches = sample(dataset, recipes.infobatch(), epochs=4, batch_size=7, sampler=SequentialSampler(dataset))
    seen = []
    for index, _ in DataLoader(batches.dataset, batch_sampler=batches):
        batches.weigh(index, index.float())
    for index, _ in DataLoader(batches.dataset, batch_sampler=batches):
        seen += index.tolist()
    assert seen == sorted(seen)
    assert len(seen) == 30 - 15 + round(7.5)


@pytest.mark.parametrize("order", [[], [5, 7]], ids=["empty", "less than a batch"])
def test_your_own_sampler_may_give_no_batch(order):
    batches = sample(
        TensorDataset(torch.arange(30)), recipes.infobatch(), epochs=3, batch_size=4, sampler=order, drop_last=True
    )
    assert [list(batches), list(batches)] == [[], []]


@pytest.mark.parametrize("epochs", [7, 100])
def test_the_share_of_epochs_that_skip_has_no_rounding_error(epochs):
    def skips(delta, epoch):
        return not SoftPrune(delta=delta).select(torch.arange(8.0), epoch, epochs, torch.Generator()).keep.all()

    for n in range(1, epochs):
        assert skips(n / epochs, n - 1)
        assert not skips(n / epochs, n)


def test_length_is_that_of_the_epoch():
    batches = sample(TensorDataset(torch.arange(50)), recipes.infobatch(), epochs=3, batch_size=8)
    short = sample(TensorDataset(torch.arange(50)), recipes.infobatch(), epochs=3, batch_size=8, drop_last=True)
    for b in (batches, short):
        for _ in range(2):
            handed = 0
            for index, _ in DataLoader(b.dataset, batch_sampler=b):
                b.weigh(index, index.float())
                handed += 1
            assert handed == len(b)
    assert (len(batches), len(short)) == (5, 4)


def run(batches, epochs):
    """Indices of the next epochs, with losses that differ between epochs."""
    seen = []
    for epoch in range(epochs):
        for index, _ in DataLoader(batches.dataset, batch_sampler=batches):
            seen.append(index.tolist())
            batches.weigh(index, torch.sin(index * (1.0 + len(batches.stats.epochs))))
        seen.append(epoch)
    return seen


def test_a_resumed_run_goes_on_with_the_same_bits():
    def new(seed):
        return sample(
            TensorDataset(torch.arange(60)),
            recipes.infobatch(ema=0.5),
            epochs=6,
            batch_size=8,
            generator=torch.Generator().manual_seed(seed),
        )

    straight = new(0)
    run(straight, 3)
    state = copy.deepcopy(straight.state_dict())
    rest = run(straight, 3)
    resumed = new(1)
    resumed.load_state_dict(state)
    assert run(resumed, 3) == rest
    assert resumed.stats == straight.stats
    assert torch.equal(resumed.scores, straight.scores)
    short = sample(TensorDataset(torch.arange(60)), recipes.infobatch(), epochs=2, batch_size=8)
    short.load_state_dict(state)
    with pytest.raises(RuntimeError, match="all 2 epochs are done"):
        list(short)
    with pytest.raises(ValueError, match="state is of 60 examples, the data set has 5"):
        sample(TensorDataset(torch.arange(5)), recipes.infobatch(), epochs=2, batch_size=2).load_state_dict(state)


def test_the_same_seed_gives_the_same_epochs_and_no_global_state_is_touched():
    state = torch.random.get_rng_state()
    orders = []
    for _ in range(2):
        batches = sample(TensorDataset(torch.arange(60)), recipes.infobatch(), epochs=4, batch_size=8)
        epochs = []
        for _ in range(4):
            epochs.append(list(batches))
            for indices in epochs[-1]:
                batches.weigh(torch.tensor(indices), torch.tensor(indices).float())
        orders.append(epochs)
    assert orders[0] == orders[1]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_losses_that_are_not_finite_keep_the_old_score_and_are_counted():
    batches = sample(TensorDataset(torch.arange(4)), recipes.infobatch(), epochs=2, batch_size=4)
    list(batches)
    batches.weigh(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    batches.weigh(torch.arange(4), torch.tensor([5.0, torch.nan, torch.inf, 6.0]))
    assert batches.scores.tolist() == [5, 2, 3, 6]
    assert batches.stats.nan_losses == 2


def test_ema_remembers():
    prune = SoftPrune(ema=0.75)
    scores = prune.update(torch.tensor([torch.nan, 4.0]), torch.tensor([2.0, 8.0]))
    assert scores.tolist() == [2, 5]


def test_misuse_says_what_to_do():
    dataset = TensorDataset(torch.arange(10))
    new = {"epochs": 2, "batch_size": 4}
    batches = sample(dataset, recipes.infobatch(), **new)
    list(batches)
    with pytest.raises(ValueError, match=r'losses has shape \(\), index \(4,\); .* reduction="none"'):
        batches.weigh(torch.arange(4), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="no loss of the last epoch was recorded: call weigh"):
        list(batches)
    batches.weigh(torch.arange(4), torch.ones(4))
    with pytest.raises(RuntimeError, match="epoch 0 has 10 examples, 4 losses are recorded"):
        batches.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(batches)
    with pytest.raises(RuntimeError, match="all 2 epochs are done"):
        list(batches)
    with pytest.raises(ValueError, match="a recipe for a smaller set goes to `distill`"):
        sample(dataset, recipes.random(), **new)
    with pytest.raises(ValueError, match="epochs and batch_size must be at least 1"):
        sample(dataset, recipes.infobatch(), epochs=0, batch_size=4)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match="Stream has no items by index"):
        sample(Stream(), recipes.infobatch(), **new)
    for settings in ({"r": 1.0}, {"r": -0.1}, {"delta": 1.1}, {"ema": 1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            recipes.infobatch(**settings)
