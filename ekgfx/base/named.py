"""What a command names, looked at before torch is imported: a wrong name is answered at once, not after seconds."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from ekgfx.errors import DataError, ModelError

DATA_KINDS = ("folder", "cifar10", "cifar100", "npz", "timm", "digits", "photos")
_IN_FOLDERS = ("folder", "cifar10", "cifar100", "npz")
_FORMS = "use timm:NAME, hf:NAME|DIR, torchvision:NAME, package.module:factory, path/file.py:factory or a run directory"
LIBRARIES = {
    "hf": ("transformers", "pip install transformers"),
    "torchvision": ("torchvision", "pip install torchvision"),
}
"""What a MODEL may name before a colon besides timm → the package that it needs, and how to get it."""


def check_model(model: str) -> None:
    """Raises ModelError for a MODEL of an unknown form, a timm model or a file that does not exist, or a folder that is
    no run; says what was probably meant."""
    if model.startswith("timm:"):
        return _check_timm(model.removeprefix("timm:"))
    library, colon, name = model.partition(":")
    if colon and library in LIBRARIES:
        return _check_library(library, name)
    if colon and library in plugins():
        return None
    if Path(model).is_dir():
        if not (Path(model) / "run.json").is_file():
            raise ModelError(f"'{model}' is a folder but no run: it has no run.json")
        return None
    place, _, factory = model.rpartition(":")
    if not place or not factory:
        raise ModelError(_unknown_form(model))
    if not place.endswith(".py"):
        if _is_missing(place):
            raise ModelError(_no_package(model, place, factory))
        return None
    file = Path(place).expanduser()
    if not file.is_file():
        raise ModelError(f"no such file: '{place}' (in MODEL '{model}')")
    names = _defined(file)
    if names is not None and factory not in names:
        raise ModelError(no_function(factory, names, place))
    return None


@cache
def plugins() -> dict[str, EntryPoint]:
    """What plug-ins bring: the name before the colon → their entry point in the group `ekgfx.models`."""
    found = {entry.name: entry for entry in entry_points(group="ekgfx.models")}
    return {name: entry for name, entry in found.items() if name != "timm" and name not in LIBRARIES}


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def in_library(model: str) -> bool:
    """Whether a MODEL names a library other than timm, or a plug-in."""
    library, colon, _ = model.partition(":")
    return bool(colon) and (library in LIBRARIES or library in plugins())


def _check_library(library: str, name: str) -> None:
    package, help = LIBRARIES[library]
    if not installed(package):
        raise ModelError(f"{library}:{name} needs {package}: {help}")
    place = Path(name).expanduser()
    if library == "hf" and place.is_dir() and not (place / "config.json").is_file():
        raise ModelError(f"hf:{name} is a folder without config.json; `save_pretrained` of transformers writes one")


def no_function(name: str, known: Iterable[str], place: str, kind: str = "factory") -> str:
    """Says that a file or module has no such function, and what was probably meant."""
    close = get_close_matches(name, list(known), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "it must be a function (or class) of that module"
    return f"no {kind} '{name}' in {place}: {hint}"


def check_of_run(model: str, **asked: object) -> None:
    """Raises ModelError where MODEL is a run, and something is asked for that the run has said already."""
    typed = [name for name, value in asked.items() if value and value not in ("auto", "none")]
    if typed and (Path(model) / "run.json").is_file():
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise ModelError(f"{model} is a run, which says what its network is: leave {flags} out")


def check_weights(weights: str) -> None:
    """Raises ModelError for a weights file that does not exist."""
    if weights in ("auto", "none") or Path(weights).expanduser().exists():
        return
    if "://" in weights:
        raise ModelError(f"weights '{weights}' are not fetched: download the file, and name it")
    raise ModelError(f"weights '{weights}': no such file (else use auto or none)")


def check_input(text: str | None) -> None:
    """Raises ModelError for an `--input` that is no shape."""
    if text is not None:
        shapes(text)


def shapes(text: str) -> list[tuple[int, ...]]:
    """Shapes of inputs: "1x3x32x32,1x10" → [(1, 3, 32, 32), (1, 10)]. ModelError for what is none."""
    try:
        found = [tuple(int(side) for side in shape.split("x")) for shape in text.split(",")]
    except ValueError:
        found = []
    if len(found) > 1 and all(len(shape) == 1 for shape in found):
        raise ModelError(
            f"input '{text}' is {len(found)} inputs of one dimension: write {text.replace(',', 'x')} for one"
        )
    if not found or any(side < 1 for shape in found for side in shape):
        raise ModelError(f"input '{text}' is no shape: write 1x3x32x32, and more inputs after commas")
    return found


def check_data(spec: str | None) -> None:
    """Raises DataError for data of an unknown kind, or in a folder that does not exist."""
    if spec is None:
        return
    kind, _, rest = spec.partition(":")
    if kind not in DATA_KINDS:
        raise DataError(_unknown_data(spec, kind))
    if kind not in (*_IN_FOLDERS, "timm") and spec != kind:
        raise DataError(f"data '{spec}': {kind} comes with scikit-learn, and from no folder; write {kind}")
    if kind in _IN_FOLDERS and (not rest or not Path(rest).expanduser().is_dir()):
        raise DataError(f"no such folder: '{rest}' (in --data {spec})")


def absolute(spec: str | None) -> str | None:
    """A data SPEC that means the same from another working directory."""
    if spec is None:
        return None
    kind, colon, place = spec.partition(":")
    name, at, root = place.rpartition("@") if kind == "timm" else ("", "", place)
    return f"{kind}{colon}{name}{at}{Path(root).expanduser().absolute()}" if root and (at or kind != "timm") else spec


def _defined(file: Path) -> set[str] | None:
    """The names that a Python file defines at its top, as its text says; None where only running it would tell."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None  # importing it says what is wrong
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names.update(part.id for part in ast.walk(node) if isinstance(part, ast.Name))
        elif not isinstance(node, ast.Expr):
            return None  # defined under a condition, or otherwise
    return None if {"*", "__getattr__"} & names else names


