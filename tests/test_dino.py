"""DINO against independent slow versions, and each of the details that are commonly wrong."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_run import load, stop_after
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import common
import dino
import linear_probe
from dino import (DINO, Head, StochasticDepthBlock, ViT, dino_loss, teacher_entropy, update_center,
                  without_dropout)

DOUBLE = torch.float64


def tiny_vit(image_size=8, patch_size=4, drop_path=0.0, dim=12, depth=3, num_heads=3):
    """With random numbers in place of the zeros and ones of the initialization."""
    vit = ViT(image_size, patch_size, dim, depth, num_heads, drop_path)
    for p in vit.parameters():
        nn.init.normal_(p, std=0.2)
    return vit


# ---- loss


def softmax(x):
    return torch.exp(x) / torch.exp(x).sum()


def slow_loss(student, teacher, center, student_temperature, teacher_temperature):
    """Equations 1 to 3, image by image."""
    terms = []
    for t in range(2):
        for v in range(len(student)):
            if t == v:
                continue  # never a view against itself
            for image in range(student.shape[1]):
                a = softmax((teacher[t, image] - center) / teacher_temperature)
                b = softmax(student[v, image] / student_temperature)
                terms.append(-(a * torch.log(b)).sum())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 5])
def test_loss_and_gradient_equal_slow_version(views):
    student = torch.randn(views, 3, 4, dtype=DOUBLE, requires_grad=True)
    teacher = torch.randn(2, 3, 4, dtype=DOUBLE)
    center = torch.randn(4, dtype=DOUBLE)
    slow = slow_loss(student, teacher, center, 0.5, 0.2)
    fast = dino_loss(student, teacher, center, 0.5, 0.2)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    (slow_gradient,) = torch.autograd.grad(slow, student)
    (fast_gradient,) = torch.autograd.grad(fast, student)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, teacher, center, 0.5, 0.2), student)


def test_loss_has_no_gradient_to_the_teacher_and_changes_nothing():
    student = torch.randn(2, 3, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, requires_grad=True)
    center = torch.randn(4)
    before = center.clone()
    dino_loss(student, teacher, center, 0.1, 0.04).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert torch.equal(center, before)


def test_loss_at_chance_and_at_extremes():
    center = torch.zeros(8)
    teacher = torch.randn(2, 6, 8)
    constant = torch.ones(5, 6, 8)
    assert dino_loss(constant, teacher, center, 0.1, 0.04).item() == pytest.approx(math.log(8))
    one_hot = 1e4 * F.one_hot(torch.arange(6), 8).float()
    student = one_hot.expand(5, 6, 8)
    teacher = one_hot.expand(2, 6, 8)
    assert dino_loss(student, teacher, center, 0.1, 0.04).item() == pytest.approx(0, abs=1e-6)
    assert dino_loss(student, -teacher, center, 0.1, 0.04).isfinite()


def test_entropy_and_kl_add_up_to_the_loss():
    student = torch.randn(5, 3, 4, dtype=DOUBLE)
    teacher = torch.randn(2, 3, 4, dtype=DOUBLE)
    center = torch.randn(4, dtype=DOUBLE)
    entropy = teacher_entropy(teacher, center, 0.2)
    p = ((teacher - center) / 0.2).softmax(2)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(p).entropy().mean())
    log_p = (student / 0.5).log_softmax(2)
    kl = []
    for t in range(2):
        for v in range(5):
            if v != t:
                kl.append(F.kl_div(log_p[v], p[t], reduction="batchmean"))
    loss = dino_loss(student, teacher, center, 0.5, 0.2)
    torch.testing.assert_close(loss - entropy, sum(kl) / 8)


def test_entropy_at_extremes():
    uniform = torch.zeros(2, 3, 4)
    certain = 1e4 * torch.eye(4).expand(2, 4, 4)
    center = torch.zeros(4)
    assert teacher_entropy(uniform, center, 0.04).item() == pytest.approx(math.log(4))
    assert teacher_entropy(certain, center, 0.04) == 0


def test_center_is_a_running_mean():
    center = torch.zeros(3, dtype=DOUBLE)
    means = torch.randn(4, 3, dtype=DOUBLE)
    for mean in means:
        update_center(center, mean, 0.9)
    weights = 0.1 * 0.9 ** torch.tensor([3, 2, 1, 0], dtype=DOUBLE)
    torch.testing.assert_close(center, (weights[:, None] * means).sum(0))


# ---- vision transformer


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", "vit_base"])
def test_vit_has_the_names_and_shapes_of_timm_and_of_the_official_checkpoints(arch):
    """Of vit_*_patch16_224 with num_classes=0, and of dino_deitsmall16_pretrain.pth for small."""
    dim, depth, num_heads = dino.VITS[arch]
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + 14 * 14, dim),
              "patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,),
              "norm.weight": (dim,), "norm.bias": (dim,)}
    for i in range(12):
        shapes.update({
            f"blocks.{i}.norm1.weight": (dim,), f"blocks.{i}.norm1.bias": (dim,),
            f"blocks.{i}.attn.qkv.weight": (3 * dim, dim), f"blocks.{i}.attn.qkv.bias": (3 * dim,),
            f"blocks.{i}.attn.proj.weight": (dim, dim), f"blocks.{i}.attn.proj.bias": (dim,),
            f"blocks.{i}.norm2.weight": (dim,), f"blocks.{i}.norm2.bias": (dim,),
            f"blocks.{i}.mlp.fc1.weight": (4 * dim, dim), f"blocks.{i}.mlp.fc1.bias": (4 * dim,),
            f"blocks.{i}.mlp.fc2.weight": (dim, 4 * dim), f"blocks.{i}.mlp.fc2.bias": (dim,)})
    assert len(shapes) == 150
    assert dim == {"vit_tiny": 192, "vit_small": 384, "vit_base": 768}[arch]
    assert dim // num_heads == 64
    with torch.device("meta"):
        vit = ViT(224, 16, dim, depth, num_heads)
    assert {name: tuple(value.shape) for name, value in vit.state_dict().items()} == shapes


def torch_layer(block):
    """torch's transformer layer with the parameters of a block."""
    layer = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", 1e-6, True, norm_first=True)
    layer.self_attn.in_proj_weight = block.attn.qkv.weight
    layer.self_attn.in_proj_bias = block.attn.qkv.bias
    layer.self_attn.out_proj = block.attn.proj
    layer.norm1 = block.norm1
    layer.norm2 = block.norm2
    layer.linear1 = block.mlp.fc1
    layer.linear2 = block.mlp.fc2
    return layer


