"""What importing the client costs, and its public surface."""

import subprocess
import sys

import pytest

import diffuserve_client

ENGINES = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "diffusers", "transformers")


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_client_loads_no_engine() -> None:
    code = "from diffuserve_client import AsyncClient, Client, Progress, Result\nClient()\nAsyncClient()"
    assert not modules_after(code).intersection(ENGINES)


@pytest.mark.parametrize("module", ["diffuserve_client", "diffuserve_client.generate_command"])
def test_command_line_loads_nothing_heavy(module: str) -> None:
    heavy = (*ENGINES, "numpy", "grpc", "tritonclient", "PIL", "tqdm")
    assert not modules_after(f"import {module}").intersection(heavy)


def test_public_names() -> None:
    assert diffuserve_client.__all__ == [
        "AsyncClient",
        "Client",
        "Description",
        "LocalClient",
        "Progress",
        "RequestFields",
        "Result",
        "TorchServe",
        "Triton",
    ]
    for name in diffuserve_client.__all__:
        assert getattr(diffuserve_client, name).__name__ == name
        assert name in dir(diffuserve_client)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Clients'.*Client"):
        _ = diffuserve_client.Clients
