"""The evaluation against independent calculations; every layout of files; the command."""

import argparse
import copy
import itertools
import math
import os
import random
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import run_linear_probe
from PIL import Image
from processes import run_processes
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import VisionTransformer

import common
import dino
import linear_probe
import mae
import moco
from common import Failure, ImageSet, center_view
from linear_probe import (calibrate_batch_norm, evaluate, extract_features, knn, labelled_features,
                          labelled_rows, linear_path, load_backbone, mlp_path, quick_knn,
                          stage_features)

CPU = torch.device("cpu")


def image_set(pixels, labels, classes=()):
    """-> an ImageSet in memory."""
    images = ImageSet("made", range(len(pixels)), labels, classes)
    images.pixels = pixels
    images.aspect = torch.ones(len(pixels))
    images.side = pixels.shape[-1]
    return images


def numbered_images(count):
    """Image i has the value i everywhere."""
    values = torch.arange(count).byte()[:, None, None, None]
    return image_set(values.expand(-1, 3, 16, 16), [0] * count, ["one"])


def bright_images(labels, seed=0):
    """Three classes, which differ in brightness; label -1: none."""
    labels = torch.tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(20, (len(labels), 3, 16, 16), generator=generator)
    pixels = 60 * labels.clamp(min=0)[:, None, None, None] + 30 + noise
    return image_set(pixels.byte(), labels, ["dark", "gray", "bright"])


def pattern_images(count, seed=0):
    """Synthetic images of three classes, which a random network hardly tells apart."""
    images = common.synthetic_set("made", 4 * count, seed)
    rows = [row for row in range(len(images)) if images.labels[row] < 3]
    return images.subset(rows[:count])


class Brightness(nn.Module):
    """-> the value of an image of one value, (B, 1)."""

    def forward(self, x):
        return (255 * common.denormalize(x)[:, :1, 0, 0]).round()


def clusters(count, classes, dim, seed, noise=1.0):
    """Features (count, dim) around a center for each class, and labels."""
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    features = centers[labels] + noise * torch.randn(count, dim, generator=generator)
    return features.double(), labels


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def assert_same_weights(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


# --------------------------------------------------------------------------------- kNN and probe


def test_knn_asks_200_neighbours_at_a_temperature_of_a_tenth():
    """60 exp(9) votes for class 0 and 140 exp(8.3) for class 1; among more neighbours class 2 wins.
    """
    cosine = torch.tensor([0.9] * 60 + [0.83] * 140 + [0.8] * 1000)
    x = torch.stack([cosine, (1 - cosine**2).sqrt()], 1)
    y = torch.tensor([0] * 60 + [1] * 140 + [2] * 1000)
    assert knn(x, y, torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == 100


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (5, 0.07), (5, 10.0), (1000, 0.1)])
def test_knn_equals_a_loop_over_images(k, temperature):
    x, y = clusters(40, 4, 6, seed=0)
    queries, labels = clusters(60, 4, 6, seed=1)
    correct = 0
    for query, label in zip(queries.tolist(), labels.tolist()):
        neighbours = []
        for row, neighbour in zip(x.tolist(), y.tolist()):
            dot = sum(a * b for a, b in zip(query, row))
            neighbours.append((dot / math.hypot(*query) / math.hypot(*row), neighbour))
        votes = [0.0] * 4
        for cosine, neighbour in sorted(neighbours, reverse=True)[:k]:
            votes[neighbour] += math.exp(cosine / temperature)
        correct += votes.index(max(votes)) == label
    assert knn(x, y, queries, labels, k, temperature) == pytest.approx(100 * correct / 60)
    assert 25 < 100 * correct / 60 < 100  # so that the comparison can fail


def test_knn_of_float16_features_equals_that_of_float32():
    x, y = clusters(300, 4, 6, seed=0, noise=0.7)
    queries, labels = clusters(100, 4, 6, seed=1, noise=0.7)
    x = x.half()
    queries = queries.half()
    assert knn(x, y, queries, labels) == knn(x.float(), y, queries.float(), labels)


def test_every_penalty_reaches_its_optimum():
    """The objective is convex, so a gradient of zero is the optimum."""
    x, y = clusters(300, 3, 10, seed=0)
    x = (x - x.mean(0)) * torch.logspace(-1, 1, 10) + 0.2 * x[:, :1]
    for strength, classifier in linear_path(x, y, 3):
        weight = classifier.keywords["weight"].clone().requires_grad_()
        bias = classifier.keywords["bias"].clone().requires_grad_()
        probabilities = (x @ weight.T + bias).softmax(1)
        loss = -probabilities[torch.arange(300), y].log().mean()
        loss = loss + strength / 2 * (weight**2).sum()
        gradients = torch.autograd.grad(loss, [weight, bias])
        # in scaled coordinates the gradient is below 1e-6, or the loss moves by less than 1e-7
        bound = 2e-3 * min(1, strength**0.5 + 0.1)
        assert max(gradient.abs().max() for gradient in gradients) < bound, strength
        assert strength > 1e-3 or loss < 0.5


def test_the_probe_converges_in_some_dozens_of_steps(monkeypatch):
    """On features whose scales differ 10,000-fold: without its scaled coordinates, L-BFGS takes ten
    times as many."""
    x, y = clusters(300, 3, 40, seed=0, noise=3)
    x = (x - x.mean(0)) * torch.logspace(-3, 1, 40)
    calls = []
    cross_entropy = F.cross_entropy

    def counted(*arguments):
        calls.append(arguments)
        return cross_entropy(*arguments)

    monkeypatch.setattr(F, "cross_entropy", counted)
    assert len(list(linear_path(x, y, 3))) == 7  # penalties
    assert len(calls) < 300


def test_the_setting_that_is_best_on_held_out_images_is_fitted_to_all():
    x, y = clusters(60, 3, 20, seed=0, noise=6)
    test_x, test_y = clusters(400, 3, 20, seed=1, noise=6)
    report = linear_probe.linear_probe(x.clone(), y, test_x.clone(), test_y)

    mean = x.mean(0)
    std = (x.var(0, correction=0) + 1e-6).sqrt()
    x = (x - mean) / std
    test_x = (test_x - mean) / std
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    held, rest = order[:6], order[6:]
    held_out = {}
    for strength, classifier in linear_path(x[rest], y[rest], 3):
        if strength in report["held_out"]:  # it stops when two settings were no better
            right = classifier(x[held]).argmax(1) == y[held]
            held_out[strength] = 100 * right.double().mean().item()
    assert report["held_out"] == pytest.approx(held_out)
    assert report["chosen"] == max(held_out, key=held_out.get)  # the first of equals
    assert list(held_out)[-3] == report["chosen"] or len(held_out) == 7
    for strength, classifier in linear_path(x, y, 3):
        if strength == report["chosen"]:
            right = classifier(test_x).argmax(1) == test_y
            assert report["probe"] == pytest.approx(100 * right.double().mean().item())


