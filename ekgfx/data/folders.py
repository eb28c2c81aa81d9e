"""The image files below a folder, by class."""

import logging
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from ekgfx.errors import DataError

log = logging.getLogger("ekgfx")
ENDINGS = frozenset(IMG_EXTENSIONS)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is what systems and editors leave behind (`._cat.jpg`, `.ipynb_checkpoints`,
    `__MACOSX`), and none of the user's."""
    return name.startswith((".", "__"))


def find_images(folder: Path) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """All images below a folder with the number of their class, and the classes' numbers.

    The innermost folder's name is the class ("" for images in the folder itself), numbered in natural order, as timm
    does. One line says what is left out. Raises DataError where a folder cannot be listed."""
    found: list[tuple[str, str]] = []
    others: Counter[str] = Counter()
    for inside, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        folders[:] = [name for name in folders if not is_hidden(name)]
        label = "" if Path(inside) == folder else Path(inside).name
        for name in names:
            ending = Path(name).suffix.lower()
            if is_hidden(name):
                others.update(["hidden"] if ending in ENDINGS else [])
            elif ending in ENDINGS:
                found.append((os.path.join(inside, name), label))
            else:
                others.update([ending or "without an ending"])
    if found and others:
        most = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        log.info("%s: %d images; other files are left out: %s", folder, len(found), most)
    labels = sorted({label for _, label in found}, key=natural_key)
    numbers = {label: number for number, label in enumerate(labels)}
    found.sort(key=lambda sample: natural_key(sample[0]))
    return [(file, numbers[label]) for file, label in found], numbers


def told_order(root: Path, found: Collection[str]) -> dict[str, int] | None:
    """The classes' numbers that `classes.txt` says, a folder's name a line; None where there is none for these folders,
    and a warning where torchvision would number them otherwise than timm and `find_images` do.

    Raises:
        DataError: it names some of the class folders, but not all.
    """
    table = root / "classes.txt"
    names = table.read_text(encoding="utf-8-sig", errors="replace").split("\n") if table.is_file() else []
    numbers = {name: number for number, name in enumerate(filter(None, map(str.strip, names)))}
    if missing := sorted(set(found) - set(numbers)):
        if len(missing) < len(found):
            raise DataError(f"{table} does not name the class folder {missing[0]!r}: add it, or move the file away")
        natural, plain = sorted(found, key=natural_key), sorted(found)
        if natural != plain:
            first = next(number for number, name in enumerate(plain) if name != natural[number])
            log.warning(
                "%s: class %d is %r, in natural order, as timm has it; torchvision's ImageFolder has %r there. If the "
                "model was trained so, write the folders' names in its order into %s, a name a line",
                *(root, first, natural[first], plain[first], table),
            )
        return None
    log.info("%s: classes in the order of %s", root, table.name)
    return numbers


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot list {error.filename}: {error.strerror or error}") from error
