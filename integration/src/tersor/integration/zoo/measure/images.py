"""Image classifiers: accuracy on Fashion-MNIST's test images."""

from typing import Any

from tersor.integration.zoo.measure import Figure
from tersor.integration.zoo.training import images as training


def figures(name: str, model: Any, processor: Any) -> list[Figure]:
    test_images, test_labels = training.read("test")
    nearest = training.nearest_mean_accuracy(*training.read("train"), test_images, test_labels)
    return [
        Figure(
            "accuracy, 10,000 test images",
            training.accuracy(model, test_images, test_labels),
            nearest,
            "nearest class mean",
            bar=training.TRAININGS[name].bar,
        )
    ]
