"""Muon: steps that move all directions of a layer alike, not just those that the loss shouts for.

The gradient of a layer is a matrix, and a few of its directions (singular vectors) are far larger
than the others. Adam follows these, one number at a time. Muon gives every direction the same
size, so that what is rare, but there, is learnt as fast: a small net needs about half the epochs.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
ROUNDS = 5
# Of the polynomial a s + b s^3 + c s^5, which takes a singular value s from anywhere in 0..1 to
# about 1 in a few rounds. These, Jordan's, settle between 0.7 and 1.2, but get there fast.
A, B, C = 3.4445, -4.7750, 2.0315
ADAM_LIKE = 0.2  # typical size of an Adam step, in learning rates


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors, and singular values near 1.

    By the Newton-Schulz iteration, which needs matrix products only. Each round multiplies by a
    polynomial of the matrix's square; these factors are gathered, as they are small where the
    matrix is long.

    Args:
        matrix: float [rows, columns].
    """
    if matrix.shape[0] > matrix.shape[1]:  # squares of the shorter side are smaller
        return orthogonalise(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    if len(matrix) == 1:  # one row has one singular value, and that is 1 now
        return matrix
    square = matrix @ matrix.T
    factors = factor = _factor(square)
    for _ in range(ROUNDS - 1):
        square = factor @ square @ factor
        factor = _factor(square)
        factors = factor @ factors
    return factors @ matrix


def _factor(square: Tensor) -> Tensor:
    """Return a + b square + c square^2, which a round multiplies the matrix with."""
    factor = torch.addmm(square, square, square, beta=B, alpha=C)
    factor.diagonal().add_(A)
    return factor


class Muon(torch.optim.Optimizer):
    """Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).

    The weights of a layer are one matrix with a row for each output; those of a convolution as
    well, and biases are a matrix of one row. (torch.optim.Muon takes none but plain matrices.)
    Steps are as large as Adam's typically are (Liu et al., "Muon is scalable for LLM training",
    2025), so that learning rates mean about the same.

    Args:
        weights: float tensors of any shape.
        learning_rate: of matrices, vectors and all.
        weight_decay: shrinks matrices by this times the learning rate each step.
    """

    def __init__(
        self, weights: Iterable[Tensor], learning_rate: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(weights, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Move all weights that have a gradient once."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group["lr"], group["weight_decay"])

    def _move(self, weight: Tensor, learning_rate: float, weight_decay: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        ahead = weight.grad.lerp(momentum, MOMENTUM)  # as Nesterov looks ahead
        matrix = ahead.flatten(start_dim=1) if ahead.ndim > 1 else ahead[None]
        size = ADAM_LIKE * max(matrix.shape) ** 0.5
        if weight.ndim > 1:
            weight.mul_(1 - learning_rate * weight_decay)
        weight.sub_(orthogonalise(matrix).view(weight.shape), alpha=learning_rate * size)
