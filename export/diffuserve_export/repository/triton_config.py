"""Triton's model configurations, built as typed protobuf objects from the tensor tables and a bundle's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffuserve.batching.policies import DEFAULT_POLICY
from diffuserve.bundle.manifest import Manifest
from diffuserve.limits import MAX_DECODE_BATCH, Limits
from diffuserve.stages import CALL_TIMEOUT_S
from diffuserve.tensors import (
    REQUEST_INPUTS,
    RESPONSE,
    SAFETY_CHECKER,
    STABLE_DIFFUSION,
    TEXT_ENCODER,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
    StageSpec,
    TensorSpec,
)
from diffuserve.triton.stage_models import parameters_from_stage_models, stage_model
from diffuserve_export.repository.triton_backends import PYTHON, set_backend

# How long the text encoder waits for company. The UNet's only caller is the in-flight loop, which has made the batch
# already: a delay there would be paid at every step.
TEXT_ENCODER_DELAY_US = 2000

_MODEL_PY = '"""Entry point for Triton; the model lives in the installed package."""\n\n'
INFLIGHT_MODEL_PY = f"{_MODEL_PY}from diffuserve.triton.stable_diffusion import StableDiffusionModel as TritonPythonModel  # noqa: F401\n"
"""The text of an in-flight model's 1/model.py."""
STAGE_MODEL_PY = f"{_MODEL_PY}from diffuserve.triton.stage import StageModel as TritonPythonModel  # noqa: F401\n"
"""That of a stage's."""


@dataclass(frozen=True)
class Serving:
    """How a repository serves its bundle, besides the limits: what `diffuserve.pipeline.Pipeline` is given.

    `unet_instances`: copies of the UNet, one for each GPU; the loop keeps a call in flight for each. `call_timeout_s`:
    seconds after which a stage's call counts as hung; the loop gives it up, and the stage's process ends itself.
    `require_safety_checker`: load no bundle without one.
    """

    batching: str = "inflight"
    policy: str = DEFAULT_POLICY
    unet_instances: int = 1
    call_timeout_s: float = CALL_TIMEOUT_S
    require_safety_checker: bool = False


def configs_from_manifest(
    manifest: Manifest, serving: Serving | None = None, backend: str = PYTHON, *, name: str = STABLE_DIFFUSION
) -> dict[str, Any]:
    """A `ModelConfig` for each Triton model that serves the bundle, by model name; that of the in-flight model is the last.

    Args:
        manifest: the bundle's.
        serving: how it is served.
        backend: one of `diffuserve_export.repository.triton_backends.BACKENDS`, for the stages.
        name: of the in-flight model; its stages are named after it (`diffuserve.triton.stage_models`).

    Raises:
        BundleError: the backend does not run a component as it is.
    """
    serving = serving or Serving()
    limits = Limits.for_model(manifest.model)
    max_batch_sizes = {
        TEXT_ENCODER: limits.max_rows,
        UNET: limits.max_rows,
        VAE_DECODER: MAX_DECODE_BATCH,
        VAE_ENCODER: MAX_DECODE_BATCH,
        SAFETY_CHECKER: MAX_DECODE_BATCH,
    }
    stage_models = {stage: stage_model(name, stage) for stage in manifest.components}
    configs = {}
    for stage, component in manifest.components.items():
        config = _stage_config(stage, stage_models[stage], component.tensors, max_batch_sizes[stage])
        configs[config.name] = config
        instances = serving.unet_instances if stage == UNET else 1
        if backend == PYTHON:
            config.instance_group[0].count = instances
            # 0 is one thread for each core. The UNet runs nearly all the time, and the others only between a request's
            # ends.
            config.parameters["threads"].string_value = "0"
            config.parameters["call_timeout_s"].string_value = str(serving.call_timeout_s)
        else:
            set_backend(config, backend, component, manifest.model, instances)
    configs[name] = _inflight_config(name, limits, serving, stage_models)
    return configs


def text_from_config(config: Any) -> str:
    """A config.pbtxt. Protobuf's text format leaves out zeros, but Triton reads a missing max_batch_size as unset."""
    from google.protobuf import text_format

    text = text_format.MessageToString(config)
    if config.max_batch_size == 0:
        text += "max_batch_size: 0\n"
    return "# Written by `diffuserve assemble`.\n" + text


def _stage_config(stage: str, name: str, tensors: StageSpec, max_batch_size: int) -> Any:
    from tritonclient.grpc.model_config_pb2 import ModelDynamicBatching

    config = _config(name, tensors.inputs, tensors.outputs, max_batch_size)
    delay_us = TEXT_ENCODER_DELAY_US if stage == TEXT_ENCODER else 0
    config.dynamic_batching.CopyFrom(ModelDynamicBatching(max_queue_delay_microseconds=delay_us))
    return config


def _inflight_config(name: str, limits: Limits, serving: Serving, stage_models: Mapping[str, str]) -> Any:
    config = _config(name, REQUEST_INPUTS, RESPONSE, max_batch_size=0)
    config.model_transaction_policy.decoupled = True
    parameters = {**asdict(limits), **asdict(serving), **parameters_from_stage_models(stage_models)}
    for parameter, value in parameters.items():
        config.parameters[parameter].string_value = str(value)
    return config


def _config(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], max_batch_size: int) -> Any:
    from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInput, ModelInstanceGroup, ModelOutput

    def data_type(spec: TensorSpec) -> int:
        return DataType.Value("TYPE_STRING" if spec.dtype == "BYTES" else f"TYPE_{spec.dtype}")

    return ModelConfig(
        name=name,
        backend=PYTHON,
        max_batch_size=max_batch_size,
        input=[
            ModelInput(name=spec.name, data_type=data_type(spec), dims=spec.dims, optional=spec.optional)
            for spec in inputs
        ],
        output=[ModelOutput(name=spec.name, data_type=data_type(spec), dims=spec.dims) for spec in outputs],
        # Written out, since on a machine with GPUs Triton's default is an instance, so an in-flight loop, for each.
        instance_group=[ModelInstanceGroup(count=1, kind=ModelInstanceGroup.KIND_CPU)],
    )
