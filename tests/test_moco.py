"""MoCo against independent slow versions, and each of the details that are commonly wrong."""

import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
import torchvision
from processes import run_processes
from torch import nn

import common
import linear_probe
import moco
from common import Failure
from moco import GroupBatchNorm, MoCo, MoCoV3, moco_loss, moco_v3_loss, positive_found


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def small_backbone():
    """Views of 8 x 8 pixels -> (B, 12)."""
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
                         nn.Linear(54, 12))


# ---- losses


def slow_term(query, positive, keys, temperature):
    """Equation 1 for one query, term by term: `positive` is the row of `keys` to be found."""
    scores = [torch.exp(query @ key / temperature) for key in keys]
    return -torch.log(scores[positive] / sum(scores))


def slow_moco_loss(query, key, queue, temperature):
    terms = [slow_term(query[i], 0, [key[i], *queue], temperature) for i in range(len(query))]
    return sum(terms) / len(terms)


def slow_moco_v3_loss(query, key, temperature):
    terms = [slow_term(query[i], i, key, temperature) for i in range(len(query))]
    return 2 * temperature * sum(terms) / len(terms)


def assert_same_loss_and_gradient(fast, slow, query):
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    (fast_gradient,) = torch.autograd.grad(fast, query)
    (slow_gradient,) = torch.autograd.grad(slow, query)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_losses_and_gradients_equal_slow_versions(temperature):
    query = unit(5, 7).requires_grad_()
    key = unit(5, 7)
    queue = unit(11, 7)
    assert_same_loss_and_gradient(moco_loss(query, key, queue, temperature),
                                  slow_moco_loss(query, key, queue, temperature), query)
    assert_same_loss_and_gradient(moco_v3_loss(query, key, temperature),
                                  slow_moco_v3_loss(query, key, temperature), query)
    assert torch.autograd.gradcheck(lambda q: moco_loss(q, key, queue, temperature), query)


def test_keys_are_constants_in_the_losses():
    query = unit(5, 7).requires_grad_()
    key = unit(5, 7).requires_grad_()
    queue = unit(5, 7).requires_grad_()
    loss = moco_loss(query, key, queue, 0.2) + moco_v3_loss(query, key, 0.2)
    loss.backward()
    assert query.grad is not None and key.grad is None and queue.grad is None


def test_losses_at_chance():
    same = F.normalize(torch.ones(8, 4), dim=1)
    assert moco_loss(same, same, same[:5], 0.1).item() == pytest.approx(math.log(6))
    assert moco_v3_loss(same, same, 0.3).item() == pytest.approx(2 * 0.3 * math.log(8))


def test_losses_at_extremes():
    z = torch.eye(8)
    twin_in_queue = z[7:]  # one query finds its own key twice
    assert moco_loss(z, z, twin_in_queue, 0.01).item() == pytest.approx(math.log(2) / 8, abs=1e-6)
    assert moco_v3_loss(z, z, 0.01).item() == pytest.approx(0, abs=1e-6)
    assert moco_loss(z, -z, z, 1e-4).isfinite()
    assert moco_v3_loss(z, z.roll(1, 0), 1e-4).isfinite()


def test_gradient_of_v3_hardly_depends_on_the_temperature():
    """At small scores the slope of 2τ · loss is that at any other τ."""
    query = unit(6, 300).requires_grad_()
    key = unit(6, 300)
    slopes = []
    for temperature in 1.0, 2.0:
        (gradient,) = torch.autograd.grad(moco_v3_loss(query, key, temperature), query)
        slopes.append(gradient.norm().item())
    assert slopes[0] == pytest.approx(slopes[1], rel=0.05)


def test_positive_found():
    z = torch.eye(8)
    assert positive_found(z, z) == 1
    assert positive_found(z, z.roll(1, 0)) == 0
    assert positive_found(z, 0.9 * z, z[:4]) == 0.5  # the queue has better ones for half of them


