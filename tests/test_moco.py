"""MoCo against independent slow versions, and each of the details that are commonly wrong."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import moco
from moco import MoCo, ema_update, moco_loss, moco_v3_loss, positive_found


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def slow_loss(query, keys, own, temperature):
    """Equation 1, term by term; keys[own(i)] is the positive of query i."""
    total = 0.0
    for i, q in enumerate(query):
        scores = [torch.exp(q @ k / temperature) for k in keys(i)]
        total = total - torch.log(scores[own(i)] / sum(scores))
    return total / len(query)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_losses_and_gradients_equal_slow_versions(temperature):
    query, key, queue = unit(5, 7).requires_grad_(), unit(5, 7), unit(11, 7)
    v2 = slow_loss(query, lambda i: [key[i], *queue], lambda i: 0, temperature)
    v3 = 2 * temperature * slow_loss(query, lambda i: key, lambda i: i, temperature)
    for fast, slow in ((moco_loss(query, key, queue, temperature), v2),
                       (moco_v3_loss(query, key, temperature), v3)):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(loss, query)[0] for loss in (fast, slow)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q: moco_loss(q, key, queue, temperature), query)


def test_keys_are_constants_in_the_losses():
    vectors = [unit(5, 7).requires_grad_() for _ in range(3)]
    (moco_loss(*vectors, 0.2) + moco_v3_loss(*vectors[:2], 0.2)).backward()
    assert [v.grad is not None for v in vectors] == [True, False, False]


def test_losses_at_chance_and_at_extremes():
    same = F.normalize(torch.ones(8, 4), dim=1)
    assert moco_loss(same, same, same[:5], 0.1).item() == pytest.approx(math.log(6))
    assert moco_v3_loss(same, same, 0.3).item() == pytest.approx(0.6 * math.log(8))
    z = torch.eye(8)
    found = moco_loss(z, z, z.roll(1, 0)[:1], 0.01).item()
    assert found == pytest.approx(math.log(2) / 8, abs=1e-6)
    assert moco_v3_loss(z, z, 0.01).item() == pytest.approx(0, abs=1e-6)
    assert moco_loss(z, -z, z, 1e-4).isfinite() and moco_v3_loss(z, z.roll(1, 0), 1e-4).isfinite()


def test_gradient_of_v3_hardly_depends_on_the_temperature():
    """At small scores the slope of 2τ · loss is that at any other τ."""
    query, key = (unit(6, 300) for _ in range(2))
    slopes = [torch.autograd.grad(moco_v3_loss(query.requires_grad_(), key, t), query)[0].norm()
              for t in (1.0, 2.0)]
    assert slopes[0].item() == pytest.approx(slopes[1].item(), rel=0.05)


def test_positive_found():
    z = torch.eye(8)
    assert positive_found(z, z, z[:0]) == 1
    assert positive_found(z, z.roll(1, 0), z[:0]) == 0
    assert positive_found(z, 0.9 * z, z[:4]) == 0.5


# ---- the queue


def test_queue_starts_with_unit_rows_and_replaces_the_oldest():
    """Whatever the batch: 12 keys, 5 at a time, then more than the queue holds."""
    model = MoCo(nn.Flatten(), 12, proj_dim=3, queue_size=12)
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(12))
    expected, everything = model.queue.clone(), []
    for b in 5, 5, 5, 5, 1, 12, 30, 2:
        keys = torch.randn(b, 3)
        everything += list(keys)
        model.enqueue(keys)
        newest = {tuple(k.tolist()) for k in everything[-12:]}
        assert newest <= {tuple(k.tolist()) for k in model.queue}
        assert model.queue[model.queue_ptr - 1].tolist() == keys[-1].tolist()
        if b == 5 and len(everything) == 5:
            assert torch.equal(model.queue[5:], expected[5:]) and model.queue_ptr == 5
    assert {"queue", "queue_ptr"} <= model.state_dict().keys()


# ---- the model


@pytest.mark.parametrize("version, expected", [(1, [12, 5]), (2, [12, 12, 5])])
def test_projectors_of_v1_and_v2(version, expected):
    """One and two layers, with bias and without BN; no predictor."""
    model = MoCo(nn.Flatten(), 12, version, proj_dim=5, queue_size=4)
    layers = [m for m in model.online[1] if isinstance(m, nn.Linear)]
    assert [layers[0].in_features] + [m.out_features for m in layers] == expected
    assert all(m.bias is not None for m in layers)
    kinds = [type(m) for m in model.online[1]]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear][-2 * version + 1 :]
    assert isinstance(model.predictor, nn.Identity)


@pytest.mark.parametrize("vit", [False, True])
def test_heads_of_v3(vit):
    """ResNet and ViT: linear layers without bias, BN; the last BN without scale and offset."""
    model = MoCo(nn.Flatten(), 12, 3, proj_dim=5, hidden_dim=7, vit=vit)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    projector, predictor = model.online[1], model.predictor
    assert [type(m) for m in projector] == hidden * (2 if vit else 1) + hidden[:2]
    assert [type(m) for m in predictor] == hidden + hidden[: 1 + vit]
    for mlp in projector, predictor:
        assert all(m.bias is None for m in mlp if isinstance(m, nn.Linear))
        norms = [m for m in mlp if isinstance(m, nn.BatchNorm1d)]
        assert norms[0].affine and (mlp is predictor or not norms[-1].affine)
    if vit:
        assert not predictor[-1].affine
    assert not any("predictor" in name for name, _ in model.target.named_parameters())
    assert not dict(model.named_buffers()).keys() & {"queue", "queue_ptr"}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_queries_have_gradient_and_keys_have_none(version):
    model = MoCo(small_backbone(), 12, version, proj_dim=5, queue_size=4, bn_groups=2, hidden_dim=7)
    for p1, p2 in zip(model.online.parameters(), model.target.parameters(), strict=True):
        assert torch.equal(p1, p2) and p1.requires_grad and not p2.requires_grad
    view1, view2 = torch.randn(2, 8, 3, 8, 8)
    before = {k: v.clone() for k, v in model.target.state_dict().items() if "running" in k}
    pairs = model(view1, view2)
    assert len(pairs) == (2 if version == 3 else 1)
    for query, key in pairs:
        assert query.requires_grad and not key.requires_grad and query.shape == key.shape == (8, 5)
        torch.testing.assert_close(query.norm(dim=1), torch.ones(8))
        torch.testing.assert_close(key.norm(dim=1), torch.ones(8))
    after = model.target.state_dict()  # the target is in training mode: batch statistics
    assert all(not torch.equal(v, after[k]) for k, v in before.items())


def test_v3_pairs_are_the_two_directions():
    model = MoCo(small_backbone(), 12, 3, proj_dim=5, hidden_dim=7)
    views = torch.randn(2, 8, 3, 8, 8)
    pairs, exchanged = model(*views), model(*views.flip(0))
    for i in range(2):
        for a, b in zip(pairs[i], exchanged[1 - i]):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(pairs[0][1], F.normalize(model.target(views[1]), dim=1))
        query = model.predictor(model.online(views[0]))
        torch.testing.assert_close(pairs[0][0], F.normalize(query, dim=1))


def test_average_moves_parameters_and_leaves_bn_statistics():
    model = MoCo(small_backbone(), 12, 3, proj_dim=5, hidden_dim=7)
    for tensor in model.online.state_dict().values():
        tensor.add_(1)
    before = copy.deepcopy(model.target.state_dict())
    ema_update(model.target, model.online, 0.9)
    parameters = dict(model.target.named_parameters())
    for key, tensor in model.target.state_dict().items():
        torch.testing.assert_close(tensor, before[key] + (0.1 if key in parameters else 0))


# ---- BN in groups


def small_backbone():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
                         nn.Linear(54, 12))


def test_bn_groups_equal_separate_batches():
    plain = nn.BatchNorm2d(4).double()
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    grouped = copy.deepcopy(plain)
    MoCo(grouped, 12, bn_groups=3, queue_size=4)
    x = (3 + torch.randn(12, 4, 5, 5, dtype=torch.float64)).requires_grad_()
    copies = [copy.deepcopy(plain) for _ in range(3)]
    expected = torch.cat([bn(part) for bn, part in zip(copies, x.chunk(3))])
    found = grouped(x)
    torch.testing.assert_close(found, expected)
    g = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad((y * g).sum(), x)[0]
                                 for y in (found, expected)))
    for name in "running_mean", "running_var":
        mean = sum(getattr(bn, name) for bn in copies) / 3
        torch.testing.assert_close(getattr(grouped, name), mean)
    assert grouped.num_batches_tracked == 1
    plain.load_state_dict(grouped.state_dict())  # the same keys
    torch.testing.assert_close(grouped.eval()(x), plain.eval()(x))


def test_groups_are_set_in_v1_and_v2_and_stay_in_the_copy():
    model = MoCo(common.make_backbone("resnet8", 32), 128, queue_size=4, bn_groups=4)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(isinstance(m, moco.GroupBatchNorm) and m.groups == 4 for m in norms)
    model = MoCo(common.make_backbone("resnet8", 32), 128, 3, hidden_dim=8)
    assert not any(isinstance(m, moco.GroupBatchNorm) for m in model.modules())


def test_v2_trains_a_network_without_bn(two_calls):
    assert two_calls("--arch", "vit_micro", "--version", "2")[1][1][0].version == 2


@pytest.fixture
def two_calls(monkeypatch, no_report, class_folders):
    """two_calls(*flags) -> what `train` called in two steps of 12 images, with the arguments."""
    calls = []

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*arguments):
            calls.append((name, [copy.deepcopy(a.detach()) if isinstance(a, torch.Tensor) else a
                                 for a in arguments]))
            return function(*arguments)

        monkeypatch.setattr(owner, name, watched)

    def start(*flags):
        shared = "--data images --recipe demo -b 12 --epochs 1 -j 0".split()
        args = moco.parse_args([*shared, *flags])
        watch(moco, "ema_update")
        watch(MoCo, "forward")
        watch(moco, "moco_loss")
        watch(moco, "moco_v3_loss")
        watch(moco, "positive_found")
        watch(MoCo, "enqueue")
        moco.train(args)
        return calls

    return start


def test_order_of_a_step(two_calls):
    """The average moves ahead of the keys, and the queue changes after loss and health number."""
    calls = two_calls()
    names = [name for name, _ in calls]
    assert names == ["ema_update", "forward", "moco_loss", "positive_found", "enqueue"] * 2
    first_keys, queue = calls[4][1][1], calls[7][1][2]
    assert torch.equal(queue[: len(first_keys)], first_keys)  # the second loss sees the first keys
    assert not torch.equal(calls[3][1][2][: len(first_keys)], first_keys)


def test_keys_are_shuffled_between_bn_groups_and_back(two_calls, monkeypatch):
    """view2 has its rows in another order than view1; loss and queue have them in view1's."""
    def colors(self, *views):
        query, key = (F.normalize(v.mean((2, 3)) - 0.3, dim=1) for v in views)
        return [(query + 0 * sum(p.sum() for p in self.online.parameters()), key)]

    monkeypatch.setattr(MoCo, "forward", colors)
    monkeypatch.setattr(moco, "augment", lambda images, *a, **k: common.normalize(images / 255))
    calls = two_calls("--proj-dim", "3")
    view1, view2 = (v.mean((2, 3)) for v in calls[1][1][1:])
    assert (view1 - view2).abs().max() > 0.1
    rows = torch.cdist(view1, view2).argmin(1)
    assert sorted(rows.tolist()) == list(range(12)) and rows.tolist() != list(range(12))
    query, key, *_ = calls[2][1]
    torch.testing.assert_close(query, key)
    torch.testing.assert_close(calls[4][1][1], key)


