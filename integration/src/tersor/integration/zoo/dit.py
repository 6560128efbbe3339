"""A class-conditional diffusion transformer for small grey images and short videos, and its samplers.

This file imports torch and transformers alone, so that it can be loaded from its path, without tersor.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

NUM_TIMESTEPS = 1000  # of the epsilon models: 0 is nearly data, 999 nearly noise
# where `ddim` begins: a = 0.001. Beyond, the data is noise - epsilon over nearly 0: in half precision, rounding alone
FIRST_TIMESTEP = 979


class DiTConfig(PreTrainedConfig):
    """Args:
    num_frames: 1 makes a model of images, x of (batch, channels, height, width); more frames one of videos, x of
        (batch, channels, frames, height, width).
    patch_size: pixels of a token's square; tubelet_size is its number of frames.
    num_classes: labels are 0 ... num_classes - 1; `num_classes` itself stands for "no label".
    prediction: what the model returns, and with it what its timesteps are. "velocity": noise - data, at
        x = (1 - t) data + t noise, t in [0, 1]. "epsilon": the noise, at x = sqrt(a_k) data + sqrt(1 - a_k) noise,
        k = 0 ... 999, a_k as in `alphas_cumprod`.
    """

    model_type = "zoo_dit"

    hidden_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    intermediate_size: int = 512
    image_size: int = 28
    patch_size: int = 4
    num_frames: int = 1
    tubelet_size: int = 1
    num_channels: int = 1
    num_classes: int = 10
    prediction: str = "velocity"
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.prediction not in ("velocity", "epsilon"):
            raise ValueError(f'prediction must be "velocity" or "epsilon", got {self.prediction!r}')
        for name, size, part in (
            ("patch_size", self.image_size, self.patch_size),
            ("tubelet_size", self.num_frames, self.tubelet_size),
            ("4 * num_attention_heads", self.hidden_size, 4 * self.num_attention_heads),
        ):
            if size % part:
                raise ValueError(f"{name} = {part} must divide {size}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side


class DiT(PreTrainedModel):
    """DiT with adaLN-zero (arXiv:2212.09748, section 3.2).

    Unlike the paper's code, the position embedding is learnt, from sines and cosines on, and stored with the weights;
    and GELU is exact, not approximated by tanh, which on a CPU takes five times as long. The last layer of an epsilon
    model says v = sqrt(a) noise - sqrt(1 - a) data (arXiv:2202.00512), which makes noise = sqrt(1 - a) x + sqrt(a) v: near
    timestep 999, where x is nearly the noise, the layers would have to let x through to four digits.
    """

    config_class = DiTConfig
    base_model_prefix = ""
    main_input_name = "x"
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.num_channels * config.tubelet_size * config.patch_size**2
        self.num_classes = config.num_classes
        self.patch_embed = nn.Linear(patch, width)
        self.position = nn.Parameter(torch.empty(math.prod(config.grid), width))
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embed = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, config.layer_norm_eps, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What gates the blocks and what is last begin as zero, as in the paper; but embeddings of time and label not as
        nearly zero, with which labels were hardly heeded after 150 steps.
        """
        if isinstance(module, DiT):
            init.copy_(module.position, sines_of_places(module.config.grid, module.config.hidden_size))
            modulations = [part.modulation for part in module.modules() if isinstance(part, DiT | Block)]
            for layer in (module.head, *modulations):
                init.zeros_(layer.weight)
            init.normal_(module.label_embed.weight, std=0.5)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """What `config.prediction` says, in the shape of `x`.

        Args:
            x: (batch, channels, [frames,] height, width).
            timestep: (batch,).
            labels: (batch,), int64.
        """
        hidden = self.patch_embed(self.patchify(x)) + self.position
        is_epsilon = self.config.prediction == "epsilon"
        embedded = sines(timestep.float() * (1 if is_epsilon else NUM_TIMESTEPS), hidden.shape[-1]).to(hidden.dtype)
        condition = F.silu(self.time_embed(embedded) + self.label_embed(labels))
        for block in self.blocks:
            hidden = block(hidden, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        out = self.unpatchify(self.head(modulated(self.norm(hidden), shift, scale)))
        if is_epsilon:
            a = alphas_cumprod().to(x)[timestep.long()].view(-1, *[1] * (x.ndim - 1))
            out = (1 - a).sqrt() * x + a.sqrt() * out
        return out

    def patchify(self, x: Tensor) -> Tensor:
        """(batch, tokens, values of a patch) of `x`; tokens in the order time, height, width."""
        tubelet, patch = self.config.tubelet_size, self.config.patch_size
        frames, rows, columns = self.config.grid
        parts = x.reshape(len(x), -1, frames, tubelet, rows, patch, columns, patch)
        return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(x), frames * rows * columns, -1)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """The inverse of `patchify`."""
        tubelet, patch, side = self.config.tubelet_size, self.config.patch_size, self.config.image_size
        parts = tokens.reshape(len(tokens), *self.config.grid, -1, tubelet, patch, patch)
        x = parts.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(tokens), -1, self.config.num_frames, side, side)
        return x if self.config.num_frames > 1 else x.squeeze(2)