# ---- the queue


@pytest.mark.parametrize("batches", [[5, 5, 5, 5, 1], [12, 2], [30, 5]])
def test_newest_keys_replace_the_oldest(batches):
    """Of any batch, smaller or larger than the queue, which need not be a multiple of it."""
    model = MoCo(nn.Flatten(), 12, proj_dim=3, queue_size=12)
    waiting = list(model.queue.clone())  # the oldest first
    for batch_size in batches:
        key = torch.randn(batch_size, 3)
        model.enqueue(key)
        waiting = (waiting + list(key))[-12:]
        oldest_first = model.queue.roll(-int(model.queue_ptr), 0)
        torch.testing.assert_close(oldest_first, torch.stack(waiting), rtol=0, atol=0)


def test_queue_starts_with_unit_rows_and_is_saved():
    model = MoCo(nn.Flatten(), 12, proj_dim=3, queue_size=12)
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(12))
    assert model.queue_ptr == 0
    assert {"queue", "queue_ptr"} <= model.state_dict().keys()


# ---- the models


def kinds(mlp):
    return [type(layer) for layer in mlp]


@pytest.mark.parametrize("proj_layers, expected", [
    (1, [nn.Linear]), (2, [nn.Linear, nn.ReLU, nn.Linear])])
def test_projectors_of_v1_and_v2(proj_layers, expected):
    """With biases, without BN, and as wide as the features."""
    projector = MoCo(nn.Flatten(), 12, 5, proj_layers, queue_size=4).online[1]
    assert kinds(projector) == expected
    for layer in projector:
        if isinstance(layer, nn.Linear):
            assert layer.in_features == 12 and layer.bias is not None
    assert projector[-1].out_features == 5


HIDDEN = [nn.Linear, nn.BatchNorm1d, nn.ReLU]


def test_heads_of_v3_for_a_resnet():
    """No linear layer has a bias; the projector ends in BN without scale and offset."""
    model = MoCoV3(nn.Flatten(), 12, proj_dim=5, hidden_dim=7)
    projector = model.online[1]
    assert kinds(projector) == HIDDEN + [nn.Linear, nn.BatchNorm1d]
    assert kinds(model.predictor) == HIDDEN + [nn.Linear]
    for mlp in projector, model.predictor:
        assert mlp[0].out_features == 7 and mlp[3].out_features == 5
        assert mlp[0].bias is None and mlp[3].bias is None
        assert mlp[1].affine
    assert not projector[4].affine


def test_heads_of_v3_for_a_vit():
    """One more layer in the projector, and the predictor ends in BN, too."""
    model = MoCoV3(nn.Flatten(), 12, proj_dim=5, hidden_dim=7, proj_layers=3, pred_last_norm=True)
    assert kinds(model.online[1]) == HIDDEN + HIDDEN + [nn.Linear, nn.BatchNorm1d]
    assert kinds(model.predictor) == HIDDEN + [nn.Linear, nn.BatchNorm1d]
    assert not model.online[1][-1].affine and not model.predictor[-1].affine


def make_model(version):
    if version == 3:
        return MoCoV3(small_backbone(), 12, proj_dim=5, hidden_dim=7)
    return MoCo(small_backbone(), 12, 5, version, queue_size=4, bn_groups=2)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_target_starts_as_the_online_network_and_is_not_trained(version):
    model = make_model(version)
    online = list(model.online.parameters())
    target = list(model.target.parameters())
    for p1, p2 in zip(online, target, strict=True):
        assert torch.equal(p1, p2) and p1 is not p2
        assert p1.requires_grad and not p2.requires_grad


