"""What a file of weights holds: its state dicts, read without running or importing anything that the file names.

The content decides how a file is read, not its name: people's checkpoints end in .pth, .pth.tar, .ckpt, .bin, or in
nothing at all. PyTorch files are read with `weights_only=True`. Classes that they name, such as the argparse.Namespace
that timm keeps its arguments in, or the modules of a whole pickled model, are neither imported nor called: an inert
`Placeholder` takes the place of each.
"""

import builtins
import pickle  # for the name of an exception; nothing is unpickled
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # the names that Python 2 had, in which torch.save writes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ekgfx.errors import ModelError
from ekgfx.models import tensorflow_state_dict

StateDict = Mapping[str, Tensor]
DEPTH = 4
"""How many mappings inside each other are searched for state dicts."""
OF_A_FOLDER = ("model.safetensors", "pytorch_model.bin", "model.ckpt")
HDF5 = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Contents:
    """state_dicts: by where they stand in the file ("": at its top; "ema.module": inside of mappings or modules);
    others: names of classes of which the file holds objects that were not read."""

    state_dicts: Mapping[str, StateDict]
    others: tuple[str, ...] = ()


class Placeholder(list):
    """Stands for an object of a class that a file names. It keeps the state that the object would have got.

    A list, because torch lets only lists and dictionaries be filled.
    """

    state: Any = None

    def __new__(cls, *_: Any) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    __hash__ = object.__hash__  # type: ignore[assignment]  # a set or the keys of a dictionary may hold it
    __eq__ = object.__eq__


def _dictionary(*_: Any) -> dict[Any, Any]:
    return {}


OF_NO_NOTE = ("torch", "collections", "builtins", "_codecs")
"""Modules whose classes hold tensors, containers and plain values."""
STAND_INS: dict[str, Any] = {"collections.defaultdict": _dictionary}  # whose factory could be anything


def read_file(file: Path) -> Contents:
    """Every state dict in a file: safetensors, .npz (also of the EKG authors' TensorFlow variables, which are
    translated), or what torch.save wrote in any of its forms.

    Raises:
        ModelError: no such file, cut short, damaged, of another kind, or of code that was not run; says what to do.
    """
    if file.is_dir():
        inside = next((name for name in OF_A_FOLDER if (file / name).is_file()), None)
        advice = f"name the file in it: {file / inside}" if inside else "name a file"
        raise ModelError(f"weights '{file}' is a folder; {advice}")
    if not file.is_file():
        raise ModelError(f"weights '{file}': no such file (else use auto or none)")
    try:
        return _read(file)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"weights '{file}' hold more than tensors, which is refused: {_why(error)}; {RESAVE}"
        ) from error
    except Exception as error:  # what a library makes of damaged bytes may be anything
        raise ModelError(f"weights '{file}' cannot be read (cut short or damaged?): {_why(error)}") from error


RESAVE = "where the file was made, do torch.save(model.state_dict(), 'weights.pth') and give that"


def _read(file: Path) -> Contents:
    with file.open("rb") as content:
        start = content.read(16)
    if start.startswith(b"PK"):
        return _read_zip(file)
    if start[8:9] == b"{":  # the length of a header in eight bytes, then the header
        return Contents({"": load_file(file)})
    if start.startswith(b"\x80"):
        return _read_torch(file)
    if start.startswith(HDF5):
        raise ModelError(
            f"weights '{file}' are Keras's (HDF5), which is not read: convert them, as examples/resnet50_keras.py says"
        )
    if start.startswith(b"version https://"):
        raise ModelError(f"weights '{file}' are not there yet, only Git LFS's note of them: type git lfs pull")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise ModelError(f"weights '{file}' are a web page: download the file itself")
    raise ModelError(
        f"weights '{file}' are no weights that are known by their content: use auto, none, or a file that was written "
        "by torch.save, safetensors or numpy.savez"
    )


def _read_zip(file: Path) -> Contents:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    ends = {name.rpartition("/")[2] for name in names}
    if any(name.endswith(".npy") for name in names):
        return Contents({"": _read_npz(file)})
    if "constants.pkl" in ends and "data.pkl" in ends:
        raise ModelError(
            f"weights '{file}' are TorchScript, which is a program; if you trust it, type: "
            + _conversion(file, f"torch.jit.load({str(file)!r}, 'cpu').state_dict()")
        )
    if "data.pkl" not in ends:
        raise ModelError(
            f"weights '{file}' hold no state dict: it is an archive of another kind; if torch.export wrote it and you "
            "trust it, type: " + _conversion(file, f"torch.export.load({str(file)!r}).state_dict")
        )
    return _read_torch(file)


