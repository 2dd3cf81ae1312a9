"""The loop from noise to latents, one step at a time and free of hidden state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import KernelError, RequestError
from ..kernels.guidance import combine
from .components import Components
from .conditioning import Conditioning
from .dit import Branch, ModulationTable, QwenImageTransformer
from .events import Step
from .guard import Finite
from .job import Geometry, Job
from .keep.keeper import Keeper
from .latents import initial_noise, pack, unpack
from .picture import resize, to_tensor
from .reference.apply import Cast, References
from .schedule import Schedule, make_schedule
from .state import RunState

STEP_OPS = ("transformer.linear", "transformer.attention", "transformer.modulate", "transformer.rope", "guidance")


@dataclass(frozen=True)
class Seen:
    """What the VAE gives to a run before the transformer is loaded.

    Attributes:
        references: packed clean latents [1, tokens, 4z] of each picture; None for a picture that no step sees.
        first: packed clean latents of the first picture at the size of the output, where the run needs them.
        projection: affine map from latents to RGB for previews.
        channels: latent channels z.
    """

    references: tuple[torch.Tensor | None, ...]
    first: torch.Tensor | None
    projection: torch.Tensor
    channels: int

    @classmethod
    @torch.no_grad()
    def of(cls, job: Job, components: Components) -> Seen:
        """Encode the references of a run."""
        components.enter("reference")
        seen = {place for cast in job.casts for place in cast}
        references = [
            _encode(picture.image, geometry, components) if place in seen else None
            for place, (picture, geometry) in enumerate(zip(job.pictures, job.references, strict=True))
        ]
        first = None
        if job.anchored:
            known = references[0] if job.references[0] == job.target else None
            first = _encode(job.pictures[0].image, job.target, components) if known is None else known
        return cls(tuple(references), first, components.projection(), components.source.vae.config["z_dim"])


@dataclass(frozen=True)
class Denoiser:
    """One run's fixed parts; :meth:`advance` maps a state to the next.

    Attributes:
        job: the resolved request.
        key: identity of the run.
        schedule: noise levels.
        components: the network among them.
        seen: what the VAE gave.
        references: what the pictures do in each step.
        keeper: what keeps a part of the first picture, or None.
        branches: by the pictures that are there: prompt, and negative prompt where guidance is on.
        table: modulation rows of every step.
        check: raises to stop the run.
    """

    job: Job
    key: str
    schedule: Schedule
    components: Components
    seen: Seen
    references: References
    keeper: Keeper | None
    branches: Mapping[Cast, tuple[Branch, ...]]
    table: ModulationTable
    check: Callable[[], None]

    @classmethod
    @torch.no_grad()
    def prepare(
        cls,
        job: Job,
        conditionings: Mapping[Cast, Conditioning],
        seen: Seen,
        components: Components,
        key: str,
        check: Callable[[], None],
    ) -> Denoiser:
        """Embed the prompts, fix the schedule and its modulation rows.

        Args:
            job: the resolved request.
            conditionings: prompt embeddings by the pictures that the text encoder saw.
            seen: what the VAE gave.
            components: the network among them.
            key: identity of the run.
            check: raises to stop the run.
        """
        components.enter("denoise")
        transformer = components.transformer
        references = References.of(job, seen.references)
        rows, columns = job.target.grid
        schedule = make_schedule(
            job.num_inference_steps,
            rows * columns,
            components.source.scheduler_config,
            flow_shift=job.flow_shift,
        )
        timesteps = [schedule.timestep(i, components.dtype) for i in range(len(schedule))]
        return cls(
            job=job,
            key=key,
            schedule=schedule,
            components=components,
            seen=seen,
            references=references,
            keeper=_keeper(job, seen, schedule, components),
            branches={
                cast: _branches(transformer, references, cast, conditionings[job.shown(cast)]) for cast in job.casts
            },
            table=transformer.table(timesteps),
            check=check,
        )

    @property
    def total(self) -> int:
        """Steps of the run."""
        return len(self.schedule)

    def start(self) -> RunState:
        """The state before the first step that is run: noise, or ``(1 - sigma) r + sigma noise`` of picture 1."""
        noise = _noise(self.job, self.seen, self.components)
        index = self.job.start
        if index and self.seen.first is not None:
            sigma = float(self.schedule.sigmas[index])
            noise = (1 - sigma) * self.seen.first.float() + sigma * noise
        return RunState(self.key, index, self.job.target.grid, noise)

    def accept(self, state: RunState) -> RunState:
        """A saved state, if it is of this run.

        Raises:
            RequestError: it belongs to another request, model, dtype or device kind.
        """
        if state.key != self.key or not self.job.start <= state.next_step <= self.total:
            raise RequestError(
                "the saved state must be of this request, model, dtype and device, got another run's",
                hint="repeat the request that the state was saved from",
            )
        return RunState(state.key, state.next_step, state.grid, state.latent_tokens.to(self.components.device))

    @torch.no_grad()
    def finish(self, state: RunState) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents after the last step with what is kept put back, and the shares of change per token, if any."""
        return (state.latent_tokens, None) if self.keeper is None else self.keeper.finish(state.latent_tokens)

    @torch.no_grad()
    def advance(self, state: RunState) -> Step:
        """Do step ``state.next_step``; ``state`` is not changed, so a failed step can be tried again.

        A velocity that is not finite is computed once more from the same state, every op in its definition. The flag
        that tells is read before the step is given away, so no step with bad latents is ever seen; the host then waits
        for the last work of the step, and no longer, while copies ahead go on on their own stream. Whether a step is
        done again follows from its state alone, so that a resumed run ends in the same bits.

        Raises:
            KernelError: the velocity is not finite in the definitions either.
        """
        plan = self.components.planned
        step, finite = self._attempt(state, self.components.transformer, plan.kernels, safe=False)
        if finite.read():
            return step
        step, finite = self._attempt(state, self.components.safe_transformer(), plan.safe, safe=True)
        name = f"step {step.index + 1} of {step.total}"
        if not finite.read():
            raise KernelError(
                f"velocity of {name} must be finite, got NaN or infinity, with {_changed(plan.safe, plan.kernels)} too",
                hint="--dtype float32, --weights bf16 or another model file: one of its weights may be damaged",
            )
        words = f"{name} was not finite and was done again with {_changed(plan.safe, plan.kernels)}"
        return replace(step, notes=(words,))

    def _attempt(
        self, state: RunState, transformer: QwenImageTransformer, kernels: Mapping[str, str], *, safe: bool
    ) -> tuple[Step, Finite]:
        """A step, enqueued, and the question whether its velocity is finite."""
        index = state.next_step
        dtype = self.components.dtype
        sigma, sigma_next = (float(s) for s in self.schedule.sigmas[index : index + 2])
        given = self.references.at(index, state.latent_tokens, sigma)
        velocities = transformer.velocity(
            given.latents.to(dtype),
            given.tokens,
            given.dress(self.branches[self.job.cast(index)], self.job.reference, dtype),
            self.table,
            self.schedule.timestep(index, dtype),
            more=index + 1 < self.total,
            safe=safe,
            check=self.check,
        )
        velocity = _guide([v.float() for v in velocities], self.job.true_cfg_scale, kernels)
        finite = Finite(velocity)
        latents, mask = given.state, None
        if self.keeper is not None:
            latents, mask = self.keeper.before_step(index, latents, velocity)
        step = Step(
            index=index,
            total=self.total,
            sigma=sigma,
            sigma_next=sigma_next,
            state=RunState(state.key, index + 1, state.grid, self.schedule.step(index, latents, velocity)),
            predicted=unpack(latents - sigma * velocity, *state.grid),
            projection=self.seen.projection,
            size=(self.job.target.width, self.job.target.height),
            mask=mask,
            reference=self.job.table[index] if self.job.table else None,
        )
        return step, finite


