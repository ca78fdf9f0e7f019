"""Labels that are probably wrong: how they are found, and the file that a person goes through.

The file is a table that opens in any spreadsheet. Its first line names the data that it speaks
of, by its fingerprint; then comes one row for each doubted label:

    # labels of sketches, train, fingerprint 0123456789ab
    index,given,suggested,confidence,accept
    5468,cat,car,0.998,yes

Whoever does not believe a suggestion writes `no` in its last column.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.console import UserError
from common.dataset import CLASS_NAMES, Dataset

COLUMNS = ["index", "given", "suggested", "confidence", "accept"]


@dataclass(frozen=True)
class LabelFix:
    """A doubted label.

    Attributes:
        index: of the picture, in its set.
        given: the label that it has, an index in CLASS_NAMES.
        suggested: the label that it should have.
        confidence: chance that the suggestion is right, as the nets see it, 0 to 1.
        accept: whether to believe it.
    """

    index: int
    given: int
    suggested: int
    confidence: float
    accept: bool = True


def with_fixes(dataset: Dataset, fixes: Sequence[LabelFix]) -> Dataset:
    """Return the set with the accepted labels in place of the given ones."""
    labels = dataset.labels.clone()
    for fix in fixes:
        if fix.accept:
            labels[fix.index] = fix.suggested
    return replace(dataset, labels=labels)


def format_fixes(dataset: Dataset, fixes: Sequence[LabelFix]) -> str:
    """Return the content of a file of label fixes."""
    text = io.StringIO(
        f"# labels of {dataset.source}, {dataset.part}, fingerprint {dataset.fingerprint}\n"
    )
    text.seek(0, io.SEEK_END)
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for fix in fixes:
        names = CLASS_NAMES[fix.given], CLASS_NAMES[fix.suggested]
        accept = "yes" if fix.accept else "no"
        table.writerow([fix.index, *names, f"{fix.confidence:.3f}", accept])
    return text.getvalue()


def read_fixes(path: Path, dataset: Dataset) -> list[LabelFix]:
    """Read the fixes for this data set.

    Raises:
        UserError: no such file, not one of label fixes, or one for other data.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file") from error
    about = re.search(r"^\W*labels of (.+), fingerprint (\w+)", lines[0] if lines else "")
    if not about:
        raise UserError(f"{path}: does not begin with the line that names its data")
    if about[2] != dataset.fingerprint:
        raise UserError(
            f"{path}: speaks of {about[1]}, fingerprint {about[2]}; the data here is "
            f"{dataset.source}, {dataset.part}, fingerprint {dataset.fingerprint}"
        )
    rows = csv.reader(lines[1:])
    if next(rows, []) != COLUMNS:
        raise UserError(f"{path}, line 2: the columns must be {','.join(COLUMNS)}")
    return [_read_row(f"{path}, line {line}", row, dataset) for line, row in enumerate(rows, 3)]


def _read_row(where: str, row: list[str], dataset: Dataset) -> LabelFix:
    try:
        index, given, suggested, confidence, accept = (cell.strip() for cell in row)
        fix = LabelFix(
            int(index),
            CLASS_NAMES.index(given),
            CLASS_NAMES.index(suggested),
            float(confidence),
            {"yes": True, "no": False}[accept.lower()],
        )
        matches = fix.index >= 0 and dataset.labels[fix.index] == fix.given
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{where}: {','.join(row)!r} is no label fix ({','.join(COLUMNS)})"
        ) from error
    if not matches:
        raise UserError(f"{where}: picture {index} is not labelled {given} in this data")
    return fix