def test_v3_has_both_directions_and_no_queue(two_calls):
    calls = two_calls("--version", "3")
    assert [name for name, _ in calls] == ["ema_update", "forward", "moco_v3_loss",
                                           "moco_v3_loss", "positive_found"] * 2
    momenta = [arguments[2] for name, arguments in calls if name == "ema_update"]
    assert momenta[0] == 0.9 and momenta[1] == pytest.approx(0.95)  # to 1 on a cosine


def test_average_is_constant_in_v2(two_calls):
    calls = two_calls("--ema-momentum", "0.7")
    assert [a[2] for name, a in calls if name == "ema_update"] == [0.7, 0.7]


# ---- v3 with a ViT


FROZEN = {"encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"}


def test_start_of_the_vit():
    """Fixed sine positions, Xavier's bounds for q, k and v apart, all biases 0."""
    vit = moco.make_vit("vit_micro", 32)
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 128) and vit.feature_dim == 128
    place = vit.encoder.pos_embedding[0, 1 + 8 * 3 + 5]  # row 3, column 5
    omega = 10000 ** -(torch.arange(32) / 32)
    expected = torch.cat([(5 * omega).sin(), (5 * omega).cos(), (3 * omega).sin(),
                          (3 * omega).cos()])
    torch.testing.assert_close(place, expected)
    assert not vit.encoder.pos_embedding[0, 0].any()
    assert 0.7e-6 < vit.class_token.std() < 1.3e-6
    for name, p in vit.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif p.dim() in (2, 4):
            for q in p.chunk(3 if "in_proj" in name else 1):  # uniform
                bound = math.sqrt(6 / (len(q) + q[0].numel()))
                assert 0.98 * bound < q.abs().max() <= bound
                assert abs(q.std() / bound * 3**0.5 - 1) < 0.02 and abs(q.mean()) < bound / 20


