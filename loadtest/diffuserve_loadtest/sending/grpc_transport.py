"""Triton and TorchServe over gRPC, through the same client that everybody uses."""

from __future__ import annotations

from diffuserve_client import Client, TorchServe, Triton
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.sending.transport import Answer
from diffuserve_loadtest.workload.plan import PlannedRequest

# More than a run has in flight. A call that finds no thread would get its answer when another ends, and look slow.
_MAX_WAITING = 10_000


class GrpcTransport:
    """gRPC waits in threads of its own, which would stop all greenlets, unless it is told about gevent first. Then every call
    in flight waits in a thread of gevent's pool, which has ten unless told otherwise."""

    def __init__(self, target: Target) -> None:
        import gevent
        from grpc.experimental.gevent import init_gevent

        init_gevent()
        gevent.get_hub().threadpool.maxsize = _MAX_WAITING
        server = Triton() if target.protocol == "triton-grpc" else TorchServe(target.token)
        # The generator has a patience of its own, for all protocols the same, and retries nothing: it is to see errors.
        self._client = Client(target.url, server=server, model=target.model, idle_timeout_s=None, retries=0)

    def send(self, request: PlannedRequest) -> Answer:
        fields = dict(request.fields)
        if "timeout_ms" in fields:  # the client has it in seconds
            fields["timeout_s"] = fields.pop("timeout_ms") / 1000
        result = self._client.generate(**fields)
        return Answer(result.encoded, sum(map(len, result.encoded)))
