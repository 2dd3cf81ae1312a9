"""The loop from noise to latents, one step at a time and free of hidden state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..errors import KernelError, RequestError
from .components import Components
from .conditioning import Conditioning
from .events import Step
from .family import Network, Transformer
from .guard import Finite
from .job import Job
from .keep.keeper import Keeper
from .latents import initial_noise, unpack
from .picture import resize
from .reference.apply import Cast
from .resolve import starting
from .schedule import Schedule
from .seen import Seen
from .state import RunState

logger = logging.getLogger(__name__)

STEP_OPS = ("transformer.linear", "transformer.attention", "transformer.modulate", "transformer.rope", "guidance")


@dataclass(frozen=True)
class Denoiser:
    """One run's fixed parts; :meth:`advance` maps a state to the next.

    Attributes:
        job: the resolved request.
        key: identity of the run.
        schedule: noise levels.
        components: the network among them.
        seen: what the VAE gave.
        keeper: what keeps a part of the first picture, or None.
        network: what a step computes; None where no step is run.
        check: raises to stop the run.
    """

    job: Job
    key: str
    schedule: Schedule
    components: Components
    seen: Seen
    keeper: Keeper | None
    network: Network | None
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
        family = components.family
        schedule, network = family.schedule(job, components.source.scheduler_config), None
        if job.start < len(schedule):
            network = family.network(job, schedule, conditionings, seen, components.transformer, components.dtype)
        return cls(
            job=job,
            key=key,
            schedule=schedule,
            components=components,
            seen=seen,
            keeper=_keeper(job, seen, schedule, components),
            network=network,
            check=check,
        )

    @property
    def total(self) -> int:
        """Steps of the run."""
        return len(self.schedule)

    def start(self) -> RunState:
        """The state before the first step that is run: noise, or ``(1 - sigma) x + sigma noise`` of clean latents x."""
        for words in starting(self.job):
            logger.info(words)
        noise = _noise(self.job, self.seen, self.components)
        index = self.job.start
        if index and self.seen.first is not None:
            noise = self.schedule.noised(index, self.seen.first, noise)
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
        self, state: RunState, transformer: Transformer, kernels: Mapping[str, str], *, safe: bool
    ) -> tuple[Step, Finite]:
        """A step, enqueued, and the question whether its velocity is finite."""
        if self.network is None:
            raise RuntimeError("a run without steps was advanced")
        index = state.next_step
        sigma, sigma_next = (float(s) for s in self.schedule.sigmas[index : index + 2])
        latents, velocity = self.network.velocity(
            index, state.latent_tokens, transformer, kernels, safe=safe, check=self.check
        )
        finite = Finite(velocity)
        mask = None
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


def _changed(safe: Mapping[str, str], kernels: Mapping[str, str]) -> str:
    """The ops that ran in another implementation than planned."""
    return ", ".join(f"{op} {made}" for op, made in safe.items() if made != kernels[op] and op in STEP_OPS)