@pytest.mark.parametrize("version", [1, 2, 3])
def test_queries_and_keys_are_unit_rows_and_only_queries_have_a_gradient(version):
    model = make_model(version)
    outputs = model(torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))
    queries, keys = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
    assert len(queries) == len(keys) == (2 if version == 3 else 1)
    assert all(query.requires_grad for query in queries)
    assert not any(key.requires_grad for key in keys)
    for output in outputs:
        assert output.shape == (8, 5)
        torch.testing.assert_close(output.norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_target_normalises_by_the_batch(version):
    model = make_model(version)
    before = copy.deepcopy(model.target.state_dict())
    model(torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))
    for name, tensor in model.target.state_dict().items():
        if "running" in name:
            assert not torch.equal(tensor, before[name])


def test_outputs_are_of_the_views_and_networks_that_their_names_say():
    view1 = torch.randn(8, 3, 8, 8)
    view2 = torch.randn(8, 3, 8, 8)
    model = make_model(2)
    for p in model.target.parameters():
        p.add_(0.1)
    query, key = model(view1, view2)
    torch.testing.assert_close(query, F.normalize(model.online(view1), dim=1))
    torch.testing.assert_close(key, F.normalize(model.target(view2), dim=1))
    model = make_model(3)
    for p in model.target.parameters():
        p.add_(0.1)
    query1, query2, key1, key2 = model(view1, view2)
    for query, view in (query1, view1), (query2, view2):
        torch.testing.assert_close(query, F.normalize(model.predictor(model.online(view)), dim=1))
    for key, view in (key1, view1), (key2, view2):
        torch.testing.assert_close(key, F.normalize(model.target(view), dim=1))


@pytest.mark.parametrize("version", [2, 3])
def test_target_draws_nothing_at_random(version):
    """It has neither dropout nor stochastic depth, and the online network keeps them."""
    depth = torchvision.ops.StochasticDepth(0.5, "row")
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Dropout(0.5), depth)
    if version == 3:
        model = MoCoV3(backbone, 12, hidden_dim=8)
    else:
        model = MoCo(backbone, 12, queue_size=4)
    x = torch.randn(8, 3, 2, 2)
    assert model.training
    assert torch.equal(model.target(x), model.target(x))
    assert not torch.equal(model.online(x), model.online(x))


# ---- BN in groups


def test_groups_are_normalised_as_separate_batches():
    norm = nn.BatchNorm2d(4).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    separate = [copy.deepcopy(norm) for _ in range(3)]
    grouped = GroupBatchNorm(copy.deepcopy(norm), groups=3)
    x = 3 + torch.randn(12, 4, 5, 5, dtype=torch.float64)
    x.requires_grad_()
    found = grouped(x)
    expected = torch.cat([bn(part) for bn, part in zip(separate, x.chunk(3))])
    torch.testing.assert_close(found, expected)

    weights = torch.randn_like(found)
    (found_gradient,) = torch.autograd.grad((found * weights).sum(), x)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(found_gradient, expected_gradient)

    mean = sum(bn.running_mean for bn in separate) / 3
    variance = sum(bn.running_var for bn in separate) / 3
    torch.testing.assert_close(grouped.running_mean, mean)
    torch.testing.assert_close(grouped.running_var, variance)
    assert grouped.num_batches_tracked == 1

    norm.load_state_dict(grouped.state_dict())  # the same names
    torch.testing.assert_close(grouped.eval()(x), norm.eval()(x))


def test_groups_keep_eps_and_momentum():
    grouped = GroupBatchNorm(nn.BatchNorm2d(4, eps=0.1, momentum=0.3), groups=2)
    assert grouped.eps == 0.1
    assert grouped.momentum == 0.3


def test_parts_have_at_least_two_images():
    grouped = GroupBatchNorm(nn.BatchNorm2d(4), groups=8)
    plain = nn.BatchNorm2d(4)
    x = torch.randn(5, 4, 3, 3)
    parts = x[:3], x[3:]
    torch.testing.assert_close(grouped(x), torch.cat([plain(part) for part in parts]))


