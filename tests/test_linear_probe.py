"""The evaluation: kNN, probe, diagnostics against independent calculations; every file layout."""

import argparse
import functools
import json
import math
import sys
import types

import common
import dino
import linear_probe as linear_probe_file
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import write_images
from linear_probe import (Stages, build, calibrate_batch_norm, diagnostics, digest,
                          evaluate, extract_features, knn, knn_accuracy, labelled_features,
                          linear_path, linear_probe, load_backbone, mlp_path, parse_args,
                          print_report, read_backbone, run, save_neighbours, sgd_path)
from PIL import Image
from processes import run_processes
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

CPU = torch.device("cpu")


class Images:
    """What the evaluation needs of an ImageSet; image i has brightness i, or that of its class."""

    def __init__(self, labels, unreadable=(), by_class=False, seed=0):
        self.labels = torch.tensor(labels)
        self.names = [f"{i}.png" for i in range(len(labels))]
        value = self.labels * 60 + 30 if by_class else torch.arange(len(labels))
        noise = torch.randint(20, (len(labels), 3, 16, 16),
                              generator=torch.Generator().manual_seed(seed))
        self.pixels = (value[:, None, None, None] + noise * by_class).to(torch.uint8)
        self.aspect = torch.ones(len(labels))
        self.unreadable = dict.fromkeys(unreadable, "a reason")

    def __len__(self):
        return len(self.labels)

    def batches(self, index_lists, device):
        for indices in index_lists:
            yield self.pixels[indices], self.aspect[indices]


def brightness(images, aspect):
    return images[:, :, 0, 0].float()


def tiny_backbone(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten())


def clusters(n, classes, dim, seed, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9)).double()
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, dim, generator=generator).double(), labels


# ------------------------------------------------------------------------------------------- kNN


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (5, 0.07), (5, 10.0), (1000, 0.1)])
def test_knn_equals_a_loop_over_images(k, temperature):
    x, y = clusters(40, 4, 6, seed=0)
    queries, labels = clusters(60, 4, 6, seed=1)
    correct = 0
    for query, label in zip(queries.tolist(), labels.tolist()):
        cosines = []
        for row, neighbour in zip(x.tolist(), y.tolist()):
            dot = sum(a * b for a, b in zip(query, row))
            cosines.append((dot / math.hypot(*query) / math.hypot(*row), neighbour))
        votes = [0.0] * 4
        for cosine, neighbour in sorted(cosines, reverse=True)[:k]:
            votes[neighbour] += math.exp(cosine / temperature)
        correct += votes.index(max(votes)) == label
    assert knn(x, y, queries, labels, k, temperature) == pytest.approx(100 * correct / 60)
    assert 25 < 100 * correct / 60 < 100  # so that the comparison can fail


def test_knn_with_seven_images():
    x = torch.eye(7)
    y = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    assert knn(x, y, x, y) == 100 and knn(x, y, x, y.roll(1)) == 0


# ----------------------------------------------------------------------------------------- probe


def test_every_penalty_reaches_its_optimum():
    """The objective is convex, so a gradient of zero is the optimum. Directions differ 100-fold in
    scale, which plain L-BFGS takes hundreds of steps for."""
    x, y = clusters(300, 3, 10, seed=0)
    x = (x - x.mean(0)) * torch.logspace(-1, 1, 10) + 0.2 * x[:, :1]
    for strength, classifier in linear_path(x, y, 3):
        weight = classifier.keywords["weight"].clone().requires_grad_()
        bias = classifier.keywords["bias"].clone().requires_grad_()
        probabilities = (x @ weight.T + bias).softmax(1)
        loss = -probabilities[torch.arange(300), y].log().mean()
        loss = loss + strength / 2 * (weight**2).sum()
        gradients = torch.autograd.grad(loss, [weight, bias])
        # in scaled coordinates the gradient is below 1e-6 or the loss moves by less than 1e-7
        assert max(g.abs().max() for g in gradients) < 2e-3 * min(1, strength**0.5 + 0.1), strength
        assert strength > 1e-3 or loss < 0.5


def test_the_optimum_equals_that_of_gradient_descent():
    x, y = clusters(60, 3, 4, seed=0)
    weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        loss = F.cross_entropy(x @ weight.T + bias, y) + 0.1 / 2 * weight.square().sum()
        with torch.no_grad():
            for p, gradient in zip((weight, bias), torch.autograd.grad(loss, [weight, bias])):
                p -= 0.3 * gradient
    found = next(fit for strength, fit in linear_path(x, y, 3) if strength == 0.1)
    torch.testing.assert_close(found.keywords["weight"], weight.detach(), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.keywords["bias"], bias.detach(), atol=1e-3, rtol=0)


