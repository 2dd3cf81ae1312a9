"""What stands before and after the blocks of Z-Image."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from .config import PATCH, ZImageConfig


class Output(nn.Module):
    """The last linear layer, under its name in the checkpoint."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_channels)


class Ends(nn.Module):
    """Input and output layers, and the token that stands in padded places of the image."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.all_x_embedder = nn.ModuleDict({"2-1": nn.Linear(config.patch_channels, config.dim)})
        self.all_final_layer = nn.ModuleDict({"2-1": Output(config)})
        self.x_pad_token = nn.Parameter(torch.empty(1, config.dim))

    @property
    def embed(self) -> nn.Linear:
        """[..., 4 * in_channels] to [..., dim]."""
        return cast(nn.Linear, self.all_x_embedder["2-1"])

    @property
    def project(self) -> nn.Linear:
        """[..., dim] to [..., 4 * in_channels]."""
        return cast(Output, self.all_final_layer["2-1"]).linear

    def reorder(self, channels: int) -> None:
        """Bring a patch's values from (row, column, channel) to the order of packed latents (channel, row, column).

        The checkpoint's order goes into the weights once, so that every model's latents are packed alike.
        """
        embed, project = self.embed, self.project
        dim = len(embed.weight)
        by_channel = embed.weight.view(dim, PATCH, PATCH, channels).permute(0, 3, 1, 2)
        embed.weight.copy_(by_channel.reshape(dim, -1).clone())
        for parameter in (project.weight, project.bias):
            rows = parameter.view(PATCH, PATCH, channels, -1).permute(2, 0, 1, 3)
            parameter.copy_(rows.reshape(parameter.shape).clone())
