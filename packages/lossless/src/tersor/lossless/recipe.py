"""One choice along each axis of lossless compression."""

from dataclasses import dataclass, field

from .coder import Huffman
from .coder.stored import Coder
from .container.frames import Frames
from .layout import ExponentSplit
from .layout.planes import Layout


@dataclass(frozen=True)
class Recipe:
    """layout · coder · container. (A `model` axis comes with the first coder that predicts: so far codes are order 0.)

    Args:
        layout: how the bits of a tensor are regrouped.
        coder: what becomes of a plane; a plane that it does not shrink is stored.
        container: how the file is cut into blocks, and what becomes of the files without tensors.
    """

    layout: Layout = field(default_factory=ExponentSplit)
    coder: Coder = field(default_factory=Huffman)
    container: Frames = field(default_factory=Frames)

    def __post_init__(self) -> None:
        for axis, kind in (("layout", Layout), ("coder", Coder), ("container", Frames)):
            if not isinstance(getattr(self, axis), kind):
                raise TypeError(f"{axis} must be a piece of tersor.lossless.{axis}, got {getattr(self, axis)!r}")
