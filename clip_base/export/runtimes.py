"""ONNX files for faster runtimes: OpenVINO's form, and convolutions in 8-bit integers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_base.runtime.errors import InputError
from clip_base.storage.files import replacing

Run = Callable[[dict[str, Tensor]], list[Tensor]]


def require_openvino() -> None:
    """Raises an InputError unless OpenVINO is installed."""
    if importlib.util.find_spec("openvino") is None:
        raise InputError("formats=openvino needs openvino: pip install 'regionclip[openvino]'")


def write_openvino(onnx_file: Path, path: Path) -> None:
    """Writes an ONNX file in OpenVINO's form, `path` and the `.bin` beside it, with float32 weights.

    Raises:
        InputError: OpenVINO has no form for a part of the graph.
    """
    import openvino  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: PLC0415

    try:
        model = openvino.convert_model(str(onnx_file))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"OpenVINO cannot convert {onnx_file}: {reason}") from None
    openvino.save_model(model, str(path), compress_to_fp16=False)


def openvino_run(path: Path, outputs: Sequence[str], threads: int = 0) -> Run:
    """Returns a function that runs a file of OpenVINO, or an ONNX file in OpenVINO, on the processor."""
    import openvino  # noqa: PLC0415 (optional)

    settings = {
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        found: Any = model({name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(found[name].copy()) for name in outputs]

    return run


def write_int8(onnx_file: Path, path: Path, samples: Sequence[dict[str, Tensor]]) -> None:
    """Writes an ONNX file with its convolutions in 8-bit integers, whose ranges are measured on samples.

    Weights have a scale per channel, activations one per tensor (static quantization, the QDQ form that
    onnxruntime and OpenVINO compute in integers).

    Args:
        onnx_file: in float32.
        path: the file to write.
        samples: inputs of the graph, by name.
    """
    from onnxruntime import quantization  # type: ignore[import-untyped]  # noqa: PLC0415 (optional)

    class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Gives one sample after the other."""

        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            one = next(self.left, None)
            return None if one is None else {name: value.numpy() for name, value in one.items()}

    with replacing(path) as temporary:
        quantization.quantize_static(
            str(onnx_file),
            str(temporary),
            Samples(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
