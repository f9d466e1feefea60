"""The evaluation against independent calculations; every file layout; the command."""

import argparse
import functools
import itertools
import math
import re
from functools import partial
from pathlib import Path

import common
import dino
import linear_probe as probe_file
import mae
import numpy as np
import pytest
import simclr
import torch
import torch.nn.functional as F
import torchvision
from conftest import write_images
from linear_probe import (calibrate_batch_norm, diagnostics, evaluate, extract_features,
                          knn, linear_path, linear_probe, load_backbone, load_init, parse_args, run,
                          sgd_path, stage_features, timm_to_torchvision)
from PIL import Image
from processes import run_processes
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import VisionTransformer

CPU = torch.device("cpu")


class Images:
    """What the evaluation needs of an ImageSet; image i has brightness i, or that of its class."""

    side = 16

    def __init__(self, labels, by_class=False, seed=0):
        self.labels, self.classes = torch.tensor(labels), [*range(max(labels) + 1)]
        value = self.labels * 60 + 30 if by_class else torch.arange(len(labels))
        noise = torch.randint(20, (len(labels), 3, 16, 16),
                              generator=torch.Generator().manual_seed(seed))
        self.pixels = (value[:, None, None, None] + noise * by_class).to(torch.uint8)

    def __len__(self):
        return len(self.labels)

    def load(self, index_lists, device):
        for indices in index_lists:
            yield self.pixels[indices], torch.ones(len(indices))


def brightness(images, aspect):
    return images[:, :, 0, 0].float()


def clusters(n, classes, dim, seed, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9)).double()
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, dim, generator=generator).double(), labels


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# --------------------------------------------------------------------------------- kNN and probe


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


def test_the_best_held_out_setting_is_fitted_again_on_all_images():
    x, y = clusters(60, 3, 20, seed=0, noise=6)
    test_x, test_y = clusters(400, 3, 20, seed=1, noise=6)
    report = linear_probe(x.clone(), y, test_x.clone(), test_y)
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
    assert report["held_out"] == top1(rest, x[held], y[held]) != top1(everything, x[held], y[held])
    assert report["probe"] == top1(everything, test_x, test_y)[report["chosen"]]
    assert report["probe"] != top1(rest, test_x, test_y)[report["chosen"]]


def few_steps(*given, count=5, **options):
    return itertools.islice(sgd_path(*given, **options), count)


def test_an_mlp_solves_what_no_linear_classifier_can():
    """The class is the sign of a product. After 10 steps an MLP has not learned it."""
    x, test_x = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(0))
    y, test_y = ((z[:, 0] * z[:, 1] > 0).long() for z in (x, test_x))
    given = x.clone(), y, test_x.clone(), test_y
    assert linear_probe(*given)["probe"] < 60
    mlp = linear_probe(*given, partial(few_steps, hidden=64))
    assert mlp["probe"] > 90 and mlp["held_out"][10] < 85 < mlp["held_out"][mlp["chosen"]]


def test_steps_of_the_probe_lower_its_loss():
    x, y = clusters(300, 3, 20, seed=0, noise=3)
    losses = {steps: F.cross_entropy(classifier(x), y).item()
              for steps, classifier in few_steps(x, y, 3)}
    assert list(losses) == [10, 30, 100, 300, 1000]
    assert list(losses.values()) == sorted(losses.values(), reverse=True)


# ----------------------------------------------------------------------------------- diagnostics


def test_diagnostics_of_collapse():
    z = torch.randn(1, 16).expand(100, 16)
    found = diagnostics(z, z)
    assert found["spread"] < 1e-5 and abs(found["uniformity"]) < 1e-5
    assert found["alignment"] == 0 and found["effective rank"] == pytest.approx(1, abs=0.1)


