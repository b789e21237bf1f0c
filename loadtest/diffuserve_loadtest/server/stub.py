"""A server that answers at once with one picture of noise: what the generator is measured against.

It speaks as much of Triton's gRPC and HTTP as the generator uses. `--delay-s` makes it slow, `--stall` leaves requests without
an answer.
Run it as a program, `python -m diffuserve_loadtest.server.stub`; it prints its two addresses.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import click
import numpy as np

from diffuserve.response_tensors import RESPONSE
from diffuserve.tensors import NUMPY_DTYPE, STABLE_DIFFUSION

_SIDE_PX = 128
_FOREVER_S = 3600.0


def noise_png(side_px: int = _SIDE_PX) -> bytes:
    """About 49 KB at 128 x 128, since noise cannot be compressed."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png", compress_level=1)
    return stream.getvalue()


@contextmanager
def stub(*options: str) -> Iterator[tuple[str, str]]:
    """The stub in a process of its own: its address for gRPC, and that for HTTP."""
    arguments = [sys.executable, "-m", "diffuserve_loadtest.server.stub", *options]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # noqa: S101 - for the type checker
        try:
            grpc, http = process.stdout.readline().split()
            yield grpc, http
        finally:
            process.kill()


@click.command()
@click.option("--delay-s", type=click.FloatRange(0), default=0.0, help="Before every answer.")
@click.option("--stall", type=click.IntRange(0), default=0, help="Answer nothing to so many, the first ones.")
@click.option("--error", default="", help="Answer every request with this message instead.")
def main(delay_s: float, stall: int, error: str) -> None:
    """Serves until it is killed."""
    delays_s = itertools.chain(itertools.repeat(_FOREVER_S, stall), itertools.repeat(delay_s))
    asyncio.run(_serve(noise_png(), delays_s, error))


async def _serve(png: bytes, delays_s: Iterator[float], error: str) -> None:
    import grpc.aio
    from tritonclient.grpc import service_pb2_grpc

    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Grpc(png, delays_s, error), server)
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    http = _HttpServer(("127.0.0.1", 0), _http_handler(png, delays_s, error))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    click.echo(f"127.0.0.1:{grpc_port} http://127.0.0.1:{http.server_port}")
    await server.wait_for_termination()


class _HttpServer(ThreadingHTTPServer):
    request_queue_size = 512  # many connections are made at once; the default is 5
    daemon_threads = True


class _Grpc:
    """Of GRPCInferenceService, what the client calls."""

    def __init__(self, png: bytes, delays_s: Iterator[float], error: str) -> None:
        from tritonclient.grpc import service_pb2
        from tritonclient.utils import serialize_byte_tensor

        self._delays_s = delays_s
        self._answer = service_pb2.ModelStreamInferResponse(error_message=error)
        if error:
            return
        response = self._answer.infer_response
        response.model_name = STABLE_DIFFUSION
        values = _completed(png)
        for spec in RESPONSE:
            if spec.name in values:
                array = np.array(values[spec.name], NUMPY_DTYPE[spec.dtype])
                raw = serialize_byte_tensor(array).item() if spec.dtype == "BYTES" else array.tobytes()
                response.outputs.add(name=spec.name, datatype=spec.dtype, shape=array.shape)
                response.raw_output_contents.append(raw)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        async for _ in requests:
            await asyncio.sleep(next(self._delays_s))
            yield self._answer

    def __getattr__(self, name: str) -> Any:
        return None  # the service's other calls, which nobody makes


def _completed(png: bytes) -> dict[str, list[Any]]:
    """The last event of a request for one image, by name of `RESPONSE`."""
    return {
        "event": [b"completed"],
        "step": [1],
        "steps": [1],
        "image": [png],
        "flagged": [False],
        "seed": [0],
        "width": [_SIDE_PX],
        "height": [_SIDE_PX],
        "parameters": [b""],
        "warnings": [b""],
        "queue_s": [0.0],
        "denoise_s": [0.0],
        "total_s": [0.0],
    }


def _http_handler(png: bytes, delays_s: Iterator[float], error: str) -> type[BaseHTTPRequestHandler]:
    fields = {"error": error} if error else {"event": "completed", "image": base64.b64encode(png).decode()}
    body = json.dumps({"model_name": STABLE_DIFFUSION, **fields}).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            threading.Event().wait(next(delays_s))
            stream = self.path.endswith("generate_stream")
            content = b"data: " + body + b"\n\n" if stream else body
            self.send_response(503 if error else 200)
            self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


if __name__ == "__main__":
    main()
