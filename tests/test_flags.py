"""What reaches the optimizer, the model, the views and the loss of a run from its flags."""

import importlib
import math

import pytest
import torch
from conftest import METHODS
from test_run import load, record_loss, start
from torch.optim.optimizer import register_optimizer_step_pre_hook

import linear_probe
import mae
import moco

pytestmark = pytest.mark.usefixtures("class_folders", "no_report")

# ---- optimizer


@pytest.fixture
def steps():
    """A list that gets, at each step of an optimizer, its name and its first parameter group."""
    seen = []

    def record(optimizer, args, kwargs):
        seen.append((type(optimizer).__name__.lower(), dict(optimizer.param_groups[0])))

    hook = register_optimizer_step_pre_hook(record)
    yield seen
    hook.remove()


def expected_rates(method):
    """With a peak of 0.1, in nine steps, of which the first three are the warm-up."""
    end = {"swav": 1e-4, "barlow": 1e-4, "dino": 1e-6}.get(method, 0.0)
    if method in ("rotation", "jigsaw"):
        after = [0.1, 0.1, 0.1, 0.02, 0.02, 0.02]  # a drop at 0.7 of the training
    elif method == "simsiam":
        after = [0.1, 0.1, 0.1, 0.05, 0.05, 0.05]  # its demonstration halves the rate there
    else:
        after = [end + (0.1 - end) * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    return [0.1 / 3, 0.2 / 3, 0.1, *after]


@pytest.mark.parametrize("method", METHODS)
def test_rates(method, steps):
    flags = ["--lr-factor", "0.2"] if method in ("rotation", "jigsaw") else []
    start(method, "--epochs", "3", "--warmup-epochs", "1", "--lr", "3.2", *flags)
    assert [group["lr"] for _, group in steps] == pytest.approx(expected_rates(method))


OTHERS = {"simclr": "lars", "moco": "adamw", "byol": "lars", "swav": "lars", "dino": "sgd"}


@pytest.mark.parametrize("method", METHODS)
def test_weight_decay_and_momentum(method, steps):
    start(method, "--epochs", "1", "--wd", "0.3")
    _, group = steps[0]
    assert group["weight_decay"] == 0.3
    assert group.get("momentum", 0.9) == 0.9  # AdamW has none


@pytest.mark.parametrize("method, name", OTHERS.items())
def test_another_optimizer(method, name, steps):
    start(method, "--epochs", "1", "--optimizer", name, "--wd", "0.3")
    found, group = steps[0]
    assert found == name
    assert group["weight_decay"] == 0.3
    assert group.get("momentum", 0.9) == 0.9


# ---- model


@pytest.mark.parametrize("method, flags, shapes", [
    ("simclr", "--proj-layers 3 --proj-dim 24", {"projector.6.weight": (24, 32)}),
    ("moco", "--version 3 --proj-dim 24 --hidden-dim 40", {"predictor.0.weight": (40, 24)}),
    ("byol", "--proj-dim 24 --hidden-dim 40", {"predictor.0.weight": (40, 24)}),
    ("simsiam", "--proj-dim 24 --pred-dim 12 --proj-layers 3",
     {"predictor.0.weight": (12, 24), "projector.6.weight": (24, 24)}),
    ("simsiam", "--proj-layers 2 --proj-dim 24",
     {"projector.3.weight": (24, 24), "projector.6.weight": None}),
    ("swav", "--proj-dim 24 --num-prototypes 12", {"prototypes.weight": (12, 24)}),
    ("barlow", "--proj-dim 24", {"projector.6.weight": (24, 24)}),
    ("dino", "--no-head-bn --out-dim 24 --hidden-dim 40",
     {"student.head.mlp.2.weight": (40, 40), "student.head.last_layer.weight": (24, 256)}),
    ("mae", "--decoder-depth 2 --decoder-dim 96",
     {"decoder_blocks.1.norm1.weight": (96,), "decoder_blocks.2.norm1.weight": None}),
    ("jigsaw", "--permutations 12 --tile-dim 24 --hidden-dim 40",
     {"orders": (12, 9), "embed.0.weight": (24, 32), "head.0.weight": (40, 216)})])
def test_heads(method, flags, shapes):
    """None: there is no such layer."""
    start(method, "--epochs", "0", *flags.split())
    model = load("run/checkpoint.pth")["model"]
    found = {name: tuple(model[name].shape) if name in model else None for name in shapes}
    assert found == shapes


def test_heads_of_the_decoder(monkeypatch):
    """One for each 32 dimensions."""
    heads = []
    init = mae.MAE.__init__

    def record(model, *args, **options):
        init(model, *args, **options)
        heads.append(model.decoder_blocks[0].attn.num_heads)

    monkeypatch.setattr(mae.MAE, "__init__", record)
    start("mae", "--epochs", "0", "--decoder-dim", "96")
    assert heads == [3]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "mae"])
