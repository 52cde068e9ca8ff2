"""Models as files that run without this code: ONNX, and PyTorch's exported programs (`.pt2`).

One trace serves both. A file takes its place only after it was loaded back and gave the module's own numbers.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from clip_base.export import runtimes
from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError
from clip_base.storage.files import replacing

FORMATS = ("onnx", "torch", "openvino")
SUFFIX = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}
TOLERANCE = 1e-3  # what a file's numbers may differ from PyTorch's
NEEDED = "onnx", "onnxscript", "onnxruntime"


Run = runtimes.Run


@dataclass(kw_only=True)
class GraphFormats:
    """In which forms a model is written."""

    formats: list[str] = option(
        ["onnx"],
        "some of onnx, torch (a .pt2 of torch.export) and openvino (.xml and .bin)",
        renamed_from="forms",
    )


@dataclass(frozen=True)
class Graph:
    """What to write.

    Attributes:
        module: computes in float32, in evaluation mode.
        inputs: an example of each argument of its `forward`, by name; sides that may vary are larger than 1,
            which PyTorch would take for a constant.
        dynamic: by argument, the sides that may vary: {"image": {0: Dim("height", min=64)}}.
        outputs: names of what it returns.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, Dim]]
    outputs: tuple[str, ...]


def check_formats(formats: Sequence[str]) -> None:
    """Raises an InputError unless the formats are known and what writes them is installed."""
    wrong = [form for form in formats if form not in FORMATS]
    if wrong or not formats:
        raise InputError(f"formats must be some of {', '.join(FORMATS)}, found {', '.join(wrong) or 'none'}")
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if "openvino" in formats:
        runtimes.require_openvino()
    if {"onnx", "openvino"} & set(formats) and absent:
        raise InputError(
            f"formats={','.join(formats)} needs {', '.join(absent)}: pip install 'regionclip[onnx]'"
        )


def write_graph(
    graph: Graph, folder: Path, name: str, formats: Sequence[str], differences: Callable[[Run], float]
) -> dict[str, float]:
    """Writes `folder/name.onnx`, `folder/name.pt2` and `folder/name.xml` with `.bin`, as asked.

    Args:
        graph: what to write.
        folder: where.
        name: the files' stem.
        formats: some of `FORMATS`.
        differences: runs what was written, and returns by how much it differs from the module.

    Returns:
        The largest difference of each file, by file name.

    Raises:
        RuntimeError: a file differs by more than `TOLERANCE`; it is not kept.
    """
    print(f"{name}: tracing the graph, which takes a minute or two for large models", file=sys.stderr)
    program = trace(graph)
    found: dict[str, float] = {}
    for form in sorted(formats, key=FORMATS.index):  # OpenVINO is made of ONNX
        if form == "openvino":
            found |= _openvino(program, graph, folder / f"{name}.xml", differences)
            continue
        path = folder / f"{name}{SUFFIX[form]}"
        print(f"{path}: writing, then comparing it with PyTorch", file=sys.stderr)
        with replacing(path) as temporary:
            if form == "onnx":
                _write_onnx(program, graph, temporary)
                run = onnx_run(temporary, graph.outputs)
            else:
                with _quiet(), temporary.open("wb") as file:
                    torch.export.save(program, file)
                run = program_run(temporary)
            found[path.name] = differences(run)
            _require_close(path, found[path.name])
    return found


def _openvino(
    program: ExportedProgram, graph: Graph, path: Path, differences: Callable[[Run], float]
) -> dict[str, float]:
    """Writes OpenVINO's two files from the ONNX file, and returns the difference by the graph's name."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        step, written = path.with_suffix(".onnx"), Path(folder) / path.name
        print(f"{path}: writing, then comparing it with PyTorch", file=sys.stderr)
        if not step.exists():
            step = Path(folder) / step.name
            _write_onnx(program, graph, step)
        runtimes.write_openvino(step, written)
        difference = differences(runtimes.openvino_run(written, graph.outputs))
        _require_close(path, difference)
        for file in (written.with_suffix(".bin"), written):  # the graph last: it needs its weights
            file.replace(path.with_suffix(file.suffix))
    return {path.name: difference}


def _require_close(path: Path, difference: float) -> None:
    if not difference <= TOLERANCE:  # written so that NaN fails too
        raise RuntimeError(
            f"{path} would differ from PyTorch by {difference:.2g}, more than {TOLERANCE:g}; it was not "
            "written"
        )


def trace(graph: Graph) -> ExportedProgram:
    """Returns the module as a graph of operators."""
    sides = {name: graph.dynamic.get(name) for name in graph.inputs}
    with _quiet(), torch.no_grad():
        return torch.export.export(graph.module, (), dict(graph.inputs), dynamic_shapes=sides, strict=False)


def onnx_run(path: Path, outputs: Sequence[str], threads: int = 0) -> Run:
    """Returns a function that runs an ONNX file in onnxruntime on the processor."""
    import onnxruntime  # type: ignore[import-untyped]  # noqa: PLC0415 (optional)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        found: list[Any] = session.run(list(outputs), {name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(value) for value in found]

    return run


def program_run(path: Path) -> Run:
    """Returns a function that runs a `.pt2` file."""
    with _quiet(), path.open("rb") as file:
        module = torch.export.load(file).module()

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            found = module(**inputs)
        return [found] if isinstance(found, Tensor) else list(found)

    return run


def _write_onnx(program: ExportedProgram, graph: Graph, path: Path) -> None:
    with _quiet():
        written = torch.onnx.export(
            program,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamo=True,
            verbose=False,
        )
    assert written is not None
    written.save(str(path), external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what the exporter says about its own inner workings from people who cannot act on it."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
