"""Clients that ask for much and read nothing, over HTTP and gRPC."""

from __future__ import annotations

import time

from diffuserve_client.wire import infer_request_from_fields
from diffuserve_faults import raw_http
from diffuserve_faults.case import Cases, Trial
from diffuserve_faults.checks import take_snapshot

_CLIENTS = 6
_HOLD_S = 15.0
_RECEIVE_BYTES = 2048
# A preview of every step of every image: more than any buffer on the way takes.
_MUCH = {
    "prompt": "a rocket",
    "steps": 150,
    "num_images": 4,
    "guidance_scale": 1.0,
    "width": 64,
    "height": 64,
    "progress": True,
    "preview": 1,
}


def never_read(trial: Trial) -> None:
    """They hold their connections while others are served; what the server keeps for them is measured, and must be gone
    when they are."""
    import grpc
    from tritonclient.grpc import service_pb2_grpc

    count = trial.times(_CLIENTS)
    before = take_snapshot(trial.server)
    channels = [
        grpc.insecure_channel(trial.address.grpc, options=[("grpc.use_local_subchannel_pool", 1), ("number", number)])
        for number in range(count)
    ]
    sockets = []
    with trial.background(users=3) as background:
        try:
            calls = []
            for number, channel in enumerate(channels):
                sockets.append(raw_http.open_stream(trial, {**_MUCH, "seed": number}, _RECEIVE_BYTES))
                request = infer_request_from_fields(trial.model, f"unread-{number}", {**_MUCH, "encoding": "binary"})
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                calls.append(stub.ModelStreamInfer(iter([request])))
            answered = trial.tally.answered
            time.sleep(trial.seconds(_HOLD_S))
            background.wait_for_answers(1)
            held = take_snapshot(trial.server)
            if trial.tally.answered == answered:
                trial.problems.append("nobody else was served meanwhile")
        finally:
            for connection in sockets:
                connection.close()
            for channel in channels:
                channel.close()
        background.wait_for_answers(1)
    trial.tally.give_up(2 * count)
    growth = sum(held.memory_bytes.values()) - sum(before.memory_bytes.values())
    trial.notes["held_bytes_a_client"] = max(0, growth) / (2 * count)


CASES: Cases = {"never-reads": ("clients ask for much and never read", never_read)}