def test_vit_equals_torchs_transformer():
    vit = tiny_vit(image_size=12).double()
    layers = [torch_layer(block) for block in vit.blocks]
    images = torch.randn(2, 3, 12, 12, dtype=DOUBLE)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 9, 48)
    tokens = F.linear(patches, vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias)
    tokens = torch.cat([vit.cls_token.expand(2, 1, 12), tokens], 1) + vit.pos_embed
    before_last = nn.Sequential(*layers[:-1])(tokens)
    expected = vit.norm(layers[-1](before_last))[:, 0]
    torch.testing.assert_close(vit(images), expected, rtol=1e-10, atol=1e-10)

    x = layers[-1].norm1(before_last)
    _, weights = layers[-1].self_attn(x, x, x, average_attn_weights=False)
    attention = vit.class_attention(images)
    assert attention.shape == (2, 3, 3, 3)  # images, heads, rows, columns
    torch.testing.assert_close(attention.flatten(2), weights[:, :, 0, 1:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("height, width", [(4, 4), (3, 5), (12, 9)])
def test_local_views_get_interpolated_positions(height, width):
    vit = tiny_vit(image_size=32)
    grid = vit.pos_embed[0, 1:].detach().unflatten(0, (8, 8))
    # One axis after the other, as weighted sums: the weights are an interpolated identity matrix.
    eye = torch.eye(8)[None, :, :, None]
    rows = F.interpolate(eye, (height, 1), mode="bicubic")[0, :, :, 0]  # (8, height)
    columns = F.interpolate(eye, (width, 1), mode="bicubic")[0, :, :, 0]
    expected = torch.einsum("ih,jw,ijc->hwc", rows, columns, grid).flatten(0, 1)
    positions = vit.positions(height, width)
    torch.testing.assert_close(positions[0, 1:], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(positions[:, 0], vit.pos_embed[:, 0])  # the class token's


def test_positions_are_added_as_they_are_at_the_size_of_training():
    vit = tiny_vit(image_size=32)
    assert torch.equal(vit.positions(8, 8), vit.pos_embed)
    images = torch.randn(2, 3, 12, 20)  # 3 · 5 patches
    tokens = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(images)], 1)
    assert torch.equal(vit.embed(images), tokens + vit.positions(3, 5))
    assert vit(images).shape == (2, 12)


@pytest.mark.filterwarnings("ignore:The nodes obtained by tracing the model in train mode")
def test_features_of_a_layer_can_be_extracted_by_torchvision():
    vit = tiny_vit().eval()
    extractor = create_feature_extractor(vit, {"blocks.1.mlp.fc2": "inner", "norm": "tokens"})
    images = torch.randn(2, 3, 8, 8)
    features = extractor(images)
    assert features["inner"].shape == (2, 5, 12)
    torch.testing.assert_close(features["tokens"][:, 0], vit(images))


# ---- stochastic depth


def test_stochastic_depth_leaves_out_branches_of_single_images():
    block = StochasticDepthBlock(12, 3, p=0.25)
    x = torch.randn(4, 5, 12)
    noise = torch.tensor([[0.3, 0.9], [0.2, 0.25], [0.25, 0.1], [0.0, 0.24]])  # below p: left out
    attention = block.attn(block.norm1(x)) * torch.tensor([1, 0, 1, 0])[:, None, None] / 0.75
    after = x + attention
    mlp = block.mlp(block.norm2(after)) * torch.tensor([1, 1, 0, 0])[:, None, None] / 0.75
    torch.testing.assert_close(block(x, noise), after + mlp)


def test_stochastic_depth_draws_its_own_numbers_where_none_are_given():
    block = StochasticDepthBlock(12, 3, p=0.25)
    x = torch.randn(1, 5, 12).expand(4000, -1, -1)
    unchanged = (block(x) == x).all(2).all(1)  # both branches are left out
    assert unchanged.float().mean().item() == pytest.approx(0.25**2, abs=0.02)


@pytest.mark.parametrize("training, p", [(True, 0.0), (False, 0.5)])
def test_without_stochastic_depth_a_block_is_whole_and_nothing_is_drawn(training, p):
    block = StochasticDepthBlock(12, 3, p).train(training)
    x = torch.randn(4, 5, 12)
    before = torch.get_rng_state()
    assert torch.equal(block(x), dino.Block.forward(block, x))
    assert torch.equal(block(x, torch.zeros(4, 2)), block(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_stochastic_depth_rises_over_the_blocks_of_the_student():
    model = DINO(tiny_vit(drop_path=0.5), 12, 7, 6, 5)
    assert [block.p for block in model.student["backbone"].blocks] == [0, 0.25, 0.5]
    assert [block.p for block in model.teacher["backbone"].blocks] == [0, 0, 0]
    assert model.training and model.teacher.training
    views = [torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)]
    student1, teacher1 = model(views, [])
    student2, teacher2 = model(views, [])
    assert torch.equal(teacher1, teacher2)
    assert not torch.equal(student1, student2)
    torch.testing.assert_close(model.eval()(views, [])[0], teacher1)


def test_noise_reaches_its_view_image_and_block():
    """Each view alone, with its own noise, gives what all views give together."""
    model = DINO(tiny_vit(drop_path=0.9), 12, 7, 6, 5)
    backbone = model.student["backbone"]
    global_views = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    local_views = [torch.randn(4, 3, 4, 4) for _ in range(3)]
    noise = torch.rand(5, 4, 3, 2)  # views, images, blocks, branches
    student, _ = model(global_views, local_views, noise)
    for v, view in enumerate(global_views + local_views):
        tokens = backbone.embed(view)
        for i, block in enumerate(backbone.blocks):
            tokens = block(tokens, noise[v, :, i])
        expected = model.student["head"](backbone.norm(tokens)[:, 0])
        torch.testing.assert_close(student[v], expected)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["swin_t", "efficientnet_b0", "mobilenet_v3_small"])
def test_other_networks_repeat_themselves_without_dropout(arch):
    network = torchvision.models.get_model(arch)
    images = torch.randn(2, 3, 64, 64)
    assert not torch.equal(network(images), network(images))
    without_dropout(network)
    assert torch.equal(network(images), network(images))


@torch.no_grad()
def test_attention_dropout_is_switched_off():
    attention = nn.MultiheadAttention(12, 3, dropout=0.5)  # without a Dropout layer
    x = torch.randn(4, 2, 12)
    assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    without_dropout(attention)
    assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])


