"""How many tokens to draft in each step."""

from tersor.decoding.controller.length import FixedLength, Heuristic

__all__ = ["FixedLength", "Heuristic"]