def test_whose_residual_blocks_start_as_identities(method):
    """Those of the methods whose official code starts their last BN at 0."""
    start(method, "-a", "resnet18x0.125", "--epochs", "0")
    last_bn = load("run/backbone.pth")["layer3.1.bn2.weight"]
    assert (not last_bn.any()) == (method in ("simclr", "byol", "simsiam", "barlow"))


def test_jigsaws_first_layer_is_that_for_whole_images():
    start("jigsaw", "-a", "resnet18x0.125", "--image-size", "96", "--tile-size", "24",
          "--epochs", "0")
    assert load("run/backbone.pth")["conv1.weight"].shape[2:] == (7, 7)


# ---- which networks are evaluated, and how


@pytest.mark.parametrize("method", METHODS)
def test_the_untrained_network_is_neither_trained_nor_the_init_file(method, monkeypatch):
    start(method, "--epochs", "0", "--out", "fresh")
    fresh = load("fresh/backbone.pth")
    start(method, "--epochs", "0", "--seed", "1", "--out", "other")
    networks = []

    def evaluate(backbone, untrained, *args, **options):
        networks.append(untrained)

    monkeypatch.setattr(linear_probe, "evaluate", evaluate)
    start(method, "--epochs", "1", "--init", "other/backbone.pth")
    (untrained,) = networks
    for name, parameter in untrained.named_parameters():
        assert torch.equal(parameter, fresh[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_untrained_networks_and_those_of_tiles_are_calibrated(method, monkeypatch):
    calls = []

    def quick_knn(*args, calibrate=False, **options):
        calls.append(calibrate)

    monkeypatch.setattr(linear_probe, "quick_knn", quick_knn)
    start(method, "--epochs", "1")
    assert calls == [True, method == "jigsaw"]  # untrained, trained


# ---- views


@pytest.mark.parametrize("method", ["simclr", "byol", "simsiam", "swav", "barlow", "dino"])
def test_jitter_strength(method, operations):
    jitters = []
    for strength in "1", "0.5":
        operations.clear()
        start(method, "--epochs", "0", "--jitter-strength", strength, "--out", strength)
        jitters.append(dict(operations)["color_jitter"])
    whole, half = jitters
    for name in "brightness", "contrast", "saturation", "hue":
        assert half[name] == whole[name] / 2


@pytest.mark.parametrize("method", ["simclr", "byol", "barlow", "mae"])
def test_small_views_are_resized_bilinearly(method, operations):
    start(method, "--epochs", "0")
    assert dict(operations)["random_resized_crop"]["interpolation"] == "bilinear"


@pytest.mark.parametrize("method, flags", [
    ("rotation", "--invert 0.3 --crop shift"),
    ("jigsaw", "--invert 0.3 --gray 0.6 --crop-scale 1")])
def test_views_of_pretext_tasks(method, flags, operations):
    start(method, "--epochs", "0", *flags.split())
    given = dict(operations)
    assert given["random_solarize"]["p"] == 0.3
    assert "random_resized_crop" not in given
    if method == "jigsaw":
        assert given["random_grayscale"]["p"] == 0.6


# ---- loss


@pytest.mark.parametrize("method, gradients", [
    ("simclr", [True, True]),
    ("moco", [True, False, False]),  # query, key, queue
    ("byol", [True, True, False, False]),  # predictions, targets
    ("simsiam", [True, True, True, True]),  # the loss stops that of the z
    ("swav", [True, False, False]),  # scores, codes
    ("barlow", [True, True]),
    ("dino", [True, False, False]),  # student, teacher, center
    ("mae", [True, False, False]),  # prediction, images, mask
    ("rotation", [True, False]),  # logits, labels
    ("jigsaw", [True, False])])
def test_what_has_a_gradient(method, gradients, monkeypatch):
    calls = record_loss(monkeypatch, importlib.import_module(method), method)
    start(method, "--epochs", "1")
    tensors, _ = calls[0]
    assert [tensor.requires_grad for tensor in tensors] == gradients


def test_what_has_a_gradient_in_moco_v3(monkeypatch):
    calls = record_loss(monkeypatch, moco, "moco_v3")
    start("moco", "--version", "3", "--epochs", "1")
    for tensors, _ in calls:
        assert [tensor.requires_grad for tensor in tensors] == [True, False]  # query, key


@pytest.mark.parametrize("flags, fraction", [([], 0.75), (["--mask-ratio", "0.5"], 0.5)])
@pytest.mark.parametrize("objective", ["mae", "simmim"])
def test_mask_ratio(objective, flags, fraction, monkeypatch):
    """The loss is that of the removed patches."""
    seen = []
    loss = getattr(mae, f"{objective}_loss")

    def record(prediction, images, mask, *args, **options):
        seen.append(mask.mean().item())
        return loss(prediction, images, mask, *args, **options)

    monkeypatch.setattr(mae, f"{objective}_loss", record)
    start("mae", "--objective", objective, "--epochs", "1", *flags)
    assert set(seen) == {fraction}
