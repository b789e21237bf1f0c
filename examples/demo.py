"""Starts a Triton server of its own, draws one picture with the client, and stops the server: what `make demo` runs."""

from pathlib import Path

from diffuserve.defaults import REPOSITORY
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client

PROMPT = "a slice of pizza, glossy, on a blue background"
OUTPUT = Path("demo.png")

address = TritonAddress.on_free_ports()
print("Starting Triton ...", flush=True)
with TritonServer(REPOSITORY, address), Client(address.grpc) as client:
    print(f'Drawing "{PROMPT}" ...', flush=True)
    result = client.generate(PROMPT, seed=7)
    OUTPUT.write_bytes(result.encoded[0])
print(f"{OUTPUT}: {result.width}x{result.height} px, drawn in {result.total_s:.2f} s")
