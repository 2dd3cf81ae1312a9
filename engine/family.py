"""What differs between kinds of models: how their parts are opened, and what one step computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import RequestError
from .given import Given

if TYPE_CHECKING:
    import torch

    from ..loaders import Component, ModelSource
    from .conditioning import Conditioning
    from .encoder import PromptEncoder
    from .job import Job
    from .mover import Tape
    from .reference.apply import Cast
    from .schedule import Schedule
    from .seen import Seen
    from .stack import BlockStack, Hold
    from .stack.pack import Progress
    from .template import Template
    from .vae import ImageVAE


@dataclass(frozen=True)
class Shape:
    """Widths of a model that what goes into it must have.

    Attributes:
        multiple: pixels per token side.
        latent_channels: z.
        text_width: of prompt embeddings.
        most_text_rows: longest prompt embeddings; None where the model sets no bound.
    """

    multiple: int
    latent_channels: int
    text_width: int
    most_text_rows: int | None = None

    def check(self, given: Given) -> None:
        """Raise RequestError where an encoded part is of another width, or longer than the model reads."""
        for name, tensor in given.tensors.items():
            if not name.endswith("embeds"):
                wanted, what = (1, self.latent_channels, 1), "channels of this model's latents"
                if tuple(tensor.shape[:3]) != wanted:
                    raise RequestError(
                        f"{name} must be [1, {self.latent_channels}, 1, h, w] ({what}), got {list(tensor.shape)}",
                        hint="encode it with this model's VAE",
                    )
            elif tensor.shape[1] != self.text_width:
                raise RequestError(
                    f"{name} must be {self.text_width} wide as this transformer reads them, got {tensor.shape[1]}",
                    hint="encode with the text encoder that belongs to this model",
                )
            elif self.most_text_rows is not None and len(tensor) > self.most_text_rows:
                raise RequestError(f"{name} must be at most {self.most_text_rows} rows, got {len(tensor)}")


class Transformer(Protocol):
    """A diffusion transformer on its tape."""

    blocks: Tape

    def close(self) -> None:
        """Free the weights."""
        ...

    def with_template(self, template: Template[Any]) -> Any:
        """The same tape run by another block."""
        ...


class Network(Protocol):
    """What a family computes in the steps of one run; made once per run."""

    def velocity(
        self,
        index: int,
        latents: torch.Tensor,
        transformer: Any,
        kernels: Mapping[str, str],
        *,
        safe: bool,
        check: Callable[[], None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step's network evaluations, enqueued.

        Args:
            index: of the step.
            latents: packed float32 [1, tokens, 4z]; not changed.
            transformer: that evaluates.
            kernels: implementations by place and op.
            safe: ops run as they are defined.
            check: called before each block; raises to stop the run.

        Returns:
            The latents that the Euler step starts from, and the guided velocity, both float32 [1, tokens, 4z].
        """
        ...


class Family(Protocol):
    """One kind of models."""

    def shape(self, source: ModelSource) -> Shape:
        """Its widths, from the configs."""
        ...

    def open_encoder(
        self,
        source: ModelSource,
        device: torch.device,
        dtype: torch.dtype,
        hold: Hold,
        cache: Path,
        *,
        alone: bool,
        progress: Progress,
    ) -> PromptEncoder:
        """The prompt encoder; no weight is read."""
        ...

    def stack(
        self, component: Component, weight_format: str, dtype: torch.dtype, kernels: Mapping[str, str]
    ) -> BlockStack[Any]:
        """The transformer's blocks in a weight format; no weight is read."""
        ...

    def load_transformer(
        self,
        component: Component,
        device: torch.device,
        dtype: torch.dtype,
        cache: Path,
        hold: Hold,
        progress: Progress,
    ) -> Transformer:
        """Read the transformer."""
        ...

    def load_vae(
        self,
        component: Component,
        device: torch.device,
        dtype: torch.dtype,
        tile_pixels: int | None,
        weight_format: str,
    ) -> ImageVAE:
        """Read the VAE."""
        ...

    def schedule(self, job: Job, config: Mapping[str, Any]) -> Schedule:
        """Noise levels of the whole schedule, of which :attr:`Job.start` is where a run starts.

        Args:
            job: the resolved request.
            config: the scheduler's config.json.
        """
        ...

    def network(
        self,
        job: Job,
        schedule: Schedule,
        conditionings: Mapping[Cast, Conditioning],
        seen: Seen,
        transformer: Any,
        dtype: torch.dtype,
    ) -> Network:
        """Embed the prompts and compute the modulation rows of a run."""
        ...