def test_bn_is_replaced_in_its_place_in_v1_and_v2():
    """Names, parameters and their order stay, so that weights can be loaded before and after."""
    backbone = common.make_backbone("resnet8", 32)
    parameters = dict(backbone.named_parameters())
    names = list(backbone.state_dict())
    model = MoCo(backbone, 128, queue_size=4, bn_groups=4)
    assert model.online[0] is backbone
    assert list(backbone.state_dict()) == names
    for name, parameter in backbone.named_parameters():
        assert parameter is parameters[name]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert isinstance(norm, GroupBatchNorm) and norm.groups == 4


def test_v3_keeps_plain_bn():
    model = MoCoV3(common.make_backbone("resnet8", 32), 128, hidden_dim=8)
    assert not any(isinstance(module, GroupBatchNorm) for module in model.modules())


class BatchNormAct2d(nn.BatchNorm2d):
    """A BN with a function of its own, as timm has it."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("norm", [BatchNormAct2d(6), nn.SyncBatchNorm(6)])
def test_other_kinds_of_bn_are_refused(norm):
    with pytest.raises(ValueError, match=type(norm).__name__):
        MoCo(nn.Sequential(nn.Conv2d(3, 6, 1), norm), 6, queue_size=4)


def test_a_network_without_bn_passes():
    vit = moco.make_vit("vit_micro", 32)
    model = MoCo(vit, vit.feature_dim, queue_size=4)
    query, key = model(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32))
    assert query.shape == key.shape == (2, 128)


# ---- the loop


@pytest.fixture
def calls_of_two_steps(monkeypatch, no_report, class_folders):
    """calls_of_two_steps(*flags) -> [(name, arguments)] of what `train` called in two steps of 12
    images. Tensors are copies from the time of the call."""
    calls = []

    def record(owner, name):
        function = getattr(owner, name)

        def recorded(*arguments):
            copies = []
            for argument in arguments:
                is_tensor = isinstance(argument, torch.Tensor)
                copies.append(argument.detach().clone() if is_tensor else argument)
            calls.append((name, copies))
            return function(*arguments)

        monkeypatch.setattr(owner, name, recorded)

    def start(*flags):
        args = moco.parse_args("--data images --recipe demo -b 12 --epochs 1 -j 0".split()
                               + list(flags))
        for name in "ema_update", "moco_loss", "moco_v3_loss", "positive_found":
            record(moco, name)
        record(MoCo, "forward")
        record(MoCo, "enqueue")
        record(MoCoV3, "forward")
        moco.train(args)
        return calls

    return start


def arguments_of(calls, name):
    return [arguments for called, arguments in calls if called == name]


def test_order_of_a_step(calls_of_two_steps):
    """The average moves ahead of the keys, and the queue changes after loss and health number."""
    calls = calls_of_two_steps()
    names = [name for name, _ in calls]
    assert names == 2 * ["ema_update", "forward", "moco_loss", "positive_found", "enqueue"]
    (_, key, first_queue, _), (_, _, second_queue, _) = arguments_of(calls, "moco_loss")
    assert not torch.equal(first_queue[:12], key)
    assert torch.equal(second_queue[:12], key)
    _, _, queue_of_health = arguments_of(calls, "positive_found")[0]
    assert torch.equal(queue_of_health, first_queue)


def test_order_of_a_step_of_v3(calls_of_two_steps):
    calls = calls_of_two_steps("--version", "3")
    names = [name for name, _ in calls]
    assert names == 2 * ["ema_update", "forward", "moco_v3_loss", "moco_v3_loss", "positive_found"]


def test_v3_pairs_the_query_of_one_view_with_the_key_of_the_other(calls_of_two_steps, monkeypatch):
    """In networks that return the mean colors, which here differ between views only a little."""
    def colors(self, view1, view2):
        unused = 0 * sum(p.sum() for p in self.parameters())
        means = [view1.mean((2, 3)), view2.mean((2, 3))]
        return means[0] + unused, means[1] + unused, means[0], means[1]

    monkeypatch.setattr(MoCoV3, "forward", colors)
    calls = calls_of_two_steps("--version", "3", "--proj-dim", "3")
    _, view1, view2 = arguments_of(calls, "forward")[0]
    color1 = view1.mean((2, 3))
    color2 = view2.mean((2, 3))
    first, second = arguments_of(calls, "moco_v3_loss")[:2]
    assert torch.equal(first[0], color1) and torch.equal(first[1], color2)
    assert torch.equal(second[0], color2) and torch.equal(second[1], color1)


def test_keys_are_shuffled_between_bn_groups_and_back(calls_of_two_steps, monkeypatch):
    """view2 has its rows in another order than view1; loss and queue have them in view1's.

    Both views are the whole images, and query and key their mean colors.
    """
    def colors(self, view1, view2):
        unused = 0 * sum(p.sum() for p in self.online.parameters())
        return view1.mean((2, 3)) + unused, view2.mean((2, 3))

    def whole_image(images, aspect, **settings):
        return common.normalize(images / 255)

    monkeypatch.setattr(MoCo, "forward", colors)
    monkeypatch.setattr(moco, "augment", whole_image)
    calls = calls_of_two_steps("--proj-dim", "3")
    _, view1, view2 = arguments_of(calls, "forward")[0]
    distances = torch.cdist(view1.mean((2, 3)), view2.mean((2, 3)))
    rows = distances.argmin(1).tolist()
    assert sorted(rows) == list(range(12))
    assert rows != list(range(12))
    query, key, _, _ = arguments_of(calls, "moco_loss")[0]
    torch.testing.assert_close(query, key)
    _, enqueued = arguments_of(calls, "enqueue")[0]
    torch.testing.assert_close(enqueued, key)


@pytest.mark.parametrize("version, loss", [(2, "moco_loss"), (3, "moco_v3_loss")])
def test_temperature_of_a_run(version, loss, calls_of_two_steps):
    calls = calls_of_two_steps("--version", str(version), "--temperature", "0.3")
    temperatures = [temperature for *_, temperature in arguments_of(calls, loss)]
    assert set(temperatures) == {0.3}


@pytest.mark.parametrize("version, second", [(2, 0.7), (3, 0.85)])
def test_ema_momentum_is_constant_in_v2_and_rises_to_1_in_v3(version, second, calls_of_two_steps):
    calls = calls_of_two_steps("--version", str(version), "--ema-momentum", "0.7")
    momenta = [momentum for _, _, momentum in arguments_of(calls, "ema_update")]
    assert momenta == pytest.approx([0.7, second])  # half of the cosine after one of two steps


@pytest.mark.parametrize("version, layers, chance, starts_as_identity", [
    (1, 1, math.log(1 + 20), False),
    (2, 3, math.log(1 + 20), False),
    (3, 5, 2 * 2 * 0.1 * math.log(12), True)])
def test_what_train_makes_of_the_flags(version, layers, chance, starts_as_identity,
                                       calls_of_two_steps, monkeypatch, capsys):
    make_backbone = common.make_backbone

    def recorded(arch, image_size, zero_init_residual):
        assert zero_init_residual == starts_as_identity
        return make_backbone(arch, image_size, zero_init_residual)

    monkeypatch.setattr(common, "make_backbone", recorded)
    calls = calls_of_two_steps("--version", str(version), "--queue-size", "20", "--bn-groups", "3",
                               "--temperature", "0.1")
    model = arguments_of(calls, "forward")[0][0]
    assert len(model.online[1]) == layers  # of the projector
    for module in model.modules():
        if isinstance(module, GroupBatchNorm):
            assert module.groups == 3
    assert f"(chance {chance:.4f})" in capsys.readouterr().out


# ---- the ViT


def test_fixed_position_embeddings_of_the_vit():
    vit = moco.make_vit("vit_micro", 32)
    assert torch.equal(vit.encoder.pos_embedding, moco.positions(128, 8))


def assert_xavier_uniform(matrix):
    outputs, inputs = matrix.shape
    bound = math.sqrt(6 / (outputs + inputs))
    assert 0.98 * bound < matrix.abs().max() <= bound
    assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # uniform
    assert matrix.mean().abs() < bound / 20


def test_weights_of_the_vit_at_the_start():
    """Xavier's bounds, for q, k and v each; all biases 0."""
    vit = moco.make_vit("vit_micro", 32)
    assert 0.7e-6 < vit.class_token.std() < 1.3e-6
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "in_proj" in name:
            for matrix in parameter.chunk(3):
                assert_xavier_uniform(matrix)
        elif parameter.dim() in (2, 4):
            assert_xavier_uniform(parameter.flatten(1))


