"""DINO against independent slow versions, and each of the details that are commonly wrong."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import dino
import linear_probe
from dino import DINO, Block, Head, ViT, dino_loss, teacher_entropy, update_center

pytestmark = [pytest.mark.filterwarnings("error::FutureWarning"),
              pytest.mark.filterwarnings("error::DeprecationWarning")]
DOUBLE = torch.float64


def tiny_vit(image_size=8, patch_size=4, drop_path=0.0, dim=12, depth=3, num_heads=3):
    """With random numbers in place of the zeros and ones of the initialisation."""
    vit = ViT(image_size, patch_size, dim, depth, num_heads, drop_path)
    for p in vit.parameters():
        nn.init.normal_(p, std=0.2)
    return vit


# ---- loss


def slow_terms(student, teacher, center, student_temperature, teacher_temperature):
    """{(t, v): H(P_t, P_v)} from equations 1 to 3, image by image, without softmax functions."""
    def distribution(x):
        return torch.exp(x) / torch.exp(x).sum()

    terms = {}
    for t in range(2):
        for v in range(len(student)):
            values = []
            for image in range(student.shape[1]):
                a = distribution((teacher[t, image] - center) / teacher_temperature)
                b = distribution(student[v, image] / student_temperature)
                values.append(-sum(a[k] * torch.log(b[k]) for k in range(len(center))))
            terms[t, v] = sum(values) / len(values)
    return terms


@pytest.mark.parametrize("views", [2, 5])
def test_loss_and_gradient_equal_slow_version(views):
    student = torch.randn(views, 3, 4, dtype=DOUBLE, requires_grad=True)
    teacher, center = torch.randn(2, 3, 4, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)
    terms = slow_terms(student, teacher, center, 0.5, 0.2)
    terms = [term for (t, v), term in terms.items() if t != v]  # never a view against itself
    slow, fast = sum(terms) / len(terms), dino_loss(student, teacher, center, 0.5, 0.2)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, teacher, center, 0.5, 0.2), student)


def test_loss_has_no_gradient_to_the_teacher_and_changes_nothing():
    student, teacher = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    center = torch.randn(4)
    before = center.clone()
    dino_loss(student, teacher, center, 0.1, 0.04).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    assert torch.equal(center, before)


def test_loss_at_chance_and_at_extremes():
    teacher, center = torch.randn(2, 6, 8), torch.zeros(8)
    constant = torch.ones(5, 6, 8)
    assert dino_loss(constant, teacher, center, 0.1, 0.04).item() == pytest.approx(math.log(8))
    agreed = 1e4 * F.one_hot(torch.arange(6), 8).float()
    loss = dino_loss(agreed.expand(5, 6, 8), agreed.expand(2, 6, 8), center, 0.1, 0.04)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert dino_loss(agreed.expand(5, 6, 8), -agreed.expand(2, 6, 8), center, 0.1, 0.04).isfinite()


def test_entropy_and_kl_add_up_to_the_loss():
    student = torch.randn(5, 3, 4, dtype=DOUBLE)
    teacher, center = torch.randn(2, 3, 4, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)
    entropy = teacher_entropy(teacher, center, 0.2)
    p = ((teacher - center) / 0.2).softmax(2)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(p).entropy().mean())
    kl = [F.kl_div((student[v] / 0.5).log_softmax(1), p[t], reduction="batchmean")
          for t in range(2) for v in range(5) if v != t]
    loss = dino_loss(student, teacher, center, 0.5, 0.2)
    torch.testing.assert_close(loss - entropy, sum(kl) / 8)
    assert teacher_entropy(torch.zeros(2, 3, 4), torch.zeros(4), 0.04).item() == pytest.approx(
        math.log(4))
    assert teacher_entropy(1e4 * torch.eye(4).expand(2, 4, 4), torch.zeros(4), 0.04) == 0


def test_center_is_a_running_mean():
    center, means = torch.zeros(3, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    for mean in means:
        update_center(center, mean, 0.9)
    weights = 0.1 * 0.9 ** torch.tensor([3, 2, 1, 0], dtype=DOUBLE)
    torch.testing.assert_close(center, (weights[:, None] * means).sum(0))


# ---- networks


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", "vit_base"])
def test_vit_has_the_names_and_shapes_of_timm_and_of_the_official_checkpoints(arch):
    """Of vit_*_patch16_224 with num_classes=0, and of dino_deitsmall16_pretrain.pth for small."""
    dim = {"vit_tiny": 192, "vit_small": 384, "vit_base": 768}[arch]
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + (224 // 16) ** 2, dim),
              "patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,),
              "norm.weight": (dim,), "norm.bias": (dim,)}
    for block in (f"blocks.{i}." for i in range(12)):
        for name, out, *into in (("norm1", dim), ("attn.qkv", 3 * dim, dim),
                                 ("attn.proj", dim, dim), ("norm2", dim),
                                 ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim)):
            shapes |= {f"{block}{name}.weight": (out, *into), f"{block}{name}.bias": (out,)}
    assert len(shapes) == 150 and dim // dino.VITS[arch][2] == 64  # width of a head
    with torch.device("meta"):
        vit = ViT(224, 16, *dino.VITS[arch])
    assert {k: tuple(v.shape) for k, v in vit.state_dict().items()} == shapes


def test_vit_equals_torchs_transformer():
    vit = tiny_vit(image_size=12).double()
    layers = []
    for block in vit.blocks:
        layer = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", 1e-6, True, norm_first=True)
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = block.attn.qkv.parameters()
        layer.self_attn.out_proj, layer.norm1 = block.attn.proj, block.norm1
        layer.linear1, layer.linear2, layer.norm2 = block.mlp.fc1, block.mlp.fc2, block.norm2
        layers.append(layer)
    images = torch.randn(2, 3, 12, 12, dtype=DOUBLE)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 9, 48)
    tokens = F.linear(patches, vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias)
    tokens = torch.cat([vit.cls_token.expand(2, 1, 12), tokens], 1) + vit.pos_embed
    before_last = nn.Sequential(*layers[:-1])(tokens)
    expected = vit.norm(layers[-1](before_last))[:, 0]
    torch.testing.assert_close(vit(images), expected, rtol=1e-10, atol=1e-10)
    x = layers[-1].norm1(before_last)
    _, weights = layers[-1].self_attn(x, x, x, average_attn_weights=False)
    maps = vit.class_attention(images)
    assert maps.shape == (2, 3, 3, 3)  # images, heads, rows, columns
    torch.testing.assert_close(maps.flatten(2), weights[:, :, 0, 1:], rtol=1e-10, atol=1e-10)


def test_local_views_get_interpolated_positions():
    vit = tiny_vit(image_size=32)
    grid = vit.pos_embed[:, 1:].detach().unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    for height, width in (4, 4), (3, 5), (12, 9):
        positions = vit.positions(height, width)
        assert torch.equal(positions[:, 0], vit.pos_embed[:, 0])
        expected = F.interpolate(grid, (height, width), mode="bicubic").flatten(2).transpose(1, 2)
        torch.testing.assert_close(positions[:, 1:], expected, rtol=1e-5, atol=1e-6)
    assert vit.positions(8, 8) is vit.pos_embed
    torch.testing.assert_close(vit.embed(torch.zeros(1, 3, 12, 20)) - vit.patch_embed.proj.bias
                               .expand(1, 16, 12).index_fill(1, torch.tensor(0), 0)
                               - F.pad(vit.cls_token, (0, 0, 0, 15)), vit.positions(3, 5))
    assert vit(torch.randn(2, 3, 16, 16)).shape == (2, 12)


def test_drop_path_leaves_out_whole_branches_of_single_images():
    block = Block(12, 3, drop_path=0.25)
    kept = block.drop(torch.ones(4000, 5, 12))
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (kept[:, 0, 0] == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert block.eval().drop(branch := torch.ones(4000, 5, 12)) is branch


def test_drop_path_is_in_the_student_only():
    model = DINO(tiny_vit(drop_path=0.5), 12, 7, 6, 5)
    assert [b.drop_path for b in model.student["backbone"].blocks] == [0, 0.25, 0.5]
    assert [b.drop_path for b in model.teacher["backbone"].blocks] == [0, 0, 0]
    assert model.training and model.teacher.training
    views = [torch.randn(6, 3, 8, 8) for _ in range(2)]
    (student1, teacher1), (student2, teacher2) = model(views, []), model(views, [])
    assert torch.equal(teacher1, teacher2) and not torch.equal(student1, student2)
    torch.testing.assert_close(model.eval()(views, [])[0], teacher1)


def test_last_layer_is_weight_normalised_with_g_fixed_at_1():
    head = Head(12, 7, 6, 5, bn=False)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False))
    reference.parametrizations.weight.original0.data.fill_(1)
    reference.parametrizations.weight.original1.data.copy_(head.last_layer.weight)
    x = torch.randn(4, 12)
    expected = reference(F.normalize(head.mlp(x), dim=1))
    torch.testing.assert_close(head(x), expected)
    assert head(x).abs().max() <= 1
    assert [n for n, _ in head.named_parameters() if "last" in n] == ["last_layer.weight"]
    head.last_layer.weight.data *= torch.rand(7, 1) + 1
    torch.testing.assert_close(head(x), expected)


def test_head_has_three_layers_and_bn_on_demand():
    hidden = [nn.Linear, nn.GELU]
    for bn, kinds in (False, hidden), (True, [nn.Linear, nn.BatchNorm1d, nn.GELU]):
        head = Head(12, 7, 6, 5, bn)
        assert [type(m) for m in head.mlp] == 2 * kinds + [nn.Linear]
        assert [tuple(m.weight.shape) for m in head.mlp if isinstance(m, nn.Linear)] == [
            (6, 12), (6, 6), (5, 6)]
        assert head(torch.randn(4, 12)).shape == (4, 7)


@pytest.mark.parametrize("arch", ["vit", "resnet8"])
def test_teacher_sees_global_views_only_and_the_student_all(arch):
    backbone = tiny_vit(32, 8) if arch == "vit" else common.make_backbone(arch, 32)
    model = DINO(backbone, backbone.feature_dim, 7, 6, 5, head_bn=False)
    global_views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    local_views = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    student, teacher = model(global_views, local_views)
    assert student.shape == (5, 4, 7) and teacher.shape == (2, 4, 7)
    assert student.requires_grad and not teacher.requires_grad
    torch.testing.assert_close(student[:2], teacher)  # equal weights at the start
    for v, view in enumerate(global_views + local_views) if arch == "vit" else ():
        torch.testing.assert_close(model.student["head"](backbone(view)), student[v])
    again, _ = model(global_views, [])
    torch.testing.assert_close(again, student[:2])
    assert not any(p.requires_grad for p in model.teacher.parameters())
    if arch == "resnet8":
        batches = [model[net]["backbone"].bn1.num_batches_tracked.item()
                   for model in [{"student": model.student, "teacher": model.teacher}]
                   for net in ("student", "teacher")]
        assert batches == [3, 2]  # two sizes and one; one and one


def test_files_of_the_official_code_are_read(tmp_path):
    """The whole checkpoint, of which the teacher counts, and the backbone by itself."""
    model = DINO(tiny_vit(64, 16, dim=64, num_heads=1), 64, 7, 6, 5)
    for p in model.teacher.parameters():
        nn.init.normal_(p)
    student, teacher = ({n: t for n, t in net.state_dict().items()}
                        for net in (model.student, model.teacher))
    torch.save({"student": {f"module.{n}": t for n, t in student.items()}, "teacher": teacher,
                "epoch": 1}, tmp_path / "full.pth")
    torch.save(model.teacher["backbone"].state_dict(), tmp_path / "backbone.pth")
    images = torch.randn(2, 3, 64, 64)
    for name in "full.pth", "backbone.pth":
        backbone, initial, size = linear_probe.load_backbone(tmp_path / name)
        assert size == 64
        features = model.teacher["backbone"](images)
        torch.testing.assert_close(backbone.eval()(images), features, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(initial.eval()(images), features, rtol=1e-2, atol=1e-2)


# ---- training


def test_each_gradient_is_clipped_by_its_own_norm():
    params = [nn.Parameter(torch.zeros(n, dtype=DOUBLE)) for n in (3, 4, 5, 2)]
    for p, scale in zip(params[:3], (0.1, 10, 1000)):
        p.grad = scale * torch.randn_like(p)
    expected = copy.deepcopy(params)
    for p, q in zip(params, expected):
        q.grad = None if p.grad is None else p.grad.clone()
        nn.utils.clip_grad_norm_([q], 3.0)
    small = params[0].grad.clone()
    dino.clip_gradients(params, 3.0)
    for p, q in zip(params[:3], expected):
        torch.testing.assert_close(p.grad, q.grad)
    assert torch.equal(params[0].grad, small) and params[3].grad is None


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_biases_and_norms_are_not_decayed(name):
    model = DINO(tiny_vit(), 12, 7, 6, 5)
    weights, others = dino.make_optimizer(name, model, 0.1).param_groups
    assert weights["weight_decay"] == 0.1 and others["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert all("bias" in names[id(p)] or "norm" in names[id(p)] for p in others["params"])
    decayed = [names[id(p)] for p in weights["params"]]
    for name in "cls_token", "pos_embed", "patch_embed.proj.weight":
        assert f"student.backbone.{name}" in decayed
    assert "student.head.last_layer.weight" in decayed
    assert len(decayed) + len(others["params"]) == len(list(model.student.parameters()))


def test_schedules():
    values = [dino.cosine(step, 100, 10, 2.0) for step in range(100)]
    assert values[0] == pytest.approx(0.2) and values[9] == values[10] == 2.0
    assert dino.cosine(0, 100, 0, 0.996, 1.0) == 0.996  # no warm-up: rises to its end
    assert dino.cosine(50, 100, 0, 0.04, 0.4) == pytest.approx(0.22)
    assert dino.cosine(100, 100, 0, 0.996, 1.0) == 1
    assert [dino.linear(epoch, 30, 0.04, 0.07) for epoch in (0, 10, 30, 99)] == pytest.approx(
        [0.04, 0.05, 0.07, 0.07])
    assert dino.linear(0, 0, 0.04, 0.07) == 0.07


def test_order_and_schedules_of_a_run(class_folders, monkeypatch):
    """24 images, three steps in each of two epochs. The center is that of the steps before, the
    teacher follows the updated student, and the last layer starts to move in the second epoch."""
    calls, last_layers = [], []

    def record(owner, name, value):
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            calls.append((name, value(*args)))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    record(dino, "dino_loss", lambda s, t, center, ts, tt: (center.clone(), tt))
    record(dino, "clip_gradients", lambda parameters, norm: norm)
    record(torch.optim.AdamW, "step", lambda self: [g["weight_decay"] for g in self.param_groups])
    record(dino, "ema_update", lambda teacher, student, m: (
        m, last_layers.append(student["head"].last_layer.weight.detach().clone())))
    record(dino, "update_center", lambda center, mean, m: (mean, m))
    evaluated = []
    monkeypatch.setattr(linear_probe, "evaluate", lambda *a: evaluated.extend(a[:2]))
    monkeypatch.setitem(dino.VITS, "vit_test", (64, 2, 1))
    args = ("--data images --recipe demo --arch vit_test -b 8 --epochs 2 --patch-size 8 "
            "--workers 0 --local-views 1 --out-dim 32 --hidden-dim 16 "
            "--teacher-temperature-start 0.04 --teacher-temperature 0.07 "
            "--temperature-warmup-epochs 1 --ema-momentum 0.9 "
            "--weight-decay 0.1 --weight-decay-end 0.5 --out run --freeze-epochs 1")
    dino.train(dino.parse_args(args.split()))
    assert [name for name, _ in calls] == 6 * ["dino_loss", "clip_gradients", "step", "ema_update",
                                              "update_center"]
    values = {name: [v for n, v in calls if n == name] for name, _ in calls}
    center = torch.zeros(32)
    for (used, _), (mean, momentum) in zip(values["dino_loss"], values["update_center"]):
        torch.testing.assert_close(used, center)
        center = momentum * center + (1 - momentum) * mean
    assert center.abs().max() > 0
    assert [t for _, t in values["dino_loss"]] == pytest.approx([0.04, 0.05, 0.06] + 3 * [0.07])
    half = [(1 - math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert [m for m, _ in values["ema_update"]] == pytest.approx([0.9 + 0.1 * h for h in half])
    for (decay, none), h in zip(values["step"], half):
        assert decay == pytest.approx(0.1 + 0.4 * h) and none == 0
    assert all(torch.equal(weight, last_layers[0]) for weight in last_layers[:3])
    assert not torch.equal(last_layers[3], last_layers[0])
    saved = torch.load("run/checkpoint.pth", weights_only=True)["model"]
    torch.testing.assert_close(saved["center"], center)
    trained, start = saved["student.backbone.cls_token"], saved["teacher.backbone.cls_token"]
    assert not torch.equal(trained, start)
    teacher, initial = evaluated  # the teacher is what is evaluated and kept
    kept = torch.load("run/backbone.pth", weights_only=True)
    assert torch.equal(teacher.cls_token, start) and torch.equal(kept["cls_token"], start)
    assert not torch.equal(initial.cls_token, start)
    assert {"attention.png", "views.png"} <= {path.name for path in Path("run").iterdir()}


def test_views_are_those_of_the_paper(class_folders, monkeypatch):
    """What is done to make views.png, with the numbers of the imagenet recipe."""
    calls = []

    def record(name, value):
        original = getattr(common, name)

        def recorded(x, *args, **kwargs):
            calls.append(value(*args, **kwargs))
            return original(x, *args, **kwargs)

        monkeypatch.setattr(common, name, recorded)

    record("random_resized_crop", lambda aspect, size, scale, interpolation: (
        size, scale, interpolation))
    record("gaussian_blur", lambda p, kernel_size, sigma: p)
    record("random_solarize", lambda p: p)
    monkeypatch.setattr(linear_probe, "evaluate", lambda *a: {})
    dino.train(dino.parse_args("--data images --recipe imagenet --arch resnet8 --image-size 32 "
                               "--local-size 16 --out-dim 8 --hidden-dim 8 -b 8 --epochs 0 "
                               "--workers 0".split()))
    large, small = (32, (0.4, 1.0), "bicubic"), (16, (0.05, 0.4), "bicubic")
    assert calls == [large, 1.0, 0.0, large, 0.1, 0.2] + 8 * [small, 0.5, 0.0]


@pytest.mark.parametrize("flags", ["--arch vit_small --patch-size 5", "--arch vit_huge",
                                   "--local-crop-scale 0.5 --crop-scale 0.4"])
def test_flags_that_do_not_fit(flags, capsys):
    with pytest.raises(SystemExit) as end:
        dino.parse_args(flags.split())
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ---- collapse, as the paper's figure 7 shows it


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
    entropy, kl = toy_training(center_momentum=1.0, teacher_temperature=0.04, steps=200)
    assert entropy < 0.1 and kl < 0.02  # the center stays 0: one class
    entropy, kl = toy_training(center_momentum=0.9, teacher_temperature=0.2)  # not sharp
    assert entropy > 0.99 and kl < 0.01  # uniform
