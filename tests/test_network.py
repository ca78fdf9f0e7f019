import pytest
import torch
import torch.nn.functional as F
from conftest import COURSE_DATA, make_dataset, needs_course_data
from torch import nn

from common.console import UserError
from common.dataset import as_input, open_source
from common.network import (
    CourseNet,
    build_network,
    load_checkpoint,
    predict_logits,
    save_checkpoint,
    with_pixel_range,
)
from evaluation import evaluate


def logits_as_the_course_writes_it(net: CourseNet, x: torch.Tensor) -> torch.Tensor:
    """Return the logits for pixels in [-1, 1], with ReLU before pooling."""
    x = F.max_pool2d(F.relu(net.conv1(x)), 2)
    x = F.max_pool2d(F.relu(net.conv2(x)), 2)
    x = F.relu(net.fc1(x.flatten(1)))
    return net.fc3(F.relu(net.fc2(x)))


def test_net_has_the_courses_number_of_parameters():
    assert sum(p.numel() for p in build_network().parameters()) == 66_171


def test_net_equals_the_courses_net_on_the_courses_range():
    net = build_network().eval()
    pictures = as_input(make_dataset().pictures)
    expected = logits_as_the_course_writes_it(net, pictures * 2 - 1)
    torch.testing.assert_close(net(pictures), expected, atol=1e-5, rtol=1e-5)


def test_gradient_is_the_same_as_with_relu_first():
    net, pictures = build_network().eval(), as_input(make_dataset().pictures)
    ours, theirs = pictures.clone().requires_grad_(), pictures.clone().requires_grad_()
    net(ours).pow(2).sum().backward()
    logits_as_the_course_writes_it(net, theirs * 2 - 1).pow(2).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_checkpoint_rebuilds_its_net_alone(tmp_path):
    net = build_network(pixel_range=(0.0, 1.0)).eval()
    path, pictures = tmp_path / "net.ckpt", make_dataset().pictures
    save_checkpoint(path, net, {"seed": 7})
    again, about = load_checkpoint(path)
    assert torch.equal(predict_logits(net, pictures), predict_logits(again, pictures))
    assert about == {"seed": 7}
    assert not again.training


def test_bare_checkpoint_of_the_course_is_read_in_the_range_it_is_said_to_have(tmp_path):
    net, path = build_network(), tmp_path / "bare.ckpt"
    torch.save({"model_state_dict": net.state_dict()}, path)
    pictures = make_dataset().pictures
    for pixel_range in ((-1.0, 1.0), (0.0, 1.0)):
        expected = predict_logits(with_pixel_range(net, pixel_range), pictures)
        loaded, about = load_checkpoint(path, pixel_range)
        assert torch.equal(predict_logits(loaded, pictures), expected)
        assert about == {}
    assert (load_checkpoint(path)[0].pixel_range.low, net.pixel_range.low) == (-1, -1)


def test_our_checkpoint_loads_in_the_courses_own_way(tmp_path):
    save_checkpoint(tmp_path / "net.ckpt", build_network(), {})
    names = set(torch.load(tmp_path / "net.ckpt", weights_only=True)["model_state_dict"])
    layers = ("conv1", "conv2", "fc1", "fc2", "fc3")
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_range_for_a_checkpoint_that_has_its_own_is_refused(tmp_path):
    save_checkpoint(tmp_path / "net.ckpt", build_network(), {})
    with pytest.raises(UserError, match="carries its own pixel range, -1,1"):
        load_checkpoint(tmp_path / "net.ckpt", (0.0, 1.0))


def other_shape(weights):
    weights["conv1.weight"] = torch.zeros(8, 3, 5, 5)


def missing(weights):
    del weights["fc3.bias"]