def first_steps(features, labels, classes):
    """The MLP after 10 and 30 steps."""
    return itertools.islice(mlp_path(features, labels, classes), 2)


def test_an_mlp_solves_what_no_linear_classifier_can():
    """The class is the sign of a product."""
    x, test_x = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    test_y = (test_x[:, 0] * test_x[:, 1] > 0).long()
    linear = linear_probe.linear_probe(x.clone(), y, test_x.clone(), test_y)
    assert linear["probe"] < 60
    mlp = linear_probe.linear_probe(x.clone(), y, test_x.clone(), test_y, first_steps)
    assert mlp["probe"] > 90 and list(mlp["held_out"]) == [10, 30]


def test_steps_of_the_mlp_lower_its_loss():
    x, y = clusters(300, 3, 20, seed=0, noise=3)
    losses = {}
    for steps, classifier in first_steps(x, y, 3):
        losses[steps] = F.cross_entropy(classifier(x), y).item()
    assert F.cross_entropy(torch.zeros(300, 3), y) > losses[10] > losses[30]


def test_an_mlp_does_not_depend_on_earlier_draws():
    x, y = clusters(100, 3, 5, seed=0)
    losses = []
    for _ in range(2):
        torch.randn(3)
        losses.append([F.cross_entropy(mlp(x), y).item() for _, mlp in first_steps(x, y, 3)])
    assert losses[0] == losses[1]


# -------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("count", [1, 7, 256])
def test_features_are_in_order(count):
    images = numbered_images(count)
    (x,), readable = extract_features(Brightness(), images, torch.arange(count), 16, CPU)
    assert x[:, 0].tolist() == [*range(count)] and readable.all()


def test_features_are_those_of_the_rows():
    rows = torch.cat([torch.arange(250), torch.tensor([5, 1, 3, 5]), torch.arange(250)])
    (x,), _ = extract_features(Brightness(), numbered_images(250), rows, 16, CPU)
    assert torch.equal(x[:, 0], rows.float())


def features_of(count):
    rows = torch.arange(count)
    (x,), readable = extract_features(Brightness(), numbered_images(count), rows, 16, CPU)
    return x.tolist(), readable.tolist()


@pytest.mark.parametrize("count", [1, 7])
def test_every_process_has_all_features(count):
    """Also with more processes than images."""
    assert run_processes(2, features_of, count) == [features_of(count)] * 2


def streaming_set():
    """The training images of `class_folders`, which are decoded for each batch; one is broken."""
    images = common.folder_set("images/train")
    images.side = 32
    with open("images/train/cat/003.png", "wb") as file:
        file.write(b"no image")
    return images


def test_images_that_cannot_be_read_are_left_out(class_folders):
    images = streaming_set()
    network = nn.Flatten()
    rows = torch.arange(24)
    (x,), labels = labelled_features(network, images, rows, 32, CPU)
    broken = images.names.index("cat/003.png")
    others = torch.cat([rows[:broken], rows[broken + 1 :]])
    (expected,), other_labels = labelled_features(network, images, others, 32, CPU)
    assert len(x) == 23
    assert torch.equal(x, expected) and torch.equal(labels, other_labels)


def test_calibrated_batch_norm_has_the_statistics_of_the_images():
    images = bright_images([0, 1, 2] * 14)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Flatten())
    network[1].running_mean.fill_(7)
    calibrate_batch_norm(network, images, 16, CPU)
    outputs = network[:2](center_view(images.pixels, images.aspect, 16))
    close(outputs.mean((0, 2, 3)), torch.zeros(4), 1e-3)
    close(outputs.var((0, 2, 3)), torch.ones(4), 1e-2)
    assert not any(module.training for module in network.modules())
    assert network[1].momentum == 0.3


def test_calibration_is_the_mean_over_batches():
    images = bright_images([0, 1, 2] * 200)  # three batches of 200
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768))
    calibrate_batch_norm(network, images, 16, CPU, seed=5)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(5))
    variances = []
    for part in order.split(200):
        x = center_view(images.pixels[part], images.aspect[part], 16).flatten(1)
        variances.append(x.var(0))
    close(network[1].running_var, torch.stack(variances).mean(0))


@torch.no_grad()
def test_stages_of_a_resnet():
    """Maps are pooled to about as many numbers as there are at the end."""
    network = common.make_backbone("resnet8", 32).eval()
    x = torch.randn(2, 3, 32, 32)
    end, first, second, third = stage_features(network, ["", "layer1", "layer2", "layer3"], x)
    z = network.layer1(network.relu(network.bn1(network.conv1(x))))
    close(first, F.adaptive_avg_pool2d(z, 2).flatten(1))  # 2 x 2 x 32 = 128
    z = network.layer2(z)
    close(second, F.adaptive_avg_pool2d(z, 1).flatten(1))  # 64
    close(third, network.layer3(z).mean((2, 3)))
    close(end, network(x))
    assert not any(module._forward_hooks for module in network.modules())


@torch.no_grad()
def test_stages_of_a_vit():
    """Tokens are averaged over the patches."""
    network = VisionTransformer(16, 4, num_layers=3, num_heads=1, hidden_dim=64, mlp_dim=256).eval()
    network.heads = nn.Identity()
    x = torch.randn(2, 3, 16, 16)
    end, middle = stage_features(network, ["", "encoder.layers.encoder_layer_1"], x)
    patches = network.conv_proj(x).flatten(2).mT
    tokens = torch.cat([network.class_token.expand(2, -1, -1), patches], 1)
    tokens = network.encoder.layers[:2](tokens + network.encoder.pos_embedding)
    close(middle, tokens[:, 1:].mean(1))
    close(end, network(x))


# ------------------------------------------------------------------------- kNN while training


