from collections import Counter
from itertools import islice

import numpy as np
import torch
from scipy.stats import chisquare

from common.batches import (
    all_shifts,
    change_colours,
    cut_out,
    flip_and_shift,
    least_sampled,
    mix_up,
    shuffled,
    weighted,
)

EQUAL = torch.ones(3) / 3


def labels_of(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def test_shuffled_draws_each_picture_once():
    torch.manual_seed(0)
    for epoch in islice(shuffled(labels_of((100, 20, 5))), 3):
        assert sorted(epoch.tolist()) == list(range(125))


def test_least_sampled_draws_42_42_41():
    torch.manual_seed(0)
    labels = labels_of((100, 20, 5))
    epoch = next(least_sampled(labels))
    assert sorted(Counter(labels[epoch].tolist()).values()) == [41, 42, 42]


def test_least_sampled_counts_never_differ_by_more_than_1_even_across_epochs():
    torch.manual_seed(1)
    labels = labels_of((50, 9, 5))
    counts = np.zeros(3, dtype=int)
    for epoch in islice(least_sampled(labels), 7):
        for label in labels[epoch].tolist():
            counts[label] += 1
            assert np.ptp(counts) <= 1


def test_least_sampled_breaks_ties_evenly_and_reaches_each_picture():
    torch.manual_seed(2)
    labels = labels_of((6, 3, 3))
    first, drawn = Counter(), Counter()
    sampler = least_sampled(labels)
    for epoch in islice(sampler, 600):
        first[labels[epoch[0]].item()] += 1
        drawn.update(epoch.tolist())
    assert chisquare([first[label] for label in range(3)]).pvalue > 0.001
    assert chisquare([drawn[i] for i in range(6)]).pvalue > 0.001
    assert set(drawn) == set(range(12))


def test_samplers_follow_torchs_seed():
    labels = labels_of((50, 9, 5))
    for sampler in (shuffled, least_sampled, lambda labels: weighted(labels, EQUAL)):
        runs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            runs.append(next(sampler(labels)).tolist())
        assert runs[0] == runs[1] != runs[2]


def test_weighted_draws_classes_in_the_ratio_of_their_weights():
    torch.manual_seed(0)
    labels = labels_of((880, 80, 40))
    drawn = torch.cat(list(islice(weighted(labels, torch.tensor([0.5, 0.25, 0.25])), 20)))
    counts = torch.bincount(labels[drawn])
    assert chisquare(counts, [10000, 5000, 5000]).pvalue > 0.001


def test_flip_and_shift_equals_padding_cropping_and_mirroring_one_by_one():
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    padded = np.pad(pictures.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    index = torch.randperm(64)
    results = flip_and_shift(all_shifts(pictures), index)
    assert results.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    for result, source in zip(results.numpy(), padded[index], strict=True):
        matches = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if np.array_equal(_crop(source, top, left, mirrored), result)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {mirrored for *_, mirrored in seen} == {False, True}
    assert {0, 8} <= {top for top, *_ in seen}


def _crop(source, top, left, mirrored):
    crop = source[:, top : top + 32, left : left + 32]
    return crop[:, :, ::-1] if mirrored else crop


def test_change_colours_changes_contrast_within_its_bounds_and_keeps_the_range():
    torch.manual_seed(0)
    pictures = torch.rand(200, 3, 32, 32)
    changed = change_colours(pictures, 0.3)
    assert changed.shape == pictures.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    ratio = changed.std(dim=(2, 3)) / pictures.std(dim=(2, 3))  # contrast, but for clipping
    assert 0.6 < ratio.min() < 0.8 < 1.2 < ratio.max() < 1.31
    assert torch.allclose(change_colours(pictures, 0.0), pictures, atol=1e-6)


def test_cut_out_paints_one_grey_square_a_picture_that_may_stick_out():
    torch.manual_seed(0)
    pictures = torch.rand(500, 3, 32, 32) / 3
    cut = cut_out(pictures, 10)
    painted = (cut != pictures).all(dim=1)
    assert torch.equal(cut.where(~painted[:, None], 0.5), cut)
    assert torch.equal(cut.where(painted[:, None], pictures), cut)
    rows, columns = painted.any(dim=2).sum(dim=1), painted.any(dim=1).sum(dim=1)
    assert torch.equal(painted.sum(dim=(1, 2)), rows * columns)
    assert rows.max() == columns.max() == 10
    assert rows.min() == columns.min() == 5
    assert painted[:, 0].any()
    assert painted[:, 31].any()


def test_mix_up_blends_pictures_and_targets_alike():
    torch.manual_seed(0)
    targets = torch.eye(3)[torch.arange(3).repeat(100)]
    pictures = targets[:, :, None, None].expand(-1, -1, 32, 32).contiguous()  # shows its target
    mixed, mixed_targets = mix_up(pictures, targets, alpha=0.5)
    assert torch.allclose(mixed[:, :, 5, 7], mixed_targets)
    assert torch.allclose(mixed_targets.sum(dim=1), torch.ones(300))
    assert (mixed_targets[targets == 1] >= 0.5).all()
    assert ((mixed_targets > 0.05).sum(dim=1) > 1).any()