def _is_missing(module: str) -> bool:
    """Whether there is no such package; of a module inside one, importing it tells."""
    package = module.partition(".")[0]
    return package not in sys.modules and (not package or importlib.util.find_spec(package) is None)


def _no_package(model: str, place: str, factory: str) -> str:
    file = Path(f"{place.replace('.', '/')}.py")
    libraries = {"timm": "timm", "huggingface": "hf", **{name: name for name in (*LIBRARIES, *plugins())}}
    close = get_close_matches(place, libraries, n=1)
    guess = f"{file}:{factory}" if file.is_file() else f"{libraries[close[0]]}:{factory}" if close else None
    hint = "" if guess is None else f"; did you mean '{guess}'?"
    return f"cannot import '{place}': ModuleNotFoundError: No module named '{place.partition('.')[0]}'{hint}"


def _unknown_form(model: str) -> str:
    if model.endswith(".py"):
        known = _functions(Path(model).expanduser())
        return f"'{model}' names no factory: use {' or '.join(f'{model}:{name}' for name in known or ['FACTORY'])}"
    if model.endswith(".onnx"):
        return f"'{model}' is ONNX, of which nothing can be pruned: name the PyTorch model that it was exported from"
    if Path(model).expanduser().is_file():
        return (
            f"'{model}' is a file, not a network: if it holds weights, MODEL is the network that they are of, "
            f"then --weights {model}"
        )
    guess = _meant(model)
    return f"unknown model '{model}': {_FORMS if guess is None else 'did you mean ' + repr(guess) + '?'}"


def _meant(model: str) -> str | None:
    """What a MODEL without a colon was probably to be."""
    if model.partition(".")[0] in timm_names():
        return f"timm:{model}"
    place, dot, name = model.rpartition(".")
    if dot and name.isidentifier() and Path(f"{place.replace('.', '/')}.py").is_file():
        return f"{place.replace('.', '/')}.py:{name}"
    if dot and name.isidentifier() and "/" not in place and not _is_missing(place):
        return f"{place}:{name}"
    return f"hf:{model}" if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None


def _functions(file: Path) -> list[str]:
    """The first functions and classes that a file defines."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)][:3]


def _check_timm(name: str) -> None:
    architecture = name.partition(".")[0]
    if architecture in timm_names() or ("timm" in sys.modules and sys.modules["timm"].is_model(architecture)):
        return
    close = get_close_matches(architecture, timm_names(), n=3)
    hint = f"did you mean {' or '.join(f'timm:{other}' for other in close)}?" if close else "see timm.list_models()"
    raise ModelError(f"timm has no model '{name}': {hint}")


def _unknown_data(spec: str, kind: str) -> str:
    close = get_close_matches(kind, DATA_KINDS, n=1)
    if close:
        hint = f"did you mean '{spec.replace(kind, close[0], 1)}'?"
    elif Path(spec).is_dir():
        hint = f"did you mean 'folder:{spec}'?"
    else:
        hint = "use folder:DIR, cifar10:DIR, cifar100:DIR, npz:DIR, timm:NAME[@ROOT], digits or photos"
    return f"unknown data '{spec}': {hint}"


@cache
def timm_names() -> frozenset[str]:
    """The architectures of the installed timm, and the old names that it still takes, as its source names them."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        return frozenset()
    names: set[str] = set()
    for file in (Path(found.origin).parent / "models").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        names.update(re.findall(r"@register_model\s+def (\w+)", text))
        for block in re.findall(r"register_model_deprecations\(__name__, \{(.*?)\}\)", text, re.DOTALL):
            names.update(re.findall(r"""^\s*['"](\w+)['"]\s*:""", block, re.MULTILINE))
    return frozenset(names)