def test_quick_knn_is_that_of_the_same_rows(monkeypatch):
    """Of the labelled images, in an order from seed 0; with k = 20."""
    train = pattern_images(120)
    train.labels[::4] = -1
    test = pattern_images(80, seed=1)
    test.labels[::4] = -1
    network = common.make_backbone("resnet8", 32)
    given = []

    def record(*features_and_labels, k):
        given.extend(features_and_labels)
        assert k == 20
        return 12.5

    monkeypatch.setattr(linear_probe, "knn", record)
    assert quick_knn(network, train, test, 32, CPU, sizes=(60, 40)) == 12.5
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [row for row in order if train.labels[row] >= 0][:60]
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0)).tolist()
    test_rows = [row for row in order if test.labels[row] >= 0][:40]
    (x,), y = labelled_features(network.eval(), train, torch.tensor(rows), 32, CPU)
    (test_x,), test_y = labelled_features(network, test, torch.tensor(test_rows), 32, CPU)
    torch.testing.assert_close(given, [x, y, test_x, test_y])


def test_quick_knn_of_an_untrained_network_calibrates_it():
    train = pattern_images(120)
    test = pattern_images(80, seed=1)
    network = common.make_backbone("resnet8", 32)
    plain = quick_knn(network, train, test, 32, CPU)
    calibrated = quick_knn(network, train, test, 32, CPU, calibrate=True)
    calibrate_batch_norm(network, train, 32, CPU)
    assert calibrated == quick_knn(network, train, test, 32, CPU) != plain


def test_quick_knn_draws_no_random_number(class_folders):
    """Not for a set that is decoded by a DataLoader, either."""
    images = streaming_set()
    network = common.make_backbone("resnet8", 32)
    random_state = random.getstate()
    numpy_state = str(np.random.get_state())
    torch_state = torch.get_rng_state()
    quick_knn(network, images, images, 32, CPU, calibrate=True)
    assert random.getstate() == random_state
    assert str(np.random.get_state()) == numpy_state
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("calibrate", [False, True])
def test_quick_knn_leaves_the_network_as_it_was(calibrate):
    images = bright_images([0, 1, 2] * 10)
    network = common.make_backbone("resnet8", 16).train()
    network.layer2.eval()
    network(torch.randn(4, 3, 16, 16)).sum().backward()
    before = copy.deepcopy(network)  # without gradients
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    quick_knn(network, images, images, 16, CPU, calibrate=calibrate)
    assert_same_weights(network, before)
    for module, module_before in zip(network.modules(), before.modules()):
        assert module.training == module_before.training
    for parameter, gradient in zip(network.parameters(), gradients):
        assert torch.equal(parameter.grad, gradient)


def test_quick_knn_without_test_images():
    images = bright_images([0, 1, 2] * 10)
    assert quick_knn(common.make_backbone("resnet8", 16), images, None, 16, CPU) is None


def test_quick_knn_without_labels():
    """As --max-images may leave a training set."""
    images = bright_images([0, 1, 2] * 10)
    unlabelled = bright_images([-1] * 10)
    assert quick_knn(common.make_backbone("resnet8", 16), unlabelled, images, 16, CPU) is None


# ---------------------------------------------------------------------------------------- report


@pytest.fixture
def networks():
    """A backbone, and the same untrained."""
    return common.make_backbone("resnet8", 16), common.make_backbone("resnet8", 16)


def test_a_fraction_is_that_of_the_training_labels(networks, capsys):
    train = pattern_images(60)
    test = pattern_images(30, seed=1)
    report = evaluate(*networks, train, test, 32, CPU, label_fraction=0.5, seed=3)
    printed = capsys.readouterr().out
    assert "of 30 test images" in printed and "of 30 training images" in printed
    rows = labelled_rows(train, 0.5, seed=3)
    (x,), y = labelled_features(networks[0], train, rows, 32, CPU)
    (test_x,), test_y = labelled_features(networks[0], test, torch.arange(30), 32, CPU)
    assert report["trained"]["knn"] == knn(x, y, test_x, test_y)


def test_chance_is_the_share_of_the_largest_class(networks, capsys):
    evaluate(*networks, bright_images([0, 1, 2] * 4), bright_images([0, 0, 0, 1]), 16, CPU)
    assert "(chance 75.0)" in capsys.readouterr().out


def test_pixels_are_standardized_before_the_knn(networks, monkeypatch):
    given = []

    def record(features, *args):
        given.append(features.clone())
        return 0.0

    monkeypatch.setattr(linear_probe, "knn", record)
    train = pattern_images(60)
    evaluate(*networks, train, pattern_images(30, seed=1), 32, CPU)
    _, _, found = given  # trained, random, pixels
    pixels = F.adaptive_avg_pool2d(center_view(train.pixels, train.aspect, 32), 16).flatten(1)
    pixels = pixels[labelled_rows(train)]
    close(found, (pixels - pixels.mean(0)) / pixels.std(0), 1e-3)


def test_evaluation_leaves_the_backbone_as_it_was(networks):
    images = bright_images([0, 1, 2] * 12)
    before = copy.deepcopy(networks[0])
    evaluate(*networks, images, images, 16, CPU, layers=True)
    assert_same_weights(networks[0], before)  # its BN statistics, too


def test_a_networks_features_are_freed_before_the_next_are_made(networks, monkeypatch):
    """Of ImageNet, those of two networks would not fit into a GPU."""
    images = bright_images([0, 1, 2] * 12)
    earlier = []

    def labelled(*args):
        if args[-1].startswith("training images"):  # the first of a network
            assert not [features for features in earlier if features() is not None]
        made, labels = labelled_features(*args)
        earlier.extend(map(weakref.ref, made))
        return made, labels

    monkeypatch.setattr(linear_probe, "labelled_features", labelled)
    evaluate(*networks, images, images, 16, CPU, layers=True)


def test_report(networks, capsys):
    train = bright_images([0, 1, 2] * 12 + [-1])
    test = bright_images([0, 1, 2] * 12 + [-1], seed=1)
    report = evaluate(*networks, train, test, 16, CPU)
    assert list(report) == ["trained", "random", "pixels"]
    printed = capsys.readouterr().out
    for name, row in report.items():
        assert row["knn"] > 60 and row["probe"] > 60
        assert f"kNN {row['knn']:5.1f}  linear probe {row['probe']:5.1f}  {name}\n" in printed
    assert "of 36 test images (chance 33.3)" in printed
    assert "the nearest 36 of 36 training images" in printed
    assert "best stage" not in printed


