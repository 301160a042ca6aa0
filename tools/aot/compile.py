"""Compile one kernel for a GPU that is not there, and read from the machine code what the gate judges.

A fake driver names the architecture; `kernel.warmup` then takes the path of a real launch up to the cubin. The cuobjdump that the Triton
wheel carries reads it back. A process compiles for one architecture only: Triton caches kernels by device, not by architecture.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tools.aot.case import KIB, Case

ARCHITECTURES = {"sm_90a": 90, "sm_100a": 100}
WARPGROUP_MMA = ("HGMMA", "UTCHMMA")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


@dataclass(frozen=True)
class Figures:
    """What one compilation gave.

    registers and stack bytes of a thread (spills live on the stack); local: loads and stores of it; mma: products of a warp group (HGMMA,
    UTCHMMA); hmma: of a warp; shared: bytes of a block; tensor_memory: columns; stores: to global memory; instructions: all.
    """

    registers: int
    stack: int
    local: int
    mma: int
    hmma: int
    shared: int
    tensor_memory: int
    stores: int
    instructions: int


class FakeDriver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, arch: str):
        self.target = GPUTarget("cuda", ARCHITECTURES[arch], 32)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * KIB}


class Pointer:
    """A device pointer to `dtype`, aligned to 16 bytes."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        return 0


def use(arch: str) -> None:
    """Make `arch` the architecture of this process, once."""
    driver.set_active(FakeDriver(arch))


def figures(case: Case) -> Figures:
    """Compile a case. Raises what Triton raises, and ValueError where the case does not fit the kernel's parameters."""
    wanted = set(case.kernel.arg_names)
    if differing := wanted.symmetric_difference(case.arguments):
        raise ValueError(f"arguments of {case.kernel.__name__} missing or unknown: {', '.join(sorted(differing))}")
    arguments = {name: Pointer(value) if _is_pointer(case, name, value) else value for name, value in case.arguments.items()}
    kernel = case.kernel.warmup(grid=(1,), num_warps=case.num_warps, num_stages=case.num_stages, **arguments)
    resources, code = dump(kernel.asm["cubin"])
    return Figures(
        registers=resources["REG"],
        stack=resources["STACK"],
        local=code["LDL"] + code["STL"],
        mma=sum(code[name] for name in WARPGROUP_MMA),
        hmma=code["HMMA"],
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        stores=sum(code[name] for name in ("STG", "RED", "REDG", "ATOM", "ATOMG", "UTMASTG")),
        instructions=sum(code.values()) - code["NOP"],
    )


def _is_pointer(case: Case, name: str, value: object) -> bool:
    constants = {parameter.name for parameter in case.kernel.params if parameter.is_constexpr}
    return isinstance(value, torch.dtype) and name not in constants


def dump(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    """Resource usage by cuobjdump's names (REG, STACK, SHARED, ...), and how often each instruction stands in the code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}, Counter(INSTRUCTION.findall(code))


def attempt(case: Case) -> tuple[Figures | None, str]:
    """Figures of a case, or None and one line saying why it does not compile."""
    try:
        return figures(case), ""
    except Exception as error:  # whatever the compiler raises is a finding of the gate
        return None, one_line(error)


def one_line(error: BaseException) -> str:
    """Type and the most telling line of an exception."""
    chain: BaseException = error
    while chain.__cause__ is not None:
        chain = chain.__cause__
    lines = [line.strip() for line in str(chain).splitlines() if line.strip()]
    return f"{type(chain).__name__}: {lines[-1] if lines else ''}"[:300]


def version_family() -> str:
    """The Triton release, without its patch number: figures move between these."""
    return ".".join(triton.__version__.split(".")[:2])


def as_dict(found: Figures) -> dict[str, Any]:
    """For the baseline."""
    return dict(vars(found))
