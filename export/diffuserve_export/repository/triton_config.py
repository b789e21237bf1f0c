"""Triton's model configurations, built as typed protobuf objects from the tensor tables and a bundle's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffuserve import __version__
from diffuserve.bundle.manifest import Manifest, ModelSpec
from diffuserve.limits import Limits, max_batch_sizes
from diffuserve.options import to_parameters
from diffuserve.response_tensors import RESPONSE
from diffuserve.serving_options import Serving
from diffuserve.tensors import STABLE_DIFFUSION, TEXT_ENCODER, UNET, TensorSpec
from diffuserve.wire import REQUEST_INPUTS
from diffuserve_export.repository.serving_arguments import given, words
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


def configs_from_manifest(
    manifest: Manifest, limits: Limits, serving: Serving, backend: str = PYTHON
) -> dict[str, Any]:
    """A `ModelConfig` for each Triton model that serves the bundle, by model name.

    Args:
        manifest: the bundle's.
        limits: what is accepted.
        serving: how it is served.
        backend: one of `diffuserve_export.repository.triton_backends.BACKENDS`, for the stages.

    Raises:
        BundleError: the backend does not run a component as it is.
    """
    rows = max_batch_sizes(limits)
    configs = {
        name: _stage_config(name, component.tensors.inputs, component.tensors.outputs, rows[name])
        for name, component in manifest.components.items()
    }
    for name, config in configs.items():
        instances = serving.unet_instances if name == UNET else 1
        if backend == PYTHON:
            config.instance_group[0].count = instances
            config.parameters["call_timeout_s"].string_value = to_parameters(serving)["call_timeout_s"]
        else:
            set_backend(config, backend, manifest.components[name], manifest.model, instances)
    configs[STABLE_DIFFUSION] = _stable_diffusion_config(limits, serving)
    return configs


def given_arguments(model: ModelSpec, limits: Limits, serving: Serving, backend: str) -> dict[str, str]:
    """What `diffuserve assemble` must be given for these, as `diffuserve_export.repository.serving_arguments.given`."""
    return {
        **given(limits, Limits.for_model(model)),
        **given(serving, Serving()),
        **({} if backend == PYTHON else {"--backend": backend}),
    }


def sources(manifest: Manifest, arguments: Mapping[str, str]) -> str:
    """The head of every config.pbtxt: what it was made from.

    Args:
        manifest: the bundle's.
        arguments: of `given_arguments`.
    """
    return (
        f"# Written by `diffuserve assemble`, version {__version__}.\n"
        # The checkpoint's and not the bundle's, which carries an image that differs between processors.
        f"# Checkpoint: {' '.join(manifest.title.split())}, SHA-256 {manifest.source_sha256}.\n"
        f"# Options: {words(arguments) or 'none'}.\n"
    )


def text_from_config(config: Any, head: str) -> str:
    """A config.pbtxt. Protobuf's text format leaves out zeros, but Triton reads a missing max_batch_size as unset."""
    from google.protobuf import text_format

    text = text_format.MessageToString(config)
    if config.max_batch_size == 0:
        text += "max_batch_size: 0\n"
    return head + text


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
    for name, text in to_parameters(limits, serving).items():
        config.parameters[name].string_value = text
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