def test_the_report_is_that_of_knn_and_probe(networks):
    """Of all labelled images; the untrained network is calibrated."""
    train = pattern_images(60)
    train.labels[::4] = -1
    test = pattern_images(30, seed=1)
    backbone, untrained = copy.deepcopy(networks)
    report = evaluate(*networks, train, test, 32, CPU)
    calibrate_batch_norm(untrained, train, 32, CPU)
    rows = labelled_rows(train)
    assert sorted(rows.tolist()) == [row for row in range(60) if row % 4 > 0]
    for name, network in {"trained": backbone.eval(), "random": untrained}.items():
        (x,), y = labelled_features(network, train, rows, 32, CPU)
        (test_x,), test_y = labelled_features(network, test, labelled_rows(test), 32, CPU)
        vote = knn(x, y, test_x, test_y)
        probe = linear_probe.linear_probe(x, y, test_x, test_y)
        assert report[name] == {"knn": vote, **probe}


def test_report_by_stage(networks, capsys):
    train = pattern_images(60)
    test = pattern_images(30, seed=1)
    report = evaluate(*networks, train, test, 32, CPU, layers=True)
    stages = [f"trained layer{i}" for i in (1, 2, 3)]
    assert list(report) == ["trained", *stages, "random", "random layer1", "random layer2",
                            "random layer3", "pixels"]
    assert report["trained layer3"] == report["trained"]
    printed = capsys.readouterr().out
    best = re.search(r"best stage, by held-out training images: (.+), ", printed)[1]
    top1 = {stage: max(report[stage]["held_out"].values()) for stage in stages}
    assert top1[best] == max(top1.values())


def test_report_with_an_mlp(networks, monkeypatch):
    def ten_steps(features, labels, classes):
        return itertools.islice(mlp_path(features, labels, classes), 1)

    monkeypatch.setattr(linear_probe, "mlp_path", ten_steps)
    images = bright_images([0, 1, 2] * 12)
    report = evaluate(*networks, images, images, 16, CPU, mlp=True)
    assert list(report) == ["trained, MLP", "trained", "random, MLP", "random", "pixels, MLP",
                            "pixels"]
    for name in "trained", "random", "pixels":
        assert report[f"{name}, MLP"]["knn"] == report[name]["knn"]
        assert list(report[f"{name}, MLP"]["held_out"]) == [10]


@pytest.mark.parametrize("fraction, counts", [(1.0, [10, 20]), (0.1, [1, 2]), (1e-6, [1, 1])])
def test_fraction_of_the_labels(fraction, counts):
    """Of each class at least one image; another seed takes others."""
    images = bright_images([1] * 20 + [-1] * 5 + [0] * 10)
    images.classes = ["dark", "gray"]
    rows = labelled_rows(images, fraction, seed=3)
    assert images.labels[rows].bincount().tolist() == counts
    assert len(set(rows.tolist())) == len(rows)
    if fraction == 0.1:
        assert {*rows.tolist()} != {*labelled_rows(images, fraction, seed=4).tolist()}


@pytest.mark.parametrize("labels, test", [([0, 1] * 4, None), ([-1] * 4 + [0], [0, 1])])
def test_without_labels_the_report_says_what_to_do(labels, test, networks, capsys):
    test_set = bright_images(test) if test else None
    assert evaluate(*networks, bright_images(labels), test_set, 16, CPU) == {}
    printed = capsys.readouterr().out
    assert "--neighbours" in printed and printed.count("\n") == 1


# ------------------------------------------------------------------------ checkpoints of ResNets


