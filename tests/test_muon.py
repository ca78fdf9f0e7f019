import pytest
import torch
from torch import nn

from common.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (16, 16), (1, 9)])
def test_singular_values_come_near_1_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    result = orthogonalise(matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ result @ right.T
    assert torch.allclose(turned, torch.diag(turned.diag()), atol=1e-4)
    large = values > 0.1 * values.max()  # the smallest need more rounds
    assert (turned.diag()[large] - 1).abs().max() < 0.35


@pytest.mark.parametrize("gradient", [torch.zeros(4, 6), None])
def test_a_gradient_of_zero_or_none_at_all_moves_nothing(gradient):
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = gradient
    Muon([weight], 0.1).step()
    assert torch.equal(weight.data, torch.ones(4, 6))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_move_as_with_torch_optim_muon(weight_decay):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(12, 20))
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    optimizers = (
        Muon([ours], 0.01, weight_decay),
        torch.optim.Muon([theirs], 0.01, weight_decay, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        ours.grad = torch.randn(12, 20)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()  # theirs computes in bfloat16, two or three digits
    assert (ours - theirs).norm() < 0.03 * moved


def test_a_convolution_moves_like_the_matrix_that_it_is():
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(8, 27))
    kernels = nn.Parameter(matrix.detach().view(8, 3, 3, 3).to(memory_format=torch.channels_last))
    matrix.grad = torch.randn(8, 27)
    kernels.grad = matrix.grad.view(8, 3, 3, 3)
    Muon([matrix, kernels], 0.1).step()
    assert torch.allclose(kernels.flatten(1), matrix, atol=1e-6)


def test_a_bias_moves_along_its_gradient_by_a_fifth_of_the_rate_and_does_not_decay():
    bias = nn.Parameter(torch.tensor([1.0, 1.0]))
    bias.grad = torch.tensor([3.0, -4.0])
    Muon([bias], 0.1, weight_decay=0.5).step()
    moved = bias.detach() - 1
    assert moved.tolist() == pytest.approx([-0.6 * 0.02 * 2**0.5, 0.8 * 0.02 * 2**0.5], rel=1e-4)
