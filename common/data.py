"""The data set: three classes of 32x32 images, badly imbalanced, some of the labels wrong.

There are two forms on disk, the course's pickles and folders of image files. In memory a
`Dataset` holds uint8; `to_float` is the one place where a model's float input is made.
"""

import csv
import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from common.cli import PROJECT, UserError, one_line, read_bytes, read_json, safe_repr, say
from data import cifar10, synthetic
from data.pickles import read_course_pickle

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

CLASS_NAMES = ("car", "truck", "cat")
SPLITS = ("train", "dev")
IMAGE_SIZE = 32
QUICK_COUNT = 60  # images per class in a dry run

DATA_FOLDER = PROJECT / "data"
PREPARED = {"cifar10": cifar10, "synthetic": synthetic}  # name: the module that makes it
OTHER_SPLITS = ("val", "valid", "validation", "test")  # a note says that they are not read

MAX_FILE_SIZE = 2**24  # bytes, of an image
MAX_ROW_SIZE = 200  # bytes of label corrections per image, beyond the first megabyte
MAX_PIXELS = 50_000_000  # of an image that is to be scaled down


@dataclass(frozen=True)
class Dataset:
    """One split of a data set, in memory."""

    name: str  # where it came from, such as `synthetic` or the name of a folder
    split: str  # `train` or `dev`
    images: Tensor  # uint8 [N, 3, 32, 32]
    labels: Tensor  # int64 [N], indices into CLASS_NAMES; some may be wrong
    true_labels: Tensor | None = None  # int64 [N], where they are known
    path: Path | None = None  # of the folder that it was read from

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def class_counts(self) -> list[int]:
        """Number of images labeled as each class."""
        return torch.bincount(self.labels, minlength=len(CLASS_NAMES)).tolist()

    @cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that change with any pixel or label."""
        return _digest(self.images, self.labels)

    @cached_property
    def image_fingerprint(self) -> str:
        """12 hexadecimal digits that change with any pixel, whatever the labels."""
        return _digest(self.images)

    @cached_property
    def duplicate_groups(self) -> Tensor:
        """A group number for each image, int64 [N]; near-duplicates share one."""
        i, j, correlation = (values.numpy() for values in _correlated_pairs(self.images))
        graph = coo_array((correlation, (i, j)), shape=(len(self), len(self)))
        return torch.from_numpy(connected_components(graph, directed=False)[1]).long()

    def subset(self, index: Tensor) -> "Dataset":
        """Return the images that an index, int64 or bool, selects."""
        true_labels = None if self.true_labels is None else self.true_labels[index]
        images, labels = self.images[index], self.labels[index]
        return replace(self, images=images, labels=labels, true_labels=true_labels)

    def first(self, count: int) -> "Dataset":
        """Return the first `count` images of each class, in their order."""
        members = [torch.nonzero(self.labels == label)[:count] for label in self.labels.unique()]
        return self.subset(torch.cat(members).flatten().sort().values)

    def metadata(self) -> dict[str, Any]:
        """Return this split's entry in result files and checkpoints."""
        counts = dict(zip(CLASS_NAMES, self.class_counts, strict=True))
        wrong = None if self.true_labels is None else int((self.labels != self.true_labels).sum())
        return {
            "fingerprint": self.fingerprint,
            "image_fingerprint": self.image_fingerprint,
            "class_counts": counts,
            "wrong_labels": wrong,
        }


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:12]


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 images of any shape into float32 in [0, 1]."""
    return images.float().div_(255)


def describe(*datasets: Dataset | None) -> dict[str, Any]:
    """Return the name and path of a data set, and the metadata of each split that was loaded."""
    loaded = [dataset for dataset in datasets if dataset is not None]
    splits = {dataset.split: dataset.metadata() for dataset in loaded}
    return {"name": loaded[0].name, "path": str(loaded[0].path), "splits": splits}


# ---- where the images come from -------------------------------------------------------------


@dataclass(frozen=True)
class DataFolder:
    """A folder with a data set in it, and the name that results and figures give it."""

    name: str
    path: Path

    def has(self, split: str) -> bool:
        """Return whether the folder has this split."""
        return self._pickle(split).is_file() or (self.path / split).is_dir()

    def load(self, split: str, quick: bool = False, corrections: Path | None = None) -> Dataset:
        """Load and check `train` or `dev`; `quick` keeps the first 60 images of each class.

        Args:
            corrections: a file of label corrections to apply.

        Raises:
            UserError: the split is missing, broken, in the wrong format, or lacks a class; or the
                corrections can't be used.
        """
        if not self.has(split):
            raise UserError(f"{self.path}: has neither {split}.pickle nor {split}/<class>/*.png")
        if self._pickle(split).is_file():
            images, labels = read_course_pickle(self._pickle(split))
            if (self.path / split).is_dir():
                say(f"note: {self.path}: {split}.pickle is read, {split}/ is not", error=True)
        else:
            images, labels = _read_image_folder(self.path / split)
        true_labels = self._true_labels(split, len(labels))
        dataset = Dataset(self.name, split, images, labels, true_labels, self.path.resolve())
        _check_classes(dataset, f"{self.path}, {split}")
        dataset = dataset.first(QUICK_COUNT) if quick else dataset
        if corrections:
            dataset = apply_corrections(dataset, read_corrections(corrections, dataset))
        return dataset

    def _pickle(self, split: str) -> Path:
        return self.path / f"{split}.pickle"

    def _true_labels(self, split: str, count: int) -> Tensor | None:
        path = self.path / "true_labels.json"
        if not self._pickle(split).is_file() or not path.is_file():
            return None
        content = read_json(path)
        labels = content.get(split) if isinstance(content, dict) else None
        whole = isinstance(labels, list) and len(labels) == count
        if not whole or not all(type(y) is int and 0 <= y < len(CLASS_NAMES) for y in labels):
            last = len(CLASS_NAMES) - 1
            raise UserError(f"{path}: {split} must be a list of {count} labels from 0 to {last}")
        return torch.tensor(labels)


def open_data(name_or_path: str) -> DataFolder:
    """Return the data set that `--data` names, prepared if it has to be.

    Args:
        name_or_path: `auto`, `cifar10`, `synthetic`, or the path of a folder.

    Raises:
        UserError: the name is unknown, the folder has no images, or CIFAR-10 can't be downloaded.
    """
    if name_or_path == "auto":
        return _open_first()
    if name_or_path in PREPARED:
        return _open_prepared(name_or_path)
    return _open_folder(Path(name_or_path))


def _open_first() -> DataFolder:
    if any(DataFolder("", DATA_FOLDER).has(split) for split in SPLITS):
        return _open_folder(DATA_FOLDER)
    if _is_prepared("cifar10") or cifar10.is_downloaded() or cifar10.is_reachable():
        return _open_prepared("cifar10")
    say("No images in data/, and CIFAR-10 can't be reached: using synthetic images.")
    return _open_prepared("synthetic")


def _is_prepared(name: str) -> bool:
    return all((DATA_FOLDER / name / f"{split}.pickle").is_file() for split in SPLITS)


def _open_prepared(name: str) -> DataFolder:
    folder = DATA_FOLDER / name
    if not _is_prepared(name):
        with FileLock(DATA_FOLDER / f".{name}.lock"):  # two scripts may be started at once
            if not _is_prepared(name):
                PREPARED[name].prepare(folder)
    return DataFolder(name, folder)


def _open_folder(path: Path) -> DataFolder:
    if path.is_file():
        raise UserError(f"--data {path}: is a file; name the folder that it is in")
    if not path.is_dir():
        raise UserError(f"--data {path}: no such folder, and not auto, cifar10 or synthetic")
    name = one_line(path.resolve().name) or "root"
    if name in PREPARED and path.resolve() != (DATA_FOLDER / name).resolve():
        name = f"folder-{name}"  # its results must not be taken for the prepared set's
    folder = DataFolder(name, path)
    if not any(folder.has(split) for split in SPLITS):
        raise UserError(
            f"--data {path}: holds neither pickles (train.pickle, dev.pickle) nor image files "
            "(train/<class>/*.png, dev/<class>/*.png)"
        )
    for each in OTHER_SPLITS:
        if folder.has(each):
            say(f"note: {path}: split {each} is not read; the splits are train and dev", error=True)
    return folder


def _check_classes(dataset: Dataset, cause: str) -> None:
    for name, count in zip(CLASS_NAMES, dataset.class_counts, strict=True):
        if count == 0:
            raise UserError(f"{cause}: class {name} has no images; each class needs at least one")


# ---- folders of image files -----------------------------------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")  # for some others Pillow starts programs
NAMED_FILES = 5


def write_image_folder(folder: Path, dataset: Dataset) -> None:
    """Write a data set as `folder/<split>/<class>/<index>.png`.

    PNG keeps every pixel, and the index in the name keeps the order when files are moved.
    """
    for name in CLASS_NAMES:
        (folder / dataset.split / name).mkdir(parents=True, exist_ok=True)
    pixels = dataset.images.permute(0, 2, 3, 1).contiguous().numpy()
    for index, (image, label) in enumerate(zip(pixels, dataset.labels.tolist(), strict=True)):
        path = folder / dataset.split / CLASS_NAMES[label] / f"{index:05d}.png"
        Image.fromarray(image).save(path)


def _read_image_folder(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the images and labels of `folder/<class>/*`, in the order of the file names."""
    files, unread = _list_files(folder)
    known = ", ".join(CLASS_NAMES)
    unknown = {file.parent.name for file in files} - set(CLASS_NAMES)
    if unknown:
        raise UserError(f"{folder / min(unknown)}: unknown class; the classes are {known}")
    if unread:
        names = ", ".join(one_line(file.relative_to(folder)) for file in unread[:NAMED_FILES])
        more = ", ..." if len(unread) > NAMED_FILES else ""
        say(f"note: {folder}: {len(unread)} files are not read: {names}{more}", error=True)
    if not files:
        raise UserError(f"{folder}: no image files in its class folders {known}")
    files.sort(key=lambda file: (file.name, file.parent.name))
    labels = [CLASS_NAMES.index(file.parent.name) for file in files]
    return torch.stack([read_image(file) for file in files]), torch.tensor(labels)


