import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's 8 x 8 digits, shuffled: 1297 to train on, 500 to test."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(data.target)[order]
    return TensorDataset(images[:1297], labels[:1297]), TensorDataset(images[1297:], labels[1297:])