def test_dropout_of_timm_is_switched_off_by_its_name():
    class DropPath(nn.Module):
        drop_prob = 0.5

    network = without_dropout(nn.Sequential(DropPath(), nn.Dropout(0.3), nn.Dropout2d(0.3)))
    assert network[0].drop_prob == network[1].p == network[2].p == 0


@pytest.mark.parametrize("network", [ViT(32, 4, 64, depth=2, num_heads=1),
                                     Head(64, 128, 256, 256, bn=False).mlp])
def test_weights_at_the_start(network):
    for module in network.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not module.bias.any()


# ---- head, student and teacher


def test_last_layer_is_weight_normalised_with_g_fixed_at_1():
    head = Head(12, 7, 6, 5, bn=False)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False))
    reference.parametrizations.weight.original0.data.fill_(1)
    reference.parametrizations.weight.original1.data.copy_(head.last_layer.weight)
    x = torch.randn(4, 12)
    expected = reference(F.normalize(head.mlp(x), dim=1))
    torch.testing.assert_close(head(x), expected)
    assert head(x).abs().max() <= 1
    names = [name for name, _ in head.named_parameters() if "last" in name]
    assert names == ["last_layer.weight"]
    head.last_layer.weight.data *= torch.rand(7, 1) + 1
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("bn, hidden", [(False, [nn.Linear, nn.GELU]),
                                        (True, [nn.Linear, nn.BatchNorm1d, nn.GELU])])