def test_diagnostics_of_the_uniform_sphere():
    """In three dimensions the cosine of two random directions is uniform on [-1, 1], so
    E exp(-2 |x - y|²) = exp(-4) · mean of exp(4 cos) = (1 - exp(-8)) / 8."""
    z = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)).double()
    found = diagnostics(7 * z, -z)  # the length does not matter
    assert found["spread"] == pytest.approx(1, abs=0.03)
    assert found["uniformity"] == pytest.approx(math.log((1 - math.exp(-8)) / 8), abs=0.03)
    assert found["alignment"] == pytest.approx(4)
    assert found["effective rank"] == pytest.approx(3, abs=0.01)
    assert found["alignment"] == pytest.approx(simclr.alignment(z, -z).item())
    assert found["uniformity"] == pytest.approx(simclr.uniformity(z).item())


# -------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("count", [1, 7, 256, 300])
def test_features_are_in_order(count):
    images = Images([0] * count)
    images.pixels = images.pixels % 100
    (x,) = extract_features(nn.Identity(), images, torch.arange(count), brightness, CPU)
    assert torch.equal(x, images.pixels[:, :, 0, 0].float())
    rows = torch.tensor([5, 1, 3]) % count
    (x,) = extract_features(nn.Identity(), images, rows, brightness, CPU)
    assert x[:, 0].tolist() == rows.tolist()


def features_of(count):
    images, rows = Images([0] * count), torch.arange(count)
    return extract_features(nn.Identity(), images, rows, brightness, CPU)[0].tolist()


@pytest.mark.parametrize("count", [1, 7])
def test_every_process_has_all_features(count):
    assert run_processes(2, features_of, count) == [features_of(count)] * 2


def test_calibrated_batch_norm_has_the_statistics_of_the_images():
    images = Images([0, 1, 2] * 14, by_class=True)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    network[1].running_mean.fill_(7)
    calibrate_batch_norm(network, images, 16, CPU)
    outputs = network[:2](probe_file.centre_view(images.pixels, torch.ones(42), 16))
    close(outputs.mean((0, 2, 3)), torch.zeros(4), 1e-3)
    close(outputs.var((0, 2, 3)), torch.ones(4), 1e-2)
    assert not any(module.training for module in network.modules())


@torch.no_grad()
def test_stages():
    """Maps are averaged to equal numbers, tokens over the patches; no hook stays."""
    net, x = common.make_backbone("resnet8", 32).eval(), torch.randn(2, 3, 32, 32)
    z = net.relu(net.bn1(net.conv1(x)))
    found = stage_features(net, ["", "layer1", "layer2", "layer3"], x)
    for name, side, features in zip(net.stages, (2, 1, 1), found[1:]):
        z = getattr(net, name)(z)
        close(features, F.adaptive_avg_pool2d(z, side).flatten(1))
    close(found[0], net(x))
    close(found[0], found[3])
    assert not any(module._forward_hooks for module in net.modules())
    vit = dino.ViT(16, 4, 64, 3, 1).eval()
    x = torch.randn(2, 3, 16, 16)
    end, middle = stage_features(vit, ["", "blocks.1"], x)
    close(end, vit(x))
    close(middle, vit.blocks[:2](vit.embed(x))[:, 1:].mean(1))


# ---------------------------------------------------------------------------------------- report


