"""A stage whose engine fails on a request of a batch: that request gets the error, the others their outputs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import msgspec
import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig

from diffuserve.bundle.file_samples import sample_file
from diffuserve.bundle.manifest import read_manifest
from diffuserve.engines import load_engine
from diffuserve.errors import StageFailed
from diffuserve.tensors import TEXT_ENCODER
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve.triton.placement import read_placement, write_placement
from diffuserve_client import Client
from tests.waiting import LONG_S, wait_for

MERGED = 4
OUT_OF_RANGE = 700_000_000


@pytest.fixture(scope="module")
def merging(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server whose text encoder waits for four requests before it runs, so that they are one batch on any machine."""
    copy = tmp_path_factory.mktemp("merging") / "repository"
    shutil.copytree(repository, copy)
    path = copy / TEXT_ENCODER / "config.pbtxt"
    config = text_format.Parse(path.read_text(), ModelConfig())
    config.dynamic_batching.preferred_batch_size.append(MERGED)
    config.dynamic_batching.max_queue_delay_microseconds = 60_000_000
    path.write_text(text_format.MessageToString(config))
    with TritonServer(copy, TritonAddress.on_free_ports()) as server:
        yield server


def encode(server: TritonServer, input_ids: NDArray[np.int32]) -> NDArray[np.float32] | str:
    """The embedding of one prompt, or the server's error."""
    request = service_pb2.ModelInferRequest(model_name=TEXT_ENCODER, raw_input_contents=[input_ids.tobytes()])
    request.inputs.add(name="input_ids", datatype="INT32", shape=input_ids.shape)
    with grpc.insecure_channel(server.address.grpc) as channel:
        try:
            answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=LONG_S)
        except grpc.RpcError as error:
            return str(error.details())  # type: ignore[attr-defined]
    [output] = answer.outputs
    return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(output.shape)


def encode_together(server: TritonServer, prompts: list[NDArray[np.int32]]) -> list[NDArray[np.float32] | str]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda input_ids: encode(server, input_ids), prompts))


def rows_and_calls(server: TritonServer) -> tuple[int, int]:
    with grpc.insecure_channel(server.address.grpc) as channel:
        asked = service_pb2.ModelStatisticsRequest(name=TEXT_ENCODER)
        [counts] = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStatistics(asked, timeout=LONG_S).model_stats
    return counts.inference_count, counts.execution_count


def ids(first: int, length: int) -> NDArray[np.int32]:
    return np.full((1, length), first, np.int32)


def test_four_requests_are_one_call(merging: TritonServer, bundle: Path) -> None:
    """What the next test rests on. It comes first, since Triton counts a call a moment after its answers."""
    [length] = read_manifest(bundle).components[TEXT_ENCODER].tensors.inputs[0].dims
    rows, calls = rows_and_calls(merging)
    encode_together(merging, [ids(5, length)] * MERGED)
    wait_for((rows + MERGED, calls + 1), lambda: rows_and_calls(merging))


@pytest.mark.parametrize("bad", [4, 1, 0])
def test_only_those_that_fail_alone_get_the_error(merging: TritonServer, bundle: Path, bad: int) -> None:
    component = read_manifest(bundle).components[TEXT_ENCODER]
    [length] = component.tensors.inputs[0].dims
    prompts = [ids(OUT_OF_RANGE + at if at < bad else 3 + at, length) for at in range(MERGED)]
    answers = encode_together(merging, prompts)
    engine = load_engine(bundle / component.files[0].path, component, threads=1)
    for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if at < bad:
            assert isinstance(answer, str)
            assert re.fullmatch(
                rf"\[stage_failed\] The stage {TEXT_ENCODER} failed: .*{OUT_OF_RANGE + at}.*", answer, re.S
            )
        else:
            [expected] = engine({"input_ids": prompt}).values()
            np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-5)  # type: ignore[arg-type]


def test_an_image_whose_stage_fails_tells_the_stages_words_once(repository: Path, tmp_path: Path) -> None:
    """The text encoder here knows the bytes' tokens, with which it is warmed, and no token that begins a prompt."""
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    folder = copy / TEXT_ENCODER / "1"
    for stored in folder.glob("*.onnxruntime"):
        shutil.rmtree(stored)
    path = folder / "model.onnx"
    model = onnx.load(path)
    embeddings = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    for tensor in model.graph.initializer:
        if tensor.name in embeddings:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)[:300], tensor.name))
    onnx.save(model, path)
    placement = read_placement(repository / TEXT_ENCODER / "1")
    write_placement(folder, msgspec.structs.replace(placement, files=(sample_file(folder, path),)))
    with TritonServer(copy, TritonAddress.on_free_ports()) as server, Client(server.address.grpc) as client:
        with pytest.raises(StageFailed) as caught:
            client.generate("a rocket", steps=1)
        assert str(caught.value).startswith(f"The stage {TEXT_ENCODER} failed: ")
        assert str(caught.value).count("failed: ") == 1
        assert "stage_failed" not in str(caught.value)