def test_head_has_three_layers_and_bn_on_demand(bn, hidden):
    head = Head(12, 7, 6, 5, bn)
    assert [type(module) for module in head.mlp] == 2 * hidden + [nn.Linear]
    linear = [module for module in head.mlp if isinstance(module, nn.Linear)]
    assert [tuple(module.weight.shape) for module in linear] == [(6, 12), (6, 6), (5, 6)]
    assert head(torch.randn(4, 12)).shape == (4, 7)


def test_teacher_sees_global_views_only_and_the_student_all():
    backbone = tiny_vit(32, 8)
    model = DINO(backbone, 12, 7, 6, 5)
    global_views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    local_views = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    student, teacher = model(global_views, local_views)
    assert student.shape == (5, 4, 7) and student.requires_grad
    assert teacher.shape == (2, 4, 7) and not teacher.requires_grad
    torch.testing.assert_close(student[:2], teacher)  # equal weights at the start
    for v, view in enumerate(global_views + local_views):
        torch.testing.assert_close(student[v], model.student["head"](backbone(view)))
    again, _ = model(global_views, [])
    torch.testing.assert_close(again, student[:2])
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_views_of_one_size_share_the_statistics_of_bn():
    backbone = common.make_backbone("resnet8", 32)
    model = DINO(backbone, backbone.feature_dim, 7, 6, 5)
    global_views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    local_views = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    model(global_views, local_views)
    assert model.student["backbone"].bn1.num_batches_tracked == 2  # a batch of each size
    assert model.teacher["backbone"].bn1.num_batches_tracked == 1


def test_a_backbone_that_returns_tokens_is_refused():
    tokens = nn.Sequential(dino.PatchEmbed(4, 12))
    with pytest.raises(ValueError, match=r"must return \(B, C\), not \(6, 4, 12\)"):
        DINO(tokens, 12, 7, 6, 5)([torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)], [])