def _list_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the image files in the class folders, and all other files."""
    files, unread = [], []
    for entry in _visible(folder):
        for file in _visible(entry) if entry.is_dir() else [entry]:
            if file.is_dir():
                unread += sorted(inner for inner in file.rglob("*") if not inner.is_dir())
            elif file != entry and file.is_file() and file.suffix.lower() in SUFFIXES:
                files.append(file)
            else:
                unread.append(file)
    return files, unread


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def read_image(path: Path, resize: bool = False) -> Tensor:
    """Return a file's image, uint8 [3, 32, 32].

    Args:
        resize: accept any size, and scale the central square; without it, other sizes are refused.

    Raises:
        UserError: not a readable image, too large, or of another size.
    """
    content = io.BytesIO(read_bytes(path, MAX_FILE_SIZE))
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(content, formats=FORMATS) as file:
            width, height = file.size
            if resize and width * height > MAX_PIXELS:
                raise UserError(f"{path}: is {width}x{height} pixels; the most is {MAX_PIXELS:,}")
            if not resize and file.size != (IMAGE_SIZE, IMAGE_SIZE):
                needed = f"{IMAGE_SIZE}x{IMAGE_SIZE}"
                raise UserError(f"{path}: is {width}x{height} pixels, it must be {needed}")
            image = _to_rgb(ImageOps.exif_transpose(file))
            if resize:
                image = ImageOps.fit(image, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
            pixels = np.array(image)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too many pixels; the most is {MAX_PIXELS:,}") from error
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, struct.error
        raise UserError(f"{path}: not a readable {', '.join(FORMATS)} image") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8 bits, and put transparent images on white."""
    if image.mode.startswith("I"):
        gray = np.array(image).astype(np.float32)
        gray[gray == image.info.get("transparency")] = 65535
        image = Image.fromarray(np.rint(gray / 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


# ---- near-duplicates ------------------------------------------------------------------------

# Images whose pixels correlate this much are nearly always the same photograph, made brighter or
# shifted by a pixel; occasionally they are two plain landscapes.
DUPLICATE_CORRELATION = 0.9
BLOCK = 2048  # images per side of a comparison, to limit memory
MAX_PAIRS = 20_000


def near_duplicates(images: Tensor, others: Tensor | None = None) -> list[tuple[int, int, float]]:
    """Find images that are nearly the same, mirrored or not.

    Args:
        images: uint8 [N, 3, 32, 32].
        others: uint8 [M, 3, 32, 32]; without them, pairs i < j within `images`.

    Returns:
        (index in images, index in others, correlation of the pixels), most similar first;
        at most MAX_PAIRS of them.
    """
    i, j, correlation = _correlated_pairs(images, others)
    order = correlation.argsort(descending=True, stable=True)[:MAX_PAIRS]
    values = correlation[order].clamp(max=1).tolist()
    return list(zip(i[order].tolist(), j[order].tolist(), values, strict=True))


def _correlated_pairs(images: Tensor, others: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return i, j and correlation, [pairs] each, of all near-duplicates, block by block."""
    found = []
    for row, block in enumerate(images.split(BLOCK)):
        first = _standardize(block)
        for column, other in enumerate((images if others is None else others).split(BLOCK)):
            if others is None and column < row:
                continue
            second = _standardize(other).flatten(1).T
            direct, mirrored = (x.flatten(1) @ second for x in (first, first.flip(-1)))
            correlation = torch.maximum(direct, mirrored)
            if others is None and column == row:
                correlation = correlation.triu(diagonal=1)
            i, j = torch.nonzero(correlation >= DUPLICATE_CORRELATION, as_tuple=True)
            found.append((i + row * BLOCK, j + column * BLOCK, correlation[i, j]))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _standardize(images: Tensor) -> Tensor:
    """Return images with mean 0 and norm 1, independent of brightness and contrast.

    Their dot products are correlations. All images of a single gray are the same.
    """
    pixels = to_float(images)
    pixels = pixels - pixels.mean(dim=(1, 2, 3), keepdim=True)
    single_gray = pixels.abs().amax(dim=(1, 2, 3), keepdim=True) < 1e-3
    pixels = pixels.masked_fill(single_gray, 1.0)
    return pixels / pixels.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


# ---- label corrections ----------------------------------------------------------------------
#
# A CSV file that any spreadsheet can edit. Its first line names the data by its fingerprint; to
# reject a suggestion, write `no` in the last column:
#
#     # labels of synthetic, train, fingerprint 0123456789ab
#     index,given,suggested,confidence,accept
#     5468,cat,car,0.998,yes

COLUMNS = ["index", "given", "suggested", "confidence", "accept"]
ANSWERS = dict.fromkeys(("yes", "y", "true", "1"), True)
ANSWERS |= dict.fromkeys(("no", "n", "false", "0"), False)


@dataclass(frozen=True)
class Correction:
    """A label that may be wrong."""

    index: int  # of the image in its split
    given: int  # its label, an index into CLASS_NAMES
    suggested: int  # the label that it should have
    confidence: float  # the models' probability that the suggestion is right
    accept: bool = True  # whether to apply it


def apply_corrections(dataset: Dataset, corrections: Sequence[Correction]) -> Dataset:
    """Return the data set with the accepted labels in place of the given ones; say how many.

    Raises:
        UserError: a class would have no images left.
    """
    labels, accepted = dataset.labels.clone(), [each for each in corrections if each.accept]
    for correction in accepted:
        labels[correction.index] = correction.suggested
    say(f"label corrections: {len(accepted)} of {len(corrections)} are applied\n")
    corrected = replace(dataset, labels=labels)
    _check_classes(corrected, "with the label corrections")
    return corrected


def format_corrections(
    dataset: Dataset, corrections: Sequence[Correction], reviewed: bool = True
) -> str:
    """Return the text of a CSV file of corrections, marked if no person has reviewed them."""
    head = f"# labels of {dataset.name}, {dataset.split}, fingerprint {dataset.fingerprint}"
    mark = "" if reviewed else _unreviewed_mark(corrections)
    return f"{head}{mark}\n{','.join(COLUMNS)}\n{_format_rows(corrections)}"


def _unreviewed_mark(corrections: Sequence[Correction]) -> str:
    """Return the mark of corrections that are as a script found them: any edit makes it untrue."""
    return f"; not reviewed: {hashlib.sha256(_format_rows(corrections).encode()).hexdigest()[:12]}"


def _format_rows(corrections: Sequence[Correction]) -> str:
    rows = ""
    for each in corrections:
        names = f"{CLASS_NAMES[each.given]},{CLASS_NAMES[each.suggested]}"
        rows += f"{each.index},{names},{each.confidence:.3f},{'yes' if each.accept else 'no'}\n"
    return rows


def find_fingerprint(first_line: str) -> str | None:
    """Return the fingerprint of the data that a file of corrections is for, None if it has none."""
    found = re.search(r"labels of .+fingerprint (\w{1,40})", first_line)
    return found[1] if found else None


def read_lines(path: Path, dataset: Dataset) -> list[str]:
    """Return the lines of a file of corrections that are not blank, [""] if there are none.

    Spreadsheets write them in several encodings.

    Raises:
        UserError: it can't be read.
    """
    content = read_bytes(path, 2**20 + MAX_ROW_SIZE * len(dataset))
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    lines = content.decode(encoding, errors="replace").splitlines()
    kept = [line for line in lines if line.strip(' ,;\t"') and not line.startswith("sep=")]
    return kept or [""]


def read_corrections(path: Path, dataset: Dataset) -> list[Correction]:
    """Read a CSV file of corrections.

    Raises:
        UserError: there is no such file, it is broken, or it was made for other data.
    """
    lines = read_lines(path, dataset)
    found = find_fingerprint(lines[0])
    if not found:
        raise UserError(f"{path}: its first line must be that of label_errors.py (# labels of ...)")
    if found != dataset.fingerprint:
        raise UserError(
            f"{path}: is for data with fingerprint {safe_repr(found)}; {dataset.name}, "
            f"{dataset.split} has {dataset.fingerprint} (with --quick, another one): run "
            "label_errors.py on it"
        )
    rows = {}
    for row in _split_rows(path, lines[1:]):
        correction = _parse_row(path, row, dataset)
        if correction.index in rows:
            raise UserError(f"{path}: index {correction.index} is in two rows")
        rows[correction.index] = correction
    return list(rows.values())


def is_reviewed(path: Path, dataset: Dataset, corrections: Sequence[Correction]) -> bool:
    """Return whether a person has reviewed or edited the file with these corrections."""
    return _unreviewed_mark(corrections) not in read_lines(path, dataset)[0]


def _split_rows(path: Path, lines: list[str]) -> list[list[str]]:
    """Return the cells of each row; the separator is the one that splits the header correctly."""
    for separator in ",;\t":
        try:
            rows = list(csv.reader(lines, delimiter=separator))
        except csv.Error as error:
            raise UserError(
                f"{path}: has a cell that is too long, or a line break in one"
            ) from error
        rows = [[cell.strip() for cell in row] for row in rows]
        if rows and [cell.lower() for cell in rows[0][: len(COLUMNS)]] == COLUMNS:
            return rows[1:]
    raise UserError(f"{path}: the columns must be {','.join(COLUMNS)}")


def _parse_row(path: Path, row: list[str], dataset: Dataset) -> Correction:
    """Check the cells of a row one by one; the message names the bad one."""
    index, *cells = row + [""] * len(COLUMNS)
    given, suggested, confidence, accept = (cell.lower() for cell in cells[: len(COLUMNS) - 1])

    def check(condition: object, column: str, value: str, expected: str) -> None:
        if not condition:
            row_name = f"the row of index {safe_repr(index)}"
            raise UserError(f"{path}, {row_name}: {column} is {safe_repr(value)}, not {expected}")

    classes = f"one of {', '.join(CLASS_NAMES)}"
    known = re.fullmatch(r"\d{1,9}", index, re.ASCII) and int(index) < len(dataset)
    check(known, "index", index, f"a number from 0 to {len(dataset) - 1}")
    check(given in CLASS_NAMES, "given", given, classes)
    check(suggested in CLASS_NAMES, "suggested", suggested, classes)
    decimal = r"(0?[.,]\d{1,20}|[01]([.,]0{1,20})?)"  # a comma in many countries
    is_decimal = re.fullmatch(decimal, confidence, re.ASCII)
    check(is_decimal, "confidence", confidence, "a number from 0 to 1")
    check(accept in ANSWERS, "accept", accept, "yes or no")
    label = CLASS_NAMES[dataset.labels[int(index)]]
    check(given == label, "given", given, f"{label} as in this data")
    return Correction(
        int(index),
        CLASS_NAMES.index(given),
        CLASS_NAMES.index(suggested),
        float(confidence.replace(",", ".")),
        ANSWERS[accept],
    )