def test_report(capsys, monkeypatch):
    monkeypatch.setattr(probe_file, "sgd_path", partial(few_steps, count=2))
    train, test = (Images([0, 1, 2] * 12 + [-1], by_class=True, seed=s) for s in (0, 1))
    networks = [common.make_backbone("resnet8", 16) for _ in range(2)]
    plain = evaluate(*networks, train, test, 16, CPU)
    report = evaluate(*networks, train, test, 16, CPU, layers=True)
    stages = [f"{kind} layer{i}" for kind in ("trained", "random") for i in (1, 2, 3)]
    assert {*report} == {*plain, *stages} and {*plain} == {"trained", "random", "pixels"}
    assert all(report[name] == row and row["knn"] > 60 and row["probe"] > 60
               for name, row in plain.items())
    assert report["trained layer3"] == report["trained"]
    printed = capsys.readouterr().out
    assert "of 36 test images (chance 33.3)" in printed and "of 36 training images" in printed
    best = re.search(r"best stage, by held-out training images: (.+), ", printed)[1]
    top1 = {name: max(report[name]["held_out"].values()) for name in stages[:3]}
    assert top1[best] == max(top1.values())
    more = evaluate(*networks, train, test, 16, CPU, mlp=True, steps=True)
    assert {*more} == {name + by for name in plain for by in ("", ", MLP", ", by steps")}
    assert all(more[name] == row for name, row in plain.items())
    assert all(more[f"trained, {by}"]["knn"] == more["trained"]["knn"] and
               list(more[f"trained, {by}"]["held_out"])[0] == 10 for by in ("MLP", "by steps"))
    assert re.search(r"trained, by steps 10: \d+\.\d 30: ", capsys.readouterr().out)
    few = evaluate(*networks, Images([0, 1] * 20), test, 16, CPU, labels=0.1)
    assert all(top1 in (0, 100) for top1 in few["trained"]["held_out"].values())  # of one image
    assert "of 4 training images" in capsys.readouterr().out


def test_without_labels_the_report_says_what_to_do(capsys):
    networks = [common.make_backbone("resnet8", 16) for _ in range(2)]
    for train, test in (Images([0, 1] * 4), None), (Images([-1] * 4 + [0]), Images([0, 1])):
        assert evaluate(*networks, train, test, 16, CPU) == {}
        printed = capsys.readouterr().out
        assert "nan" not in printed and "--neighbours" in printed and printed.count("\n") == 1


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


def under(prefix, weights):
    return {prefix + name: value for name, value in weights.items() if not name.startswith("fc.")}


def other(prefix):
    return under(prefix, reference(seed=1).state_dict())


