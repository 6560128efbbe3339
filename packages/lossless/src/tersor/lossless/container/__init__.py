"""Containers: the packed file. A piece says how it is cut; `packed` reads it and `writer` writes it."""

from .frames import Frames

__all__ = ["Frames"]
