"""How labels go wrong, estimated from what nets think of pictures that they have not learnt.

A net's probability alone is a bad judge of a label: where a class is rare, even a good net doubts
many labels for each one that is wrong. What counts as well is how often each class is mistaken
for each other, and that can be estimated along with the wrong labels themselves.
"""

import torch
from torch import Tensor

from common.dataset import CLASS_NAMES

# Nets that learn from altered pictures are underconfident: their logits are multiplied by this, the
# inverse of a temperature. It can be estimated; this value is a careful one.
SHARPNESS = 1.5
SHARPNESSES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
ROUNDS = 50  # of the estimate; it settles long before
LEFT_OUT = -1  # in place of a label that is not to be learnt from


def true_label_chances(logits: Tensor, labels: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """Return the chance of each class to be a picture's true label, [N, C].

    Expectation-maximisation, as Dawid and Skene (1979) did for doctors who disagree: from a
    table of how often label i is given to class j follow the chances of each picture's true
    label, and from these, summed up, a better table.

    Args:
        logits: [N, C], of nets to which all classes are alike beforehand.
        labels: as given, int64 [N].
        sharpness: what the logits are multiplied with.
    """
    return _estimate(logits, labels, sharpness)[0]


def fit_sharpness(logits: Tensor, labels: Tensor) -> float:
    """Return the sharpness with which the given labels are the least surprising.

    Only for logits of nets that have not learnt these labels.
    """
    return max(SHARPNESSES, key=lambda sharpness: _estimate(logits, labels, sharpness)[1])


def _estimate(logits: Tensor, labels: Tensor, sharpness: float) -> tuple[Tensor, float]:
    """Return the chances, and the mean log of the chance of each given label."""
    likelihood = (sharpness * logits.double()).softmax(dim=1)
    classes = len(CLASS_NAMES)
    counts = torch.bincount(labels, minlength=classes).double()
    table = counts[:, None] * (0.9 * torch.eye(classes) + 0.1 / classes)
    for _ in range(ROUNDS):
        chances = likelihood * table[labels]
        chances /= chances.sum(dim=1, keepdim=True)
        table = torch.zeros_like(table).index_add_(0, labels, chances)
    of_each_label = likelihood @ table.T
    of_given = of_each_label.gather(1, labels[:, None])[:, 0] / of_each_label.sum(dim=1)
    return chances, of_given.log().mean().item()


def leave_out_doubted(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the labels, int64 [N], LEFT_OUT where another is more likely than the one given.

    A class of which nothing would be left is kept whole.
    """
    trusted = true_label_chances(logits, labels).argmax(dim=1) == labels
    return labels.where(keep_classes(trusted, labels), LEFT_OUT)


def keep_classes(trusted: Tensor, labels: Tensor) -> Tensor:
    """Return which labels to keep, bool [N]: those trusted, and all of a class that has none."""
    left = torch.bincount(labels[trusted], minlength=len(CLASS_NAMES))
    return trusted | (left[labels] == 0)