@pytest.mark.parametrize("arch, image_size, tokens, heads", [
    ("vit_micro", 32, 65, 2), ("vit_small", 64, 257, 12), ("vit_small", 96, 37, 12)])
def test_shape_of_the_vit(arch, image_size, tokens, heads):
    vit = moco.make_vit(arch, image_size)
    assert vit.encoder.pos_embedding.shape[1] == tokens
    assert vit.encoder.layers[0].num_heads == heads


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_positions_and_patch_projection_do_not_move(name):
    vit = moco.make_vit("vit_micro", 32)
    model = MoCo(vit, vit.feature_dim, 3, 16, hidden_dim=32, vit=True)
    optimizer = moco.make_optimizer(name, model, 0.1)
    before = {n: p.clone() for n, p in vit.named_parameters()}
    sum(moco_v3_loss(*pair, 0.2) for pair in model(*torch.randn(2, 16, 3, 32, 32))).backward()
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    assert {n for n, p in vit.named_parameters() if torch.equal(p, before[n])} == FROZEN


def test_vit_trains_and_resume_alone_continues_it_as_v3(two_calls):
    first = two_calls("--arch", "vit_micro", "--out", "run")
    model = first[1][1][0]
    assert model.version == 3 and isinstance(model.predictor[-1], nn.BatchNorm1d)
    assert len(model.online[1]) == 8  # three layers
    args = moco.parse_args(["--resume", "--out", "run"])
    assert (args.version, args.arch, args.optimizer) == (3, "vit_micro", "adamw")
    assert args.weight_decay == 0.1 and args.temperature == 0.2 and args.batch_size == 12
    moco.train(args)  # nothing is left to do


