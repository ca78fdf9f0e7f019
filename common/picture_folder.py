"""Read and write a data set as a folder of pictures: train/car/00017.png, dev/cat/00003.png, ...

A wrong label is mended by moving its file into the right class's folder.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.console import UserError


def read_folder(folder: Path, class_names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Read all PNG files of `folder/<class>/`, in the order of their file names.

    Returns:
        pictures, uint8 [N, 3, 32, 32], and labels, int64 [N]: index in `class_names`.

    Raises:
        UserError: a folder of an unknown class, no pictures, a file that is no 32x32 picture.
    """
    files = sorted(folder.glob("*/*.png"), key=lambda file: (file.name, file.parent.name))
    if not files:
        raise UserError(f"{folder}: no pictures; they must stand in {_folders(class_names)}")
    for name in sorted({file.parent.name for file in files} - set(class_names)):
        raise UserError(f"{folder / name}: unknown class; known are {_folders(class_names)}")
    labels = [class_names.index(file.parent.name) for file in files]
    return torch.stack([_read_picture(file) for file in files]), torch.tensor(labels)


def _folders(class_names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}/*.png" for name in class_names)


def _read_picture(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            if image.size != (32, 32):
                width, height = image.size
                raise UserError(f"{file}: is {width}x{height} pixels, it must be 32x32")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not a readable picture") from error


def write_folder(
    folder: Path, pictures: Tensor, labels: Tensor, class_names: tuple[str, ...]
) -> None:
    """Write pictures (uint8 [N, 3, 32, 32]) as `folder/<class>/<index>.png`.

    PNG keeps every pixel, and the index in the name keeps the order.
    """
    for name in class_names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        image.save(folder / class_names[label] / f"{index:05d}.png")
