"""What Locust runs: `locust -f loadtest/locustfile.py`, with the options of a workload beside Locust's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from locust import User, constant, events, task
from locust.exception import StopUser

from diffuserve.defaults import TORCHSERVE, TRITON
from diffuserve.errors import DiffuserveError, InvalidRequest
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.torchserve.keys import read_inference_token
from diffuserve_loadtest.sending.distributed import open_generation
from diffuserve_loadtest.sending.generation import Generation
from diffuserve_loadtest.sending.target import PROTOCOLS, Target
from diffuserve_loadtest.workload.arrivals import Closed
from diffuserve_loadtest.workload.due_times import due_times
from diffuserve_loadtest.workload.files import read_workload

_DEFAULT_HOST = {
    "triton-grpc": f"localhost:{TRITON.grpc}",
    "triton-http": f"http://localhost:{TRITON.http}",
    "triton-stream": f"http://localhost:{TRITON.http}",
    "torchserve-grpc": f"localhost:{TORCHSERVE.grpc}",
    "torchserve-http": f"http://localhost:{TORCHSERVE.http}",
}


class WorkloadUser(User):
    """One user of a closed loop. In an open loop users only stand for the run: requests are sent when they are due."""

    wait_time = constant(0)

    @task
    def turn(self) -> None:
        if not self.environment.generation.turn():
            raise StopUser


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: Any) -> None:
    group = parser.add_argument_group("diffuserve")
    group.add_argument("--workload", default="single", help="A shipped workload's name, or a YAML file [single]")
    group.add_argument(
        "--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help=f"How requests travel [{PROTOCOLS[0]}]"
    )
    group.add_argument("--model", default=STABLE_DIFFUSION, help=f"Which of the server's models [{STABLE_DIFFUSION}]")
    group.add_argument("--capacity-per-s", type=float, help="Requests a second that make a load of 1")
    group.add_argument("--recording", help="File for a record of every request, JSON")
    group.add_argument("--key-file", help="TorchServe's file of keys")


@events.init.add_listener  # type: ignore[untyped-decorator]
def _prepare(environment: Any, **_: Any) -> None:
    try:
        environment.generation = _generation(environment)
    except DiffuserveError as error:
        raise SystemExit(str(error)) from None


def _generation(environment: Any) -> Generation:
    """As the options say; raises `DiffuserveError` for those that cannot be met."""
    options = environment.parsed_options
    workload = read_workload(options.workload)
    if options.capacity_per_s is not None:
        workload = workload.at_capacity(options.capacity_per_s)
    if isinstance(workload.arrivals, Closed):
        options.num_users = options.num_users or workload.arrivals.users
        options.spawn_rate = options.spawn_rate or workload.arrivals.users / (workload.arrivals.ramp_s or 1.0)
    else:
        next(due_times(workload), None)  # what is wrong with them is said now, and not when the run has begun
    host = environment.host or _DEFAULT_HOST.get(options.protocol)
    if host is None:
        raise InvalidRequest(f"Say where the server is: --host, as {options.protocol} has no usual address.")
    environment.host = host
    token = read_inference_token(Path(options.key_file)) if options.key_file else None
    recording = Path(options.recording) if options.recording else None
    if recording is not None and not recording.absolute().parent.is_dir():
        raise InvalidRequest(f"{recording} cannot be written: there is no such folder.")
    target = Target(options.protocol, host, token, options.model)
    return open_generation(environment, workload, target, recording)
