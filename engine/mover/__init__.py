"""Weights on the move: one mechanism for the blocks of every model, resident or streamed, on CPU and CUDA.

`schedule` says in which order slabs are copied, awaited and visited, and needs no torch; `host` says where streamed
slabs lie; `copier` moves them; `tape` joins the three behind one generator, `Tape.sweep`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .schedule import Copy as Copy
from .schedule import Op as Op
from .schedule import Placement as Placement
from .schedule import Ring as Ring
from .schedule import Visit as Visit
from .schedule import Wait as Wait
from .schedule import schedule as schedule
from .schedule import spread as spread

if TYPE_CHECKING:
    from .copier import Copier, CudaCopier, ThreadCopier
    from .host import Disk, Host, HostArena, MappedSource, SlabSource
    from .tape import Tape

_HOMES = {
    "Copier": "copier",
    "CudaCopier": "copier",
    "Disk": "host",
    "Host": "host",
    "HostArena": "host",
    "MappedSource": "host",
    "SlabSource": "host",
    "Tape": "tape",
    "ThreadCopier": "copier",
}

__all__ = [
    "Copier",
    "Copy",
    "CudaCopier",
    "Disk",
    "Host",
    "HostArena",
    "MappedSource",
    "Op",
    "Placement",
    "Ring",
    "SlabSource",
    "Tape",
    "ThreadCopier",
    "Visit",
    "Wait",
    "schedule",
    "spread",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)
