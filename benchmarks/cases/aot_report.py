"""What the shipped kernels occupy and issue, compiled where there is no GPU.

Beside the shipped launches there are those of an A100's attention as a Hopper GPU would run them, and three that must
not pass: attention padded from 80 to 128 dims, attention on strides that Triton knows nothing of, and the head's
gradients without their barrier.
"""

from __future__ import annotations

from benchmarks.harness import aot
from benchmarks.harness.aot import Row
from benchmarks.harness.spec import ALSO_SHIPPED, ARCHITECTURES, AS_SM80, FORMS, OTHER_WIDTHS, PADDED, SHIPPED
from benchmarks.registry import GateError, Measure, Report, case, versions


@case("aot_report", turns=1, summary="what the shipped kernels occupy and issue, compiled for sm_80 and sm_90")
def aot_report(turns: int) -> Report:
    forms = [(arch, form) for arch in ARCHITECTURES for form in FORMS if (arch, form) != (80, AS_SM80)]
    rows = sum(aot.compiled([(arch, form, None) for arch, form in forms]), [])
    shipped = [row for row in rows if row.form in (SHIPPED, ALSO_SHIPPED, OTHER_WIDTHS)]
    broken = [f"{row.kernel} {row.launch} for sm_{row.arch}: {text}" for row in shipped for text in row.violations]
    if broken:
        raise GateError("; ".join(broken))
    return Report(
        peer={"padded-to-128": ""} | versions("triton"),
        gate=f"all {len(shipped)} shipped launches are within their budgets",
        measures=[measure for row in rows if row.form == PADDED and row.useful for measure in _against(shipped, row)],
        table=[row.cells for row in rows],
    )


def _against(shipped: list[Row], padded: Row) -> list[Measure]:
    """A padded launch beside the shipped one that it is a form of."""
    ours = next(x for x in shipped if (x.kernel, x.launch, x.arch) == (padded.kernel, padded.launch, padded.arch))
    which = f"sm_{ours.arch} {ours.kernel.removeprefix('attention ')}"
    return [
        Measure.of(
            f"{which}: multiply-adds a tile", "Mi", *([max(row.multiply_adds) / 2**20] for row in (ours, padded))
        ),
        Measure.of(f"{which}: shared memory", "KiB", *([row.shared / 1024] for row in (ours, padded))),
    ]
