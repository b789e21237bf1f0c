"""What `diffuserve serve` says of a server."""

from __future__ import annotations

from pathlib import Path

from diffuserve.limits import Limits
from diffuserve.serve_command import _summary
from diffuserve.serving.launcher import Served
from tests.core.fakes import make_bundle


def test_limits_are_told_whole(tmp_path: Path) -> None:
    limits = Limits(max_prompt_bytes=2**20, max_waiting_rows=1_000_001, max_guidance_scale=7.25)
    said = _summary(Served(make_bundle(tmp_path), limits, {"gRPC": "127.0.0.1:8001"}, " --url x"))
    assert "max_prompt_bytes 1048576, " in said
    assert said.count("max_waiting_rows 1000001\n") == 1
    assert "max_guidance_scale 7.25, " in said
    assert "max_steps 150, " in said
