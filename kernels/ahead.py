"""Compiling every Triton kernel ahead of time, for cards that need not be here: registers, spills, shared memory.

``python -m qengine.kernels.ahead [OP ...] [--cc 86 ...]`` prints a JSON line per kernel configuration and target.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import KernelError

TARGETS = (80, 86, 89, 90, 120)
"""Compute capabilities for which every kernel is built."""

ALIGNED_BYTES = 16

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration, as its launcher launches it.

    Attributes:
        name: of the configuration, unique inside the op.
        kernel: the function that ``triton.jit`` made.
        signature: Triton type of every argument (``*bf16``, ``i32``, ``fp32``, ``constexpr``).
        constants: values of the ``constexpr`` arguments.
        warps: warps per program.
        stages: pipeline stages.
        since: least compute capability it is launched on.
        until: last compute capability it is launched on; None for no limit.
        unaligned: pointers that are not known to be multiples of 16.
        multiples: integers that are multiples of 16, as those of the models' shapes are.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 1
    since: int = 80
    until: int | None = None
    unaligned: frozenset[str] = field(default_factory=frozenset)
    multiples: frozenset[str] = field(default_factory=frozenset)

    def fits(self, cc: int) -> bool:
        """Whether it is launched on a compute capability."""
        return self.since <= cc and (self.until is None or cc <= self.until)


@dataclass(frozen=True)
class Resources:
    """What ``cuobjdump --dump-resource-usage`` says of a kernel; ``spill_bytes`` is its stack and local memory."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def ops() -> tuple[str, ...]:
    """Folders of this package that hold Triton kernels."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton.py")))


def builds(op: str) -> tuple[Build, ...]:
    """The configurations of an op.

    Raises:
        KernelError: no such op.
    """
    if op not in ops():
        raise KernelError(f"op must be one of {', '.join(ops())}, got {op!r}")
    return import_module(f".{op}.triton", __package__).builds()


def compile_ahead(build: Build, cc: int) -> Resources:
    """Compile for a compute capability and read the resources of the machine code.

    Raises:
        KernelError: Triton runs in interpreter mode, or the machine code cannot be read.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(build.kernel, triton.JITFunction):
        raise KernelError("Triton must compile here, got its interpreter", hint="unset TRITON_INTERPRET")
    names = list(build.kernel.arg_names)
    pointers = {name for name, kind in build.signature.items() if kind.startswith("*")} - build.unaligned
    source = ASTSource(
        fn=build.kernel,
        signature={name: build.signature[name] for name in names},
        constexprs=dict(build.constants),
        attrs={(names.index(name),): [["tt.divisibility", ALIGNED_BYTES]] for name in pointers | build.multiples},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    return _resources(made.asm["cubin"], int(made.metadata.shared))


def _resources(cubin: bytes, shared_bytes: int) -> Resources:
    from triton import backends

    tool = Path(backends.__path__[0]) / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=False)
    found = _RESOURCES.search(done.stdout)
    if found is None:
        raise KernelError(f"cuobjdump must print the resources of a kernel, got {done.stdout + done.stderr!r}")
    registers, stack, _, local = map(int, found.groups())
    return Resources(registers, stack + local, shared_bytes)


def report(names: Sequence[str], targets: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One line per configuration and target on which it is launched."""
    for op in names:
        for build in builds(op):
            for cc in (cc for cc in targets if build.fits(cc)):
                line = {"op": op, "name": build.name, "cc": cc, "warps": build.warps, "stages": build.stages}
                yield line | asdict(compile_ahead(build, cc))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 1 where a kernel spills."""
    parser = argparse.ArgumentParser(prog="python -m qengine.kernels.ahead", description=__doc__)
    parser.add_argument("ops", nargs="*", help=f"which to build, of {', '.join(ops())}; all when none is named")
    parser.add_argument("--cc", nargs="+", type=int, default=TARGETS, help="compute capabilities, 86 for 8.6")
    options = parser.parse_args(argv)
    spilled = False
    for line in report(options.ops or ops(), options.cc):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        spilled |= bool(line["spill_bytes"])
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