def test_probe_ignores_the_scale_and_offset_of_features():
    x, y = clusters(200, 3, 5, seed=0, noise=0.3)
    test_x, test_y = clusters(100, 3, 5, seed=1, noise=0.3)
    factor, offset = torch.tensor([1e3, 1, 0.1, 1, 50]), torch.tensor([1e3, 0, 5, -20, 0])
    plain = linear_probe(x, y, test_x, test_y)
    assert plain["probe"] > 95
    scaled = linear_probe(x * factor + offset, y, test_x * factor + offset, test_y)
    assert scaled["probe"] == plain["probe"] and scaled["chosen"] == plain["chosen"]


def test_only_the_mlp_solves_xor():
    generator = torch.Generator().manual_seed(0)
    x, test_x = torch.randn(2, 400, 2, generator=generator)
    y, test_y = ((z[:, 0] * z[:, 1] > 0).long() for z in (x, test_x))
    assert linear_probe(x, y, test_x, test_y)["probe"] < 70
    mlp = linear_probe(x, y, test_x, test_y, mlp=True)
    assert mlp["probe"] > 90 and mlp["chosen"] == max(mlp["held_out"], key=mlp["held_out"].get)


@pytest.mark.parametrize("mlp", [False, True])
def test_nothing_is_chosen_on_test_images(mlp):
    """Other test labels change neither a choice nor a prediction: each test image is given each
    label once, and one of these is right."""
    x, y = clusters(60, 3, 20, seed=0, noise=3)
    test_x, _ = clusters(50, 3, 20, seed=1, noise=3)
    reports = [linear_probe(x.float(), y, test_x.float(), torch.full((50,), c), mlp)
               for c in range(3)]
    assert all(r["held_out"] == reports[0]["held_out"] for r in reports)
    assert all(r["chosen"] == reports[0]["chosen"] for r in reports)
    assert sum(r["probe"] for r in reports) == pytest.approx(100)
    assert all(r["probe"] < 90 for r in reports)  # the predictions are not constant


def test_the_best_held_out_setting_is_fitted_again_on_all_images():
    x, y = clusters(60, 3, 20, seed=0, noise=6)
    test_x, test_y = clusters(400, 3, 20, seed=1, noise=6)
    report = linear_probe(x, y, test_x, test_y)
    held_out = list(report["held_out"].values())
    assert report["chosen"] == list(report["held_out"])[held_out.index(max(held_out))]
    mean, std = x.mean(0), (x.var(0, correction=0) + 1e-6).sqrt()

    def top1(rows, x_other, y_other):
        """By strength, of classifiers fitted on these rows only."""
        return {strength: 100 * (fit((x_other - mean) / std).argmax(1) == y_other).sum().item()
                / len(y_other) for strength, fit in linear_path((x[rows] - mean) / std, y[rows], 3)
                if strength in report["held_out"]}

    held, rest = torch.randperm(60, generator=torch.Generator().manual_seed(0)).split([6, 54])
    everything = torch.arange(60)
    assert report["held_out"] == top1(rest, x[held], y[held])
    assert report["held_out"] != top1(everything, x[held], y[held])
    assert report["probe"] == top1(everything, test_x, test_y)[report["chosen"]]
    assert report["probe"] != top1(rest, test_x, test_y)[report["chosen"]]


@pytest.mark.parametrize("path", [linear_path, mlp_path])
def test_a_path_is_the_same_each_time(path):
    x, y = clusters(50, 3, 4, seed=0)
    twice = [next(path(x.float(), y, 3))[1](x.float()) for _ in range(2)]
    assert torch.equal(*twice)


def test_sgd_approaches_the_optimum_of_its_strength():
    """Whatever the scale of the features; its excess loss falls, and from far off."""
    x, y = clusters(300, 3, 10, seed=0)
    x = 5 * (x - x.mean(0)) * torch.logspace(-1, 0, 10)

    def loss(fit, weight):
        return (F.cross_entropy(fit(x), y) + 0.05 * weight.square().sum()).item()

    best = next(loss(fit, fit.keywords["weight"]) for s, fit in linear_path(x, y, 3) if s == 0.1)
    steps, excess = zip(*((n, loss(fit, fit.weight) - best) for n, fit in sgd_path(x, y, 3, 0.1)))
    assert steps == (10, 30, 100, 300, 1000, 3000, 10000)
    assert max(excess[5:]) < 0.001 < 0.002 < excess[2] < excess[1] < excess[0] < math.log(3) - best


def test_steps_are_of_the_chosen_penalty_and_choose_nothing():
    x, y = clusters(100, 3, 6, seed=0, noise=0.4)
    test_x, test_y = clusters(300, 3, 6, seed=1, noise=0.4)
    plain, report = (linear_probe(x, y, test_x, test_y, steps=s) for s in (False, True))
    steps = report.pop("steps")
    assert report == plain
    mean, std = x.mean(0), (x.var(0, correction=0) + 1e-6).sqrt()
    path = sgd_path((x - mean) / std, y, 3, plain["chosen"])
    assert steps == {n: pytest.approx(100 * (fit((test_x - mean) / std).argmax(1) == test_y).sum()
                                      .item() / 300) for n, fit in path}


