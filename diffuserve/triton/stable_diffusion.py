"""The in-flight model, stable_diffusion unless it was given another name: a thin, decoupled shell around the pipeline and its
in-flight loop.

Each request is an asyncio task that reads the pipeline's events and sends a response for each. Whatever happens, it ends
with exactly one final response, since a client would wait forever for a missing one.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from diffuserve.bundle.manifest import read_manifest
from diffuserve.description import describe, values_from_description
from diffuserve.engines.tensorrt_library import LIBRARIES
from diffuserve.engines.tensorrt_profiles import check_limits, profiles_of
from diffuserve.errors import TRITON_CODE, Cancelled, DiffuserveError, InvalidRequest, StageFailed, to_wire
from diffuserve.events import Completed
from diffuserve.pipeline import Pipeline
from diffuserve.request import TextToImageRequest
from diffuserve.request_fields import shown
from diffuserve.serving.lifecycle import ModelSigns
from diffuserve.serving_options import limits_and_serving
from diffuserve.tensors import UNET
from diffuserve.triton.bls_stages import BlsStages
from diffuserve.triton.configuration import check_stages
from diffuserve.triton.device_tensors import device_for
from diffuserve.triton.housekeeping import Housekeeping
from diffuserve.triton.log import log_to_triton
from diffuserve.triton.neighbours import RunFolderNeighbours
from diffuserve.triton.parameters import without_tritons_own
from diffuserve.triton.placement import read_placement
from diffuserve.triton.repository import check_one_bundle
from diffuserve.triton.responses import tensors_from_event, tensors_from_values
from diffuserve.triton.stage_models import check_all_named, split_parameters
from diffuserve.wire import REQUEST_INPUTS, request_from_wire

log = logging.getLogger(__name__)

# Parameters that are Triton's own: what its front ends and clients add, and the id that a body of JSON may give a request.
# Others of its own never reach a model (sequence_id, timeout, headers ...).
_TRITON_PARAMETERS = frozenset(
    {"triton_enable_empty_final_response", "triton_final_response", "binary_data_output", "id"}
)

# Triton 2.51 notes an `execute` that it has started only afterwards, and keeps for good the note of one that ended sooner.
_LEAST_EXECUTE_S = 0.05


class StableDiffusionModel:
    """Owns the pipeline. Triton runs one instance of it, whose `execute` calls overlap on one event loop."""

    def initialize(self, args: dict[str, str]) -> None:
        name = args["model_name"]
        log_to_triton(name)
        version_folder = Path(args["model_repository"]) / args["model_version"]
        try:
            parameters = {
                key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()
            }
            placement = read_placement(version_folder)
            models, options = split_parameters(without_tritons_own(parameters))
            limits, serving = limits_and_serving(placement.model, options)
            manifest = read_manifest(version_folder)
            check_limits(limits, manifest)
            components = manifest.components
            check_all_named(models, components)
            # Also for a Triton that the launcher has not started.
            repository = version_folder.parents[1]
            check_one_bundle(repository, name, models.values(), args["model_version"])
            check_stages(repository, name, models, limits, serving)
            outputs = {
                stage: [spec.name for spec in component.tensors.outputs] for stage, component in components.items()
            }
            ranges = {
                stage: profiles_of(component, placement.model)
                for stage, component in components.items()
                if component.engine in LIBRARIES
            }
            self._stages = BlsStages(models, outputs, ranges, device_for(components[UNET]))
            neighbours = RunFolderNeighbours.from_environment(name)
            self._pipeline = Pipeline(version_folder, self._stages, limits, serving, neighbours=neighbours)
        except DiffuserveError as error:
            raise pb_utils.TritonModelException(to_wire(error)) from error
        # A pool of its own for the blocking round trips of `send`; BLS calls use the event loop's default pool.
        self._senders = ThreadPoolExecutor(4, thread_name_prefix="response sender")
        self._unanswered = 0
        self._signs = ModelSigns.from_environment(name)
        self._housekeeping = Housekeeping(self._pipeline, self._is_idle, name, self._signs)
        if self._signs:
            self._signs.live()

    async def execute(self, requests: list[Any]) -> None:
        await asyncio.gather(*(self._answer(request) for request in requests))
        await asyncio.sleep(_LEAST_EXECUTE_S)

    def finalize(self) -> None:
        if self._signs:
            self._signs.end()
        self._housekeeping.stop()
        self._senders.shutdown(wait=False)

    def _is_idle(self) -> bool:
        return not (self._unanswered or self._stages.calls)

    async def _answer(self, request: Any) -> None:
        self._unanswered += 1
        try:
            await self._answer_once(request)
        finally:
            self._unanswered -= 1

    async def _answer_once(self, request: Any) -> None:
        sender = request.get_response_sender()
        request_id = _shown_id(request)
        task = asyncio.create_task(self._serve(request, sender))
        try:
            final = await task
        except asyncio.CancelledError:
            final = _error_response(Cancelled("The request was cancelled by its client."))
            log.info("%s cancelled", request_id)
        except DiffuserveError as error:
            final = _error_response(error)
            log.info("%s %s: %s", request_id, error.code, "refused" if isinstance(error, InvalidRequest) else error)
        except Exception as error:
            log.exception("%s failed", request_id)
            final = _error_response(StageFailed(f"The server failed on this request: {error!r}"))
        finally:
            # The task's exception refers to this frame by its traceback, and this frame to the task. Undone, such a
            # ring would keep the sender until some garbage collection, and Triton unloads no model that has one.
            del task
        await asyncio.get_running_loop().run_in_executor(self._senders, self._send_final, sender, final)

    def _send_final(self, sender: Any, response: Any) -> None:
        # The sender must not be polled once it is closed.
        self._housekeeping.unwatch(sender)
        try:
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception:
            log.exception("the final response could not be sent; closing the request without it")
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _serve(self, triton_request: Any, sender: Any) -> Any:
        """Sends the events in between; returns the final response."""
        request = self._parse(triton_request)
        if request is None:
            description = describe(self._pipeline.manifest, self._pipeline.limits)
            return _response(tensors_from_values(values_from_description(description)))
        events = self._pipeline.generate(request)
        watched = False
        try:
            async for event in events:
                if not watched:  # before it is accepted there is nothing to take back, and a refusal is quicker
                    self._housekeeping.watch(sender, cast("asyncio.Task[Any]", asyncio.current_task()))
                    watched = True
                response = _response(tensors_from_event(event, request))
                if isinstance(event, Completed):
                    log.info(
                        "%s done: %d x %dx%d, %d steps of %s, queued %.3f s, total %.3f s",
                        _shown_id(triton_request),
                        request.num_images,
                        request.width,
                        request.height,
                        request.steps,
                        request.sampler,
                        event.queue_s,
                        event.total_s,
                    )
                    return response
                if request.progress:
                    await asyncio.get_running_loop().run_in_executor(self._senders, sender.send, response)
        finally:
            await events.aclose()
        raise StageFailed("The pipeline ended without a result.")

    def _parse(self, triton_request: Any) -> TextToImageRequest | None:
        try:
            parameters = json.loads(triton_request.parameters() or "{}")
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"The request has text that is not UTF-8 ({error.reason}). Encode it as UTF-8."
            ) from None
        fields = {name: value for name, value in parameters.items() if name not in _TRITON_PARAMETERS}
        for name in [spec.name for spec in REQUEST_INPUTS if spec.name in fields]:
            raise InvalidRequest(f"{name} came as a parameter of the request. Send it as an input tensor of shape [1].")
        for tensor in triton_request.inputs():
            # Triton has checked dtype and shape against the configuration; `tolist` copies out of shared memory.
            [fields[tensor.name()]] = tensor.as_numpy().tolist()
        return request_from_wire(fields, self._pipeline.manifest.model, self._pipeline.limits)


def _shown_id(request: Any) -> str:
    """Its client's id for it, in the log: of bounded length and on one line, whatever the client made it."""
    try:
        request_id = request.request_id()
    except UnicodeDecodeError as error:  # from HTTP, where Triton does not check it
        return shown(error.object)
    return shown(request_id) if request_id else "-"


def _response(tensors: Mapping[str, NDArray[Any]]) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])


def _error_response(error: DiffuserveError) -> Any:
    code = getattr(pb_utils.TritonError, TRITON_CODE.get(type(error), "INTERNAL"))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(to_wire(error), code))