def small_resnet(seed=0, block=BasicBlock, depths=(1, 1, 1, 1)):
    """torchvision's names, 8 channels, and BN statistics that matter."""
    torch.manual_seed(seed)
    network = common.ResNet(block, depths, width=8).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def under(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def saved(value):
    torch.save(value, "file.pth")
    return "file.pth"


W = small_resnet().state_dict()  # what an evaluation should find
OTHER = small_resnet(seed=1).state_dict()  # what it should not
HEAD = torch.zeros(4, 4)
LAYOUTS = {  # name: the file, and what is not of the backbone
    "torchvision": ({**W, "fc.weight": HEAD, "fc.bias": HEAD}, "fc"),
    "timm": ({"state_dict": {**W, "fc.weight": HEAD}, "state_dict_ema": OTHER},
             "fc, state_dict_ema"),
    "moco": ({"epoch": 1, "arch": "resnet50", "state_dict": {
        **under("module.encoder_k.", OTHER), **under("module.encoder_q.", W),
        "module.encoder_q.fc.0.weight": HEAD, "module.encoder_q.fc.2.weight": HEAD,
        "module.queue": HEAD, "module.queue_ptr": HEAD[0]}},
        "encoder_k, fc, queue, queue_ptr"),
    "moco-v3": ({"state_dict": {
        **under("module.momentum_encoder.", OTHER), **under("module.base_encoder.", W),
        "module.base_encoder.fc.0.weight": HEAD, "module.predictor.0.weight": HEAD}},
        "fc, momentum_encoder, predictor"),
    "simsiam": ({"epoch": 100, "arch": "resnet50", "state_dict": {
        **under("module.encoder.", W), "module.encoder.fc.0.weight": HEAD,
        "module.encoder.fc.1.running_mean": HEAD[0], "module.predictor.0.weight": HEAD},
        "optimizer": {"state": {0: {"momentum_buffer": HEAD}}}}, "fc, optimizer, predictor"),
    "barlow": ({"epoch": 3, "model": {
        **under("module.backbone.", W), "module.bn.running_mean": HEAD,
        "module.projector.0.weight": HEAD}, "optimizer": {"state": {0: {"mu": HEAD}}}},
        "bn, optimizer, projector"),
    "swav": ({**under("module.", W), "module.projection_head.0.weight": HEAD,
              "module.prototypes.weight": HEAD}, "projection_head, prototypes"),
    "vicreg": (W, None),
    "dino": ({"student": {**under("module.backbone.", OTHER), "module.head.mlp.0.weight": HEAD},
              "teacher": {**under("backbone.", W), "head.mlp.0.weight": HEAD,
                          "head.last_layer.weight_g": HEAD},
              "args": argparse.Namespace(arch="resnet50"), "dino_loss": {"center": HEAD}},
             "dino_loss, head, student"),
    "solo-learn": ({"epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.0",
                    "state_dict": {**under("momentum_backbone.", OTHER), **under("backbone.", W),
                                   "classifier.weight": HEAD, "projector.0.weight": HEAD,
                                   "momentum_projector.0.weight": HEAD}},
                   "classifier, momentum_backbone, momentum_projector, projector"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_resnet_of_every_layout(layout, capsys):
    """Every weight is used or named as unused."""
    file, unused = LAYOUTS[layout]
    backbone, untrained, size = load_backbone(saved(file))
    assert size == 224
    expected = "file.pth: assuming --image-size 224\n"
    if unused is not None:
        expected += f"file.pth: not of the backbone: {unused}\n"
    assert capsys.readouterr().out == expected
    x = torch.randn(2, 3, 64, 64)
    expected = small_resnet()(x)
    close(backbone.eval()(x), expected)
    assert not torch.allclose(untrained.eval()(x), expected, atol=1e-2)


OURS = {"method": "byol", "recipe": "demo", "step": 7, "args": {"image_size": 96,
                                                                "arch": "resnet18x0.125"}}


@pytest.mark.parametrize("model, unused", [
    ({**under("backbone.", W), "projector.0.weight": HEAD}, "projector"),
    ({**under("target.backbone.", OTHER), **under("online.backbone.", W)}, "target"),
    ({**under("student.backbone.", OTHER), **under("teacher.backbone.", W), "center": HEAD},
     "center, student")])
def test_a_checkpoint_of_ours(model, unused, capsys):
    backbone, _, size = load_backbone(saved({**OURS, "model": model}))
    assert size == 96
    assert_same_weights(backbone, small_resnet())
    first, second = capsys.readouterr().out.splitlines()
    assert first == "file.pth: byol after 7 steps" and second == f"file.pth: not of the backbone: {unused}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_init_takes_every_layout(layout):
    file, _ = LAYOUTS[layout]
    network = small_resnet(seed=2)
    load_backbone(saved(file), network=network)
    assert_same_weights(network, small_resnet())


@torch.no_grad()
def test_torchvisions_resnet_gives_its_own_features():
    theirs = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1]).eval()
    backbone, _, _ = load_backbone(saved(theirs.state_dict()))
    theirs.fc = nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    close(backbone.eval()(x), theirs(x))


@torch.no_grad()
def test_bottlenecks_and_depths_are_read_from_the_weights():
    theirs = small_resnet(block=Bottleneck, depths=(1, 2, 3, 1))
    backbone, _, _ = load_backbone(saved(theirs.state_dict()))
    x = torch.randn(1, 3, 64, 64)
    close(backbone.eval()(x), theirs(x))


@pytest.mark.parametrize("arch", ["resnet8", "resnet8x2", "resnet18x0.25"])
@torch.no_grad()
def test_networks_for_small_images_are_read_from_the_weights(arch):
    network = common.make_backbone(arch, 32).eval()
    backbone, _, size = load_backbone(saved(network.state_dict()))
    assert size == 32
    assert load_backbone("file.pth", 48)[2] == 48
    x = torch.randn(1, 3, 32, 32)
    close(backbone.eval()(x), network(x))


@torch.no_grad()
def test_stem_padding_is_said_and_changes_the_features(capsys):
    network = common.make_backbone("resnet18x0.25", 32).eval()
    network.conv1.padding = (2, 2)  # as in solo-learn
    x = torch.randn(1, 3, 32, 32)
    plain, _, _ = load_backbone(saved(network.state_dict()))
    assert "stride 1, --stem-padding 1" in capsys.readouterr().out
    padded, _, _ = load_backbone("file.pth", stem_padding=2)
    assert "stride 1, --stem-padding 2" in capsys.readouterr().out
    close(padded.eval()(x), network(x))
    assert not torch.allclose(plain.eval()(x), network(x), atol=1e-3)


@pytest.mark.parametrize("arch, trained_at, assumed", [
    ("resnet8", 32, "a first layer of stride 2, as resnet8's here"),
    ("resnet18", 32, "a first layer of stride 1, --stem-padding 1"),
    ("resnet18", 224, None)])
def test_what_weights_do_not_tell_is_said(arch, trained_at, assumed, capsys):
    """Three stages of others have stride 1; and no network tells the size that it was made for."""
    path = saved(common.make_backbone(arch, trained_at).state_dict())
    load_backbone(path)
    size = f"--image-size {trained_at}"
    said = ", ".join([assumed, size] if assumed else [size])
    assert f"file.pth: assuming {said}\n" in capsys.readouterr().out
    load_backbone(path, image_size=64)
    assert "--image-size" not in capsys.readouterr().out


@pytest.mark.parametrize("arch, groups, width_per_group", [
    ("wide_resnet50_2", 1, 128), ("resnext50_32x4d", 32, 4)])
def test_a_wide_resnet_or_resnext_needs_arch(arch, groups, width_per_group, monkeypatch):
    """Here with only the first half of its layers, to be quick."""
    def get_model(arch):
        network = torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], groups=groups,
                                            width_per_group=width_per_group)
        network.layer3 = nn.Identity()
        network.layer4 = nn.Identity()
        network.fc = nn.Linear(512, 10)
        return network

    theirs = get_model(arch)
    with pytest.raises(Failure, match="file.pth .*: name it by --arch"):
        load_backbone(saved(theirs.state_dict()))
    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    backbone, untrained, size = load_backbone("file.pth", arch=arch)
    theirs.fc = nn.Identity()
    assert size == 224
    assert_same_weights(backbone, theirs)
    assert not torch.equal(untrained.conv1.weight, theirs.conv1.weight)


def test_arch_names_another_network_of_torchvision(capsys):
    network = common.make_backbone("shufflenet_v2_x0_5", 32)
    weights = {**under("model.backbone.", network.state_dict()), "model.backbone.fc.weight": HEAD}
    with pytest.raises(Failure, match="file.pth .*--arch"):
        load_backbone(saved(weights))
    load_backbone("file.pth", arch="shufflenet_v2_x0_5")
    assert "file.pth: assuming --image-size 224\n" in capsys.readouterr().out
    backbone, untrained, size = load_backbone("file.pth", 32, "shufflenet_v2_x0_5")
    assert size == 32
    assert_same_weights(backbone, network)
    assert not torch.equal(untrained.conv1[0].weight, network.conv1[0].weight)
    assert capsys.readouterr().out == "file.pth: not of the backbone: fc\n"


def test_a_7x7_stem_as_init_for_small_views():
    network = common.ResNet(BasicBlock, (1, 1, 1, 1), width=8, stem="cifar")
    with pytest.raises(Failure, match=r"file.pth .*first layer is \(8, 3, 7, 7\).*\(8, 3, 3, 3\).*"
                                      "7x7 for views of more than 64 pixels"):
        load_backbone(saved(W), network=network)


def without(name):
    return {other: tensor for other, tensor in W.items() if other != name}


