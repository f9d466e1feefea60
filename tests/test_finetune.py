"""Fine-tuning: the training against its definition; how the rate is chosen; the file it writes."""

import copy
import math
import re

import pytest
import torch
from conftest import run_linear_probe
from torch import nn
from torchvision.models import ShuffleNetV2
from torchvision.models.vision_transformer import VisionTransformer

import common
import linear_probe
import mae
import moco
from common import center_view
from linear_probe import (add_head, evaluate, evaluate_finetuning, finetune, finetune_at_best_rate,
                          labelled_rows, load_backbone, load_classifier)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Six steps of eight images, and two rates."""
    monkeypatch.setattr(linear_probe, "RATES", (1e-3, 3e-3))
    monkeypatch.setattr(linear_probe, "BATCH_SIZE", 8)
    monkeypatch.setattr(linear_probe, "MIN_STEPS", 6)
    monkeypatch.setattr(linear_probe, "MAX_STEPS", 6)


def small_network(seed=0):
    torch.manual_seed(seed)
    return common.make_backbone("resnet8x0.25", 32)


def pattern_images(count, seed=0):
    """Synthetic images of three classes."""
    images = common.synthetic_set("made", 4 * count, seed)
    rows = [row for row in range(len(images)) if images.labels[row] < 3]
    images = images.subset(rows[:count])
    images.classes = images.classes[:3]
    images.side = 32
    return images


def trained(images, rows=None, network=None, rate=1e-3, steps=6, seed=0):
    rows = torch.arange(len(images)) if rows is None else rows
    return finetune(network or small_network(), images, rows, 32, CPU, rate, steps, seed)


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return all(torch.equal(a.state_dict()[name], value) for name, value in b.state_dict().items())


# -------------------------------------------------------------------------------------- training


def test_all_layers_of_a_copy_are_trained():
    network = small_network()
    before = weights(network)
    classifier = trained(pattern_images(30), network=network)
    for name, parameter in classifier[0].named_parameters():
        assert not torch.equal(parameter, before[name]), name
    torch.testing.assert_close(weights(network), before, rtol=0, atol=0)
    assert not any(module.training for module in classifier.modules())


@pytest.fixture
def seen(monkeypatch):
    """-> lists of the views, not normalized, and of the labels of each step."""
    views = []
    labels = []
    normalize = common.normalize
    cross_entropy = linear_probe.F.cross_entropy

    def record_views(x):
        views.append(x)
        return normalize(x)

    def record_labels(logits, y):
        labels.append(y)
        return cross_entropy(logits, y)

    monkeypatch.setattr(common, "normalize", record_views)
    monkeypatch.setattr(linear_probe.F, "cross_entropy", record_labels)
    return views, labels


def test_training_equals_a_loop_of_ones_own(seen, monkeypatch):
    """BN layers and all others train, though `evaluate` leaves the network in evaluation mode. In
    float64: AdamW's steps are as long where a gradient is nothing but rounding.
    """

    def add_head_in_float64(backbone, classes):
        classifier = add_head(backbone, classes).double()
        classifier.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
        return classifier

    monkeypatch.setattr(linear_probe, "add_head", add_head_in_float64)
    network = small_network().eval()
    classifier = trained(pattern_images(30), network=network, rate=0.003, steps=20)
    expected = add_head_in_float64(copy.deepcopy(network), 3).train()
    optimizer = torch.optim.AdamW(expected.parameters(), weight_decay=0.05)
    views, labels = map(torch.stack, seen)
    for step in range(20):
        cosine = (1 + math.cos(math.pi * (step - 1) / 18)) / 2
        optimizer.param_groups[0]["lr"] = 0.003 * (1 / 25 if step == 0 else cosine)
        probabilities = expected(common.normalize(views[step])).float().softmax(1)
        optimizer.zero_grad()
        (-probabilities[torch.arange(8), labels[step]].log().mean()).backward()
        optimizer.step()
    torch.testing.assert_close(weights(classifier), weights(expected), rtol=0, atol=1e-5)


def test_the_head_standardizes_and_starts_at_zero():
    """So does the probe."""
    classifier = add_head(small_network(), 5).train()
    x = 100 + 50 * torch.randn(64, 3, 32, 32)
    assert torch.equal(classifier(x), torch.zeros(64, 5))
    z = classifier[1](classifier[0](x))
    torch.testing.assert_close(z.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
    assert (z.std(0) > 0.9).all() and len([*classifier[1].parameters()]) == 0


def test_the_rate_rises_for_a_tenth_of_the_steps_and_then_falls_on_a_cosine(monkeypatch):
    rates = []

    class AdamW(torch.optim.AdamW):
        def step(self):
            (group,) = self.param_groups
            rates.append(group["lr"])
            assert group["weight_decay"] == 0.05 and group["betas"] == (0.9, 0.999)
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    monkeypatch.setattr(linear_probe, "BATCH_SIZE", 2)
    trained(pattern_images(4), rate=0.003, steps=40)
    assert len(rates) == 40
    assert rates[:4] == sorted(rates[:4]) and rates[3] == pytest.approx(0.003)
    for i in range(3, 40):
        cosine = (1 + math.cos(math.pi * (i - 3) / 36)) / 2
        assert rates[i] == pytest.approx(0.003 * cosine, abs=1e-7)


def test_each_view_has_the_label_of_its_image(seen):
    """Images of class i have the value 20 i everywhere."""
    images = pattern_images(3)
    images.pixels = (20 * images.labels).byte()[:, None, None, None].expand(-1, 3, 32, 32)
    trained(images)
    views, labels = map(torch.stack, seen)
    values = views[:, :, 0].mean((2, 3)) * 255 / 20
    assert labels.shape == (6, 8) and labels.unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(values, labels.float(), rtol=0, atol=1e-3)


def test_crops_and_flips(operations):
    trained(pattern_images(8), steps=1)
    assert [name for name, _ in operations] == [
        "random_resized_crop", "random_horizontal_flip", "normalize"]
    assert operations[0][1] == {"size": 32, "scale": (0.2, 1.0)}
    assert operations[1][1] == {}  # half of them


def test_only_the_rows_are_seen_and_every_batch_is_full():
    """A BN layer cannot train on one image. Here it gets eight crops of it."""
    images = pattern_images(30)
    rows = torch.tensor([7])
    classifier = trained(images, rows)
    assert all(value.isfinite().all() for value in classifier.state_dict().values())
    images.pixels[8:] = 0
    images.pixels[:7] = 255
    images.labels[images.labels != images.labels[7]] = -1
    assert same(trained(images, rows), classifier)


def test_both_networks_and_all_rates_get_the_same_views(seen):
    views, _ = seen
    images = pattern_images(30)
    trained(images, steps=2)
    torch.randn(3)
    trained(images, network=small_network(seed=1), rate=0.1, steps=2)
    trained(images, steps=2, seed=1)
    assert torch.equal(views[0], views[2]) and torch.equal(views[1], views[3])
    assert not torch.equal(views[0], views[4])


# ------------------------------------------------------------------------------ images from a disk


def folder_images(memory):
    """The training images of `class_folders`: kept in memory, or decoded for each batch."""
    images = common.folder_set("images/train")
    images.side = 32
    return common.decode(images, CPU) if memory else images


def test_a_streaming_set_gives_the_same_weights(class_folders):
    assert same(trained(folder_images(memory=False)), trained(folder_images(memory=True)))


def test_an_image_that_cannot_be_read_does_not_teach_its_label(class_folders):
    with open("images/train/cat/003.png", "wb") as file:
        file.write(b"no image")
    images = folder_images(memory=False)
    rows = torch.arange(8)  # cats
    images.labels[:8] = torch.arange(8) % 2
    classifier = trained(images, rows)
    assert all(value.isfinite().all() for value in classifier.state_dict().values())
    images.labels[3] = 0
    assert same(trained(images, rows), classifier)
    images.labels[4] = 1
    assert not same(trained(images, rows), classifier)


# --------------------------------------------------------------------------- choice and comparison


class Constant(nn.Module):
    """Classifier that gives each image this class."""

    def __init__(self, label):
        super().__init__()
        self.label = label

    def forward(self, x):
        return nn.functional.one_hot(torch.tensor(self.label), 3).float().expand(len(x), -1)


def test_the_rate_is_the_best_on_a_held_out_tenth(monkeypatch):
    """Which the training for it does not see; in the end it sees all rows."""
    images = pattern_images(120)
    rows = labelled_rows(images)
    calls = []

    def record(network, images, rows, image_size, device, rate, steps, seed, what):
        calls.append((rate, rows, steps, seed))
        return Constant({1e-3: 1, 3e-3: 2}[rate])

    monkeypatch.setattr(linear_probe, "finetune", record)
    held = rows[::10]
    assert images.labels[held].bincount().tolist() == [4, 4, 4]
    for best in 1, 2:  # which class most of the held-out images have
        changed = copy.copy(images)
        changed.labels = torch.full_like(images.labels, 3 - best)  # the other one
        changed.labels[held[:7]] = best
        calls.clear()
        classifier, rate = finetune_at_best_rate(None, changed, rows, 32, CPU, seed=5)
        assert rate == {1: 1e-3, 2: 3e-3}[best] and classifier.label == best
        assert [call[0] for call in calls] == [1e-3, 3e-3, rate]
        for _, rest, _, _ in calls[:2]:
            assert sorted([*rest.tolist(), *held.tolist()]) == sorted(rows.tolist())
        assert torch.equal(calls[2][1], rows)
        assert all(seed == 5 for _, _, _, seed in calls)
    changed.labels = torch.zeros_like(images.labels)  # both rates are equally good: the first
    assert finetune_at_best_rate(None, changed, rows, 32, CPU)[1] == 1e-3


@pytest.mark.parametrize("count, steps", [(2, 300), (1500, 468), (20_000, 3000)])
def test_steps_are_those_of_20_epochs_within_limits(count, steps, monkeypatch):
    monkeypatch.setattr(linear_probe, "BATCH_SIZE", 64)
    monkeypatch.setattr(linear_probe, "MIN_STEPS", 300)
    monkeypatch.setattr(linear_probe, "MAX_STEPS", 3000)
    found = set()

    def record(network, images, rows, image_size, device, rate, steps, *rest):
        found.add(steps)
        return Constant(0)

    monkeypatch.setattr(linear_probe, "finetune", record)
    rows = torch.arange(count) % 2
    finetune_at_best_rate(None, pattern_images(2), rows, 32, CPU)
    assert found == {steps}


def test_both_networks_are_compared_on_the_test_images(capsys):
    """With the labels, and the calibrated network, that the probe had; BN averages as usual."""
    train = pattern_images(60)
    train.labels[::4] = -1
    test = pattern_images(30, seed=1)
    test.labels[::3] = -1
    backbone, untrained = small_network(), small_network(seed=1)
    report = evaluate(backbone, untrained, train, test, 32, CPU, label_fraction=0.5, seed=3)
    capsys.readouterr()
    classifier = evaluate_finetuning(backbone, untrained, report, train, test, 32, CPU, label_fraction=0.5,
                                     seed=3)
    printed = capsys.readouterr().out.splitlines()
    rows = labelled_rows(train, 0.5, seed=3)
    kept = test.labels >= 0
    views = center_view(test.pixels, test.aspect, 32)[kept]
    for line, name, network in zip(printed, ("trained", "random"), (backbone, untrained)):
        expected, rate = finetune_at_best_rate(network, train, rows, 32, CPU, seed=3)
        right = expected(views).argmax(1) == test.labels[kept]
        accuracy = 100 * right.double().mean().item()
        probe = report[name]["probe"]
        assert line == (f"linear probe {probe:5.1f}  fine-tuned {accuracy:5.1f}  {name} "
                        f"(rate {rate:g})")
        if name == "trained":
            assert same(classifier, expected)
        assert all(module.momentum == 0.1 for module in expected.modules()
                   if isinstance(module, nn.BatchNorm2d))


# -------------------------------------------------------------------------------- MAE's baseline


def mae_file(image_size=32):
    torch.manual_seed(1)
    network = mae.ViT(image_size, patch_size=4, dim=128, depth=2, num_heads=2)
    torch.save(network.state_dict(), "mae.pth")
    return network


def test_the_untrained_network_of_a_mae_file_is_drawn_as_maes():
    """Its positions are equal, its weights of equal deviation, and not those of the file."""
    file = mae_file()
    _, untrained, _ = load_backbone("mae.pth")
    ours = linear_probe.timm_to_torchvision(file.state_dict())
    theirs = untrained.state_dict()
    assert torch.equal(theirs["encoder.pos_embedding"], file.pos_embed)
    for name, tensor in ours.items():
        if tensor.dim() > 1 and name != "encoder.pos_embedding":
            assert not torch.equal(tensor, theirs[name])
            bound = 0.2 if name == "class_token" else 0.05  # of 128 numbers, and of thousands
            assert theirs[name].std() == pytest.approx(tensor.std().item(), rel=bound), name


def test_the_baselines_positions_fit_another_image_size():
    mae_file()
    backbone, untrained, size = load_backbone("mae.pth", image_size=48)
    assert size == 48
    assert torch.equal(untrained.encoder.pos_embedding, backbone.encoder.pos_embedding)


def test_learned_positions_are_none_of_the_baselines():
    torch.manual_seed(1)
    network = VisionTransformer(32, 4, num_layers=1, num_heads=2, hidden_dim=128, mlp_dim=512)
    network.heads = nn.Identity()
    torch.save(network.state_dict(), "vit.pth")
    _, untrained, _ = load_backbone("vit.pth")
    assert not torch.equal(untrained.encoder.pos_embedding, network.encoder.pos_embedding)


# --------------------------------------------------------------------------------------- command


@pytest.fixture
def command(class_folders, capsys):
    """-> a function of flags that gives the exit status, stdout and stderr."""
    torch.save(small_network().state_dict(), "backbone.pth")

    def call(*flags):
        argv = ["--checkpoint", "backbone.pth", "--data", "images", "--device", "cpu",
                "--workers", "0", "--finetune", "classifier.pth"]
        argv += [str(flag) for flag in flags]
        capsys.readouterr()
        return run_linear_probe(argv, capsys)

    return call


def accuracy_of(classifier, images, image_size):
    pixels, aspect = next(images.load([torch.arange(len(images))], CPU))
    labels = classifier(center_view(pixels, aspect, image_size)).argmax(1)
    return 100 * (labels == images.labels).double().mean().item()


def test_the_file_holds_the_classifier_that_was_measured(command):
    status, out, err = command()
    assert status == 0 and err == ""
    assert out.count("kNN") == 3 and "classifier.pth: a classifier of 2 classes" in out
    rows = re.findall(r"linear probe +[\d.]+  fine-tuned +([\d.]+)  (\w+) \(rate", out)
    assert [name for _, name in rows] == ["trained", "random"]
    classifier, classes, image_size, side = load_classifier("classifier.pth")
    assert classes == ["cat", "dog"] and image_size == side == 32
    test = common.folder_set("images/val", classes)
    test.side = side
    assert accuracy_of(classifier, test, image_size) == pytest.approx(float(rows[0][0]), abs=0.05)
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_the_file_is_a_checkpoint_again(command):
    assert command("--labels", 0.5, "--seed", 2, "--max-images", 20)[0] == 0
    backbone, _, _ = load_backbone("classifier.pth")
    classifier, *_ = load_classifier("classifier.pth")
    assert same(backbone, classifier[0])


def test_flags_reach_the_fine_tuning(command, monkeypatch):
    calls = []

    def record(backbone, untrained, report, train, test, *rest):
        calls.append(rest)
        return add_head(backbone, 2)

    monkeypatch.setattr(linear_probe, "evaluate_finetuning", record)
    assert command("--labels", 0.5, "--seed", 2, "--image-size", 48)[0] == 0
    assert calls == [(48, CPU, 0.5, 2)]


@pytest.mark.parametrize("flags", [["--heads", 4, "--image-size", 48], ["--stem-padding", 2],
                                   ["--arch", "shufflenet_v2_x0_5", "--image-size", 48]])
def test_what_leaves_no_trace_in_the_weights_is_restored(flags, command, monkeypatch):
    monkeypatch.setattr(linear_probe, "evaluate", lambda *args: {"trained": {}})
    monkeypatch.setattr(linear_probe, "evaluate_finetuning",
                        lambda backbone, *args: add_head(backbone, 2))
    if "--heads" in flags:
        torch.save(mae_file().state_dict(), "backbone.pth")
    elif "--arch" in flags:
        torch.save(common.make_backbone("shufflenet_v2_x0_5", 48).state_dict(), "backbone.pth")
    else:
        torch.save(common.make_backbone("resnet18x0.125", 32).state_dict(), "backbone.pth")
    status, out, err = command(*flags)
    assert status == 0 and err == ""
    classifier, _, image_size, side = load_classifier("classifier.pth")
    if "--heads" in flags:
        assert classifier[0].encoder.layers[0].self_attention.num_heads == 4
    if "--stem-padding" in flags:
        assert classifier[0].conv1.padding == (2, 2)
    assert image_size == (48 if "--image-size" in flags else 32)
    assert classifier(torch.randn(2, 3, image_size, image_size)).shape == (2, 2)


def test_the_network_that_a_checkpoint_names_is_restored(command, monkeypatch):
    monkeypatch.setattr(linear_probe, "evaluate", lambda *args: {"trained": {}})
    monkeypatch.setattr(linear_probe, "evaluate_finetuning",
                        lambda backbone, *args: add_head(backbone, 2))
    network = common.make_backbone("shufflenet_v2_x0_5", 48)
    weights = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    torch.save({"method": "simclr", "recipe": "demo", "step": 7, "model": weights,
                "args": {"arch": "shufflenet_v2_x0_5", "image_size": 48}}, "backbone.pth")
    assert command()[0] == 0
    classifier, _, image_size, _ = load_classifier("classifier.pth")
    assert type(classifier[0]) is ShuffleNetV2 and image_size == 48


def test_the_heads_of_a_checkpoint_are_restored(command, monkeypatch):
    monkeypatch.setattr(linear_probe, "evaluate", lambda *args: {"trained": {}})
    monkeypatch.setattr(linear_probe, "evaluate_finetuning",
                        lambda backbone, *args: add_head(backbone, 2))
    weights = {f"online.0.{name}": value for name, value in moco.make_vit("vit_small", 32)
               .state_dict().items()}
    torch.save({"method": "moco", "recipe": "imagenet-v3-vit", "step": 7, "model": weights,
                "args": {"arch": "vit_small", "image_size": 32}}, "backbone.pth")
    assert command()[0] == 0
    classifier, _, _, _ = load_classifier("classifier.pth")
    assert classifier[0].encoder.layers[0].self_attention.num_heads == 12


def test_a_streaming_set_with_unreadable_images(command):
    for name in "train/cat/003.png", "val/dog/001.png":
        with open(f"images/{name}", "wb") as file:
            file.write(b"no image")
    status, out, err = command("--memory", 0)
    assert status == 0 and err == "" and out.count("fine-tuned") == 2


def test_test_images_without_labels_are_refused_in_one_line(command, tmp_path):
    (tmp_path / "images" / "val" / "cat").rename(tmp_path / "images" / "val" / "bird")
    (tmp_path / "images" / "val" / "dog").rename(tmp_path / "images" / "val" / "cow")
    status, out, err = command()
    assert status == 1 and "--finetune needs labels" in err and err.count("\n") == 1
    assert "fine-tuned" not in out


def test_several_processes_are_refused_in_one_line(command, monkeypatch):
    monkeypatch.setattr(linear_probe, "world_size", lambda: 2)
    status, out, err = command()
    assert status == 1 and "without torchrun" in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize("path", ["backbone.pth", "no/folder/classifier.pth"])
def test_a_file_that_cannot_be_written_shows_before_the_work(path, command):
    status, out, err = command("--finetune", path)
    assert status == 1 and path in err and out == ""


def test_one_kind_of_output_at_a_time(command):
    status, _, err = command("--features", "f.npz")
    assert status == 2 and "--features" in err.splitlines()[-1]