def _conversion(file: Path, load: str) -> str:
    saved = str(file.with_name(f"{file.stem}-weights.pth"))
    return f'python -c "import torch; torch.save({load}, {saved!r})", then --weights {saved}'


def _read_npz(file: Path) -> StateDict:
    with file.open("rb") as content, np.load(content) as arrays:  # allow_pickle is off by default
        variables = {name: arrays[name] for name in arrays.files}
    if variables and all(name.endswith(":0") for name in variables):
        return tensorflow_state_dict(variables)
    return {name: torch.from_numpy(array) for name, array in variables.items()}


def _read_torch(file: Path) -> Contents:
    named = sorted(set(_classes(file)))
    functions = [name for name in named if _is_function(name)]
    if functions:
        raise ModelError(
            f"weights '{file}' hold more than tensors, which is refused: they would call {functions[0]}; {RESAVE}"
        )
    with torch.serialization.safe_globals([(STAND_INS.get(name, Placeholder), name) for name in named]):
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    found = dict(_state_dicts(content, "", DEPTH))
    others = tuple(
        name for name in named if name.partition(".")[0] not in ("torch", "collections", "builtins", "_codecs")
    )
    if not found and others:
        raise ModelError(
            f"weights '{file}' hold more than tensors, which is refused: objects of {', '.join(others[:3])}; {RESAVE}"
        )
    if not found:
        raise ModelError(f"weights '{file}' hold no state dict (a mapping of names to tensors); {RESAVE}")
    return Contents(found, others)


def _classes(file: Path) -> Iterator[str]:
    """The names of classes and functions in a PyTorch file, also of those that torch knows as harmless."""
    for number, stream in enumerate(_pickles(file)):
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name == "PROTO" and int(argument or 0) != PROTOCOL:
                raise ModelError(f"weights '{file}' are pickled with protocol {argument}, torch reads 2; {RESAVE}")
            if operation.name == "STOP" and not isinstance(stream, bytes) and not number:
                _check_magic(file, stream.tell())
            if operation.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                yield f"{module}.{name}"


PROTOCOL = 2
MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


def _check_magic(file: Path, end: int) -> None:
    """Refuses what begins with another number than the old form of torch.save; end: of the file's first pickle."""
    with file.open("rb") as content:
        if MAGIC not in content.read(end):
            raise ModelError(f"weights '{file}' were not written by torch.save, but by pickle; {RESAVE}")


def _pickles(file: Path) -> Iterator[BinaryIO | bytes]:
    """The pickled parts of a PyTorch file: one in an archive; in the old form three numbers, then the content."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            yield archive.read(name)
        return
    with file.open("rb") as stream:
        for _ in range(4):
            yield stream


def _is_function(name: str) -> bool:
    """Whether it is one of Python's built-in functions, which no harmless file calls."""
    module, _, function = name.partition(".")
    return module == "builtins" and not isinstance(getattr(builtins, function, None), type)


def _state_dicts(value: Any, place: str, depth: int) -> Iterator[tuple[str, StateDict]]:
    """The state dicts in a mapping and in those inside of it, and that of a whole model."""
    if isinstance(value, Placeholder):
        tensors = dict(_of_module(value, ""))
        if tensors:
            yield place, tensors
        return
    if not isinstance(value, Mapping) or not depth:
        return
    tensors = {key: item for key, item in value.items() if isinstance(key, str) and isinstance(item, Tensor)}
    if tensors:
        yield place, tensors
    for key, item in value.items():
        if isinstance(key, str):
            yield from _state_dicts(item, f"{place}.{key}" if place else key, depth - 1)


def _of_module(module: Placeholder, prefix: str, above: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a pickled module, as its `state_dict` would give them."""
    state = module.state
    if not isinstance(state, Mapping) or id(module) in above:
        return
    volatile = state.get("_non_persistent_buffers_set", ())
    for part in ("_parameters", "_buffers"):
        for name, tensor in _items(state.get(part)):
            if isinstance(tensor, Tensor) and name not in volatile:
                yield prefix + name, tensor
    for name, child in _items(state.get("_modules")):
        if isinstance(child, Placeholder):
            yield from _of_module(child, f"{prefix}{name}.", (*above, id(module)))


def _items(value: Any) -> list[tuple[str, Any]]:
    return [(key, item) for key, item in value.items() if isinstance(key, str)] if isinstance(value, Mapping) else []


_SAID = re.compile(r"WeightsUnpickler error:\s+(.+)")
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _why(error: Exception) -> str:
    """The reason in a library's words, of which torch's begin with a page of advice in bold."""
    text = _COLOURS.sub("", str(error))
    said = _SAID.search(text)
    words = said[1].split(" Please use", 1)[0] if said else text
    return " ".join(words.split())[:300].rstrip(". ") or type(error).__name__
