"""Who guesses the next tokens."""

from tersor.decoding.drafter.model import ModelDrafter
from tersor.decoding.drafter.ngram import NgramDrafter

__all__ = ["ModelDrafter", "NgramDrafter"]