HEAD = torch.zeros(4, 4)
LAYOUTS = {  # -> what is named as not used
    "torchvision": (lambda w: w, "fc"),
    "timm": (lambda w: {"state_dict": under("", w), "state_dict_ema": other("")}, "state_dict_ema"),
    "moco": (lambda w: {"epoch": 1, "arch": "resnet50", "state_dict": {
        **other("module.encoder_k."), **under("module.encoder_q.", w),
        "module.encoder_q.fc.0.weight": HEAD, "module.queue": HEAD}}, "encoder_k, fc, queue"),
    "moco v3": (lambda w: {"state_dict": {
        **other("module.momentum_encoder."), **under("module.base_encoder.", w),
        "module.base_encoder.fc.0.weight": HEAD, "module.predictor.0.weight": HEAD}},
        "fc, momentum_encoder, predictor"),
    "swav": (lambda w: {**under("module.", w), "module.projection_head.0.weight": HEAD,
                        "module.prototypes.weight": HEAD}, "projection_head, prototypes"),
    "barlow": (lambda w: {"epoch": 3, "model": {
        **under("module.backbone.", w), "module.bn.running_mean": HEAD,
        "module.projector.0.weight": HEAD}, "optimizer": {"state": {0: {"mu": HEAD}}}},
        "bn, optimizer, projector"),
    "vicreg": (lambda w: under("", w), None),
    "dino": (lambda w: {
        "student": other("module.backbone."), "args": argparse.Namespace(arch="resnet50"),
        "teacher": {**under("backbone.", w), "head.mlp.0.weight": HEAD},
        "dino_loss": {"center": HEAD}}, "dino_loss, head, student"),
    "solo-learn": (lambda w: {"epoch": 3, "state_dict": {
        **other("momentum_backbone."), **under("backbone.", w), "classifier.weight": HEAD}},
        "classifier, momentum_backbone"),
    "ours": (lambda w: {"recipe": "demo", "args": {"image_size": 96}, "model": {
        **under("backbone.", w), "projector.0.weight": HEAD}}, "projector"),
    "ours, byol": (lambda w: {"recipe": "demo", "args": {"image_size": 96}, "model": {
        **other("target.backbone."), **under("online.backbone.", w)}}, "target"),
    "ours, dino": (lambda w: {"recipe": "demo", "args": {"image_size": 96}, "model": {
        **other("student.backbone."), **under("teacher.backbone.", w), "center": HEAD}},
        "center, student"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resnet_of_every_layout_gives_torchvisions_features(layout, tmp_path, capsys):
    network, (make, unused) = reference(), LAYOUTS[layout]
    torch.save(make(network.state_dict()), tmp_path / "file.pth")
    backbone, initial, size = load_backbone(tmp_path / "file.pth")
    assert size == (96 if "ours" in layout else 224)
    printed = capsys.readouterr().out
    assert printed.endswith(f"not used: {unused}\n") if unused else not printed
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torchvision_features(network, images)
        torch.testing.assert_close(backbone.eval()(images), expected)
        assert not torch.allclose(initial.eval()(images), expected, atol=1e-2)
    load_init(initial, tmp_path / "file.pth")
    assert same_weights(initial, backbone)


def test_bottlenecks_widths_and_stems_are_read_from_the_weights(tmp_path, capsys):
    path, images = tmp_path / "file.pth", torch.randn(1, 3, 64, 64)
    torch.save((deep := reference(Bottleneck)).state_dict(), path)
    with torch.no_grad():
        found = load_backbone(path)[0].eval()
        torch.testing.assert_close(found(images), torchvision_features(deep, images))
        for ours in (common.make_backbone("resnet8", 32), common.make_backbone("resnet8x2", 32),
                     common.ResNet(BasicBlock, (2, 1, 1, 2), 0.5, "cifar")):
            torch.save(ours.state_dict(), path)
            found, _, size = load_backbone(path)
            assert size == 32 and load_backbone(path, 48)[2] == 48
            torch.testing.assert_close(found.eval()(images), ours.eval()(images))
            assert "assuming stride" in capsys.readouterr().out
        ours.conv1.padding = 2, 2  # solo-learn's for CIFAR
        weights = under("backbone.", ours.state_dict())
        torch.save({"pytorch-lightning_version": "2", "state_dict": weights},
                   tmp_path / "lightning.pth")
        for found in load_backbone(tmp_path / "lightning.pth"), load_backbone(path, stem_padding=2):
            torch.testing.assert_close(found[0].eval()(images), ours(images))
        assert "--stem-padding 2" in capsys.readouterr().out


def rename(weights, old, new):
    return {new if name == old else name: value for name, value in weights.items()}


@pytest.mark.parametrize("damage, reason", [
    (lambda w: {n: v for n, v in w.items() if n != "layer3.0.bn2.weight"}, "layer3.0.bn2.weight"),
    (lambda w: {n: v for n, v in w.items() if n != "bn1.running_var"}, "bn1.running_var"),
    (lambda w: rename(w, "conv1.weight", "conv1.0.weight"), "lacking 'conv1.weight'"),
    (lambda w: rename(w, "layer1.0.conv1.weight", "stage1.0.conv1.weight"), "no weights"),
    (lambda w: w | {"layer2.0.conv2.weight": torch.zeros(128, 4, 3, 3)}, "size mismatch"),
    (lambda w: w | {"layer2.0.se.fc1.weight": HEAD}, "Unexpected key.*layer2.0.se.fc1"),
    (lambda w: w | {"fc_norm.weight": HEAD}, "Unexpected key.*fc_norm"),
    (lambda w: w | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, "size mismatch"),
    (lambda w: w | {"bn1.bias": torch.full((64,), math.nan)}, "not finite"),
    (lambda w: {"fc.weight": HEAD}, "no weights of a ResNet"), (lambda w: [1], "no weights"),
    (lambda w: HEAD, "no weights"),
])
def test_a_file_that_is_not_what_it_seems_is_refused(damage, reason, tmp_path):
    torch.save(damage(under("", reference().state_dict())), tmp_path / "file.pth")
    with pytest.raises(common.Failure, match=f"file.pth.*{reason}") as failure:
        load_backbone(tmp_path / "file.pth")
    assert len(str(failure.value)) < 400


def test_a_pickled_network_is_named_with_the_way_out(tmp_path):
    torch.save({"model": nn.Sequential(nn.Linear(2, 2))}, tmp_path / "file.pth")
    with pytest.raises(common.Failure, match=r"pickled torch.*Sequential object.*state_dict\(\)"):
        load_backbone(tmp_path / "file.pth")
    for path, content in ("text.pth", b"hello"), ("none.pth", None):
        if content:
            (tmp_path / path).write_bytes(content)
        with pytest.raises(common.Failure, match=f"{path}"):
            load_backbone(tmp_path / path)


@pytest.mark.parametrize("name, prefix", [
    ("regnet_y_400mf", "model.backbone."),
    pytest.param("vgg11_bn", "", marks=pytest.mark.torture),
    pytest.param("convnext_tiny", "", marks=pytest.mark.torture),
    pytest.param("resnext50_32x4d", "module.", marks=pytest.mark.torture)])
def test_arch_names_another_network_of_torchvision(name, prefix, tmp_path):
    network = common.make_backbone(name, 32).eval()
    torch.save(under(prefix, network.state_dict()), tmp_path / "file.pth")
    backbone, initial, size = load_backbone(tmp_path / "file.pth", 32, name)
    assert size == 32 and same_weights(backbone, network) and not same_weights(initial, network)
    with pytest.raises(common.Failure, match="file.pth"):
        load_backbone(tmp_path / "file.pth")
    with pytest.raises(common.Failure, match="file.pth"):
        load_backbone(tmp_path / "file.pth", arch="densenet121")


# ------------------------------------------------------------------------------------------ ViTs

SHAPES = [(32, 4, 128, 4, 2), (64, 16, 384, 2, 6), (56, 14, 1280, 1, 16)]  # side, patch, dim, ...


def vit_reference(module, *shape):
    """A ViT none of whose parameters is 0 or 1 everywhere."""
    torch.manual_seed(0)
    vit = module.ViT(*shape).eval()
    for name, p in vit.named_parameters():
        if p.dim() == 1:
            nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return vit


def saved(weights, path):
    torch.save(weights, path)
    return path


VITS = {
    "timm": lambda w: {**w, "head.weight": HEAD},
    "dino": lambda w: {"student": under("module.backbone.", w), "teacher": {
        **under("backbone.", w), "head.last_layer.weight_g": HEAD}},
    "mae": lambda w: {"model": {**w, "mask_token": HEAD, "decoder_pos_embed": HEAD,
                                "decoder_blocks.0.norm1.weight": HEAD},
                      "args": argparse.Namespace(model="mae_vit_base_patch16")},
    "moco v3": lambda w: {"state_dict": {**under("module.base_encoder.", w),
                                         **under("module.momentum_encoder.", w),
                                         "module.base_encoder.head.0.weight": HEAD}},
}


@pytest.mark.parametrize("module", [dino, mae])
@pytest.mark.parametrize("shape", [*SHAPES[:2],
                                   pytest.param(SHAPES[2], marks=pytest.mark.torture)])
@torch.no_grad()
def test_features_and_stages_of_a_vit(shape, module, tmp_path):
    theirs, x = vit_reference(module, *shape), torch.randn(3, 3, shape[0], shape[0])
    for layout in VITS.values():
        vit, _, size = load_backbone(saved(layout(theirs.state_dict()), tmp_path / "file.pth"))
        assert size == shape[0]
        close(vit.eval()(x), theirs(x))
    timm = [f"blocks.{i}" for i in range(shape[3])]
    own = [f"encoder.layers.encoder_layer_{i}" for i in range(shape[3])]
    for a, b in zip(stage_features(vit, own, x), stage_features(theirs, timm, x), strict=True):
        close(a, b)


def test_names_pass(tmp_path):
    theirs, x = vit_reference(dino, *SHAPES[0]).train(), torch.randn(2, 3, 32, 32)
    weights = theirs.state_dict()
    names = timm_to_torchvision(weights)
    vit = load_backbone(saved(weights, tmp_path / "a.pth"))[0]
    assert names.keys() == vit.state_dict().keys() == timm_to_torchvision(names).keys()
    released = {re.sub(r"mlp\.([03])", lambda m: f"mlp.linear_{1 + int(m[1]) // 3}", n): t
                for n, t in names.items()}  # names in torchvision's files
    for same in names, released:
        close(load_backbone(saved(same, tmp_path / "b.pth"))[0](x), vit(x), 0)
    load_init(fresh := load_backbone(tmp_path / "a.pth")[1], tmp_path / "a.pth")
    assert same_weights(fresh, vit)
    load_init(timm := dino.ViT(*SHAPES[0]), tmp_path / "a.pth")  # into timm's
    assert same_weights(timm, theirs)


@pytest.mark.parametrize("size", [16, 48, 64])
def test_another_image_size(size, tmp_path):
    weights, x = vit_reference(dino, *SHAPES[0]).state_dict(), torch.randn(2, 3, size, size)
    vit, _, found = load_backbone(saved(weights, tmp_path / "file.pth"), size)
    grid = weights["pos_embed"][:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (size // 4,) * 2, mode="bicubic", align_corners=True).flatten(2).mT
    theirs = dino.ViT(size, *SHAPES[0][1:]).eval()
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], grid], 1)
    theirs.load_state_dict(weights)
    close(vit.eval()(x), theirs(x))
    assert found == size
    with pytest.raises(common.Failure, match=f"--image-size {size + 2} is no multiple"):
        load_backbone(tmp_path / "file.pth", size + 2)


@pytest.mark.parametrize("extra", [
    "blocks.2.ls1.gamma", "blocks.2.attn.q_norm.weight", "blocks.2.attn.norm.weight", "reg_token",
    "norm_pre.weight", "fc_norm.weight", "dist_token"])
def test_other_vits_are_refused(extra, tmp_path):
    weights = vit_reference(dino, *SHAPES[0]).state_dict()
    with pytest.raises(common.Failure, match="Unexpected key"):
        load_backbone(saved(weights | {extra: torch.ones(128)}, tmp_path / "file.pth"))
    for missing in "blocks.1.attn.qkv.bias", "norm.weight", "patch_embed.proj.bias", "cls_token":
        part = {n: t for n, t in weights.items() if n != missing}
        with pytest.raises(common.Failure, match="Missing key|lacking"):
            load_backbone(saved(part, tmp_path / "file.pth"))
    with pytest.raises(common.Failure, match="attention heads"):
        load_backbone(saved(dino.ViT(20, 4, 96, 3, 3).state_dict(), tmp_path / "file.pth"))


def test_heads_of_moco_v3s_small_vit(tmp_path, capsys):
    weights = dino.ViT(32, 16, 384, 1, 12).state_dict()
    weights["patch_embed.proj.bias"].zero_()
    vit = load_backbone(saved(weights, tmp_path / "file.pth"))[0]
    assert isinstance(vit, VisionTransformer) and "assuming 12 att" in capsys.readouterr().out
    assert vit.encoder.layers[0].self_attention.num_heads == 12


# --------------------------------------------------------------------------------------- command


@pytest.fixture
def command(tmp_path, capsys):
    """-> a function of flags that gives exit status, lines on stdout, lines on stderr."""
    torch.save(common.make_backbone("resnet8", 32).state_dict(), tmp_path / "backbone.pth")
    given = ["--checkpoint", str(tmp_path / "backbone.pth"), "--device", "cpu", "--workers", "0"]

    def call(*flags):
        try:
            common.main(run, parse_args, given + [str(flag) for flag in flags])
            status = 0
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return call


def test_command(class_folders, command, monkeypatch):
    monkeypatch.setattr(probe_file, "sgd_path", partial(few_steps, count=2))
    status, out, err = command("--data", class_folders, "--layers", "--max-images", 20)
    assert status == 0 and not err and any("best stage" in line for line in out)
    assert sum(line.startswith("kNN") for line in out) == 9
    status, out, err = command("--data", class_folders, "--diagnostics")
    assert status == 0 and not err and out[-1].startswith("spread ") and "nan" not in out[-1]
    status, out, err = command("--data", class_folders, "--neighbours", "n.png")
    assert status == 0 and not err
    assert Image.open("n.png").size == (8 * 132 + 4, 2 * 132 + 4)  # a row for each class
    status, out, err = command("--data", class_folders, "--max-images", 20, "--mlp", "--steps")
    assert status == 0 and not err and sum(line.startswith("kNN") for line in out) == 9


@pytest.mark.parametrize("layout", ["train and val", "split", "flat", "one"])
def test_features_of_all_images_in_the_order_of_files(layout, class_folders, command, tmp_path):
    root = {"train and val": class_folders, "split": class_folders / "train",
            "flat": class_folders / "train" / "cat", "one": tmp_path / "one"}[layout]
    write_images(tmp_path / "one", 1)
    if layout != "one":
        broken = sorted(root.rglob("*.png"))[3]
        broken.write_bytes(b"no image")
    status, out, err = command("--data", root, "--features", "f.npz")
    assert status == 0 and not err
    saved = np.load("f.npz")
    files = sorted(str(file) for file in root.rglob("*.png"))
    if layout != "one":
        files.remove(str(broken))
        assert any(broken.name in line and "unreadable" in line for line in out)
    assert saved["names"].tolist() == files and saved["features"].shape == (len(files), 128)
    labels = [{"cat": 0, "dog": 1}.get(Path(file).parent.name, -1) for file in files]
    labels = labels if layout in ("train and val", "split") else [-1] * len(files)
    assert saved["labels"].tolist() == labels
    assert saved["classes"].tolist() == (["cat", "dog"] if max(labels) > 0 else [])
    backbone, _, size = load_backbone(tmp_path / "backbone.pth")
    image = torch.from_numpy(np.array(Image.open(files[-1]))).permute(2, 0, 1)[None]
    image = F.interpolate(image.float(), (64, 64), mode="bicubic", antialias=True).clamp(0, 255)
    expected = backbone.eval()(probe_file.centre_view(image, torch.ones(1), size))[0]
    close(torch.from_numpy(saved["features"][-1]), expected.detach(), 0.1 * expected.max().item())


@pytest.mark.parametrize("flags", [["--labels", "nan"], ["--labels", "0"], ["--image-size", "0"],
                                   ["--max-images", "inf"], ["--stem-padding", "3"],
                                   ["--arch", "x"], ["--device", "abacus"], ["--unknown", "1"]])
def test_wrong_arguments_exit_2(flags, command):
    status, out, err = command(*flags)
    assert status == 2 and not out and len(err) == 1 and flags[0] in err[0]


def test_what_cannot_be_read_or_written_exits_1(class_folders, tmp_path, command):
    write_images(tmp_path / "one", 1)
    for flags, named in ((["--checkpoint", "none.pth"], "none.pth"),
                         (["--data", "nowhere"], "nowhere"),
                         (["--data", class_folders, "--features", tmp_path], "cannot write"),
                         (["--neighbours", tmp_path / "no" / "n.png"], "cannot write"),
                         (["--data", tmp_path / "one", "--diagnostics"], "two images")):
        status, _, err = command(*flags)
        assert status == 1 and len(err) == 1 and named in err[0]