def _noise(job: Job, seen: Seen, components: Components) -> torch.Tensor:
    return initial_noise(job.seed, seen.channels, *job.target.grid).to(components.device)


def _keeper(job: Job, seen: Seen, schedule: Schedule, components: Components) -> Keeper | None:
    if job.keep.rule is None or seen.first is None:
        return None
    return Keeper.of(
        job.keep,
        mask_image=None if job.mask is None else job.mask.image,
        control=seen.first,
        noise=_noise(job, seen, components),
        target=job.target,
        sigmas=schedule.sigmas.tolist(),
        original=resize(job.pictures[0].image, job.target.width, job.target.height),
        implementation=components.planned.kernels.get("rcm", "reference"),
    )


def _branches(
    transformer: QwenImageTransformer, references: References, cast: Cast, conditioning: Conditioning
) -> tuple[Branch, ...]:
    """Both prompts beside the pictures of a cast."""
    grids, frames, kept = references.layout(cast)
    made = [transformer.branch(conditioning.prompt_embeds, grids, frames=frames, kept=kept)]
    if conditioning.negative_embeds is not None:
        alone = not references.options.negative
        grids, frames, kept = references.layout(()) if alone else (grids, frames, kept)
        made.append(transformer.branch(conditioning.negative_embeds, grids, frames=frames, kept=kept))
    return tuple(made)


def _guide(velocities: Sequence[torch.Tensor], scale: float, kernels: Mapping[str, str]) -> torch.Tensor:
    if len(velocities) == 1:
        return velocities[0]
    return combine(velocities[0], velocities[1], scale, implementation=kernels["guidance"])


def _changed(safe: Mapping[str, str], kernels: Mapping[str, str]) -> str:
    """The ops that ran in another implementation than planned."""
    return ", ".join(f"{op} {made}" for op, made in safe.items() if made != kernels[op] and op in STEP_OPS)


def _encode(image: Image.Image, geometry: Geometry, components: Components) -> torch.Tensor:
    """Packed clean latents of a picture [1, tokens, 4z]."""
    return pack(components.vae.encode(_pixels(image, geometry).to(components.device, components.dtype)))


def _pixels(image: Image.Image, geometry: Geometry) -> torch.Tensor:
    """The picture at its reference size, its right and lower edge repeated up to whole tokens: [1, 3, H, W]."""
    pixels = to_tensor(resize(image, geometry.width, geometry.height))
    width, height = geometry.padded
    return F.pad(pixels, (0, width - geometry.width, 0, height - geometry.height), mode="replicate")
