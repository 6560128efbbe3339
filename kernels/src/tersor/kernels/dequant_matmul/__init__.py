from torch import Tensor

from tersor.kernels.bits import unpack_bits


def dequant_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int) -> Tensor:
    codes = unpack_bits(packed, bits, x.shape[-1]).unflatten(-1, (-1, group_size))
    weight = ((codes - zero_point[..., None].float()) * scale[..., None].float()).flatten(-2)
    return x @ weight.to(x.dtype).T
