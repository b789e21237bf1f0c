"""What the engines alone would do of a workload: the bound that no way of serving can exceed."""

from __future__ import annotations

import statistics
from pathlib import Path

from diffuserve.bundle import read_manifest
from diffuserve_loadtest.stage_seconds import StageSeconds, best_request_s, measure_stages
from diffuserve_loadtest.workload.plan import plan
from diffuserve_loadtest.workload.workload import Workload

_PLANNED = 1000


def engine_bound_per_s(workload: Workload, bundle: Path, max_rows: int) -> float:
    """Requests a second if every row, text and image ran in the batch that is cheapest for one of them.

    Times the engines in this process, half a minute or more for each image size of the workload.

    Args:
        workload: whose mixture it is.
        bundle: whose engines.
        max_rows: rows of a UNet call, at most.
    """
    model = read_manifest(bundle).model
    seconds: dict[tuple[int, int], StageSeconds] = {}
    each_s = []
    for number in range(_PLANNED):
        request = plan(workload, number)
        size = (request.size[0] or model.width, request.size[1] or model.height)
        if size not in seconds:
            seconds[size] = measure_stages(bundle, size)
        each_s.append(best_request_s(seconds[size], request.unet_rows, request.images, max_rows))
    return 1 / statistics.fmean(each_s)
