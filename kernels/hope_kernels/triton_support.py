"""What the Triton scans can run, and whether they run in the interpreter."""

import triton

from hope_kernels.rule import MemoryRule
from hope_kernels.tuning import table, tuning


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def scan_obstacle(rule: MemoryRule, *, width: int, hidden: int) -> str:
    """Why the Triton scans do not compute a rule at head width K and hidden width F, or ""."""
    if rule.objective == "dot":
        return 'objective = "dot" has no kernel'
    if rule.update == "dgd" and rule.dgd_scope == "layerwise" and rule.memory == "mlp":
        return 'dgd_scope = "layerwise" has no kernel'
    if tuning(width=width, hidden=hidden if rule.memory == "mlp" else width) is None:
        largest = "x".join(str(n) for n in max(table()))
        return f"memories of {width}x{hidden} are larger than the largest kernel, {largest}"
    return ""
