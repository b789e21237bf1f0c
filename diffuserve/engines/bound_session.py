"""An ONNX Runtime session whose inputs and outputs lie in the same memory of the device from call to call, and whose batches
are of few sizes.

From release 1.20 on ONNX Runtime plans every convolution anew with cuDNN in each call whose shapes are others than the last
call's, and keeps no plan (github.com/microsoft/onnxruntime, issue 23006): 100 ms and more for a UNet, where batches that
requests join and leave change in nearly every step. So rows are padded to a power of two; `SessionsByRows` has a session for
each.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.engines.dtypes import check_dtypes
from diffuserve.engines.example_inputs import Arrays
from diffuserve.tensors import NUMPY_DTYPE, StageSpec


class BoundSession:
    """Calls from several threads run one after another.

    Args:
        session: an `onnxruntime.InferenceSession`.
        tensors: the component's.
        device: where inputs and outputs lie: "cuda", the first GPU, or "cpu".
    """

    def __init__(self, session: Any, tensors: StageSpec, device: str) -> None:
        self._session, self._device = session, device
        self._dtypes = {spec.name: np.dtype(NUMPY_DTYPE[spec.dtype]) for spec in tensors.inputs}
        self._outputs = [output.name for output in session.get_outputs()]
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the inputs that memory is bound for
        self._inputs: dict[str, Any] = {}
        self._binding: Any = None
        self._lock = threading.Lock()

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs the model; see `diffuserve.stages.Engine`.

        Raises:
            ValueError: an input is missing, unknown or of another dtype. ONNX Runtime itself would take it for what it is
                not.
        """
        check_dtypes(inputs, self._dtypes)
        rows = len(next(iter(inputs.values())))
        padded = {name: _pad(array, padded_rows(rows)) for name, array in inputs.items()}
        with self._lock:
            outputs = self._run(padded)
        return {name: array[:rows] for name, array in zip(self._outputs, outputs, strict=True)}

    def _run(self, inputs: Arrays) -> list[NDArray[Any]]:
        shapes = {name: array.shape for name, array in inputs.items()}
        is_new = shapes != self._shapes
        if is_new:
            self._bind(inputs)
        for name, array in inputs.items():
            self._inputs[name].update_inplace(array)
        self._session.run_with_iobinding(self._binding)
        if is_new:
            # What ONNX Runtime has made for the outputs is used again, too.
            for name, value in zip(self._outputs, self._binding.get_outputs(), strict=True):
                self._binding.bind_ortvalue_output(name, value)
            self._shapes = shapes
        outputs: list[NDArray[Any]] = self._binding.copy_outputs_to_cpu()
        return outputs

    def _bind(self, inputs: Arrays) -> None:
        from onnxruntime import OrtValue

        self._shapes = {}  # until a call of these shapes has come to its end
        self._binding, self._inputs = self._session.io_binding(), {}
        for name, array in inputs.items():
            value = OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, self._device, 0)
            self._binding.bind_ortvalue_input(name, value)
            self._inputs[name] = value
        for name in self._outputs:
            self._binding.bind_output(name, self._device)


def padded_rows(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


def _pad(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """Repeats the last row: numbers such as a model may meet."""
    missing = rows - len(array)
    return np.concatenate([array, array[-1:].repeat(missing, axis=0)]) if missing else np.ascontiguousarray(array)
