"""What runs differently on an NVIDIA GPU; without one, these tests are skipped."""

import copy
from dataclasses import replace

from common import attacks
from common.data import to_float
from common.model import build_model, predict_logits
from common.recipes import BEST, FINAL, ROBUST, TUNED
from common.train import GraphedStep, train

import pytest
import torch
from conftest import make_dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
CUDA = torch.device("cuda")
# 60 images are three whole batches and a short one; flips and crops start in the second epoch.
SHORT = {"epochs": 4, "batch_size": 16, "label_filter": None, "augment_from": 1}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """Let the same numbers go in and come out: no choice between algorithms, no bfloat16."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)


def run(recipe, seed=0, state=None):
    """Train; return the model, the losses of all steps, and the state after each epoch."""
    losses, states = [], []

    def after_epoch(run, of_epoch):
        losses.extend(of_epoch)
        states.append(copy.deepcopy(run.state_dict()))

    model = train(recipe, make_dataset(), seed, CUDA, after_epoch, state)
    return model, losses, states


@pytest.mark.parametrize("recipe", [FINAL, TUNED, BEST, ROBUST], ids=lambda recipe: recipe.name)
def test_a_replayed_step_does_what_the_step_does(recipe, monkeypatch):
    recipe = replace(recipe, **SHORT)
    _, replayed, _ = run(recipe)
    monkeypatch.setattr("common.train.GraphedStep", lambda step: step)
    _, plain, _ = run(recipe)
    assert len(plain) == 16
    assert replayed == pytest.approx(plain, rel=0.02, abs=2e-3)
    assert replayed != run(recipe, seed=1)[1]


def test_steps_are_replayed_after_their_warm_up(monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))
    )
    run(replace(TUNED, **SHORT))
    # Epoch 0: three whole batches. Then, augmented, nine of them and three short ones.
    assert len(replays) == 9 - GraphedStep.WARMUP_CALLS
    assert len(set(map(id, replays))) == 1


@pytest.mark.parametrize("recipe", [FINAL, ROBUST], ids=lambda recipe: recipe.name)
def test_a_run_can_be_resumed(recipe):
    recipe = replace(recipe, **SHORT)
    _, losses, states = run(recipe)
    _, resumed, _ = run(recipe, state=states[1])
    assert resumed == pytest.approx(losses[8:], rel=0.02, abs=2e-3)


def test_predictions_and_attacks_are_those_of_the_cpu():
    dataset = make_dataset("dev")
    model, _, _ = run(replace(TUNED, **SHORT))
    on_cpu = build_model("CourseNet", tta_flip=model.tta_flip, tta_shift=model.tta_shift).eval()
    on_cpu.load_state_dict(model.state_dict())
    logits = [predict_logits(each, dataset.images) for each in (model, on_cpu)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    images, labels = to_float(dataset.images), dataset.labels
    attacked = [
        attacks.in_batches(attacks.pgd, each, images, labels, epsilon=0.1, random_start=False)
        for each in (model, on_cpu)
    ]
    # Where a gradient is all but 0, its sign is chance.
    assert (attacked[0] - attacked[1]).abs().mean() < 0.01
