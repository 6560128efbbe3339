"""Layouts: how the bits of a tensor are regrouped before coding. A piece says which `Form` a dtype takes."""

from .planes import BytePlanes, ExponentSplit, Raw

__all__ = ["BytePlanes", "ExponentSplit", "Raw"]
