"""Muon for matrices, Adam for the rest, with a warm-up and cosine schedule and an average of the weights.

Muon (orthogonalised momentum) needs about half of AdamW's steps on networks as small as these.
Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; here convolution kernels are
flattened to [out, in * taps] and the update is scaled by 0.2 * sqrt(max(rows, columns)), the root mean square of Adam's
steps (Liu et al. 2025, arXiv:2502.16982), so that one learning rate serves both kinds of parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

MOMENTUM = 0.95
WORKERS = 2


def _orthogonal(stack: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """The nearest orthogonal matrices, roughly, of a stack [n, rows, columns]: five Newton-Schulz rounds."""
    x = stack / (stack.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on parameters of two and more dimensions; equal shapes are orthogonalised in one batch."""

    def __init__(self, params: list[nn.Parameter], lr: float, pool: ThreadPoolExecutor) -> None:
        super().__init__(params, {"lr": lr})
        self.pool = pool

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    shapes.setdefault(param.flatten(1).shape, []).append(param)
            order = sorted(
                shapes.values(), key=lambda params: -sum(p.numel() * min(p.flatten(1).shape) for p in params)
            )
            for _ in self.pool.map(lambda params, lr=group["lr"]: self._update(params, lr), order):
                pass

    @torch.no_grad()
    def _update(self, params: list[nn.Parameter], lr: float) -> None:
        update = _orthogonal(torch.stack([self._momentum(param) for param in params]))
        scale = -lr * 0.2 * math.sqrt(max(update.shape[1:]))
        for param, change in zip(params, update, strict=True):
            param.add_(change.reshape(param.shape), alpha=scale)

    def _momentum(self, param: nn.Parameter) -> torch.Tensor:
        state = self.state[param]
        momentum = state.setdefault("momentum", torch.zeros_like(param))
        momentum.lerp_(param.grad, 1 - MOMENTUM)
        return torch.lerp(param.grad, momentum, MOMENTUM).flatten(1)


class Trainer:
    """Both optimisers, the schedule and the average, behind one `step`.

    A step takes several losses and works on them in parallel threads, one core each (set `torch.set_num_threads(1)`):
    the threads meet once per step, not once per operation, which on a busy machine is several times faster than letting
    each operation use all cores. The number of losses belongs to the recipe, so results do not depend on the machine.

    Args:
        module: What is trained; parameters that need no gradient are left alone.
        lr: Peak learning rate.
        steps: Length of the schedule.
        ema: Decay of the average of the weights.
        slow: Parts of names that Adam trains although they are matrices (embeddings, first and last layers).
    """

    def __init__(self, module: nn.Module, lr: float, steps: int, ema: float, slow: tuple[str, ...] = ()) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if p.squeeze().ndim > 1 and not any(part in n for part in slow)]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.pool = ThreadPoolExecutor(WORKERS)
        self.optimizers = [Muon(matrices, lr, self.pool), torch.optim.Adam(rest, lr, betas=(0.9, 0.98))]
        self.params = [p for _, p in named]
        self.module, self.lr, self.steps, self.decay = module, lr, steps, ema
        self.done = 0
        self.average = {name: p.detach().clone() for name, p in named}

    def rate(self) -> float:
        """Warm-up over 1 % of the steps, then a cosine down to 2 % of the peak."""
        warm = min(1.0, (self.done + 1) / max(1, self.steps // 100))
        return self.lr * warm * (0.51 + 0.49 * math.cos(math.pi * self.done / self.steps))

    def step(self, losses: Sequence[Callable[[], torch.Tensor]]) -> float:
        """One update from the mean of the losses, each computed in its own thread; returns that mean."""

        def work(loss: Callable[[], torch.Tensor]) -> tuple[float, tuple[torch.Tensor | None, ...]]:
            value = loss()
            return value.item(), torch.autograd.grad(value, self.params, allow_unused=True)

        results = list(self.pool.map(work, losses))
        for param, *grads in zip(self.params, *(grads for _, grads in results), strict=True):
            found = [grad for grad in grads if grad is not None]
            param.grad = torch.stack(found).sum(0) / len(losses) if found else None
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate()
            optimizer.step()
        self.done += 1
        decay = min(self.decay, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            for name, param in self.module.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(param, 1 - decay)
        return sum(value for value, _ in results) / len(results)

    def averaged(self) -> dict[str, torch.Tensor]:
        """The module's state with the averaged weights."""
        return {**self.module.state_dict(), **self.average}

    def save(self, path: Path) -> None:
        """Writes everything that a resumed run needs, as safetensors; replaces the file at once."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for index, optimizer in enumerate(self.optimizers):
            for place, values in optimizer.state_dict()["state"].items():
                tensors |= {f"state.{index}.{place}.{name}": torch.as_tensor(value) for name, value in values.items()}
        tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
        new = path.with_suffix(".new")
        save_file(tensors, new, metadata={"done": str(self.done)})
        new.replace(path)

    def load(self, path: Path) -> None:
        """Takes a saved state up again; the schedule goes on where it stood."""
        with safe_open(path, "pt") as file:
            self.done = int(file.metadata()["done"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        self.module.load_state_dict(_part(tensors, "module."))
        self.average = _part(tensors, "average.")
        for index, optimizer in enumerate(self.optimizers):
            saved: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in _part(tensors, f"state.{index}.").items():
                place, _, key = name.partition(".")
                saved.setdefault(int(place), {})[key] = value
            optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