@pytest.mark.parametrize("arch, image_size, tokens, heads", [
    ("vit_micro", 32, 65, 2), ("vit_small", 64, 257, 12), ("vit_small", 96, 37, 12)])
def test_shape_of_the_vit(arch, image_size, tokens, heads):
    vit = moco.make_vit(arch, image_size)
    assert vit.encoder.pos_embedding.shape[1] == tokens
    assert vit.encoder.layers[0].num_heads == heads


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_positions_and_patch_projection_do_not_move(name):
    vit = moco.make_vit("vit_micro", 32)
    model = MoCoV3(vit, vit.feature_dim, 16, hidden_dim=32)
    optimizer = moco.make_optimizer(name, model, 0.1)
    before = {name: parameter.clone() for name, parameter in vit.named_parameters()}
    query1, _, _, key2 = model(torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32))
    moco_v3_loss(query1, key2, 0.2).backward()
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    unmoved = {name for name, p in vit.named_parameters() if torch.equal(p, before[name])}
    assert unmoved == {"encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"}


VIT = "--recipe imagenet-v3-vit -a vit_micro --image-size 32 --hidden-dim 32".split()


def test_v3_with_a_vit_has_its_heads_and_can_be_resumed_and_evaluated(calls_of_two_steps):
    calls = calls_of_two_steps(*VIT, "--out", "run")
    model = arguments_of(calls, "forward")[0][0]
    assert isinstance(model, MoCoV3)
    assert len(model.online[1]) == 8  # three layers
    assert isinstance(model.predictor[-1], nn.BatchNorm1d)

    args = moco.parse_args(["--resume", "--out", "run", "--data", "images"])
    assert args.version == 3 and args.arch == "vit_micro" and args.optimizer == "adamw"
    calls.clear()
    moco.train(args)
    assert not calls  # nothing is left to do

    network, _, image_size = linear_probe.load_backbone("run/backbone.pth")
    assert image_size == 32
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network.eval()(x), model.online[0].eval()(x))


