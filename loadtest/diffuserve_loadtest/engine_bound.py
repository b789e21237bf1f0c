"""What the engines alone would do of a workload: the bound that no way of serving can exceed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from diffuserve.bundle.manifest import ModelSpec, read_manifest
from diffuserve_loadtest.stage_seconds import StageSeconds, best_request_s, measure_stages
from diffuserve_loadtest.workload.plan import PlannedRequest, plan
from diffuserve_loadtest.workload.workload import Workload

_PLANNED = 1000


def engine_bound_per_s(workload: Workload, bundle: Path, max_rows: int) -> float:
    """As `bound_per_s`; times the engines in this process, half a minute or more for each image size of the workload.

    Args:
        workload: whose mixture it is.
        bundle: whose engines.
        max_rows: rows of a UNet call, at most.
    """
    model = read_manifest(bundle).model
    sizes = dict.fromkeys(_size_of(request, model) for request in _planned(workload))
    return bound_per_s(workload, model, {size: measure_stages(bundle, size) for size in sizes}, max_rows)


def bound_per_s(
    workload: Workload, model: ModelSpec, seconds: Mapping[tuple[int, int], StageSeconds], max_rows: int
) -> float:
    """Requests a second if every row, text and image ran in the batch that is cheapest for one of them.

    Args:
        workload: whose mixture it is.
        model: whose native size a request without one has.
        seconds: of the engines, by (width, height) in pixels.
        max_rows: rows of a UNet call, at most.
    """
    return 1 / statistics.fmean(
        best_request_s(seconds[_size_of(request, model)], request.unet_rows, request.images, max_rows)
        for request in _planned(workload)
    )


def _planned(workload: Workload) -> list[PlannedRequest]:
    return [plan(workload, number) for number in range(_PLANNED)]


def _size_of(request: PlannedRequest, model: ModelSpec) -> tuple[int, int]:
    return request.size[0] or model.width, request.size[1] or model.height
