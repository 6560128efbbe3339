from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tersor.datadistill import distill, recipes
from tersor.datadistill.evaluation import ConvNet, Evaluator
from tersor.datadistill.examples import Examples

SELECTIONS = [recipes.random, recipes.herding]
selections = pytest.mark.parametrize("recipe", SELECTIONS, ids=lambda r: r.__name__)


class Items(Dataset):
    """The same data, item by item, with labels as Python numbers."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        image, label = self.dataset[i]
        return image, int(label)


@selections
def test_the_small_set_is_balanced_real_and_without_doubles(digits, recipe):
    train, _ = digits
    small = distill(train, recipe(per_class=7))
    indices = small.stored.indices
    assert len(small) == 70
    assert small.labels.bincount().tolist() == [7] * 10
    assert indices.unique().numel() == 70
    assert torch.equal(small.images, train.tensors[0][indices])
    assert torch.equal(small.labels, train.tensors[1][indices])
    x, y = next(iter(DataLoader(small, batch_size=70)))
    assert torch.equal(x, small.images)
    assert torch.equal(y, small.labels)


@selections
def test_bytes_are_those_of_the_stored_tensors(digits, recipe):
    train, _ = digits
    small = distill(train, recipe(per_class=3))
    assert small.nbytes == 30 * (64 * 4 + 8 + 8)
    assert small.source_nbytes == 1297 * (64 * 4 + 8)
    half = TensorDataset(train.tensors[0].half(), train.tensors[1])
    assert distill(half, recipe(per_class=3)).nbytes == 30 * (64 * 2 + 8 + 8)


@selections
def test_the_same_call_gives_the_same_set(digits, recipe):
    train, _ = digits
    state = torch.random.get_rng_state()
    first, second = distill(train, recipe()), distill(train, recipe())
    assert torch.equal(first.stored.indices, second.stored.indices)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_seeds_give_other_random_sets(digits):
    train, _ = digits
    one, two = (distill(train, recipes.random(), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert not torch.equal(one.stored.indices, two.stored.indices)


@selections
def test_any_map_style_data_set_will_do(digits, recipe):
    train, _ = digits
    assert torch.equal(distill(Items(train), recipe()).stored.indices, distill(train, recipe()).stored.indices)


@selections
def test_all_of_each_class_is_everything(recipe):
    dataset = TensorDataset(torch.randn(12, 5), torch.arange(12) % 3)
    small = distill(dataset, recipe(per_class=4))
    assert sorted(small.stored.indices.tolist()) == list(range(12))


def test_what_cannot_be_distilled_says_why():
    images = torch.randn(7, 3)
    few = TensorDataset(images, torch.tensor([0, 0, 0, 4, 4, 0, 0]))
    with pytest.raises(ValueError, match="class 4 has 2 examples, per_class = 3; use per_class <= 2"):
        distill(few, recipes.random(per_class=3))
    with pytest.raises(ValueError, match="per_class must be at least 1, got 0"):
        recipes.herding(per_class=0)
    with pytest.raises(ValueError, match="a recipe for sampling goes to `sample`"):
        distill(few, recipes.infobatch())
    with pytest.raises(ValueError, match="the data set is empty"):
        distill(TensorDataset(images[:0], images[:0, 0]), recipes.random())
    with pytest.raises(TypeError, match=r"labels must be class numbers \(examples,\), got shape \(7, 3\)"):
        distill(TensorDataset(images, images), recipes.random())
    with pytest.raises(TypeError, match=r"pairs \(tensor, class number\)"):
        distill(TensorDataset(images), recipes.random())
    with pytest.raises(TypeError, match=r"pairs \(tensor, class number\)"):
        distill([(torch.zeros(2), 0), (0.0, 0)], recipes.random())
    with pytest.raises(ValueError, match="2 different shapes"):
        distill([(torch.zeros(2), 0), (torch.zeros(3), 0)], recipes.random())


@pytest.mark.parametrize("label", [1.5, float("inf"), float("nan")])
def test_labels_that_are_not_whole_are_named_and_not_truncated(label):
    images, labels = torch.randn(3, 2), [0.0, label, 1.0]
    for dataset in (list(zip(images, labels)), TensorDataset(images, torch.tensor(labels))):
        with pytest.raises(ValueError, match=f"labels must be whole numbers, got {label} at index 1"):
            Examples.of(dataset)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_whole_labels_of_any_dtype_are_class_numbers(dtype):
    images, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    for dataset in (list(zip(images, labels.to(dtype))), TensorDataset(images, labels.to(dtype))):
        assert torch.equal(Examples.of(dataset).labels, labels)


EVALUATOR = Evaluator(ConvNet(depth=2, width=16), steps=120, lr=0.05)


def judged(recipe):
    return replace(recipe, evaluation=EVALUATOR)


def test_more_examples_per_class_are_better(digits):
    train, test = digits
    one = distill(train, judged(recipes.random(per_class=1))).evaluate(test)
    ten = distill(train, judged(recipes.random(per_class=10))).evaluate(test)
    # far more than the spread over seeds, 0.02
    assert ten.mean > one.mean + 0.15
    assert ten.mean > 0.8
    assert len(ten.each) == 3
    assert 0 < ten.std < 0.1
    assert sum(ten.per_class.values()) / 10 == pytest.approx(ten.mean, abs=0.02)  # classes of the test set: 40 to 60


def test_one_herded_example_is_better_than_one_random_one(digits):
    train, test = digits
    herded = distill(train, judged(recipes.herding(per_class=1))).evaluate(test).mean
    draws = [
        distill(train, judged(recipes.random(per_class=1)), generator=torch.Generator().manual_seed(seed))
        for seed in range(3)
    ]
    assert herded > sum(draw.evaluate(test).mean for draw in draws) / 3 + 0.05


def test_evaluation_is_reproducible_and_leaves_the_random_state_alone(digits):
    train, test = digits
    evaluator = Evaluator(ConvNet(depth=1, width=4), seeds=(3, 4), steps=5)
    small = distill(train, replace(recipes.random(per_class=2), evaluation=evaluator))
    state = torch.random.get_rng_state()
    first, second = small.evaluate(test), small.evaluate(test)
    assert first == second
    assert first.each[0] != first.each[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    alone = Evaluator(ConvNet(depth=1, width=4), seeds=(4,), steps=5).evaluate(small._decoded, Examples.of(test))
    assert alone.each == first.each[1:]  # a seed's network does not depend on the other seeds
    assert alone.std == 0


def test_evaluation_refuses_what_it_cannot_judge(digits):
    train, test = digits
    images, labels = train.tensors
    zeros = TensorDataset(images[labels == 0], labels[labels == 0])
    with pytest.raises(ValueError, match=r"classes \[1, 2, 3, 4, 5, 6, 7, 8, 9\] of the test set are not in"):
        distill(zeros, recipes.random()).evaluate(test)
    whole = TensorDataset((images * 16).to(torch.uint8), labels)
    with pytest.raises(TypeError, match=r"training images are torch.uint8; scale them"):
        distill(whole, recipes.random()).evaluate(test)
    with pytest.raises(ValueError, match="seeds is empty"):
        Evaluator(seeds=())


@pytest.mark.parametrize(("shape", "depth"), [((1, 28, 28), 3), ((3, 32, 32), 3), ((1, 8, 8), 3), ((2, 9, 9), 2)])
def test_convnet_fits_any_square_image(shape, depth):
    network = ConvNet(depth, width=4).build(shape, 10)
    assert network(torch.randn(2, *shape)).shape == (2, 10)


def test_convnet_is_the_published_one_at_28_pixels():
    first, *_, last = ConvNet().build((1, 28, 28), 10)
    assert first.padding == (3, 3)  # 28 becomes 32
    assert last.in_features == 128 * 4 * 4


def test_convnet_says_which_images_it_takes():
    with pytest.raises(ValueError, match=r"takes square images \(channels, side, side\), got \(5,\)"):
        ConvNet().build((5,), 2)
    with pytest.raises(ValueError, match="4 x 4 are smaller than 2\\^depth = 8"):
        ConvNet().build((1, 4, 4), 2)
