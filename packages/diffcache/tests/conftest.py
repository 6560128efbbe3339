import pytest
import torch

from tersor.diffcache.testing import ToyDiT


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return ToyDiT().eval()
