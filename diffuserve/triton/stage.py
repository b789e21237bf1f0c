"""The Triton models text_encoder, unet, vae_decoder, vae_encoder and safety_checker: one engine each, in the Python
backend.

An engine that hangs cannot be interrupted, and would block its model for good. So the process ends itself after
`call_timeout_s`, with a traceback of every thread in the log; whoever calls the stage has it loaded again, see
`diffuserve.triton.bls_stages`.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from diffuserve.engines import load_engine
from diffuserve.engines.warm import warm
from diffuserve.errors import BundleError, StageFailed, to_wire
from diffuserve.triton.inherited import close_inherited_sockets
from diffuserve.triton.log import log_to_triton
from diffuserve.triton.placement import read_placement

log = logging.getLogger(__name__)


class StageModel:
    """Runs its component on the requests that Triton's dynamic batcher put together."""

    def initialize(self, args: dict[str, str]) -> None:
        close_inherited_sockets()
        log_to_triton(args["model_name"])
        config = json.loads(args["model_config"])
        version_folder = Path(args["model_repository"]) / args["model_version"]
        try:
            placement = read_placement(version_folder)
            if placement.component is None:
                raise BundleError(f"{version_folder} holds no component. Assemble the repository again.")
            parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
            threads = int(parameters["threads"])
            self._call_timeout_s = float(parameters["call_timeout_s"])
            self._tensors = placement.component.tensors
            self._engine = load_engine(version_folder / placement.files[0].name, placement.component, threads)
            # Loading fails if these calls do, so the server is ready only when the engine has really run.
            started_s = time.monotonic()
            warm(self._engine, placement.component, placement.model)
            log.info("%s is warm, %.1f s", args["model_name"], time.monotonic() - started_s)
        except BundleError as error:
            raise pb_utils.TritonModelException(to_wire(error)) from error

    def execute(self, requests: list[Any]) -> list[Any]:
        rows = []
        arrays: dict[str, list[NDArray[Any]]] = {spec.name: [] for spec in self._tensors.inputs}
        for request in requests:
            for name, parts in arrays.items():
                parts.append(pb_utils.get_input_tensor_by_name(request, name).as_numpy())
            rows.append(len(parts[-1]))
        # Its thread needs no interpreter lock, so it also ends an engine that holds the lock while it hangs.
        faulthandler.dump_traceback_later(self._call_timeout_s, exit=True)
        try:
            outputs = self._engine(
                {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in arrays.items()}
            )
        except Exception as error:
            log.exception("the engine failed")
            failure = pb_utils.TritonError(to_wire(StageFailed(f"The engine failed: {error}")))
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        finally:
            faulthandler.cancel_dump_traceback_later()
        ends = np.cumsum(rows)
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, np.ascontiguousarray(array[end - count : end]))
                    for name, array in outputs.items()
                ]
            )
            for count, end in zip(rows, ends, strict=True)
        ]
