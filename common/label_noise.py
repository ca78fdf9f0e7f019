"""How labels go wrong, estimated from what nets think of pictures that they have not learnt.

A net's probability alone is a bad judge of a label: where a class is rare, even a good net doubts
many labels for each one that is wrong. What counts as well is how often each class is mistaken
for each other, and that can be estimated along with the wrong labels themselves.
"""

import torch
from torch import Tensor

from common.dataset import CLASS_NAMES

SHARPNESS = 1.5  # nets trained with mixup are too modest: their logits are multiplied by this
ROUNDS = 50  # of the estimate; it settles long before
SURE = 0.9  # chance of a label from which on it may take the place of another
LEFT_OUT = -1  # in place of a label that is not to be learnt from


def true_label_chances(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the chance of each class to be a picture's true label, [N, C].

    Expectation-maximisation, as Dawid and Skene (1979) did for doctors who disagree: from a
    table of how often label i is given to class j follow the chances of each picture's true
    label, and from these, summed up, a better table.

    Args:
        logits: [N, C], of nets to which all classes are alike beforehand.
        labels: as given, int64 [N].
    """
    likelihood = (SHARPNESS * logits.double()).softmax(dim=1)
    classes = len(CLASS_NAMES)
    counts = torch.bincount(labels, minlength=classes).double()
    table = counts[:, None] * (0.9 * torch.eye(classes) + 0.1 / classes)
    for _ in range(ROUNDS):
        chances = likelihood * table[labels]
        chances /= chances.sum(dim=1, keepdim=True)
        table = torch.zeros_like(table).index_add_(0, labels, chances)
    return chances


def leave_out_doubted(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the labels, int64 [N], LEFT_OUT where another is more likely than the one given.

    A class of which nothing would be left is kept whole.
    """
    trusted = true_label_chances(logits, labels).argmax(dim=1) == labels
    kept = torch.bincount(labels[trusted], minlength=len(CLASS_NAMES))
    return labels.where(trusted | (kept[labels] == 0), LEFT_OUT)


def mend(logits: Tensor, labels: Tensor, learnt: Tensor) -> Tensor:
    """Return the labels to learn from, int64 [N]: LEFT_OUT where they are in doubt.

    Where the net is sure of another label than the one given, that takes its place. What was
    left out so far comes back only where the net is sure.

    Args:
        logits: [N, C], of the net.
        labels: as given, int64 [N].
        learnt: the labels that the net has learnt from so far, int64 [N].
    """
    confidence, likely = true_label_chances(logits, labels).max(dim=1)
    trusted = (likely == labels) & (learnt != LEFT_OUT)
    return likely.where(trusted | (confidence > SURE), LEFT_OUT)
