"""Triton's model configurations, built as typed protobuf objects from the tensor tables and a bundle's manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from diffuserve.batching.policies import DEFAULT_POLICY
from diffuserve.bundle.manifest import Manifest
from diffuserve.limits import MAX_DECODE_BATCH, Limits
from diffuserve.stages import CALL_TIMEOUT_S
from diffuserve.tensors import (
    SAFETY_CHECKER,
    STABLE_DIFFUSION,
    TEXT_ENCODER,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
    TensorSpec,
)
from diffuserve.wire import REQUEST_INPUTS, RESPONSE
from diffuserve_export.repository.triton_backends import PYTHON, set_backend

# How long the text encoder waits for company. The UNet's only caller is the in-flight loop, which has made the batch
# already: a delay there would be paid at every step.
TEXT_ENCODER_DELAY_US = 2000

_MODEL_PY = {
    True: '"""Entry point for Triton; the model lives in the installed package."""\n\n'
    "from diffuserve.triton.stable_diffusion import StableDiffusionModel as TritonPythonModel  # noqa: F401\n",
    False: '"""Entry point for Triton; the model lives in the installed package."""\n\n'
    "from diffuserve.triton.stage import StageModel as TritonPythonModel  # noqa: F401\n",
}


def model_py(name: str) -> str:
    """The text of a model's 1/model.py."""
    return _MODEL_PY[name == STABLE_DIFFUSION]


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


def configs_from_manifest(manifest: Manifest, serving: Serving | None = None, backend: str = PYTHON) -> dict[str, Any]:
    """A `ModelConfig` for each Triton model that serves the bundle, by model name.

    Args:
        manifest: the bundle's.
        serving: how it is served.
        backend: one of `diffuserve_export.repository.triton_backends.BACKENDS`, for the stages.

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
    configs = {
        name: _stage_config(name, component.tensors.inputs, component.tensors.outputs, max_batch_sizes[name])
        for name, component in manifest.components.items()
    }
    for name, config in configs.items():
        instances = serving.unet_instances if name == UNET else 1
        if backend == PYTHON:
            config.instance_group[0].count = instances
            # 0 is one thread for each core. The UNet runs nearly all the time, and the others only between a request's
            # ends.
            config.parameters["threads"].string_value = "0"
            config.parameters["call_timeout_s"].string_value = str(serving.call_timeout_s)
        else:
            set_backend(config, backend, manifest.components[name], manifest.model, instances)
    configs[STABLE_DIFFUSION] = _stable_diffusion_config(limits, serving)
    return configs


def text_from_config(config: Any) -> str:
    """A config.pbtxt. Protobuf's text format leaves out zeros, but Triton reads a missing max_batch_size as unset."""
    from google.protobuf import text_format

    text = text_format.MessageToString(config)
    if config.max_batch_size == 0:
        text += "max_batch_size: 0\n"
    return "# Written by `diffuserve assemble`.\n" + text


def _stage_config(
    name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], max_batch_size: int
) -> Any:
    from tritonclient.grpc.model_config_pb2 import ModelDynamicBatching

    config = _config(name, inputs, outputs, max_batch_size)
    delay_us = TEXT_ENCODER_DELAY_US if name == TEXT_ENCODER else 0
    config.dynamic_batching.CopyFrom(ModelDynamicBatching(max_queue_delay_microseconds=delay_us))
    return config


def _stable_diffusion_config(limits: Limits, serving: Serving) -> Any:
    config = _config(STABLE_DIFFUSION, REQUEST_INPUTS, RESPONSE, max_batch_size=0)
    config.model_transaction_policy.decoupled = True
    for name, value in {**asdict(limits), **asdict(serving)}.items():
        config.parameters[name].string_value = str(value)
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
            ModelInput(name=spec.name, data_type=data_type(spec), dims=spec.triton_dims, optional=spec.optional)
            for spec in inputs
        ],
        output=[ModelOutput(name=spec.name, data_type=data_type(spec), dims=spec.triton_dims) for spec in outputs],
        # Written out, since on a machine with GPUs Triton's default is an instance, so an in-flight loop, for each.
        instance_group=[ModelInstanceGroup(count=1, kind=ModelInstanceGroup.KIND_CPU)],
    )
