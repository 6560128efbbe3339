"""The zoo's image classifiers: what ships is what was trained, and their training resumes to the bit and repeats."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel

from tersor.integration import models, zoo
from tersor.integration.errors import UserError
from tersor.integration.zoo.training import images as training
from tersor.integration.zoo.training.run import cosine

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
NAMES = list(training.TRAININGS)


@pytest.fixture(scope="module")
def test_images():
    """Fashion-MNIST's 10,000 test images (n, 28, 28) and their labels (n,)."""
    pytest.importorskip("datasets", reason="the zoo's data needs the library datasets")
    try:
        return training.read("test")
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_weights_load_with_plain_transformers_in_float16(name):
    folder = zoo.path(name)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert models.checkpoint_dtype(folder) is torch.float16
    assert model.num_parameters() * 2 <= models.tensor_nbytes(folder) <= model.num_parameters() * 2.01
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4e6
    assert model.config.id2label[9] == "Ankle boot"


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_is_the_one_that_the_script_trains(name):
    shipped = AutoModelForImageClassification.from_pretrained(zoo.path(name)).config
    fresh = AutoModelForImageClassification.from_config(training.TRAININGS[name].config).config
    for key in ("patch_size", "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_sizes", "depths"):
        assert getattr(shipped, key, None) == getattr(fresh, key, None)


@pytest.mark.parametrize("name", NAMES)
def test_test_accuracy_is_above_the_bar_and_on_the_card(name, test_images):
    model, _ = zoo.load(name)
    accuracy = training.accuracy(model, *test_images)
    assert accuracy >= training.TRAININGS[name].bar
    card = (zoo.path(name) / "README.md").read_text().splitlines()
    stated = next(line for line in card if line.startswith(f"| {name} |"))
    # another processor's rounding may flip a few of the 10,000
    assert float(stated.split("|")[2].strip(" %")) == pytest.approx(100 * accuracy, abs=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_processor_prepares_pictures_as_training_did(name, test_images):
    _, processor = zoo.load(name)
    pictures = [Image.fromarray(image.numpy()) for image in test_images[0][:20]]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, training.normalise(test_images[0][:20]))


def test_nearest_class_mean_is_far_worse(test_images):
    images, labels = training.read("validation")  # means of 500 images of each class are as good as of 5500
    assert 0.6 < training.nearest_mean_accuracy(images, labels, *test_images) < 0.75


@pytest.mark.parametrize("name", NAMES)
def test_load_gives_a_float32_model_that_is_ready_to_use(name):
    model, processor = zoo.load(name)
    assert isinstance(model, PreTrainedModel)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert type(processor) is type(AutoImageProcessor.from_pretrained(zoo.path(name)))


def test_load_gives_a_language_model_with_its_tokenizer():
    model, tokenizer = zoo.load("tiny-lm")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.decode(tokenizer("It was").input_ids) == "It was"


def test_pooled_features_of_the_cnn_tell_classes_apart(test_images):
    """For FID: two halves of one class are nearer to each other than two classes are."""
    images, labels = test_images
    model = AutoModel.from_pretrained(zoo.path("tiny-cnn"), dtype=torch.float32).eval()

    def mean_features(rows):
        with torch.inference_mode():
            pooled = model(training.normalise(images[rows])).pooler_output
        assert pooled.shape == (50, 128, 1, 1)
        return pooled.flatten(1).mean(0)

    classes = [(labels == label).nonzero().flatten()[:100] for label in range(10)]
    halves = [(mean_features(rows[:50]), mean_features(rows[50:])) for rows in classes]
    for (first, second), (other, _) in itertools.pairwise(halves):
        assert (first - second).norm() < (first - other).norm() / 2


@pytest.mark.parametrize("name", NAMES)
def test_damaged_weights_are_named(name, tmp_path, monkeypatch):
    shutil.copytree(zoo.path(name), tmp_path / name.replace("-", "_"))
    monkeypatch.setattr(zoo, "_HERE", tmp_path)
    zoo.load(name)
    weights = tmp_path / name.replace("-", "_") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(OSError, match=r"model\.safetensors is damaged or missing; reinstall tersor"):
        zoo.load(name)


@pytest.mark.parametrize("name", NAMES)
def test_squeeze_refuses_a_classifier_in_one_line(name, tersor):
    result = tersor("squeeze", name)
    assert result.returncode == 2
    assert f"{name} is a model for image classification; squeeze takes a causal language model" in result.stderr
    assert "Traceback" not in result.stderr


def tiny_run(name, folder):
    """A training of 8 steps, on noise."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (64, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (64,), generator=generator)
    settings = dataclasses.replace(training.TRAININGS[name], batch_size=16, epochs=2)
    return training.start(settings, folder, pictures, labels, seed=0)


@pytest.mark.parametrize("name", training.TRAININGS)
def test_stopped_training_ends_with_the_same_weights(name, tmp_path):
    whole, stopped = tiny_run(name, tmp_path / "whole"), tiny_run(name, tmp_path / "stopped")
    losses = [whole.advance() for _ in range(whole.steps)]
    found = [stopped.advance() for _ in range(5)]
    stopped.save()
    stopped.advance()  # lost
    resumed = tiny_run(name, tmp_path / "stopped")
    assert found + [resumed.advance() for _ in range(3)] == losses
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_checkpoint_of_another_training_is_refused(tmp_path):
    tiny_run("tiny-cnn", tmp_path).save()
    with pytest.raises(UserError, match=r"checkpoint\.pt is of a run with other settings or another seed"):
        tiny_run("tiny-vit", tmp_path)


def test_each_image_comes_once_an_epoch():
    settings = dataclasses.replace(training.TINY_CNN, batch_size=16, epochs=2, shift=0, mirrored=0.0)
    pictures = torch.arange(64).to(torch.uint8)[:, None, None].expand(-1, 28, 28)
    source = training.Images(settings, pictures, torch.arange(64), seed=0)
    assert source.steps == 8
    for first in (0, 4):
        seen = torch.cat([source.batch(step)[0] for step in range(first, first + 4)])
        assert seen[:, 0, 0].sort().values.tolist() == list(range(64))


def test_augmented_images_are_moved_and_mirrored_ones():
    pictures = torch.zeros(200, 28, 28, dtype=torch.uint8)
    pictures[:, 10, 8] = 255
    assert torch.equal(training.augment(pictures, 0, 0.0, [0]), pictures)
    assert torch.equal(training.augment(pictures, 0, 1.0, [0]), pictures.flip(-1))
    rows, columns = training.augment(pictures, 2, 0.0, [0]).nonzero()[:, 1:].T
    assert set(rows.tolist()) == {8, 9, 10, 11, 12}
    assert set(columns.tolist()) == {6, 7, 8, 9, 10}


def test_rate_rises_to_one_and_falls_to_zero():
    shares = [cosine(step / 1000, 0.1) for step in range(1001)]
    assert shares.index(max(shares)) == 100
    assert max(shares) == 1.0
    assert 0 < shares[0] < 0.02
    assert shares[-1] < 1e-12
    assert shares[:101] == sorted(shares[:101])
    assert shares[100:] == sorted(shares[100:], reverse=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_retrained_cnn_lands_within_half_a_point(tmp_path, test_images):
    """Eight to ten minutes of one free core."""
    figures = training.train(training.TINY_CNN, tmp_path, lambda *_: None)
    shipped, _ = zoo.load("tiny-cnn")
    assert figures["accuracy"] == pytest.approx(training.accuracy(shipped, *test_images), abs=0.005)
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "resnet"
    zoo.verify(tmp_path / "model")
