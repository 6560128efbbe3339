"""Which token the target puts at each position; a drafted one stands if it is that token."""

from tersor.decoding.verifier.match import Greedy, SampleMatch

__all__ = ["Greedy", "SampleMatch"]