@pytest.mark.parametrize("file", ["checkpoint", "backbone"])
def test_files_of_the_official_code_are_read(tmp_path, file):
    """The whole checkpoint, of which the teacher counts, and the backbone by itself."""
    model = DINO(tiny_vit(64, 16, dim=64, num_heads=1), 64, 7, 6, 5)
    for p in model.teacher.parameters():
        nn.init.normal_(p)
    if file == "backbone":
        saved = model.teacher["backbone"].state_dict()
    else:
        student = {f"module.{name}": value for name, value in model.student.state_dict().items()}
        saved = {"student": student, "teacher": dict(model.teacher.state_dict()), "epoch": 1}
    torch.save(saved, tmp_path / "file.pth")
    backbone, untrained, size = linear_probe.load_backbone(tmp_path / "file.pth")
    assert size == 64
    images = torch.randn(2, 3, 64, 64)
    features = model.teacher["backbone"](images)
    torch.testing.assert_close(backbone.eval()(images), features, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(untrained.eval()(images), features, rtol=1e-2, atol=1e-2)


# ---- optimizer and schedules


def test_each_gradient_is_clipped_by_its_own_norm():
    params = [nn.Parameter(torch.zeros(n, dtype=DOUBLE)) for n in (3, 4, 5, 2)]
    for p, scale in zip(params[:3], (0.1, 10, 1000)):
        p.grad = scale * torch.randn_like(p)
    expected = copy.deepcopy(params)
    for p, q in zip(params[:3], expected[:3]):
        q.grad = p.grad.clone()
        nn.utils.clip_grad_norm_([q], 3.0)
    small = params[0].grad.clone()
    dino.clip_gradients(params, 3.0)
    for p, q in zip(params[:3], expected[:3]):
        torch.testing.assert_close(p.grad, q.grad)
    assert torch.equal(params[0].grad, small)
    assert params[3].grad is None


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_biases_and_norms_are_not_decayed(name, kind):
    model = DINO(tiny_vit(), 12, 7, 6, 5)
    optimizer = dino.make_optimizer(name, model, 0.1)
    assert type(optimizer) is kind
    weights, others = optimizer.param_groups
    assert weights["weight_decay"] == 0.1 and others["weight_decay"] == 0
    names = {p: name for name, p in model.student.named_parameters()}
    decayed = {names[p] for p in weights["params"]}
    not_decayed = {names[p] for p in others["params"]}
    assert all("bias" in name or "norm" in name for name in not_decayed)
    assert decayed >= {"backbone.cls_token", "backbone.pos_embed",
                       "backbone.patch_embed.proj.weight", "head.last_layer.weight"}
    assert decayed | not_decayed == set(names.values())


def test_schedules():
    assert dino.cosine_schedule(0, 100, 0, 0.996, 1.0) == 0.996  # no warm-up: rises to its end
    assert dino.cosine_schedule(50, 100, 0, 0.04, 0.4) == pytest.approx(0.22)
    assert dino.cosine_schedule(100, 100, 0, 0.996, 1.0) == 1
    temperatures = [dino.linear_schedule(epoch, 30, 0.04, 0.07) for epoch in (0, 10, 30, 99)]
    assert temperatures == pytest.approx([0.04, 0.05, 0.07, 0.07])
    assert dino.linear_schedule(0, 0, 0.04, 0.07) == 0.07


# ---- a run


@pytest.fixture
def recorded(class_folders, monkeypatch):
    """A run of 24 images: three steps in each of two epochs.

    calls: the names of what changes state, in order. values: what each of them was given.
    last_layers: the student's, after each step. evaluated: the two networks of the report.
    """
    run = SimpleNamespace(calls=[], values={}, last_layers=[], evaluated=[])

    def record(owner, name, value):
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            run.calls.append(name)
            run.values.setdefault(name, []).append(value(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    def mean_and_momentum(center, mean, center_momentum):
        return mean, center_momentum

    def center_and_temperatures(student, teacher, center, student_temperature,
                                teacher_temperature):
        mean = teacher.mean((0, 1))
        return center.clone(), student_temperature, teacher_temperature, mean

    def decays(optimizer):
        return [group["weight_decay"] for group in optimizer.param_groups]

    def momentum_of_ema(teacher, student, ema_momentum):
        run.last_layers.append(student["head"].last_layer.weight.detach().clone())
        return ema_momentum

    record(dino, "dino_loss", center_and_temperatures)
    record(dino, "clip_gradients", lambda parameters, max_norm: max_norm)
    record(torch.optim.AdamW, "step", decays)
    record(dino, "ema_update", momentum_of_ema)
    record(dino, "update_center", mean_and_momentum)
    monkeypatch.setattr(linear_probe, "evaluate", lambda *args: run.evaluated.extend(args[:2]))
    monkeypatch.setitem(dino.VITS, "vit_test", (64, 2, 1))
    args = ("--data images --recipe demo --arch vit_test -b 8 --epochs 2 --patch-size 8 "
            "--local-views 1 --out-dim 32 --hidden-dim 16 --student-temperature 0.2 "
            "--teacher-temperature-start 0.04 --teacher-temperature 0.07 "
            "--temperature-warmup-epochs 1 --ema-momentum 0.9 --clip-norm 2 "
            "--weight-decay 0.1 --weight-decay-end 0.5 --out run --freeze-epochs 1")
    dino.train(dino.parse_args(args.split()))
    return run


def test_order_of_a_step(recorded):
    """The center is updated after the loss, the teacher after the optimizer's step."""
    step = ["dino_loss", "clip_gradients", "step", "ema_update", "update_center"]
    assert recorded.calls == 6 * step


def test_loss_is_given_the_center_of_the_steps_before(recorded):
    center = torch.zeros(32)
    updates = recorded.values["update_center"]
    for given, (mean, center_momentum) in zip(recorded.values["dino_loss"], updates):
        used, _, _, mean_of_teacher = given
        torch.testing.assert_close(used, center)
        torch.testing.assert_close(mean, mean_of_teacher)
        center = center_momentum * center + (1 - center_momentum) * mean
    assert center.abs().max() > 0
    saved = torch.load("run/checkpoint.pth", weights_only=True)["model"]
    torch.testing.assert_close(saved["center"], center)


def test_schedules_of_a_run(recorded):
    of_student = [student for _, student, _, _ in recorded.values["dino_loss"]]
    of_teacher = [teacher for _, _, teacher, _ in recorded.values["dino_loss"]]
    assert of_student == 6 * [0.2]
    assert of_teacher == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    progress = [(1 - math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert recorded.values["ema_update"] == pytest.approx([0.9 + 0.1 * x for x in progress])
    decays = [decay for decay, _ in recorded.values["step"]]
    assert decays == pytest.approx([0.1 + 0.4 * x for x in progress])
    assert [of_biases for _, of_biases in recorded.values["step"]] == 6 * [0]
    assert recorded.values["clip_gradients"] == 6 * [2]


def test_last_layer_starts_to_move_in_the_second_epoch(recorded):
    first, second, third, fourth, *_ = recorded.last_layers
    assert torch.equal(first, second) and torch.equal(second, third)
    assert not torch.equal(third, fourth)


def test_teacher_is_what_is_kept_and_evaluated(recorded):
    saved = torch.load("run/checkpoint.pth", weights_only=True)["model"]
    teacher = saved["teacher.backbone.cls_token"]
    assert not torch.equal(teacher, saved["student.backbone.cls_token"])
    kept = torch.load("run/backbone.pth", weights_only=True)
    trained, untrained = recorded.evaluated
    assert torch.equal(kept["cls_token"], teacher)
    assert torch.equal(trained.cls_token, teacher)
    assert not torch.equal(untrained.cls_token, teacher)
    assert Path("run/attention.png").exists() and Path("run/views.png").exists()


@pytest.mark.usefixtures("class_folders", "no_report")
def test_teacher_is_what_is_kept_and_measured_while_it_trains(monkeypatch):
    measured = []

    def quick_knn(network, *args, **options):
        measured.append({name: value.clone() for name, value in network.state_dict().items()})
        return 0.0

    monkeypatch.setattr(linear_probe, "quick_knn", quick_knn)
    stop_after(3, "dino")  # an epoch
    model = load("run/checkpoint.pth")["model"]
    _, trained = measured
    for name, value in load("run/backbone.pth").items():
        teacher = model[f"teacher.backbone.{name}"]
        assert torch.equal(value, teacher)
        assert torch.equal(trained[name], teacher)


@pytest.mark.parametrize("drop_path", ["0", "0.5"])
def test_noise_of_stochastic_depth_is_drawn_for_the_total_batch(class_folders, monkeypatch,
                                                                no_report, drop_path):
    """By common.uniform, in each step, and only where it is needed. An image's numbers are a row,
    so that N processes equal one."""
    drawn = []
    used = []

    def uniform(n, *shape, original=common.uniform, **kwargs):
        numbers = original(n, *shape, **kwargs)
        if len(shape) == 3:
            drawn.append(numbers)
        return numbers

    def forward(self, global_views, local_views, noise=None, original=DINO.forward):
        if noise is not None:
            used.append(noise)
        return original(self, global_views, local_views, noise)

    monkeypatch.setattr(common, "uniform", uniform)
    monkeypatch.setattr(DINO, "forward", forward)
    monkeypatch.setitem(dino.VITS, "vit_test", (64, 2, 1))
    args = ("--data images --recipe demo -a vit_test --patch-size 8 -b 8 --epochs 1 "
            "--local-views 3 --out run --drop-path").split()
    dino.train(dino.parse_args([*args, drop_path]))
    if drop_path == "0":
        assert not drawn and not used
    else:
        assert len(drawn) == len(used) == 3
        for of_images, of_views in zip(drawn, used):
            assert of_images.shape == (8, 5, 2, 2)  # images, views, blocks, branches
            assert torch.equal(of_views, of_images.transpose(0, 1))


def test_augmentation_is_that_of_the_paper(operations, monkeypatch, class_folders):
    """With the numbers of the imagenet recipe."""
    monkeypatch.setattr(linear_probe, "quick_knn", lambda *args, **kwargs: None)
    args = ("--data images --recipe imagenet -a resnet8 --image-size 32 --local-size 16 "
            "--out-dim 8 --hidden-dim 8 -b 8 --max-images 8 --epochs 1 -j 0")
    dino.train(dino.parse_args(args.split()))

    def view(size, crop_scale, blur, solarize):
        return [("random_resized_crop", {"size": size, "scale": crop_scale,
                                         "interpolation": "bicubic"}),
                ("random_horizontal_flip", {"p": 0.5}),
                ("color_jitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1,
                                  "p": 0.8}),
                ("random_grayscale", {"p": 0.2}),
                ("gaussian_blur", {"p": blur, "kernel_size": 13, "sigma": (0.1, 2.0)}),
                ("random_solarize", {"p": solarize}),
                ("normalize", {})]

    view1 = view(32, (0.4, 1.0), blur=1.0, solarize=0.0)
    view2 = view(32, (0.4, 1.0), blur=0.1, solarize=0.2)
    local_view = view(16, (0.05, 0.4), blur=0.5, solarize=0.0)
    expected = view1 + view2 + 8 * local_view
    assert operations == 2 * expected  # in views.png, and in the only step


def test_gray_is_that_of_all_views(operations, class_folders):
    args = ("--data images --recipe demo -a resnet8x0.25 --local-views 2 --gray 0.6 --out-dim 8 "
            "--hidden-dim 8 -b 8 --epochs 0")
    dino.train(dino.parse_args(args.split()))
    drawn = [numbers for name, numbers in operations if name == "random_grayscale"]
    assert drawn == 4 * [{"p": 0.6}]


@pytest.mark.parametrize("flag", ["--image-size", "--local-size"])
def test_patches_must_fit_into_the_views(flag, refusal):
    said = refusal(dino.parse_args, f"-a vit_small --patch-size 8 {flag} 36".split())
    assert f"{flag} 36 is no multiple of --patch-size 8" in said
    dino.parse_args(f"-a resnet18 --patch-size 8 {flag} 36".split())


# ---- collapse, as in the paper's figure 7


def toy_training(center_momentum, teacher_temperature, steps=100):
    """Teacher entropy / ln K, and KL / ln K, at the end of a small training."""
    torch.manual_seed(0)
    model = DINO(nn.Linear(8, 16), 16, out_dim=32, hidden_dim=32, bottleneck_dim=8)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3)
    for _ in range(steps):
        images = torch.randn(64, 8)
        views = [images + 0.5 * torch.randn(64, 8) for _ in range(4)]
        student, teacher = model(views[:2], views[2:])
        loss = dino_loss(student, teacher, model.center, 0.1, teacher_temperature)
        entropy = teacher_entropy(teacher, model.center, teacher_temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dino.ema_update(model.teacher, model.student, 0.98)
        update_center(model.center, teacher.mean((0, 1)), center_momentum)
    return entropy.item() / math.log(32), (loss - entropy).item() / math.log(32)


def test_centering_and_sharpening_together_prevent_collapse():
    entropy, kl = toy_training(center_momentum=0.9, teacher_temperature=0.04)
    assert 0.2 < entropy < 0.8 and kl > 0.05


def test_without_centering_one_class_wins():
    entropy, kl = toy_training(center_momentum=1.0, teacher_temperature=0.04, steps=200)
    assert entropy < 0.1 and kl < 0.02


def test_without_sharpening_the_output_becomes_uniform():
    entropy, kl = toy_training(center_momentum=0.9, teacher_temperature=0.2)
    assert entropy > 0.99 and kl < 0.01


def test_clip_norm_0_does_not_clip(tmp_path, monkeypatch):
    """As in the official code; a largest norm of 0 would make every gradient 0."""
    monkeypatch.setattr(dino, "clip_gradients", None)  # must not be called
    monkeypatch.setattr(linear_probe, "quick_knn", lambda *args, **kwargs: 0.0)
    monkeypatch.setattr(linear_probe, "evaluate", lambda *args: {})
    dino.train(dino.parse_args(["--max-images", "16", "-b", "8", "--epochs", "1", "-a",
                                "resnet8x0.25", "--clip-norm", "0", "--device", "cpu", "--out",
                                str(tmp_path / "run")]))