class Block(nn.Module):
    """x + gate * attn(modulated norm(x)), then the same with the MLP."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, config.layer_norm_eps, elementwise_affine=False)
        self.attn = SelfAttention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, config.layer_norm_eps, elementwise_affine=False)
        self.mlp = Mlp(width, config.intermediate_size)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(batch, tokens, width) of the same, and of `condition` (batch, width)."""
        parts = self.modulation(condition)[:, None].chunk(6, -1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        x = torch.addcmul(x, gate_attn, self.attn(modulated(self.norm1(x), shift_attn, scale_attn)))
        return torch.addcmul(x, gate_mlp, self.mlp(modulated(self.norm2(x), shift_mlp, scale_mlp)))


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def sines(values: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """(n, width): cosines and sines of `values` (n,) times width / 2 frequencies from 1 to about 1 / longest."""
    exponents = torch.arange(width // 2, device=values.device, dtype=torch.float32) / (width // 2)
    angle = values[:, None] * longest**-exponents
    return torch.cat([angle.cos(), angle.sin()], -1)


def sines_of_places(grid: tuple[int, int, int], width: int) -> Tensor:
    """(tokens, width): the first half of the width tells rows, the second columns; of videos, the first half times."""
    times, rows, columns = (
        place.flatten() for place in torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    )
    if grid[0] == 1:
        return torch.cat([sines(rows, width // 2), sines(columns, width // 2)], -1)
    return torch.cat([sines(times, width // 2), sines(rows, width // 4), sines(columns, width // 4)], -1)


def euler(model: nn.Module, noise: Tensor, labels: Tensor, steps: int, guidance: float | None = None) -> Tensor:
    """Data from `noise` by a velocity model: x_{i+1} = x_i - v / steps, from t = 1 to 0.

    Args:
        guidance: w of v = u + w (c - u), of the predictions c with labels and u without (arXiv:2207.12598), two calls
            per step; None: v = c, one call.
    """
    x = noise
    for i in range(steps):
        x = x - _guided(model, x, 1 - i / steps, labels, guidance) / steps
    return x


def ddim(model: nn.Module, noise: Tensor, labels: Tensor, steps: int, guidance: float | None = None) -> Tensor:
    """Data from `noise` by an epsilon model: DDIM (arXiv:2010.02502, equation 12 with sigma = 0).

    The timesteps go evenly from 979, where there is next to nothing but noise, and the last step ends at the data
    (arXiv:2305.08891, table 2, "trailing", but for 979). The data that a prediction stands for is clipped to [-1, 1], and the
    noise is what is then left of x: with guidance, noise that does not go with the data drives the pictures away.

    Args:
        guidance: as in `euler`.
    """
    alphas = alphas_cumprod().tolist()
    timesteps = [round((FIRST_TIMESTEP + 1) * (1 - i / steps)) - 1 for i in range(steps)]
    x = noise
    for k, following in zip(timesteps, [*timesteps[1:], None]):
        a, b = alphas[k], 1.0 if following is None else alphas[following]
        epsilon = _guided(model, x, k, labels, guidance)
        data = ((x - (1 - a) ** 0.5 * epsilon) / a**0.5).clamp(-1, 1)
        epsilon = (x - a**0.5 * data) / (1 - a) ** 0.5
        x = b**0.5 * data + (1 - b) ** 0.5 * epsilon
    return x


def alphas_cumprod() -> Tensor:
    """a_k, (1000,), float64: share of the data in x_k, squared, on a cosine (arXiv:2102.09672, equation 17)."""
    k = torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64)
    cosine = ((k / NUM_TIMESTEPS + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    beta = (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


def _guided(model: nn.Module, x: Tensor, timestep: float, labels: Tensor, guidance: float | None) -> Tensor:
    timesteps = torch.full((len(x),), timestep, dtype=torch.float32, device=x.device)
    c = model(x, timesteps, labels)
    if guidance is None:
        return c
    no_label: Any = model.num_classes
    u = model(x, timesteps, torch.full_like(labels, no_label))
    return u + guidance * (c - u)
