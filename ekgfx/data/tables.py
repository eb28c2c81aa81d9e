"""Labels in a table beside the images: labels.csv, or train.csv and val.csv, as many data sets come."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.utils.misc import natural_key

from ekgfx.data.folders import ENDINGS
from ekgfx.errors import DataError

FILE_COLUMNS = ("file", "filename", "file_name", "image", "path", "filepath", "image_path", "img", "image_id", "id")
LABEL_COLUMNS = ("label", "class", "target", "category", "class_id", "label_id", "class_name", "y")
SPLIT_COLUMNS = ("split", "set", "subset", "fold")
_ENDINGS = sorted(ENDINGS | {ending.upper() for ending in ENDINGS})


@dataclass(frozen=True)
class Row:
    """An image file, its label as the table writes it, and the split that it belongs to ("" where none is said)."""

    file: str
    label: str
    split: str


def read_table(table: Path) -> list[Row]:
    """The rows of a CSV file with a header, whose columns name an image, its class, and perhaps its split.

    Images stand beside the table, or in a folder beside it (`images/`, or of any name); their ending may be left out.

    Raises:
        DataError: no such columns, an image that is missing, or a file that is no table; names the line.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as content:
            header = content.readline()
            content.seek(0)
            lines = list(csv.reader(content, delimiter=max(",;\t", key=header.count)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table {table}: {error}") from error
    names = [name.strip().lower() for name in lines[0]] if lines else []
    file, label, split = (_column(names, known) for known in (FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS))
    if file is None or label is None or len(lines) < 2:
        missing = "rows" if len(lines) < 2 else "a column of files" if file is None else "a column of labels"
        raise DataError(
            f"{table} lacks {missing}: its first line names columns such as 'file,label' ({', '.join(names)[:200]})"
        )
    folders = [table.parent, *sorted(path for path in table.parent.iterdir() if path.is_dir())]
    found = []
    for number, line in enumerate(lines[1:], 2):
        if not any(line):
            continue
        if len(line) < len(names):
            raise DataError(f"{table}, line {number}: {len(line)} values for {len(names)} columns")
        place = _find(line[file].strip(), folders)
        if place is None:
            image = line[file][:100]
            raise DataError(f"{table}, line {number}: no image {image!r} beside the table or in a folder there")
        found.append(Row(place, line[label].strip(), "" if split is None else line[split].strip().lower()))
    return found


def numbers_of(labels: Sequence[str]) -> Mapping[str, int]:
    """The class of each label: its own number where all are whole numbers, else its place in natural order."""
    if all(label.isdecimal() for label in labels):
        return {label: int(label) for label in labels}
    return {label: number for number, label in enumerate(sorted(set(labels), key=natural_key))}


def _column(names: Sequence[str], known: Sequence[str]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)


def _find(name: str, folders: Sequence[Path]) -> str | None:
    for folder in folders:
        for ending in ("", *_ENDINGS):
            try:
                if name and (folder / f"{name}{ending}").is_file():
                    return str(folder / f"{name}{ending}")
            except (OSError, ValueError):  # a name that no file can have
                return None
    return None