def infinite(weights):
    weights["fc3.bias"][0] = float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_shape, r"conv1.weight is \[8, 3, 5, 5\], but CourseNet has \[16, 3, 5, 5\]"),
        (missing, "fc3.bias is no such weight"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra is"),
        (infinite, "NaN or infinite"),
        (lambda weights: weights.update({"fc3.bias": torch.eye(3).to_sparse()}), "no plain"),
        (lambda weights: weights.update({"fc3.bias": "text"}), "fc3.bias is no plain tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_weights_of_another_net_are_named(tmp_path, change, message):
    weights = build_network().state_dict()
    change(weights)
    torch.save({"model_state_dict": weights}, tmp_path / "net.ckpt")
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "net.ckpt")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pixel_range", "0,1", "it must be two numbers"),
        ("pixel_range", (0.0, 0.5, 1.0), "it must be two numbers"),
        ("pixel_range", (0.0, float("nan")), "it must be two numbers"),
        ("pixel_range", None, "it must be two numbers"),
        ("network", ["CourseNet"], "unknown kind"),
        ("about", 3, "no dict of facts"),
    ],
)
def test_spoilt_fields_of_a_checkpoint_are_named(tmp_path, field, value, message):
    content = {"model_state_dict": build_network().state_dict(), field: value}
    torch.save(content, tmp_path / "net.ckpt")
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "net.ckpt")


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "net.ckpt"
    with pytest.raises(UserError, match="net.ckpt: No such file"):
        load_checkpoint(path)
    for content in (b"", b"text", b"PK\x03\x04 cut short"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a whole checkpoint"):
            load_checkpoint(path)
    torch.save(build_network(), path)  # a whole module is a pickle of code
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no 'model_state_dict'"):
        load_checkpoint(path)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_leaves_the_nets_mode_and_ignores_dropout(training):
    net, pictures = build_network().train(training), make_dataset().pictures
    first = predict_logits(net, pictures)
    assert torch.equal(first, predict_logits(net, pictures))
    assert net.training is training


def test_prediction_is_the_same_for_uint8_and_for_input_pictures():
    net, pictures = build_network(), make_dataset().pictures
    expected = predict_logits(net, pictures)
    torch.testing.assert_close(predict_logits(net, as_input(pictures)), expected)


def test_prediction_takes_any_module():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    assert predict_logits(net, make_dataset().pictures).shape == (60, 3)


@needs_course_data
def test_the_reports_net_gives_the_reports_two_rows():
    dev = open_source(str(COURSE_DATA)).load("dev")
    expected = {(0.0, 1.0): (0.891, 0.779, 0.773), (-1.0, 1.0): (0.872, 0.609, 0.526)}
    for pixel_range, row in expected.items():
        net, _ = load_checkpoint(COURSE_DATA / "seed-model.ckpt", pixel_range)
        scores = evaluate(net, dev)
        ours = (scores["accuracy"], scores["balanced_accuracy"], scores["g_mean"])
        assert ours == pytest.approx(row, abs=0.0005)


@pytest.mark.parametrize(("name", "size"), [("BestNet", 291_795), ("BestPair", 2 * 291_795)])
def test_our_own_nets_are_small_and_their_checkpoints_rebuild_them(name, size, tmp_path):
    torch.manual_seed(0)
    net = build_network(name, average_flips=True)
    assert sum(weight.numel() for weight in net.parameters()) == size
    net(torch.rand(8, 3, 32, 32))  # moves the statistics of batch normalisation
    save_checkpoint(tmp_path / "net.ckpt", net.eval(), {"seed": 0})
    again, about = load_checkpoint(tmp_path / "net.ckpt")
    pictures = torch.rand(4, 3, 32, 32)
    assert torch.equal(net(pictures), again(pictures))
    assert about == {"seed": 0}
    assert (tmp_path / "net.ckpt").stat().st_size < 4e6


def test_a_pair_learns_from_half_a_batch_each_and_answers_with_the_mean():
    torch.manual_seed(0)
    pair, pictures = build_network("BestPair"), torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        first, second = (pair.nets[i].train()(pictures[3 * i : 3 * i + 3]) for i in range(2))
        torch.testing.assert_close(pair.train()(pictures), torch.cat([first, second]))
        answers = torch.stack([net.eval()(pictures) for net in pair.nets])
        torch.testing.assert_close(pair.eval()(pictures), answers.mean(dim=0))
    assert not torch.equal(answers[0], answers[1])


def test_average_flips_gives_mirror_images_the_same_logits_once_trained():
    torch.manual_seed(0)
    net, pictures = build_network(average_flips=True).eval(), torch.rand(4, 3, 32, 32)
    assert torch.allclose(net(pictures), net(pictures.flip(-1)), atol=1e-6)
    plain = build_network().eval()
    plain.load_state_dict(net.state_dict())
    expected = (plain(pictures) + plain(pictures.flip(-1))) / 2
    assert torch.allclose(net(pictures), expected, atol=1e-6)
    net.train().dropout.p = plain.dropout.p = 0.0
    assert torch.allclose(net(pictures), plain(pictures), atol=1e-6)


def test_average_shifts_is_the_mean_over_the_picture_and_its_neighbours():
    torch.manual_seed(0)
    net = build_network(average_flips=True, average_shifts=2).eval()
    plain = build_network().eval()
    plain.load_state_dict(net.state_dict())
    pictures = torch.rand(4, 3, 32, 32)
    views = [pictures]
    for rows, columns in ((-2, 0), (2, 0), (0, -2), (0, 2)):
        index = [abs(i) if i < 32 else 62 - i for i in range(-2, 34)]  # reflected at the edge
        moved = pictures[:, :, index[2 + rows : 34 + rows]]
        views.append(moved[:, :, :, index[2 + columns : 34 + columns]])
    views += [view.flip(-1) for view in views]
    expected = torch.stack([plain(view) for view in views]).mean(dim=0)
    assert torch.allclose(net(pictures), expected, atol=1e-6)
    assert torch.equal(predict_logits(net, pictures, one_view=True), plain(pictures).detach())


@pytest.mark.parametrize("shifts", [-1, 9, 1.5, "2"])
def test_checkpoint_with_strange_shifts_is_refused(tmp_path, shifts):
    net = build_network()
    net.average_shifts = shifts
    save_checkpoint(tmp_path / "net.ckpt", net, {})
    with pytest.raises(UserError, match=f"average_shifts is {shifts!r}, it must be 0 to 8"):
        load_checkpoint(tmp_path / "net.ckpt")
