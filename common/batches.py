"""What a batch is made of: which pictures are drawn, and how they are altered each time.

Each sampler yields, epoch after epoch, as many indices into the set as it has pictures. All that
is random follows from torch's seed.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Beta

from common.dataset import CLASS_NAMES

MOST_SHIFT = 4  # pixels


def shuffled(labels: Tensor) -> Iterator[Tensor]:
    """Draw each picture once an epoch, whatever its class: nearly all are cars."""
    while True:
        yield torch.randperm(len(labels))


def least_sampled(labels: Tensor) -> Iterator[Tensor]:
    """Draw always from the class that was drawn least so far; ties are broken evenly.

    That makes rounds in which each class comes once, in random order. A round that the end of
    an epoch cuts goes on in the next one, so that counts never differ by more than 1.
    """
    members = [torch.nonzero(labels == label).flatten() for label in range(len(CLASS_NAMES))]
    classes = torch.empty(0, dtype=torch.int64)
    while True:
        rounds = torch.rand(len(labels) // len(members) + 1, len(members)).argsort(dim=1)
        classes = torch.cat([classes, rounds.flatten()])
        drawn, classes = classes[: len(labels)], classes[len(labels) :]
        index = torch.empty_like(drawn)
        for label, own in enumerate(members):
            places = torch.nonzero(drawn == label).flatten()
            index[places] = own[torch.randint(len(own), (len(places),))]
        yield index


def weighted(labels: Tensor, shares: Tensor) -> Iterator[Tensor]:
    """Draw each picture by chance, so that the classes come in these shares, [C].

    The same draws as torch's WeightedRandomSampler, without a Python list in between.
    """
    weight_of_picture = (shares / torch.bincount(labels, minlength=len(shares)))[labels]
    while True:
        yield torch.multinomial(weight_of_picture, len(labels), replacement=True)


def all_shifts(pictures: Tensor) -> Tensor:
    """Return each picture, plain and mirrored, at all places that a shift can move it to.

    What a shift uncovers is filled by reflection. Padding is done here, once for all epochs; the
    places are views of the padded pictures, which take no memory of their own.

    Args:
        pictures: [N, 3, H, W] of any type.

    Returns:
        [2, N, 9, 9, H, W, 3]: plain or mirrored, picture, place down, place to the right.
    """
    channels_last = pictures.permute(0, 2, 3, 1).numpy(force=True)
    margins = ((0, 0), (MOST_SHIFT, MOST_SHIFT), (MOST_SHIFT, MOST_SHIFT), (0, 0))
    padded = torch.from_numpy(np.pad(channels_last, margins, mode="reflect")).to(pictures.device)
    height, width = pictures.shape[2:]
    both = torch.stack([padded, padded.flip(2)])
    return both.unfold(2, height, 1).unfold(3, width, 1).movedim(4, -1)


def flip_and_shift(shifts: Tensor, index: Tensor) -> Tensor:
    """Mirror half of some pictures and shift each by up to 4 pixels both ways, at random.

    Args:
        shifts: what `all_shifts` returns.
        index: which pictures, int64 [B].

    Returns:
        [B, 3, H, W].
    """
    down, right = torch.randint(2 * MOST_SHIFT + 1, (2, len(index)), device=index.device)
    mirrored = torch.randint(2, (len(index),), device=index.device)
    return shifts[mirrored, index, down, right].permute(0, 3, 1, 2)


def change_colours(pictures: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and colour balance of each picture at random.

    Args:
        pictures: float in [0, 1], [B, 3, 32, 32].
        strength: contrast changes by a factor of 1 - strength to 1 + strength. Up to half of
            strength is added to or taken from the brightness, and up to half of strength times
            the picture's mean to or from each of red, green and blue.
    """

    def between(low: float, high: float, channels: int = 1) -> Tensor:
        size = (len(pictures), channels, 1, 1)
        return torch.empty(size, device=pictures.device).uniform_(low, high)

    grey = pictures.mean(dim=(1, 2, 3), keepdim=True)
    balance = between(1 - strength / 2, 1 + strength / 2, channels=3)
    brightness = between(-strength / 2, strength / 2)
    contrast = between(1 - strength, 1 + strength)
    # (pictures - grey) * contrast + grey * balance + brightness, in one go
    offset = grey * (balance - contrast) + brightness
    along_a_row = offset.flatten(start_dim=1).repeat(1, pictures.shape[3])
    changed = torch.addcmul(along_a_row[:, None], _as_rows(pictures), contrast[:, 0])
    return _as_pictures(changed.clamp_(0, 1), pictures)


def _as_rows(pictures: Tensor) -> Tensor:
    """Return pictures, [B, C, H, W], as rows of numbers, [B, H, W * C].

    Of pictures whose channels come last in memory it is a view. What is done to rows runs in
    loops of W * C numbers, several times as fast as loops of C.
    """
    return pictures.permute(0, 2, 3, 1).flatten(start_dim=2)


def _as_pictures(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows of numbers as the pictures, [B, C, H, W], that they are."""
    count, channels, height, width = like.shape
    return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def cut_out(pictures: Tensor, size: int) -> Tensor:
    """Paint a square of each picture grey, so that no single detail decides.

    DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout"
    (2017). Squares at the edge stick out of the picture.

    Args:
        pictures: float in [0, 1], [B, 3, 32, 32].
        size: of the square's sides, in pixels.
    """
    count, channels, height, width = pictures.shape
    rows, columns = (
        torch.arange(side, device=pictures.device)
        - torch.randint(1 - size // 2, side + 1 - size // 2, (count, 1), device=pictures.device)
        for side in (height, width)
    )
    inside_rows, inside_columns = ((place >= 0) & (place < size) for place in (rows, columns))
    along_a_row = inside_columns.repeat_interleave(channels, dim=1)
    square = inside_rows[:, :, None] & along_a_row[:, None, :]
    return _as_pictures(_as_rows(pictures).masked_fill(square, 0.5), pictures)


def mix_up(pictures: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Blend each picture, and its target, with those of another of the batch.

    Zhang et al., "mixup: Beyond empirical risk minimization" (2018). The share of the other is
    drawn for each picture from Beta(alpha, alpha), and is at most a half.

    Args:
        pictures: float [B, 3, 32, 32].
        targets: chance of each class, float [B, C].
    """
    share = Beta(alpha, alpha).sample((len(pictures), 1)).to(pictures.device)
    share = torch.minimum(share, 1 - share)
    other = torch.randperm(len(pictures), device=pictures.device)
    mixed = torch.lerp(pictures, pictures[other], share[:, :, None, None])
    return mixed, torch.lerp(targets, targets[other], share)