# ----------------------------------------------------------------------------------- diagnostics


def test_diagnostics_of_collapse():
    z = torch.randn(1, 16).expand(100, 16)
    found = diagnostics(z, z)
    assert found["spread"] < 1e-5 and abs(found["uniformity"]) < 1e-5
    assert found["alignment"] == 0 and found["effective_rank"] == pytest.approx(1, abs=0.1)


def test_diagnostics_of_the_uniform_sphere():
    """In three dimensions the cosine of two random directions is uniform on [-1, 1], so
    E exp(-2 |x - y|²) = exp(-4) · mean of exp(4 cos) = (1 - exp(-8)) / 8."""
    z = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)).double()
    found = diagnostics(7 * z, -z)  # the length does not matter
    assert found["spread"] == pytest.approx(1, abs=0.03)
    assert found["uniformity"] == pytest.approx(math.log((1 - math.exp(-8)) / 8), abs=0.03)
    assert found["alignment"] == pytest.approx(4)
    assert found["effective_rank"] == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_effective_rank_of_r_equal_directions(rank):
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(50, rank, generator=generator).double()
    left = torch.linalg.qr(columns - columns.mean(0))[0]  # centred, orthonormal
    right = torch.linalg.qr(torch.randn(12, rank, generator=generator).double())[0]
    z = left @ right.T + 100  # the mean is no direction in which images differ
    assert diagnostics(z, z)["effective_rank"] == pytest.approx(rank, rel=1e-6)


# -------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("count", [7, 256, 300])
def test_features_are_in_order_and_the_mode_is_kept(count):
    images = Images([0] * count, unreadable=[2])
    images.pixels = images.pixels % 100
    network = nn.Dropout(0.5)
    features, readable = extract_features(network, images, 16, CPU, view=brightness)
    assert torch.equal(features, images.pixels[:, :, 0, 0].float()) and network.training
    assert readable.tolist() == [i != 2 for i in range(count)]
    some = torch.tensor([5, 1, 3])
    features, _ = extract_features(network.eval(), images, 16, CPU, brightness, some)
    assert features[:, 0].tolist() == [5, 1, 3] and not network.training


def features_of_seven():
    network = nn.Identity()
    return extract_features(network, Images([0] * 7, unreadable=[6]), 16, CPU, view=brightness)


def test_every_process_has_all_features():
    features, readable = features_of_seven()
    for found, good in run_processes(2, features_of_seven):
        assert torch.equal(found, features) and torch.equal(good, readable)


def test_labelled_features():
    train = Images([0] * 40 + [-1] * 10 + [1] * 60 + [2] * 3, unreadable=[0])
    test = Images([0, 1, 2, -1], unreadable=[3])  # nobody needs the last
    x, y, test_x, test_y = labelled_features(nn.Flatten(), train, test, 16, CPU)
    assert y.bincount().tolist() == [39, 60, 3] and len(x) == len(y) == 102
    assert test_y.tolist() == [0, 1, 2] and len(test_x) == 3
    few = labelled_features(nn.Flatten(), train, test, 16, CPU, fraction=0.1, seed=1)
    assert few[1].bincount().tolist()[1:] == [6, 1] and len(few[3]) == 3
    test.unreadable[1] = "a reason"
    with pytest.raises(common.Failure, match="'1.png'"):
        labelled_features(nn.Flatten(), train, test, 16, CPU)
    for nothing in (train, None), (Images([-1, -1]), test), (train, Images([-1])):
        assert labelled_features(nn.Flatten(), *nothing, 16, CPU) is None
    assert knn_accuracy(nn.Flatten(), train, None, 16, CPU) is None


def test_features_belong_to_their_labels():
    train, test = (Images([0, 1, 2] * 5, by_class=True, seed=s) for s in (0, 1))
    network = nn.Sequential(nn.AvgPool2d(16), nn.Flatten())
    x, y, *_ = labelled_features(network, train, test, 16, CPU, fraction=0.6)
    assert len(y) == 9 and torch.equal(x.mean(1).sort()[1], y.sort(stable=True)[1]) or \
        all(x[y == c].mean() < x[y == c + 1].mean() for c in range(2))


