"""TorchServe's configuration for one archive."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import msgspec

from diffuserve.bundle.manifest import MANIFEST_NAME, Manifest, ModelSpec
from diffuserve.defaults import ARCHIVES
from diffuserve.errors import BundleError, LaunchError
from diffuserve.limits import Limits
from diffuserve.serving_options import Serving, limits_and_serving
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.torchserve.address import TorchServeAddress

# The keys live as long as the server. TorchServe lets them expire after an hour by default, and nobody could call it then.
_KEYS_EXPIRE_MIN = 10 * 365 * 24 * 60
_LARGEST_MESSAGE_BYTES = 2**31 - 1
_LEAST_REQUEST_BYTES = 2**20
_BYTES_IN_JSON = 6  # of one byte of a prompt, if it is escaped: \u0000
_LOG_LEVELS = {"error": "error", "warning": "warn", "info": "info"}


@dataclass(frozen=True)
class Archive:
    """What an archive says of itself: `config` is its model-config.yaml; `limits`, `serving`: what that tells our handler."""

    path: Path
    config: Mapping[str, Any]
    manifest: Manifest
    limits: Limits
    serving: Serving

    @property
    def largest_request_bytes(self) -> int:
        """With both prompts as long as they may be, and room for the rest."""
        return max(_LEAST_REQUEST_BYTES, 2 * _BYTES_IN_JSON * self.limits.max_prompt_bytes + 2**16)

    @property
    def largest_answer_bytes(self) -> int:
        """Of a whole batch: every request with as many images as it may, of the largest size, as uncompressed base64."""
        limits = self.limits
        image_bytes = 3 * limits.max_side_px**2 * 4 // 3 + limits.max_prompt_bytes
        return min(int(self.config["batchSize"]) * limits.max_images * image_bytes, _LARGEST_MESSAGE_BYTES)


def options_from_config(model: ModelSpec, config: Mapping[str, Any]) -> tuple[Limits, Serving]:
    """What a model-config.yaml tells our handler.

    Raises:
        ConfigurationError: a parameter is unknown or not allowed.
    """
    return limits_and_serving(model, {name: str(value) for name, value in config["handler"]["parameters"].items()})


def read_archive(path: Path) -> Archive:
    """Reads an archive that `diffuserve archive` wrote, without unpacking it.

    Raises:
        BundleError: it is missing, damaged or another's, or the bundle that it refers to is gone.
        ConfigurationError: an option is unknown or not allowed.
    """
    import yaml

    again = "Write it: diffuserve archive BUNDLE"
    try:
        with zipfile.ZipFile(path) as archive:
            config = yaml.safe_load(archive.read("model-config.yaml"))
            bundle = config["handler"].get("bundle")
            data = (Path(bundle) / MANIFEST_NAME).read_bytes() if bundle else archive.read(MANIFEST_NAME)
        manifest = msgspec.json.decode(data, type=Manifest)
        return Archive(path, config, manifest, *options_from_config(manifest.model, config))
    except (
        OSError,
        zipfile.BadZipFile,
        KeyError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
        msgspec.DecodeError,
    ) as error:
        raise BundleError(f"{path} is not a model archive of diffuserve's: {error}. {again}") from error


def only_archive(folder: Path = ARCHIVES) -> Path:
    """The one archive in a folder.

    Raises:
        LaunchError: there is none, or more than one.
    """
    found = sorted(folder.glob("*.mar"))
    if len(found) != 1:
        names = f"{len(found)} archives: {', '.join(path.name for path in found)}" if found else "no archive"
        raise LaunchError(f"{folder} holds {names}. Name one with --archive, or make one: diffuserve archive BUNDLE")
    return found[0]


def properties(archive: Archive, address: TorchServeAddress) -> str:
    """The text of config.properties. The model is served under the name that it has on Triton, too."""
    store = archive.path.resolve().parent
    values = {
        "inference_address": f"http://{address.host}:{address.http_port}",
        "management_address": f"http://{address.host}:{address.management_port}",
        "metrics_address": f"http://{address.host}:{address.metrics_port}",
        "grpc_inference_address": address.host,
        "grpc_management_address": address.host,
        "grpc_inference_port": address.grpc_port,
        "grpc_management_port": address.grpc_management_port,
        "model_store": store,
        "load_models": f"{STABLE_DIFFUSION}={archive.path.name}",
        "allowed_urls": f"file://{re.escape(str(store))}/[^/]*",
        "disable_token_authorization": "false",
        "token_expiration_min": _KEYS_EXPIRE_MIN,
        "enable_model_api": "false",
        "install_py_dep_per_model": "false",
        "enable_envvars_config": "false",
        "max_request_size": archive.largest_request_bytes,
        "max_response_size": archive.largest_answer_bytes,
        "job_queue_size": archive.limits.max_waiting_requests,
        "metrics_mode": "prometheus",
        "model_metrics_auto_detect": "true",
        "disable_system_metrics": "true",
    }
    # A backslash begins an escape in Java's properties.
    return "".join(f"{name}={value}\n".replace("\\", "\\\\") for name, value in values.items())


def log_settings(level: str) -> str:
    """The text of a log4j2.xml that writes to standard output and no file: TorchServe's own would log every request's
    path, in which prompts may stand.

    Args:
        level: error, warning or info. What the workers print is always passed on, since it says why one did not start.
    """
    pattern = quoteattr("%p %c{1} - %m%n")
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="error">
  <Appenders><Console name="console" target="SYSTEM_OUT"><PatternLayout pattern={pattern}/></Console></Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_LOG" level="info"/>
    <Root level="{_LOG_LEVELS[level]}"><AppenderRef ref="console"/></Root>
  </Loggers>
</Configuration>
"""
