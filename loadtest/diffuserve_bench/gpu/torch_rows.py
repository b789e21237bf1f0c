"""PyTorch's UNet by its number of rows: eager, as CUDA graphs, and compiled. Inputs and outputs stay on the device."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.manifest import Manifest
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.tensors import UNET
from diffuserve_bench.gpu.card import memory_mib
from diffuserve_bench.gpu.cuda_graphs import Graphed
from diffuserve_bench.gpu.model import model_in
from diffuserve_bench.gpu.record import PhaseRecord, Skipped
from diffuserve_bench.gpu.settings import Settings
from diffuserve_bench.gpu.torch_device import compiler_on, median_s, precision_on, torch_device
from diffuserve_bench.gpu.torch_models import random_unet
from diffuserve_bench.gpu.ways import relative_error
from diffuserve_bench.torch_unet import Tensors, TorchUnet
from diffuserve_loadtest.stage_seconds import random_sizes

if TYPE_CHECKING:
    import torch


def measure(settings: Settings, record: PhaseRecord) -> None:
    """The same UNet in each way."""
    import torch

    device = torch_device(settings)
    bundle, manifest = model_in(settings)
    precision, dtype = precision_on(device)
    exact = random_unet(bundle, device, torch.float32)
    on_cpu = copy.deepcopy(exact).to("cpu")
    rows = _Rows(TorchUnet(exact.to(dtype)), device, manifest, settings, record, precision)
    with record.part(way="eager"):
        rows.measure("eager", lambda example: rows.unet.output)
    with record.part(way="CUDA graph"):
        if device.type != "cuda":
            raise Skipped("a CPU has no CUDA graphs")
        rows.measure("CUDA graph", lambda example: Graphed(rows.unet.output, example))
    with record.part(way="eager"):
        inputs = rows.inputs(1)
        error = relative_error(rows.unet(inputs), TorchUnet(on_cpu)(inputs))
        record.figure(
            "largest error against fp32 on the CPU",
            error,
            "of the output's deviation",
            engine="pytorch",
            precision=precision,
        )
    with record.part(way="torch.compile"):
        _measure_compiled(rows)


def _measure_compiled(rows: _Rows) -> None:
    """Compiled once for any number of rows from 2 on; one row would be compiled anew."""
    import torch

    compiled = TorchUnet(torch.compile(rows.unet.unet, backend=compiler_on(rows.device)))

    def call(tensors: Tensors) -> torch.Tensor:
        for tensor in tensors.values():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled.output(tensors)

    rows.measure("torch.compile", lambda example: call, least=2)
    rows.measure_random("torch.compile", call)


class _Rows:
    """Calls of the UNet by rows, timed and written down."""

    def __init__(
        self,
        unet: TorchUnet,
        device: torch.device,
        manifest: Manifest,
        settings: Settings,
        record: PhaseRecord,
        precision: str,
    ) -> None:
        self.unet = unet
        self.device = device
        self._manifest, self._settings = manifest, settings
        self._record, self._precision = record, precision

    def inputs(self, rows: int) -> Mapping[str, NDArray[np.float32]]:
        return example_inputs(self._manifest.components[UNET].tensors, self._manifest.model, rows)

    def measure(
        self, way: str, prepared: Callable[[Tensors], Callable[[Tensors], torch.Tensor]], least: int = 1
    ) -> None:
        """`prepared` makes what is timed from example inputs, and its time counts to the first call's."""
        named: dict[str, Any] = {"engine": "pytorch", "way": way, "precision": self._precision}
        for rows in self._settings.sizes.rows:
            if rows < least:
                continue
            with self._record.part(rows=rows, **named):
                tensors = self.unet.tensors(self.inputs(rows))
                started_s = time.perf_counter()
                call = prepared(tensors)
                call(tensors).cpu()
                self._record.figure("first call", time.perf_counter() - started_s, "s", rows=rows, **named)
                seconds = median_s(lambda: call(tensors), self.device, self._settings.sizes.calls)  # noqa: B023
                self._record.figure("call", 1000 * seconds / rows, "ms/row", rows=rows, **named)
        if (mib := memory_mib()) is not None:
            self._record.figure("memory of the GPU, all of this process", mib, "MiB", **named)

    def measure_random(self, way: str, call: Callable[[Tensors], torch.Tensor]) -> None:
        """Calls of random numbers of rows from 2 on, one after another."""
        sizes = [
            rows
            for rows in random_sizes(self._settings.sizes.random_calls, max(self._settings.sizes.rows), seed=0)
            if rows > 1
        ]
        inputs = {rows: self.unet.tensors(self.inputs(rows)) for rows in set(sizes)}
        started_s = time.perf_counter()
        for rows in sizes:
            call(inputs[rows]).cpu()
        each = 1000 * (time.perf_counter() - started_s) / sum(sizes)
        self._record.figure("calls of random sizes", each, "ms/row", engine="pytorch", way=way, calls=len(sizes))
