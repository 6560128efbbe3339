"""A small diffusion transformer and its sampler, to try caches on without a download."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ToyDiT(nn.Module):
    """Class-conditional DiT with adaLN for a rectified flow: predicts v = noise - data of x_t = (1 - t) data + t noise.

    Weights are random (not adaLN-zero, where a fresh model's blocks would do nothing) and drawn from `seed`.

    Args:
        image_size: side of the square images, a multiple of 2 (the patch size).
        num_classes: labels are 0 ... num_classes - 1; `num_classes` itself stands for "no label".
    """

    def __init__(
        self,
        image_size: int = 8,
        width: int = 32,
        depth: int = 2,
        num_heads: int = 2,
        num_classes: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.image_size, self.num_classes = image_size, num_classes
        num_tokens = (image_size // 2) ** 2
        self.patch_embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.empty(num_tokens, width))
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Linear(width, 4)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                std = 0.5 if name in ("position", "label_embed.weight") else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (std if parameter.ndim > 1 else 0))

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """Velocity at `x` (batch, 1, size, size), `timestep` (batch,) in [0, 1], `labels` (batch,)."""
        tokens = F.pixel_unshuffle(x, 2).flatten(2).mT  # (batch, tokens, 4)
        hidden = self.patch_embed(tokens) + self.position
        width = hidden.shape[-1]
        frequency = torch.exp(torch.arange(width // 2, device=x.device) * (-math.log(100.0) / (width // 2)))
        angle = timestep[:, None].float() * frequency * 2 * math.pi
        embedded = torch.cat([angle.cos(), angle.sin()], -1).to(hidden.dtype)
        condition = F.silu(self.time_embed(embedded) + self.label_embed(labels))
        for block in self.blocks:
            hidden = block(hidden, condition)
        side = self.image_size // 2
        return F.pixel_shuffle(self.head(self.norm(hidden)).mT.unflatten(2, (side, side)), 2)


class DiTBlock(nn.Module):
    """x + gate * attn(modulated norm(x)), then the same with the MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulation(condition)[:, None].chunk(6, -1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_attn * self.attn(self.norm1(x) * (1 + scale_attn) + shift_attn)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def euler(model: nn.Module, noise: Tensor, labels: Tensor, steps: int, guidance: float | None = None) -> Tensor:
    """x_{i+1} = x_i - v / steps from t = 1 to 0; with `guidance` w: v = u + w (c - u), two calls per step."""
    x = noise
    for i in range(steps):
        timestep = torch.full((len(x),), 1 - i / steps, dtype=x.dtype, device=x.device)
        v = model(x, timestep, labels)
        if guidance is not None:
            u = model(x, timestep, torch.full_like(labels, model.num_classes))  # pyright: ignore[reportArgumentType]
            v = u + guidance * (v - u)
        x = x - v / steps
    return x


def blobs(labels: Tensor, generator: torch.Generator) -> Tensor:
    """8 x 8 images in [-1, 1]: a bright spot in the quadrant that the label names, its place and width drawn."""
    centre = torch.stack([labels // 2, labels % 2], -1) * 4 + 1 + torch.rand(len(labels), 2, generator=generator)
    width = 0.8 + 0.6 * torch.rand(len(labels), 1, 1, generator=generator)
    square = (torch.arange(8.0) - centre[..., None]) ** 2  # (batch, 2, 8)
    return (2 * torch.exp(-(square[:, 0, :, None] + square[:, 1, None]) / (2 * width**2)) - 1)[:, None]


def trained_toy(train_steps: int = 250, depth: int = 3) -> ToyDiT:
    """A `ToyDiT` that has learnt `blobs` by rectified flow, labels dropped one time in ten: seconds on one core."""
    generator = torch.Generator().manual_seed(0)
    model = ToyDiT(depth=depth)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modulation." in name:
                parameter.zero_()  # adaLN-zero
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    with torch.enable_grad():
        for _ in range(train_steps):
            labels = torch.randint(4, (64,), generator=generator)
            data, noise = blobs(labels, generator), torch.randn(64, 1, 8, 8, generator=generator)
            labels = labels.where(torch.rand(64, generator=generator) > 0.1, 4)
            timestep = torch.rand(64, generator=generator)
            x = data + timestep[:, None, None, None] * (noise - data)
            loss = (model(x, timestep, labels) - (noise - data)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()
