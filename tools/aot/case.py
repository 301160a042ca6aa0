"""What a compile gate is told about one kernel: its arguments as the launch code passes them, and the limits the result must keep.

Every file of tools/aot/cases/ has a function `cases() -> list[Case]`; the gate names a case "<file>/<name>".
"""

from dataclasses import dataclass
from typing import Any

KIB = 1024


@dataclass(frozen=True)
class Case:
    """One compilation of one kernel, for every architecture of the gate.

    kernel: the `triton.jit` function. arguments: every parameter by name: a torch dtype stands for a pointer to that type aligned to 16
    bytes, an int for itself as at run time (Triton specialises on 1 and on multiples of 16); None and values of constexpr parameters
    are what they are.
    min_mma: least number of HGMMA (sm_90a) or UTCHMMA (sm_100a) instructions; 0 for a kernel without products.
    hmma_reason: why some products are too small for those; then HMMA count towards min_mma. Without a reason none is allowed.
    max_registers: of a thread. max_shared: bytes of a block. max_spill: bytes of stack that are known and borne; who needs it says why.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    min_mma: int = 1
    hmma_reason: str | None = None
    max_registers: int = 255
    max_shared: int = 227 * KIB
    max_spill: int = 0
