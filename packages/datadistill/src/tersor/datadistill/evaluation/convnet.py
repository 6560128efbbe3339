"""The field's standard network."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ConvNet:
    """`depth` times conv 3 x 3, instance norm, ReLU, mean pooling by 2; then a linear classifier.

    Source: arXiv:2006.05929, section 4.1. Sides that 2^depth does not divide are padded in the first convolution: 28
    becomes 32, as in that paper's code.

    Args:
        depth: blocks.
        width: channels of each.
    """

    depth: int = 3
    width: int = 128

    def __post_init__(self) -> None:
        if self.depth < 1 or self.width < 1:
            raise ValueError(f"depth and width must be at least 1, got {self.depth} and {self.width}")

    def build(self, image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A new network for images (channels, side, side), initialised from torch's current seed."""
        if len(image_shape) != 3 or image_shape[1] != image_shape[2]:
            raise ValueError(f"ConvNet takes square images (channels, side, side), got {image_shape}")
        channels, side, _ = image_shape
        fold = 2**self.depth
        if side < fold:
            raise ValueError(f"images of {side} x {side} are smaller than 2^depth = {fold}; use a smaller depth")
        pad = -(-(-side % fold) // 2)
        layers = []
        for i in range(self.depth):
            layers += [
                nn.Conv2d(channels if i == 0 else self.width, self.width, 3, padding=1 + (pad if i == 0 else 0)),
                nn.GroupNorm(self.width, self.width),  # one group per channel is instance norm
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        features = self.width * ((side + 2 * pad) // fold) ** 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, num_classes))