# ---- optimizers, schedules, augmentations, recipes


def test_optimizers_decay_what_the_official_ones_do():
    model = MoCo(common.make_backbone("resnet8", 32), 128, 3, hidden_dim=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    for name in "sgd", "adamw":
        (group,) = moco.make_optimizer(name, model, 0.1).param_groups
        assert group["weight_decay"] == 0.1 and len(group["params"]) == len(trained)
    weights, others = moco.make_optimizer("lars", model, 0.1).param_groups
    assert weights["weight_decay"] == 0.1 and weights["adapt"]
    assert others["weight_decay"] == 0 and not others["adapt"]
    assert all(p.ndim > 1 for p in weights["params"]) and all(p.ndim == 1 for p in others["params"])
    assert len(weights["params"]) + len(others["params"]) == len(trained)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_augmentations_are_those_of_the_papers(version, operations, class_folders):
    """The views of v3 differ in blur and solarisation."""
    moco.train(moco.parse_args(
        "--data images --recipe imagenet -a resnet8 --image-size 96 --queue-size 8 --hidden-dim 8 "
        f"--version {version} -b 8 --epochs 0".split()))

    def jitter(*strengths, p):
        names = "brightness", "contrast", "saturation", "hue"
        return "color_jitter", dict(zip(names, strengths)) | {"p": p}

    def view(blur, solarize):
        colors = [jitter(0.4, 0.4, 0.4 if version == 2 else 0.2, 0.1, p=0.8),
                  ("random_grayscale", {"p": 0.2})]
        if version == 1:
            colors = [("random_grayscale", {"p": 0.2}), jitter(0.4, 0.4, 0.4, 0.4, p=1.0)]
        return [("random_resized_crop", {"size": 96, "scale": (0.2, 1.0)}), *colors,  # bilinear
                ("gaussian_blur", {"p": blur, "sigma": (0.1, 2.0)}),
                ("random_solarize", {"p": solarize}),
                ("random_horizontal_flip", {"p": 0.5}), ("normalize", {})]

    blurs = {1: (0.0, 0.0), 2: (0.5, 0.5), 3: (1.0, 0.1)}[version]
    assert operations == view(blurs[0], 0.0) + view(blurs[1], 0.2 if version == 3 else 0.0)


@pytest.mark.parametrize("flags, version, table", [
    ([], 2, {}), (["--version", "1"], 1, moco.V1), (["--version=3"], 3, moco.V3),
    (["--arch", "vit_small"], 3, moco.V3 | moco.VIT)])
def test_version_and_network_choose_the_recipe(flags, version, table):
    table = moco.RECIPES | table
    assert all(len(row) == 4 for row in table.values()) and table.keys() == moco.RECIPES.keys()
    for i, recipe in enumerate(("demo", "cpu", "cifar", "imagenet")):
        args = moco.parse_args(["--recipe", recipe, *flags])
        values = {k: getattr(args, k) for k in table}
        assert values == {k: row[i] for k, row in table.items()} | (
            {"arch": "vit_small"} if "--arch" in flags else {})
        assert args.version == version


@pytest.mark.parametrize("flags", [["--version", "4"], ["--version", "x"], ["--bn-groups", "0"],
                                   ["--queue-size", "0"], ["--arch", "vit_tall"], ["--version"],
                                   ["--image-size", "30", "-a", "vit_micro"],  # patches of 4
                                   ["--image-size", "72", "-a", "vit_small"]])  # of 16
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as end:
        moco.parse_args(flags)
    assert end.value.code == 2 and flags[0] in capsys.readouterr().err


def test_bn_groups_are_a_multiple_of_the_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = moco.parse_args(["--bn-groups", "6", "-b", "12", "--out", "run"])
    moco.parse_args(["--version", "3", "-b", "12"])
    Path("run").mkdir()
    common.save_file("run/checkpoint.pth", {"method": "moco", "args": vars(args)})
    assert moco.parse_args(["--resume", "--out", "run"]).bn_groups == 6
    for flags in ["-b", "12"], ["--resume", "--out", "run", "--bn-groups", "4"]:
        with pytest.raises(SystemExit):
            moco.parse_args(flags)
        assert "--bn-groups" in capsys.readouterr().err