def test_calibrated_batch_norm_has_the_statistics_of_the_images():
    images = Images([0, 1, 2] * 14, by_class=True)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    network[1].running_mean.fill_(7)
    calibrate_batch_norm(network, images, 16, CPU)
    outputs = network[:2](common.eval_view(images.pixels, None, 16))
    torch.testing.assert_close(outputs.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(outputs.var((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("features, sides", [(True, (2, 1, 1)), (512, (4, 3, 2)),
                                             (10**6, (16, 8, 4))])
def test_stages_are_averaged_to_equal_numbers(features, sides):
    backbone = common.make_backbone("resnet8", 32).eval()
    stages = Stages(backbone, features)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, again = stages(x), stages(x)
        z = backbone.relu(backbone.bn1(backbone.conv1(x)))
        assert list(stages.columns) == ["layer1", "layer2", "layer3"]
        for (name, columns), side in zip(stages.columns.items(), sides):
            z = getattr(backbone, name)(z)
            expected = F.adaptive_avg_pool2d(z, side).flatten(1)
            torch.testing.assert_close(found[:, columns], expected)
        if features is True:
            torch.testing.assert_close(found[:, stages.columns["layer3"]], backbone(x))
    assert torch.equal(found, again) and found.shape[1] == sum(map(len, stages.columns.values()))
    assert not any(module._forward_hooks for module in backbone.modules())


def test_stages_of_a_vit():
    torch.manual_seed(0)
    backbone = dino.ViT(16, 4, 8, 5, 2).eval()
    stages = Stages(backbone)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = stages(x)
        for i in range(5):
            tokens = backbone.norm(backbone.blocks[: i + 1](backbone.embed(x)))
            for kind, expected in ("mean", tokens[:, 1:].mean(1)), ("class", tokens[:, 0]):
                actual = found[:, stages.columns[f"blocks.{i} {kind}"]]
                torch.testing.assert_close(actual, expected)
        assert list(stages.columns)[-1] == "blocks.4 class"
        torch.testing.assert_close(actual, backbone(x))
        last = [found[:, stages.columns[f"blocks.{i} class"]] for i in range(1, 5)]
        assert torch.equal(found[:, stages.columns["last 4 class"]], torch.cat(last, 1))


# ---------------------------------------------------------------------------------------- report


def test_report(capsys):
    train, test = (Images([0, 1, 2] * 12, by_class=True, seed=s) for s in (0, 1))
    backbone, initial = tiny_backbone(), tiny_backbone(1)
    report = evaluate(backbone, initial, train, test, 16, CPU)
    assert report == json.loads(json.dumps(report), object_hook=lambda d: {
        float(k) if k[0].isdigit() else k: v for k, v in d.items()})  # plain values: it is logged
    assert report["images"] == [36, 36] and report["chance"] == pytest.approx(100 / 3)
    for name in "trained", "random", "pixels":
        assert report[name]["knn"] > 60 and report[name]["probe"] > 60
    assert digest(backbone) in report["frozen"]
    print_report(report)
    printed = capsys.readouterr().out
    assert digest(backbone) in printed and f"{report['trained']['chosen']:.2g}" in printed


def test_report_of_both_probes_and_of_every_stage(capsys):
    train, test = (Images([0, 1, 2] * 12, by_class=True, seed=s) for s in (0, 1))
    networks = [common.make_backbone("resnet8", 16) for _ in range(2)]
    plain = evaluate(*networks, train, test, 16, CPU)
    report = evaluate(*networks, train, test, 16, CPU, mlp=True, layers=True)
    assert report == json.loads(json.dumps(report), object_hook=lambda d: {
        float(k) if k[0].isdigit() else k: v for k, v in d.items()})
    for name in "trained", "random", "pixels":
        row = report[name]
        assert plain[name] == {key: row[key] for key in plain[name]} and row["mlp"] > 60
        assert row["epochs"] >= 1 and ("layers" in row) == (name != "pixels")
    layers = report["trained"]["layers"]
    assert [row["features"] for row in layers.values()] == [128, 64, 128]
    assert layers["layer3"]["probe"] == report["trained"]["probe"]  # that of the output
    assert report["last_layer"] == "layer3"
    print_report(report)
    printed = capsys.readouterr().out
    assert all(f"{layers[name]['mlp']:.2f}" in line for name in layers
               for line in printed.splitlines() if line.startswith(name))
    assert f"accuracy): {report['best_layer']}" in printed and "last stage: layer3" in printed
    assert evaluate(*networks, train, None, 16, CPU, layers=True)["frozen"]


def test_the_best_stage_is_chosen_on_held_out_images(monkeypatch):
    def rigged(found, *_):
        n = found[0].shape[1]
        return {"knn": 0, "probe": n, "chosen": 1, "held_out": {1: 1, 2: 90 if n == 64 else 50}}

    monkeypatch.setattr(linear_probe_file, "accuracies", rigged)
    train = Images([0, 1] * 4)
    networks = [common.make_backbone("resnet8", 16) for _ in range(2)]
    report = evaluate(*networks, train, train, 16, CPU, layers=True)
    assert report["best_layer"] == "layer2"  # whose test accuracy is the lowest


def test_labels_count_for_stages_too():
    train = Images([0, 1] * 20)
    networks = [common.make_backbone("resnet8", 16) for _ in range(2)]
    report = evaluate(*networks, train, train, 16, CPU, mlp=True, labels=0.1, layers=True)
    assert report["images"] == [4, 40]
    held_out = report["trained"]["layers"]["layer1"]["held_out"]
    assert all(top1 in (0, 100) for top1 in held_out.values())  # of one image


def pictures_in(path):
    """Cells (rows, columns, 3, 16, 16) of a grid with borders of 2 pixels."""
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[:, 2:, 2:]
    return pixels.unfold(1, 16, 18).unfold(2, 16, 18).permute(1, 2, 0, 3, 4)


@pytest.mark.parametrize("alone", [False, True])
def test_picture_of_neighbours(alone, tmp_path):
    sets = [Images(list(range(10)))] if alone else [Images([0] * 30), Images([0] * 16)]
    rows = [torch.stack([s.pixels[:, 0, 0, 0].float() / 30, torch.ones(len(s))], 1) for s in sets]
    save_neighbours(rows, sets, 16, CPU, tmp_path / "n.png")
    cells = pictures_in(tmp_path / "n.png")[:, :, 0, 8, 8]
    assert cells.shape == (8, 8)
    queries = [0, 1, 2, 3, 5, 6, 7, 9] if alone else [0, 2, 4, 6, 8, 10, 12, 15]
    assert cells[:, 0].tolist() == queries
    if alone:
        assert not (cells[:, 1:] == cells[:, :1]).any()
    else:
        assert torch.equal(cells[:, 1], cells[:, 0])
    angle = [torch.atan(torch.arange(len(s)) / 30) for s in sets]
    for query, near in zip(queries, cells[:, 1:].tolist()):
        distance = (angle[0] - angle[-1][query]).abs()
        distance[query] += 100 * alone
        assert distance[near].tolist() == sorted(distance.tolist())[:7]


@pytest.mark.parametrize("labels", [[0, 1] * 3 + [0], [-1] * 7])
def test_report_on_seven_images(labels, capsys):
    images = Images(labels, by_class=True)
    report = evaluate(tiny_backbone(), tiny_backbone(1), images, images, 16, CPU)
    assert ("knn" in report["trained"]) == ("chance" in report) == (0 in labels)
    assert all(math.isfinite(v) for k, v in report["random"].items()
               if k not in ("held_out", "chosen"))
    print_report(report)
    assert ("nothing to measure" in capsys.readouterr().out) == (0 not in labels)


def test_report_without_test_images():
    report = evaluate(tiny_backbone(), tiny_backbone(1), Images([0, 1] * 4), None, 16, CPU)
    assert report["trained"]["effective_rank"] > 0 and "chance" not in report


def test_a_backbone_that_moves_is_found():
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            self.weight.data += 1e-6
            return x.flatten(1)[:, :10] * self.weight

    train = Images([0, 1] * 4)
    with pytest.raises(common.Failure, match="changed"):
        evaluate(Drifting(), tiny_backbone(), train, train, 16, CPU)


def test_a_backbone_that_unfreezes_is_found():
    class Thawing(nn.Linear):
        def forward(self, x):
            self.weight.requires_grad_()
            return super().forward(x.flatten(1)[:, :10])

    train = Images([0, 1] * 4)
    with pytest.raises(common.Failure, match="changed"):
        evaluate(Thawing(10, 10), tiny_backbone(), train, train, 16, CPU)


def test_digest_sees_weights_and_buffers():
    backbone = tiny_backbone()
    seen = {digest(backbone)}
    backbone[0].weight.data[0, 0, 0, 0] += 1e-6
    seen.add(digest(backbone))
    backbone[1].running_var[0] += 1e-6
    seen.add(digest(backbone))
    assert len(seen) == 3


# ----------------------------------------------------------------------------------- checkpoints


@functools.cache
def reference(block=BasicBlock, seed=0):
    """torchvision's ResNet with one block per stage and BN statistics that matter."""
    torch.manual_seed(seed)
    network = torchvision.models.resnet.ResNet(block, [1, 1, 1, 1])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def torchvision_features(network, images):
    return nn.Sequential(*list(network.children())[:-1], nn.Flatten())(images)  # without fc


def under(prefix, weights, fc=False):
    return {prefix + name: value for name, value in weights.items()
            if fc or not name.startswith("fc.")}


def other(prefix, seed=1):
    return under(prefix, reference(seed=seed).state_dict())


HEAD = torch.zeros(4, 4)
LAYOUTS = {
    "torchvision": lambda w: under("", w, fc=True),
    "timm": lambda w: {"state_dict": under("", w)},
    "moco": lambda w: {"epoch": 1, "arch": "resnet50", "state_dict": {
        **other("module.encoder_k."), **under("module.encoder_q.", w),
        "module.encoder_q.fc.0.weight": HEAD, "module.queue": HEAD}, "optimizer": {"state": {}}},
    "moco v3": lambda w: {"state_dict": {
        **other("module.momentum_encoder."), **under("module.base_encoder.", w),
        "module.base_encoder.fc.0.weight": HEAD, "module.predictor.0.weight": HEAD}},
    "simsiam": lambda w: {"state_dict": {
        **under("module.encoder.", w), "module.encoder.fc.0.weight": HEAD,
        "module.predictor.0.weight": HEAD}},
    "swav": lambda w: {**under("module.", w), "module.projection_head.0.weight": HEAD,
                       "module.prototypes.weight": HEAD},
    "swav checkpoint": lambda w: {"epoch": 3, "state_dict": {
        **under("module.", w), "module.prototypes.weight": HEAD}},
    "barlow": lambda w: under("", w),
    "barlow checkpoint": lambda w: {"epoch": 3, "model": {
        **under("module.backbone.", w), "module.bn.running_mean": HEAD,
        "module.projector.0.weight": HEAD}, "optimizer": {"state": {0: {"mu": HEAD}}}},
    "vicreg": lambda w: {"model": {**under("module.backbone.", w),
                                   "module.projector.0.weight": HEAD}},
    "dino": lambda w: {
        "student": other("module.backbone."), "args": argparse.Namespace(arch="resnet50"),
        "teacher": {**under("backbone.", w), "head.mlp.0.weight": HEAD},
        "dino_loss": {"center": HEAD}},
    "solo-learn": lambda w: {"epoch": 3, "state_dict": {
        **other("momentum_backbone."), **under("backbone.", w), "classifier.weight": HEAD,
        "projector.0.weight": HEAD}},
    "solo-learn, older": lambda w: {"state_dict": {
        **under("encoder.", w), **other("momentum_encoder."), "classifier.weight": HEAD}},
    "ours": lambda w: {"method": "simclr", "args": {"image_size": 96},
                       "model": {**under("backbone.", w), "projector.0.weight": HEAD}},
    "ours, byol": lambda w: {"method": "byol", "args": {"image_size": 96}, "model": {
        **other("target.backbone."), **under("online.backbone.", w)}},
    "ours, dino": lambda w: {"method": "dino", "args": {"image_size": 96}, "model": {
        **other("student.backbone."), **under("teacher.backbone.", w), "center": HEAD}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resnet_of_every_layout_gives_torchvisions_features(layout, tmp_path):
    network = reference()
    torch.save(LAYOUTS[layout](network.state_dict()), tmp_path / "file.pth")
    backbone, initial, size = load_backbone(tmp_path / "file.pth")
    initial.load_state_dict(read_backbone(tmp_path / "file.pth")[0])  # as --init does
    assert digest(initial) == digest(backbone)
    initial = load_backbone(tmp_path / "file.pth")[1]
    assert size == (96 if "ours" in layout else 224)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torchvision_features(network, images)
        torch.testing.assert_close(backbone.eval()(images), expected)
        assert not torch.allclose(initial.eval()(images), expected, atol=1e-2)


def test_bottlenecks_widths_and_stems_are_read_from_the_weights(tmp_path):
    network = reference(Bottleneck)
    torch.save(network.state_dict(), tmp_path / "file.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = load_backbone(tmp_path / "file.pth")[0].eval()
        torch.testing.assert_close(found(images), torchvision_features(network, images))
        for ours in (common.make_backbone("resnet8", 32), common.make_backbone("resnet8x2", 32),
                     common.ResNet(BasicBlock, (2, 1, 1, 2), 0.5, "cifar")):
            ours.eval()
            torch.save(ours.state_dict(), tmp_path / "file.pth")
            found, _, size = load_backbone(tmp_path / "file.pth")
            assert size == 32 and load_backbone(tmp_path / "file.pth", 48)[2] == 48
            torch.testing.assert_close(found.eval()(images[..., :32, :32]),
                                       ours(images[..., :32, :32]))


def rename(weights, old, new):
    return {new if name == old else name: value for name, value in weights.items()}


@pytest.mark.parametrize("damage", [
    lambda w: {n: v for n, v in w.items() if n != "layer3.0.bn2.weight"},
    lambda w: {n: v for n, v in w.items() if n != "bn1.running_var"},
    lambda w: {n: v for n, v in w.items() if not n.startswith("layer4")} | {"layer4.0.x": HEAD},
    lambda w: rename(w, "conv1.weight", "conv0.weight"),
    lambda w: rename(w, "layer1.0.conv1.weight", "stage1.0.conv1.weight"),
    lambda w: w | {"layer2.0.conv2.weight": torch.zeros(128, 4, 3, 3)},
    lambda w: w | {"layer2.0.se.fc1.weight": HEAD},
    lambda w: w | {"conv1.weight": torch.zeros(64, 1, 7, 7)},
    lambda w: w | {"bn1.bias": torch.full((64,), math.nan)},
    lambda w: {"fc.weight": HEAD},
    lambda w: [1, 2, 3],
])
def test_a_file_that_is_not_a_whole_backbone_is_refused(damage, tmp_path):
    torch.save(damage(under("", reference().state_dict())), tmp_path / "file.pth")
    with pytest.raises(common.Failure, match="file.pth") as failure:
        load_backbone(tmp_path / "file.pth")
    assert len(str(failure.value)) < 400


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    torch.save(reference().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]
    write_images(tmp_path / "images", 1)
    picture = (tmp_path / "images" / "000.png").read_bytes()
    for content in whole[:middle], flipped, picture, b"", b"hello\n":
        (tmp_path / "file.pth").write_bytes(content)
        with pytest.raises(common.Failure, match="file.pth"):
            load_backbone(tmp_path / "file.pth")
    with pytest.raises(common.Failure, match="none.pth"):
        load_backbone(tmp_path / "none.pth")


class FakeVGG(nn.Module):
    """torchvision's VGG without its classifier, with what the stages need."""

    def __init__(self, name):
        super().__init__()
        self.features = torchvision.models.get_model(name).features
        self.stages = [f"features.{i}" for i, module in enumerate(self.features)
                       if isinstance(module, nn.MaxPool2d)]

    def forward(self, x):
        return self.features(x).mean((2, 3))


def vgg_maker(arch, image_size):
    return {"vgg11_bnx1.0": FakeVGG, "vgg13_bnx1.0": FakeVGG}[arch](arch.partition("x")[0])


@pytest.mark.parametrize("name, layout", [
    ("vgg11_bn", lambda w: w), ("vgg13_bn", lambda w: under("", w)),
    ("vgg11_bn", lambda w: {"method": "rotation", "args": {"image_size": 32}, "model": {
        **under("backbone.", {n: v for n, v in w.items() if "classifier" not in n})}})])
def test_a_vgg_gives_torchvisions_features(name, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "make_backbone", vgg_maker)
    network = torchvision.models.get_model(name).eval()
    weights = {n: v[:4] if n == "classifier.0.weight" else v  # 400 MB
               for n, v in network.state_dict().items()}
    torch.save(layout(weights), tmp_path / "file.pth")
    backbone, initial, size = load_backbone(tmp_path / "file.pth")
    assert size == (32 if "args" in layout(weights) else 224)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = network.features(images)
        torch.testing.assert_close(backbone.eval()(images), maps.mean((2, 3)))
        assert not torch.equal(initial.eval()(images), backbone(images))
        stages = Stages(backbone)
        found = stages(images)
    assert list(stages.columns) == [f"features.{i}" for i in (
        (3, 7, 14, 21, 28) if name == "vgg11_bn" else (6, 13, 20, 27, 34))]
    torch.testing.assert_close(found[:, stages.columns[backbone.stages[-1]]], maps.flatten(1))


@pytest.mark.parametrize("name", ["vgg11", "alexnet", "mobilenet_v2"])
def test_other_networks_with_features_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "make_backbone", vgg_maker)
    network = torchvision.models.get_model(name)
    torch.save({n: v for n, v in network.state_dict().items() if "classifier" not in n},
               tmp_path / "file.pth")
    with pytest.raises(common.Failure, match="file.pth holds no backbone"):
        load_backbone(tmp_path / "file.pth")


class FakeViT(nn.Module):
    """timm's names for a ViT; remembers what it was asked for."""

    def __init__(self, image_size, patch_size, dim, depth, num_heads):
        super().__init__()
        self.asked = image_size, patch_size, dim, depth, num_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm1": nn.LayerNorm(dim)})
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(dim)


VITS = {
    "timm": lambda w: {**w, "head.weight": HEAD},
    "dino": lambda w: {"student": under("module.backbone.", w), "teacher": {
        **under("module.backbone.", w), "module.head.last_layer.weight_g": HEAD}},
    "mae": lambda w: {"model": {**w, "mask_token": HEAD, "decoder_pos_embed": HEAD,
                                "decoder_blocks.0.norm1.weight": HEAD, "decoder_norm.weight": HEAD},
                      "args": argparse.Namespace(model="mae_vit_base_patch16")},
    "moco v3": lambda w: {"state_dict": {**under("module.base_encoder.", w),
                                         **under("module.momentum_encoder.", w),
                                         "module.base_encoder.head.0.weight": HEAD}},
    "ours": lambda w: {"method": "mae", "args": {"num_heads": 3, "image_size": 40}, "model": {
        **under("encoder.", w), "decoder_pos_embed": HEAD}},
    "our moco": lambda w: {"method": "moco", "args": {"image_size": 40}, "model": {
        **under("online.0.", w), **under("target.0.", w), "online.1.0.weight": HEAD}},
    "backbone of our moco": lambda w: w,
}


@pytest.mark.parametrize("layout", VITS)
@pytest.mark.parametrize("dim, heads", [(384, 6), (1280, 16)])
def test_a_vit_of_every_layout(layout, dim, heads, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dino", types.SimpleNamespace(ViT=FakeViT))
    network = FakeViT(32, 8, dim, 11, heads)
    nn.init.normal_(network.pos_embed)
    if "moco" in layout:
        nn.init.zeros_(network.patch_embed.proj.bias)
    torch.save(VITS[layout](network.state_dict()), tmp_path / "file.pth")
    backbone, _, size = load_backbone(tmp_path / "file.pth")
    heads = 3 if layout == "ours" else 12 if "moco" in layout and dim == 384 else heads
    size_known = layout in ("ours", "our moco")
    assert backbone.asked == (32, 8, dim, 11, heads) and size == (40 if size_known else 32)
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), network.parameters()))


def test_a_vit_needs_dino(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dino", None)
    torch.save(FakeViT(32, 8, 64, 2, 1).state_dict(), tmp_path / "file.pth")
    with pytest.raises(common.Failure, match="dino"):
        load_backbone(tmp_path / "file.pth")


def test_the_untrained_network_is_that_of_the_seed():
    weights = reference().state_dict()
    torch.manual_seed(3)
    first, _ = build(weights, {})
    torch.manual_seed(3)
    assert digest(first) == digest(build(weights, {})[0])
    assert digest(first) != digest(build(weights, {})[0])


# --------------------------------------------------------------------------------------- command


def command(capsys, *flags):
    """-> exit status, lines on stdout, lines on stderr."""
    try:
        common.main(run, parse_args, [str(flag) for flag in flags])
        status = 0
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def test_command(class_folders, tmp_path, capsys):
    torch.save(common.make_backbone("resnet8", 32).state_dict(), tmp_path / "backbone.pth")
    status, out, err = command(capsys, "--checkpoint", tmp_path / "backbone.pth", "--data",
                               class_folders, "--features", tmp_path / "f.npy", "--device", "cpu",
                               "--max_images=20", "--layers", "--mlp", "--steps", "--neighbours",
                               tmp_path / "n.picture")
    assert status == 0 and not err
    assert any(line.startswith("trained") for line in out)
    assert any("SHA-256" in line for line in out)
    assert sum(line.startswith("layer") for line in out) == 3 and "mlp" in out[0]
    assert any(line.startswith("probe by steps") and "converged" in line for line in out)
    assert (tmp_path / "n.picture").read_bytes().startswith(b"\x89PNG")
    features = np.load(tmp_path / "f.npy")
    assert features.shape == (28, 128) and features.dtype == np.float32
    assert len(np.unique(features, axis=0)) == 28


@pytest.mark.parametrize("flags", [
    ["--labels", "nan"], ["--labels", "0"], ["--labels", "1.1"], ["--image-size", "0"],
    ["--layers", "0"], ["--layers", "x"], ["--max-images", "inf"], ["--workers", "-1"],
    ["--device", "abacus"], ["--unknown", "1"]])
def test_wrong_arguments_exit_2(flags, capsys):
    status, out, err = command(capsys, "--checkpoint", "x.pth", *flags)
    assert status == 2 and not out and len(err) == 1 and flags[0] in err[0]


def test_what_cannot_be_read_or_written_exits_1(class_folders, tmp_path, capsys):
    status, out, err = command(capsys, "--checkpoint", "none.pth")
    assert status == 1 and len(err) == 1 and "none.pth" in err[0]
    torch.save(common.make_backbone("resnet8", 32).state_dict(), tmp_path / "backbone.pth")
    given = ["--checkpoint", tmp_path / "backbone.pth", "--device", "cpu"]
    status, _, err = command(capsys, *given, "--data", tmp_path / "nowhere")
    assert status == 1 and len(err) == 1 and "nowhere" in err[0]
    for flag in "--features", "--neighbours":
        status, out, err = command(capsys, *given, "--data", class_folders, flag,
                                   tmp_path / "no" / "f.npy")
        assert status == 1 and len(err) == 1 and "f.npy" in err[0] and not out  # at once
    status, _, err = command(capsys, *given, "--data", class_folders, "--neighbours", tmp_path)
    assert status == 1 and len(err) == 1 and "cannot write" in err[0]
