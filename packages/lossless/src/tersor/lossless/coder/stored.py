"""No coding."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable


@runtime_checkable
class Coder(Protocol):
    """`decode(encode(plane), len(plane))` gives the bytes of `plane` back.

    `decode` raises ValueError for whatever else it is given. `id` names it in the file; one id, one format.
    """

    id: ClassVar[int]

    def encode(self, plane: memoryview) -> bytes | memoryview: ...

    @staticmethod
    def decode(stream: memoryview, n: int) -> bytes | memoryview: ...


@dataclass(frozen=True)
class Stored:
    """The bytes themselves. What every plane falls back to where its coder saves nothing."""

    id: ClassVar[int] = 0

    def encode(self, plane: memoryview) -> bytes | memoryview:
        return plane

    @staticmethod
    def decode(stream: memoryview, n: int) -> bytes | memoryview:
        if len(stream) != n:
            raise ValueError(f"stored plane of {len(stream)} bytes, expected {n}")
        return stream
