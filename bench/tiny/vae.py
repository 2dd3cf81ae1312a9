"""The image VAE, trained in two dimensions.

For one frame every causal 3-D convolution of `AutoencoderKLQwenImage` sees zeros under two of its three temporal taps,
so the last tap alone is a 2-D convolution. This module has the same names and is trained as such; `to_3d` puts the
weights into the 3-D shape. Two downsamplings only (4x, not 8x): with 16 channels an 8x latent does not hold a photo.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

BASE, CHANNELS, MULTIPLIERS = 16, 16, (1, 2, 4)
FACTOR = 2 ** (len(MULTIPLIERS) - 1)


class Norm(nn.Module):
    """x / |x| * sqrt(dim) * gamma over the channels of one pixel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=1) * (x.shape[1] ** 0.5) * self.gamma


class ResBlock(nn.Module):
    """Two normalised 3 x 3 convolutions beside a skip."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(dim), nn.Conv2d(dim, out, 3, padding=1)
        self.norm2, self.conv2 = Norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim, out, 1) if dim != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """One head over all pixels of the smallest map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = Norm(dim), nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None]
        out = F.scaled_dot_product_attention(*qkv.chunk(3, -1))
        return x + self.proj(out[:, 0].transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(dim)])
        self.resnets = nn.ModuleList([ResBlock(dim, dim), ResBlock(dim, dim)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Module):
    """Halves (strided convolution, padded right and below) or doubles (nearest, then convolution) the map."""

    def __init__(self, dim: int, up: bool) -> None:
        super().__init__()
        if up:
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(dim, dim // 2, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resample(x)


class UpBlock(nn.Module):
    def __init__(self, dim: int, out: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(dim, out), ResBlock(out, out)])
        self.upsamplers = None if last else nn.ModuleList([Resample(out, up=True)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        dims = [BASE * m for m in (1, *MULTIPLIERS)]
        self.conv_in = nn.Conv2d(3, dims[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for index, (dim, out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            blocks.append(ResBlock(dim, out))
            if index < len(MULTIPLIERS) - 1:
                blocks.append(Resample(out, up=False))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = Middle(dims[-1])
        self.norm_out, self.conv_out = Norm(dims[-1]), nn.Conv2d(dims[-1], 2 * CHANNELS, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        dims = [BASE * m for m in (MULTIPLIERS[-1], *MULTIPLIERS[::-1])]
        self.conv_in = nn.Conv2d(CHANNELS, dims[0], 3, padding=1)
        self.mid_block = Middle(dims[0])
        last = len(MULTIPLIERS) - 1
        self.up_blocks = nn.ModuleList(
            UpBlock(dims[i] // 2 if i else dims[i], dims[i + 1], i == last) for i in range(last + 1)
        )
        self.norm_out, self.conv_out = Norm(dims[-1]), nn.Conv2d(dims[-1], 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Pixels in [-1, 1], [batch, 3, h, w] <-> latents [batch, 16, h / 4, w / 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.quant_conv = nn.Conv2d(2 * CHANNELS, 2 * CHANNELS, 1)
        self.post_quant_conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the posterior."""
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, not clamped."""
        return self.decoder(self.post_quant_conv(latents))


def to_3d(state: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Fills the 3-D model's shapes: the last temporal tap holds the 2-D kernel, everything temporal is zero."""
    out = {}
    for name, shape in shapes.items():
        target = torch.zeros(shape)
        if name in state:
            value = state[name]
            if value.ndim == 4 and len(shape) == 5:
                target[:, :, -1] = value
            else:
                target.copy_(value.view(shape))
        out[name] = target
    return out
