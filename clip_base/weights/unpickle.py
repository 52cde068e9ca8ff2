"""Weights from PyTorch's pickled files, read without executing anything in them.

A pickle is a program; what it can call is decided by the reader. State dicts go through `torch.load` with
`weights_only=True`. TorchScript archives, which `torch.load` leaves to an interpreter for the code inside,
are opened here as what they are: a zip file whose `data.pkl` names modules and tensors and whose `data/N`
hold the numbers. The code in the archive is not looked at.
"""

from __future__ import annotations

import _codecs
import io
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_base.runtime.errors import InputError
from clip_base.storage.kinds import kind_of
from clip_base.storage.limits import require_unpacked

_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
# What NumPy pickles numbers with; its module is called otherwise in each major version.
_SCALAR = np.float64(0).__reduce__()[0]
T = TypeVar("T")
_DEEPEST = 64  # modules inside modules; CLIP needs nine
# What reading a damaged or foreign pickle, or a zip file around it, can raise.
_FAULTS = (
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
)


class Forbidden(pickle.UnpicklingError):
    """The pickle asks for something that is neither a tensor nor a plain container."""


class _Part:
    """What stands for any class of the archive: its attributes, and none of its behavior."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Forbidden(f"a module whose state is a {type(state).__name__}")
        self.attributes = state


# Python's own unpickler: that in C allocates what a few bytes declare, such as a memo of billions of places.
class _ArchiveUnpickler(pickle._Unpickler):
    """Rebuilds modules as `_Part` and tensors from the archive's storages; knows no other name."""

    def __init__(self, file: IO[bytes], storage: Callable[[str, torch.dtype], Tensor]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Part
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: torch.as_strided(storage, size, stride, offset)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in _LISTS:
            return lambda values: list(values)
        if module == "torch.jit._pickle" and name == "restore_type_tag":
            return lambda value, _: value
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise Forbidden(f"{module}.{name}")

    def persistent_load(self, saved: Any) -> Tensor:
        kind, dtype, key, _, length = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise Forbidden(f"an object of kind {kind!r}")
        values = self._storage(key, dtype)
        if len(values) < length:
            raise pickle.UnpicklingError(f"storage {key} holds {len(values)} values instead of {length}")
        return values


def _require_unpacked(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises an InputError when an archive declares that it unpacks to far more than it takes."""
    size = sum(entry.file_size for entry in archive.infolist())
    require_unpacked(size, path.stat().st_size, f"weights file {path}")


def _within_limits(held: T, path: Path) -> T:
    """Returns what was read of a file; an InputError when its tensors repeat few numbers very often.

    A tensor whose stride is 0 takes no memory until it is copied.
    """
    size, queue, seen = 0, [held], set[int]()
    while queue:
        value: Any = queue.pop()
        if isinstance(value, Tensor):
            size += value.numel() * value.element_size()
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))  # a dictionary may contain itself
            queue += value.values() if isinstance(value, dict) else value
    require_unpacked(size, path.stat().st_size, f"weights file {path}")
    return held


def _root(archive: zipfile.ZipFile) -> str | None:
    """Returns the folder inside the zip file that holds `data.pkl`, with its slash."""
    for name in archive.namelist():
        if name.endswith("/data.pkl") and name.count("/") == 1:
            return name.removesuffix("data.pkl")
    return None


def is_torchscript(path: Path) -> bool:
    """Whether `path` is a zip file as `torch.jit.save` writes it: with constants beside the data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        root = _root(archive)
        return root is not None and f"{root}constants.pkl" in archive.namelist()


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a TorchScript archive by their dotted names, in the precision stored.

    Raises:
        InputError: the archive is damaged, or its pickle asks for anything but modules, tensors and
            containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _require_unpacked(archive, path)
            root = _root(archive) or ""
            names = set(archive.namelist())
            if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
                raise InputError(f"{path} was written on a big-endian machine; save it again on this one")
            kept: dict[str, Tensor] = {}

            def storage(key: str, dtype: torch.dtype) -> Tensor:
                if key not in kept:
                    data = bytearray(archive.read(f"{root}data/{key}"))
                    kept[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                return kept[key]

            module = _ArchiveUnpickler(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()
            if not isinstance(module, _Part):
                raise Forbidden(f"a {type(module).__name__} where the model should be")
            return _within_limits(dict(_tensors(module, "", 0)), path)
    except InputError:
        raise
    except Forbidden as error:
        raise _refusal(path, str(error)) from None
    except _FAULTS as error:
        raise _damaged(path, error) from None


def _tensors(part: _Part, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if depth > _DEEPEST:
        raise Forbidden(f"modules nested more than {_DEEPEST} deep")
    for name, value in part.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Part):
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)


def read_pickle(path: Path) -> Any:
    """Returns what `torch.save` wrote: tensors in plain containers, on the CPU.

    Raises:
        InputError: the file is damaged, or holds anything else, such as whole modules or a program.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _require_unpacked(archive, path)
        # Given a path that ends in .safetensors, torch reads another form.
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch.save did not write, which are refused
            return _within_limits(torch.load(file, map_location="cpu", weights_only=True), path)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|global|function) ([A-Za-z_][\w.]*\.[\w.]+)", str(error))
        asks = found[1].rstrip(".") if found else None
        if asks or "nsupported" in str(error):
            raise _refusal(path, asks or "operations that torch.save does not write") from None
        raise _damaged(path, error) from None
    except _FAULTS as error:
        raise _damaged(path, error) from None


class _EmptyArray:
    """Stands for the class of arrays, which are filled by their state and not made with a size."""


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> NDArray[Any]:
    if kind is not _EmptyArray or shape != (0,):
        raise Forbidden(f"an array of {kind!r} {shape!r} without its numbers")
    return np.zeros(0, np.int8)


class _ArrayUnpickler(pickle._Unpickler):
    """Rebuilds NumPy's arrays in plain containers; knows no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("_codecs", "encode"):  # how Python 3 pickles bytes for Python 2
            return _codecs.encode
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in (
            "_reconstruct",
            "scalar",
        ):
            return _empty_array if name == "_reconstruct" else _SCALAR
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _EmptyArray if name == "ndarray" else np.dtype
        raise Forbidden(f"{module}.{name}")


def read_arrays(path: Path) -> dict[str, Any]:
    """Returns the dictionary in a pickle of NumPy arrays, as tensors; Caffe2 and detectron2 write such.

    Raises:
        InputError: the file is damaged, or holds anything but arrays, texts and numbers in plain containers.
    """
    try:
        # In memory, where no more bytes can be asked for than there are.
        held = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        if not isinstance(held, dict):
            raise Forbidden(f"a {type(held).__name__} where a dictionary should be")
        return {str(key): _as_tensors(value) for key, value in held.items()}
    except Forbidden as error:
        raise _refusal(path, str(error)) from None
    except _FAULTS as error:
        raise _damaged(path, error) from None


def _as_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=True))
    if isinstance(value, dict):
        return {str(key): _as_tensors(one) for key, one in value.items()}
    return value


def _refusal(path: Path, found: str) -> InputError:
    return InputError(
        f"{path} is refused: its pickle holds {found}, not only tensors in plain containers; "
        "ask its author to save model.state_dict()"
    )


def _damaged(path: Path, error: BaseException) -> InputError:
    kind = kind_of(path)
    if kind not in ("", "a PyTorch file", "a Python pickle", "a zip archive", "a tar archive"):
        return InputError(f"weights file {path} is {kind}, not weights; is it the right file?")
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return InputError(
        f"weights file {path} cannot be read ({reason}); it was truncated or is damaged: copy it again"
    )
