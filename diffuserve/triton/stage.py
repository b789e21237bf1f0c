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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from diffuserve.engines import load_engine
from diffuserve.engines.warm import warm
from diffuserve.errors import BundleError, ConfigurationError, StageFailed, to_wire
from diffuserve.options import from_parameters
from diffuserve.serving_options import Serving
from diffuserve.stages import ArraysByName
from diffuserve.triton.device_tensors import from_triton, joined, to_triton
from diffuserve.triton.inherited import close_inherited_sockets
from diffuserve.triton.log import log_to_triton
from diffuserve.triton.placement import read_placement

log = logging.getLogger(__name__)


class StageModel:
    """Runs its component on the requests that Triton's dynamic batcher put together."""

    def initialize(self, args: dict[str, str]) -> None:
        close_inherited_sockets()
        self._name = args["model_name"]
        log_to_triton(self._name)
        config = json.loads(args["model_config"])
        version_folder = Path(args["model_repository"]) / args["model_version"]
        try:
            placement = read_placement(version_folder)
            if placement.component is None:
                raise BundleError(f"{version_folder} holds no component. Assemble the repository again.")
            parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
            self._call_timeout_s = from_parameters(Serving(), parameters).call_timeout_s
            self._tensors = placement.component.tensors
            self._engine = load_engine(version_folder / placement.files[0].name, placement.component, threads=0)
            # Loading fails if these calls do, so the server is ready only when the engine has really run.
            started_s = time.monotonic()
            warm(self._engine, placement.component, placement.model, config["max_batch_size"])
            log.info("%s is warm, %.1f s", self._name, time.monotonic() - started_s)
        except (BundleError, ConfigurationError) as error:
            raise pb_utils.TritonModelException(to_wire(error)) from error

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request. A request that the engine fails on fails alone: the others of its batch are run
        without it."""
        inputs = [
            {
                spec.name: from_triton(pb_utils.get_input_tensor_by_name(request, spec.name))
                for spec in self._tensors.inputs
            }
            for request in requests
        ]
        try:
            return self._run(inputs)
        except Exception as error:
            log.exception("the engine failed")
            if len(inputs) == 1:
                return [self._failure(error)]
        return [self._run_alone(each) for each in inputs]

    def _run_alone(self, inputs: ArraysByName) -> Any:
        try:
            [response] = self._run([inputs])
        except Exception as error:
            return self._failure(error)
        return response

    def _run(self, inputs: Sequence[ArraysByName]) -> list[Any]:
        """One call for all; whatever the engine raises is raised."""
        names = [spec.name for spec in self._tensors.inputs]
        # Its thread needs no interpreter lock, so it also ends an engine that holds the lock while it hangs.
        faulthandler.dump_traceback_later(self._call_timeout_s, exit=True)
        try:
            outputs = self._engine({name: joined([each[name] for each in inputs]) for name in names})
            rows = [len(each[names[0]]) for each in inputs]
            # It waits for outputs on a GPU, which the engine did not.
            return [
                pb_utils.InferenceResponse(
                    [to_triton(name, array[end - count : end]) for name, array in outputs.items()]
                )
                for count, end in zip(rows, np.cumsum(rows), strict=True)
            ]
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _failure(self, error: Exception) -> Any:
        """A response of its own for each request: Triton 2.51 frees an error with each response that carries it."""
        failed = StageFailed(f"The stage {self._name} failed: {error or type(error).__name__}")
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(to_wire(failed)))
