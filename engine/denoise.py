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
from .schedule import Schedule, make_schedule
from .state import RunState

STEP_OPS = ("transformer.linear", "transformer.attention", "transformer.modulate", "transformer.rope", "guidance")


@dataclass(frozen=True)
class Seen:
    """What the VAE gives to a run before the transformer is loaded.

    Attributes:
        references: packed clean latents of all references [1, tokens, 4z], or None.
        projection: affine map from latents to RGB for previews.
        channels: latent channels z.
    """

    references: torch.Tensor | None
    projection: torch.Tensor
    channels: int

    @classmethod
    @torch.no_grad()
    def of(cls, job: Job, components: Components) -> Seen:
        """Encode the references of a run."""
        components.enter("reference")
        references = _encode_references(job, components)
        return cls(references, components.projection(), components.source.vae.config["z_dim"])


@dataclass(frozen=True)
class Denoiser:
    """One run's fixed parts; :meth:`advance` maps a state to the next.

    Attributes:
        job: the resolved request.
        key: identity of the run.
        schedule: noise levels.
        components: the network among them.
        seen: what the VAE gave.
        branches: prompt, and negative prompt where guidance is on.
        table: modulation rows of every step.
        keeper: what is kept of the first picture, or None.
        check: raises to stop the run.
    """

    job: Job
    key: str
    schedule: Schedule
    components: Components
    seen: Seen
    branches: tuple[Branch, ...]
    table: ModulationTable
    keeper: Keeper | None
    check: Callable[[], None]

    @classmethod
    @torch.no_grad()
    def prepare(
        cls,
        job: Job,
        conditioning: Conditioning,
        seen: Seen,
        components: Components,
        key: str,
        check: Callable[[], None],
    ) -> Denoiser:
        """Embed the prompts, fix the schedule and its modulation rows."""
        components.enter("denoise")
        transformer = components.transformer
        grids = [job.target.grid, *(reference.grid for reference in job.references)]
        prompts = [conditioning.prompt_embeds]
        if conditioning.negative_embeds is not None:
            prompts.append(conditioning.negative_embeds)
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
            branches=tuple(transformer.branch(prompt, grids) for prompt in prompts),
            table=transformer.table(timesteps),
            keeper=_keeper(job, seen, schedule, components),
            check=check,
        )

    @property
    def total(self) -> int:
        """Steps of the run."""
        return len(self.schedule)

    def start(self) -> RunState:
        """The state before the first step: pure noise."""
        noise = initial_noise(self.job.seed, self.seen.channels, *self.job.target.grid)
        return RunState(self.key, 0, self.job.target.grid, noise.to(self.branches[0].text.device))

    def accept(self, state: RunState) -> RunState:
        """A saved state, if it is of this run.

        Raises:
            RequestError: it belongs to another request, model, dtype or device kind.
        """
        if state.key != self.key or not 0 <= state.next_step <= self.total:
            raise RequestError(
                "the saved state must be of this request, model, dtype and device, got another run's",
                hint="repeat the request that the state was saved from",
            )
        return RunState(state.key, state.next_step, state.grid, state.latent_tokens.to(self.branches[0].text.device))

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
        dtype = self.branches[0].text.dtype
        velocities = transformer.velocity(
            state.latent_tokens.to(dtype),
            self.seen.references,
            self.branches,
            self.table,
            self.schedule.timestep(index, dtype),
            more=index + 1 < self.total,
            safe=safe,
            check=self.check,
        )
        velocity = _guide([v.float() for v in velocities], self.job.true_cfg_scale, kernels)
        finite = Finite(velocity)
        latents, mask = state.latent_tokens, None
        if self.keeper is not None:
            latents, mask = self.keeper.before_step(index, latents, velocity)
        latents = self.schedule.step(index, latents, velocity)
        sigma, sigma_next = (float(s) for s in self.schedule.sigmas[index : index + 2])
        step = Step(
            index=index,
            total=self.total,
            sigma=sigma,
            sigma_next=sigma_next,
            state=RunState(state.key, index + 1, state.grid, latents),
            predicted=unpack(state.latent_tokens - sigma * velocity, *state.grid),
            projection=self.seen.projection,
            size=(self.job.target.width, self.job.target.height),
            mask=mask,
        )
        return step, finite


def _guide(velocities: Sequence[torch.Tensor], scale: float, kernels: Mapping[str, str]) -> torch.Tensor:
    if len(velocities) == 1:
        return velocities[0]
    return combine(velocities[0], velocities[1], scale, implementation=kernels["guidance"])


def _keeper(job: Job, seen: Seen, schedule: Schedule, components: Components) -> Keeper | None:
    if job.keep.rule is None or seen.references is None:
        return None
    rows, columns = job.references[0].grid
    return Keeper.of(
        job.keep,
        mask_image=None if job.mask is None else job.mask.image,
        control=seen.references[:, : rows * columns],
        noise=initial_noise(job.seed, seen.channels, *job.target.grid).to(components.device),
        target=job.target,
        sigmas=schedule.sigmas.tolist(),
        original=resize(job.pictures[0].image, job.target.width, job.target.height),
        implementation=components.planned.kernels.get("rcm", "reference"),
    )


def _changed(safe: Mapping[str, str], kernels: Mapping[str, str]) -> str:
    """The ops that ran in another implementation than planned."""
    return ", ".join(f"{op} {made}" for op, made in safe.items() if made != kernels[op] and op in STEP_OPS)


def _encode_references(job: Job, components: Components) -> torch.Tensor | None:
    if not job.pictures:
        return None
    parts = [
        pack(components.vae.encode(_pixels(picture.image, geometry).to(components.device, components.dtype)))
        for picture, geometry in zip(job.pictures, job.references, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _pixels(image: Image.Image, geometry: Geometry) -> torch.Tensor:
    """The picture at its reference size, its right and lower edge repeated up to whole tokens: [1, 3, H, W]."""
    pixels = to_tensor(resize(image, geometry.width, geometry.height))
    width, height = geometry.padded
    return F.pad(pixels, (0, width - geometry.width, 0, height - geometry.height), mode="replicate")