def test_v2_trains_a_vit_which_has_no_bn(calls_of_two_steps):
    calls = calls_of_two_steps("--arch", "vit_micro")
    assert len(arguments_of(calls, "enqueue")) == 2


# ---- optimizers, augmentations, recipes


def test_optimizers_decay_what_the_official_ones_do():
    model = MoCoV3(common.make_backbone("resnet8", 32), 128, hidden_dim=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    for name in "sgd", "adamw":
        (group,) = moco.make_optimizer(name, model, 0.1).param_groups
        assert group["weight_decay"] == 0.1
        assert len(group["params"]) == len(trained)
    weights, others = moco.make_optimizer("lars", model, 0.1).param_groups
    assert weights["weight_decay"] == 0.1 and weights["adapt"]
    assert others["weight_decay"] == 0 and not others["adapt"]
    assert all(p.ndim > 1 for p in weights["params"])
    assert all(p.ndim == 1 for p in others["params"])
    assert len(weights["params"]) + len(others["params"]) == len(trained)


def jitter(brightness, contrast, saturation, hue, p):
    return "color_jitter", {"brightness": brightness, "contrast": contrast,
                            "saturation": saturation, "hue": hue, "p": p}


GRAY = "random_grayscale", {"p": 0.2}
COLORS = {  # in order
    "imagenet-v1": [GRAY, jitter(0.4, 0.4, 0.4, 0.4, p=1.0)],
    "imagenet": [jitter(0.4, 0.4, 0.4, 0.1, p=0.8), GRAY],
    "imagenet-v3": [jitter(0.4, 0.4, 0.2, 0.1, p=0.8), GRAY],
}


@pytest.mark.parametrize("recipe, blurs, solarized", [
    ("imagenet-v1", (0.0, 0.0), (0.0, 0.0)),
    ("imagenet", (0.5, 0.5), (0.0, 0.0)),
    ("imagenet-v3", (1.0, 0.1), (0.0, 0.2))])
def test_augmentations_are_those_of_the_papers(recipe, blurs, solarized, operations, monkeypatch,
                                               class_folders):
    """Crops are bilinear, and the flip comes last. The views of v3 differ."""
    monkeypatch.setattr(linear_probe, "quick_knn", lambda *args, **kwargs: None)
    flags = ("--data images -a resnet8 --image-size 96 --queue-size 8 --hidden-dim 8 -b 8 "
             "--max-images 8 --epochs 1 -j 0")
    moco.train(moco.parse_args([*flags.split(), "--recipe", recipe]))
    expected = []
    for blur, solarize in zip(blurs, solarized):
        expected.append(("random_resized_crop", {"size": 96, "scale": (0.2, 1.0)}))
        expected += COLORS[recipe]
        expected.append(("gaussian_blur", {"p": blur, "kernel_size": 13, "sigma": (0.1, 2.0)}))
        expected.append(("random_solarize", {"p": solarize}))
        expected.append(("random_horizontal_flip", {"p": 0.5}))
        expected.append(("normalize", {}))
    assert operations == 2 * expected  # in views.png, and in the only step


@pytest.mark.parametrize("recipe", ["imagenet-v1", "imagenet", "imagenet-v3"])
def test_jitter_strength_scales_all_four(recipe, operations, class_folders):
    flags = ("--data images -a resnet8 --image-size 32 --queue-size 8 --hidden-dim 8 -b 8 "
             "--epochs 0 --jitter-strength 0.5")
    moco.train(moco.parse_args([*flags.split(), "--recipe", recipe]))
    drawn = next(settings for name, settings in operations if name == "color_jitter")
    _, whole = next(operation for operation in COLORS[recipe] if operation[0] == "color_jitter")
    for name in "brightness", "contrast", "saturation", "hue":
        assert drawn[name] == whole[name] / 2
    assert drawn["p"] == whole["p"]


@pytest.mark.parametrize("recipe, version", [
    ("demo", 2), ("cpu", 2), ("cifar", 2), ("imagenet", 2), ("imagenet-v1", 1), ("imagenet-v3", 3),
    ("imagenet-v3-vit", 3)])
def test_version_follows_from_the_recipe(recipe, version):
    assert moco.parse_args(["--recipe", recipe]).version == version


@pytest.mark.parametrize("flags", [
    ["--image-size", "30", "-a", "vit_micro"],  # patches of 4 pixels
    ["--image-size", "72", "-a", "vit_small"]])  # of 16
def test_image_size_is_a_multiple_of_the_patches(flags, refusal):
    assert f"error: --image-size {flags[1]}: no multiple" in refusal(moco.parse_args, flags)


def refused(folder):
    os.chdir(folder)
    flags = "--data images --recipe demo -b 8 --bn-groups 3 --workers 0 --device cpu".split()
    try:
        moco.train(moco.parse_args(flags))
    except Failure as error:
        return str(error)


def test_bn_groups_are_a_multiple_of_the_processes(class_folders, tmp_path):
    messages = run_processes(2, refused, str(tmp_path))
    assert messages == ["--bn-groups 3: no multiple of 2 processes"] * 2