@pytest.mark.parametrize("content, reason", [
    (without("layer3.0.bn2.weight"), "Missing key.*layer3.0.bn2.weight"),
    (without("bn1.running_var"), "Missing key.*bn1.running_var"),
    ({**without("conv1.weight"), "conv1.0.weight": HEAD}, "lacking 'conv1.weight'"),  # and no ViT
    ({**W, "layer2.0.conv2.weight": torch.zeros(16, 4, 3, 3)}, "size mismatch"),
    ({**W, "layer2.0.se.fc1.weight": HEAD}, "Unexpected key.*layer2.0.se.fc1"),
    ({**W, "fc_norm.weight": HEAD}, "Unexpected key.*fc_norm"),
    ({**W, "conv1.weight": torch.zeros(8, 1, 7, 7)}, "first layer"),
    ({"fc.weight": HEAD}, "no weights of a ResNet"),
    ([1], "no weights"),
    (HEAD, "no weights"),
])
def test_a_file_that_does_not_fit(content, reason):
    with pytest.raises(Failure, match=f"file.pth.*{reason}") as failure:
        load_backbone(saved(content))
    assert len(str(failure.value)) < 400 and "\n" not in str(failure.value)


def test_a_file_that_is_not_there():
    with pytest.raises(Failure, match="cannot read none.pth: .*No such file"):
        load_backbone("none.pth")


@pytest.mark.parametrize("content", [b"hello", b"", b"PK\x03\x04"])
def test_a_file_that_cannot_be_read(content):
    with open("text.pth", "wb") as file:
        file.write(content)
    with pytest.raises(Failure, match="cannot read text.pth: "):
        load_backbone("text.pth")


def test_a_pickled_network_is_refused_with_the_way_out():
    with pytest.raises(Failure, match=r"cannot read file.pth: .*state_dict"):
        load_backbone(saved({"model": nn.Linear(2, 2)}))


# --------------------------------------------------------------------------- checkpoints of ViTs


def vit_weights(side=32, patch=8, dim=128, depth=2, seed=0):
    """timm's names; no tensor is 0 or 1 everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, mean=0.0, std=0.1):
        return mean + std * torch.randn(*shape, generator=generator)

    weights = {"cls_token": draw(1, 1, dim),
               "pos_embed": draw(1, (side // patch) ** 2 + 1, dim),
               "patch_embed.proj.weight": draw(dim, 3, patch, patch),
               "patch_embed.proj.bias": draw(dim)}
    for i in range(depth):
        for name, rows, columns in (("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim),
                                    ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim)):
            weights[f"blocks.{i}.{name}.weight"] = draw(rows, columns)
            weights[f"blocks.{i}.{name}.bias"] = draw(rows)
        for name in "norm1", "norm2":
            weights[f"blocks.{i}.{name}.weight"] = draw(dim, mean=1.0)
            weights[f"blocks.{i}.{name}.bias"] = draw(dim)
    weights["norm.weight"] = draw(dim, mean=1.0)
    weights["norm.bias"] = draw(dim)
    return weights


def slow_vit(weights, x, heads):
    """timm's ViT, from the weights alone: images (B, 3, H, W) -> the class token (B, dim)."""
    w = weights
    dim = w["cls_token"].shape[2]
    patch = w["patch_embed.proj.weight"].shape[2]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    patches = F.unfold(x, patch, stride=patch).mT
    patches = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), patches], 1) + w["pos_embed"]
    depth = sum(name.endswith("norm1.weight") for name in w)
    for i in range(depth):
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).split(dim, -1)
        outputs = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            scores = q[..., part] @ k[..., part].mT / (dim / heads) ** 0.5
            outputs.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(f"blocks.{i}.attn.proj", torch.cat(outputs, -1))
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
    return norm("norm", x)[:, 0]


V = vit_weights()
OTHER_V = vit_weights(seed=1)
VIT_LAYOUTS = {  # name: the file, and what is not of the backbone
    "timm": ({**V, "head.weight": HEAD, "head.bias": HEAD}, "head"),
    "dino": ({"student": under("module.backbone.", OTHER_V),
              "teacher": {**under("backbone.", V), "head.last_layer.weight_g": HEAD},
              "dino_loss": {"center": HEAD}}, "dino_loss, head, student"),
    "mae": ({"model": {**V, "mask_token": HEAD, "decoder_pos_embed": HEAD,
                       "decoder_embed.weight": HEAD, "decoder_blocks.0.norm1.weight": HEAD,
                       "decoder_norm.weight": HEAD, "decoder_pred.weight": HEAD},
             "args": argparse.Namespace(model="mae_vit_base_patch16")},
            "decoder_blocks, decoder_embed, decoder_norm, decoder_pos_embed, decoder_pred, "
            "mask_token"),
    "moco-v3": ({"state_dict": {**under("module.base_encoder.", V),
                                **under("module.momentum_encoder.", OTHER_V),
                                "module.base_encoder.head.0.weight": HEAD,
                                "module.predictor.0.weight": HEAD}},
                "head, momentum_encoder, predictor"),
    "solo-learn": ({"state_dict": {**under("backbone.", V), "classifier.weight": HEAD}},
                   "classifier"),
}


@pytest.mark.parametrize("layout", VIT_LAYOUTS)
@torch.no_grad()
def test_a_vit_of_every_layout(layout, capsys):
    """Heads, size and normalization are assumed, and said; every weight is used or named."""
    file, unused = VIT_LAYOUTS[layout]
    backbone, untrained, size = load_backbone(saved(file))
    assert size == 32
    assert capsys.readouterr().out == (
        "file.pth: assuming --heads 2, ImageNet's mean and std, --image-size 32\n"
        f"file.pth: not of the backbone: {unused}\n")
    x = torch.randn(3, 3, 32, 32)
    expected = slow_vit(V, x, heads=2)
    close(backbone.eval()(x), expected)
    assert not torch.allclose(untrained.eval()(x), expected, atol=0.1)


@pytest.mark.parametrize("side, patch, dim, depth", [(16, 4, 64, 3), (56, 14, 192, 1)])
@torch.no_grad()
def test_sizes_of_a_vit_are_read_from_the_weights(side, patch, dim, depth):
    weights = vit_weights(side, patch, dim, depth)
    backbone, _, size = load_backbone(saved(weights))
    x = torch.randn(2, 3, side, side)
    assert size == side
    close(backbone.eval()(x), slow_vit(weights, x, heads=dim // 64))


@torch.no_grad()
def test_heads_change_the_features(capsys):
    weights = vit_weights(dim=384, depth=1)
    x = torch.randn(2, 3, 32, 32)
    six, _, _ = load_backbone(saved(weights))
    assert "--heads 6," in capsys.readouterr().out
    twelve, _, _ = load_backbone("file.pth", heads=12)
    assert "--heads 12," in capsys.readouterr().out
    close(six.eval()(x), slow_vit(weights, x, heads=6), 1e-4)
    close(twelve.eval()(x), slow_vit(weights, x, heads=12), 1e-4)
    assert not torch.allclose(six(x), twelve(x), atol=0.1)


@torch.no_grad()
def test_heads_of_our_own_vits_are_known(capsys):
    weights = vit_weights(dim=384, depth=1)
    x = torch.randn(2, 3, 32, 32)
    model = under("online.0.", weights)
    ours = {"recipe": "imagenet-v3-vit", "step": 7, "args": {"image_size": 32, "arch": "vit_small"}}
    for method, heads in ("moco", 12), ("dino", 6):
        backbone, _, _ = load_backbone(saved({**ours, "method": method, "model": model}))
        assert "assuming" not in capsys.readouterr().out
        close(backbone.eval()(x), slow_vit(weights, x, heads), 1e-4)


@pytest.mark.parametrize("module", [dino, mae, moco])
def test_the_table_of_heads_is_that_of_the_methods(module):
    for arch, (dim, _, num_heads) in module.VITS.items():
        assert linear_probe.HEADS.get((module.__name__, arch), dim // 64) == num_heads


def test_heads_that_do_not_fit():
    with pytest.raises(Failure, match="file.pth .*divisible"):
        load_backbone(saved(V), heads=5)


@torch.no_grad()
def test_torchvisions_vit():
    """The names of torchvision's models, and those in the files that it publishes."""
    network = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=128, mlp_dim=512)
    weights = network.state_dict()
    network.heads = nn.Identity()
    published = {}
    for name, tensor in weights.items():
        name = name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
        published[name] = tensor
    x = torch.randn(2, 3, 32, 32)
    for names in weights, published:
        backbone, _, _ = load_backbone(saved(names))
        close(backbone.eval()(x), network.eval()(x), 0)


def test_timms_vit():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    backbone, _, size = load_backbone(saved(theirs.state_dict()))
    x = torch.randn(2, 3, 64, 64)
    theirs.reset_classifier(0)
    assert size == 64
    with torch.no_grad():
        close(backbone.eval()(x), theirs(x))


@torch.no_grad()
def test_init_of_a_vit_with_timms_names():
    """Such a network, and its names, are those of dino.py and mae.py."""
    network = nn.Module()
    network.cls_token = nn.Parameter(torch.zeros(1, 1, 128))
    network.pos_embed = nn.Parameter(torch.zeros(1, 17, 128))
    file = {"cls_token": V["cls_token"], "pos_embed": V["pos_embed"], "head.weight": HEAD}
    load_backbone(saved(file), network=network)
    assert torch.equal(network.pos_embed, V["pos_embed"])


@pytest.mark.parametrize("size", [16, 48, 64])
@torch.no_grad()
def test_a_vit_at_another_image_size(size):
    """The position embeddings are interpolated."""
    backbone, _, found = load_backbone(saved(V), size)
    assert found == size
    grid = V["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (size // 8, size // 8), mode="bicubic", align_corners=True)
    positions = torch.cat([V["pos_embed"][:, :1], grid.flatten(2).mT], 1)
    x = torch.randn(2, 3, size, size)
    close(backbone.eval()(x), slow_vit({**V, "pos_embed": positions}, x, heads=2))


def test_an_image_size_that_is_no_multiple_of_the_patches():
    with pytest.raises(Failure, match="--image-size 34 is no multiple of its patches' 8"):
        load_backbone(saved(V), 34)


@pytest.mark.parametrize("extra", [
    "blocks.1.ls1.gamma", "blocks.1.attn.q_norm.weight", "blocks.1.attn.norm.weight", "reg_token",
    "norm_pre.weight", "fc_norm.weight", "dist_token"])
def test_other_kinds_of_vits_are_refused(extra):
    with pytest.raises(Failure, match="Unexpected key"):
        load_backbone(saved({**V, extra: torch.ones(128)}))


@pytest.mark.parametrize("name", [
    "blocks.1.attn.qkv.bias", "norm.weight", "patch_embed.proj.bias", "cls_token"])
def test_a_vit_that_lacks_a_weight_is_refused(name):
    weights = {other: tensor for other, tensor in V.items() if other != name}
    with pytest.raises(Failure, match="Missing key|lacking"):
        load_backbone(saved(weights))


# --------------------------------------------------------------------------------------- command


@pytest.fixture
def command(class_folders, capsys):
    """-> a function of flags that gives the exit status, stdout and stderr."""
    torch.save(common.make_backbone("resnet8", 32).state_dict(), "backbone.pth")

    def call(*flags):
        argv = ["--checkpoint", "backbone.pth", "--data", "images", "--device", "cpu",
                "--workers", "0"]
        argv += [str(flag) for flag in flags]
        return run_linear_probe(argv, capsys)

    return call


def test_command(command):
    status, out, err = command()
    assert status == 0 and err == ""
    assert out.count("kNN") == 3
    assert "of 8 test images (chance 50.0)" in out and "of 24 training images" in out


def test_command_on_a_streaming_set_with_an_unreadable_image(command):
    with open("images/val/dog/001.png", "wb") as file:
        file.write(b"no image")
    status, out, err = command("--memory", 0)
    assert status == 0 and err == ""
    assert "1 of 8 tried unreadable ('dog/001.png'" in out
    assert "of 7 test images" in out and "of 24 training images" in out


def test_flags_reach_the_evaluation(command, monkeypatch):
    calls = []
    monkeypatch.setattr(linear_probe, "evaluate", lambda *args: calls.append(args))
    status, _, err = command("--labels", 0.5, "--layers", "--mlp", "--seed", 3, "--image-size", 48,
                             "--max-images", 6)
    assert status == 0 and err == ""
    backbone, untrained, train, test, image_size, device, labels, seed, layers, mlp = calls[0]
    assert not torch.equal(backbone.conv1.weight, untrained.conv1.weight)
    assert len(train) == len(test) == 6 and image_size == 48 and device == CPU
    assert (labels, seed, layers, mlp) == (0.5, 3, True, True)
    command()
    *_, labels, seed, layers, mlp = calls[1]
    assert (labels, seed, layers, mlp) == (1.0, 0, False, False)


def test_flags_reach_the_network(command, monkeypatch):
    torch.save(V, "backbone.pth")
    calls = []
    monkeypatch.setattr(linear_probe, "evaluate", lambda *args: calls.append(args))
    assert command("--heads", 4)[0] == 0
    assert calls[0][0].encoder.layers[0].self_attention.num_heads == 4
    torch.save(common.make_backbone("resnet18x0.125", 32).state_dict(), "backbone.pth")
    assert command("--stem-padding", 2)[0] == 0
    assert calls[1][0].conv1.padding == (2, 2)
    torch.save(common.make_backbone("shufflenet_v2_x0_5", 32).state_dict(), "backbone.pth")
    assert command("--arch", "shufflenet_v2_x0_5")[0] == 0
    assert type(calls[2][0]) is torchvision.models.ShuffleNetV2


def features_file():
    """-> names, labels, classes and features of f.npz."""
    file = np.load("f.npz")
    return (file["names"].tolist(), file["labels"].tolist(), file["classes"].tolist(),
            torch.from_numpy(file["features"]))


@torch.no_grad()
def features_of_file(name):
    """By backbone.pth, of one image."""
    backbone, _, _ = load_backbone("backbone.pth")
    pixels = torch.from_numpy(np.array(Image.open(name))).permute(2, 0, 1)[None]
    return backbone.eval()(center_view(pixels, torch.ones(1), 32))[0]


def test_features_of_all_images_in_the_order_of_files(command, class_folders):
    status, out, err = command("--features", "f.npz")
    assert status == 0 and err == ""
    names, labels, classes, features = features_file()
    folders = ["train/cat"] * 12 + ["train/dog"] * 12 + ["val/cat"] * 4 + ["val/dog"] * 4
    assert [name.rpartition("/")[0] for name in names] == [f"images/{name}" for name in folders]
    assert names == sorted(names)
    assert classes == ["cat", "dog"]
    assert labels == [0] * 12 + [1] * 12 + [0] * 4 + [1] * 4
    assert np.load("f.npz")["test"].tolist() == [False] * 24 + [True] * 8
    for i in 0, 17, 31:
        close(features[i], features_of_file(names[i]), 1e-4)
    assert "f.npz: 32 images, 128 features each" in out


@pytest.mark.parametrize("memory", [0, 1])
def test_features_leave_out_what_cannot_be_read(memory, command):
    with open("images/train/cat/003.png", "wb") as file:
        file.write(b"no image")
    assert command("--features", "f.npz", "--memory", memory)[0] == 0
    names, labels, _, features = features_file()
    assert "images/train/cat/003.png" not in names and names == sorted(names)
    assert labels == [0] * 11 + [1] * 12 + [0] * 4 + [1] * 4
    assert len(names) == len(features) == 31
    for i in 2, 3, 30:
        close(features[i], features_of_file(names[i]), 1e-4)


def test_features_of_a_held_out_tenth_are_among_the_others(command):
    assert command("--features", "f.npz", "--data", "images/train")[0] == 0
    names, labels, _, _ = features_file()
    assert len(names) == 24 and names == sorted(names)
    assert labels == [0] * 12 + [1] * 12
    _, held_out = common.find_sets("images/train")
    of_test = np.array(names)[np.load("f.npz")["test"]].tolist()
    assert sorted(of_test) == sorted(f"images/train/{name}" for name in held_out.names)


def test_features_of_images_without_labels(command):
    assert command("--features", "f.npz", "--data", "images/train/cat")[0] == 0
    names, labels, classes, _ = features_file()
    assert names == [f"images/train/cat/{i:03}.png" for i in range(12)]
    assert labels == [-1] * 12 and classes == []


def test_features_of_test_images_without_labels(command):
    for name in "cat", "dog":
        os.rename(f"images/val/{name}", f"images/val/{name}-unsorted")
    assert command("--features", "f.npz")[0] == 0
    names, labels, classes, _ = features_file()
    assert len(names) == 32 and classes == ["cat", "dog"]
    assert labels == [0] * 12 + [1] * 12 + [-1] * 8
    assert np.load("f.npz")["test"].tolist() == [False] * 24 + [True] * 8


def test_neighbours(command):
    """A row for each class: its first image, and then the others by similarity."""
    status, out, err = command("--neighbours", "n.png")
    assert status == 0 and err == ""
    assert "n.png: in each row, an image and its 7 nearest" in out
    picture = np.array(Image.open("n.png"))
    assert picture.shape == (2 * 132 + 4, 8 * 132 + 4, 3)
    for row, name in enumerate(["cat", "dog"]):
        shown = picture[132 * row + 4 : 132 * row + 132 : 4, 4:132:4]
        original = np.array(Image.open(f"images/train/{name}/000.png"))
        assert np.abs(shown.astype(int) - original).max() <= 1


def test_neighbours_are_the_nearest(monkeypatch):
    """Of nine flat images: by the cosine of (r, g, b)."""
    colors = torch.randint(1, 255, (9, 3))
    images = image_set(colors.byte()[:, :, None, None].expand(-1, -1, 16, 16), [0] * 9, ["one"])
    columns = []

    def save_picture(path, *pictures):
        columns.extend(pictures)

    monkeypatch.setattr(common, "save_picture", save_picture)
    network = nn.Sequential(nn.AvgPool2d(16), nn.Flatten())
    linear_probe.save_neighbours(network, images, 16, CPU, "n.png")
    x = F.normalize(network(center_view(images.pixels, images.aspect, 16)), dim=1)
    order = (x @ x[0]).argsort(descending=True)[:8]
    shown = torch.stack([255 * column[0, :, 0, 0] for column in columns])
    close(shown, colors[order].float(), 0.01)


@pytest.mark.parametrize("flags", [
    ["--labels", "many"], ["--image-size", "1.5"], ["--unknown", "1"], ["--steps"]])
def test_wrong_arguments_exit_2(flags, command):
    status, out, err = command(*flags)
    assert status == 2 and out == "" and flags[0] in err.splitlines()[-1]


@pytest.mark.parametrize("flags, named", [
    (["--checkpoint", "none.pth"], "none.pth"), (["--data", "nowhere"], "nowhere"),
    (["--arch", "abacus"], "--arch abacus"), (["--device", "abacus"], "--device abacus")])
def test_what_users_can_put_right_exits_1_with_one_line(flags, named, command):
    status, _, err = command(*flags)
    assert status == 1 and named in err and err.count("\n") == 1


def test_a_file_that_cannot_be_written_shows_before_the_work(command):
    status, out, err = command("--features", "no/folder/f.npz")
    assert status == 1 and "no/folder/f.npz" in err and out == ""
