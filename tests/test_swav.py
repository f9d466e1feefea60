"""SwAV against independent slow versions, and each of the details that are commonly wrong."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import common
import linear_probe
import swav
from swav import LARS, SwAV, code_entropy, nearest_views, sinkhorn, swav_loss

# ---- codes


def slow_sinkhorn(scores, epsilon, iterations):
    """The paper's listing, in plain numbers: a (K, B) matrix of total 1."""
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    prototypes, images = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / images
    return (q * images).T


@pytest.mark.parametrize("epsilon, iterations", [(0.05, 3), (0.05, 1), (0.5, 10)])
def test_sinkhorn_equals_slow_version(epsilon, iterations):
    scores = torch.rand(7, 5, dtype=torch.float64) * 2 - 1
    codes = sinkhorn(scores, epsilon, iterations)
    torch.testing.assert_close(codes, slow_sinkhorn(scores, epsilon, iterations), rtol=1e-12,
                               atol=1e-14)
    torch.testing.assert_close(codes.sum(1), torch.ones(7, dtype=torch.float64))


def test_sinkhorn_solves_the_transport_problem():
    """At convergence: equal shares, and of the form Diag(u) exp(scores / ε) Diag(v)."""
    scores = torch.randn(12, 4, dtype=torch.float64)
    codes = sinkhorn(scores, 0.3, 500)
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64))
    rest = codes.log() - scores / 0.3
    rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    assert rest.abs().max() < 1e-8


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sinkhorn_is_finite_at_any_scale(dtype, scale):
    scores = (torch.rand(40, 9) * scale).clamp(max=torch.finfo(dtype).max).to(dtype)
    codes = sinkhorn(scores, 0.03, 3)
    assert codes.dtype == torch.float32  # half precision is left before anything else
    assert codes.isfinite().all() and (codes >= 0).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(40))
    assert torch.equal(codes, sinkhorn(scores.float(), 0.03, 3))


def test_no_gradient_through_codes():
    scores = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    codes = [sinkhorn(s, 0.05, 3) for s in scores]
    assert not any(q.requires_grad for q in codes)
    constant = [q.clone() for q in codes]
    gradients = [torch.autograd.grad(swav_loss(scores, q, 0.1), scores)[0]
                 for q in (codes, constant)]
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


# ---- loss


def slow_loss(scores, codes, temperature):
    """Equations 2 and 6 over the number of terms, image by image, in Python floats."""
    total, terms = 0.0, 0
    for s, t in itertools.product(range(2), range(len(scores))):
        if s == t:
            continue
        for q, score in zip(codes[s], scores[t]):
            p = torch.exp(score / temperature)
            total = total - sum(q[k] * torch.log(p[k] / p.sum()) for k in range(len(q)))
            terms += 1
    return total / terms


@pytest.mark.parametrize("views, temperature", [(2, 0.1), (5, 0.1), (3, 1.0)])
def test_loss_and_gradient_equal_slow_version(views, temperature):
    scores = torch.rand(views, 4, 6, dtype=torch.float64, requires_grad=True)
    codes = torch.rand(2, 4, 6, dtype=torch.float64).softmax(2)
    fast = swav_loss(list(scores), list(codes), temperature)
    slow = slow_loss(scores, codes, temperature)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: swav_loss(list(x), codes, temperature), scores)


def test_codes_are_constants_in_the_loss():
    scores, codes = torch.randn(2, 2, 4, 6).requires_grad_().unbind(0)
    codes.retain_grad()
    swav_loss(scores, codes, 0.1).backward()
    assert codes.grad is None


def test_loss_at_chance_and_at_extremes():
    codes = torch.eye(8).repeat(2, 1, 1)
    assert swav_loss(torch.zeros(5, 8, 8), codes, 0.1).item() == pytest.approx(math.log(8))
    assert swav_loss(torch.eye(8).repeat(5, 1, 1), codes, 0.01).item() == pytest.approx(0, abs=1e-6)
    assert swav_loss(torch.eye(8).roll(1, 0).repeat(5, 1, 1) * 1e4, codes, 0.01).isfinite()


def test_a_view_does_not_predict_its_own_code():
    """Views 0 and 1 predict their own codes perfectly, and the other's never."""
    scores = torch.stack([torch.eye(4), torch.eye(4).roll(1, 0)])
    assert swav_loss(scores, scores, 0.1) == pytest.approx(10, rel=1e-3)
    assert swav_loss(scores.flip(0), scores, 0.1) == pytest.approx(0, abs=1e-3)


# ---- health


def test_code_entropy():
    assert code_entropy(torch.full((6, 4), 0.25)) == pytest.approx(1)
    assert code_entropy(torch.eye(4)) == 0


def toy_step(model, images, optimizer, assign):
    model.normalize_prototypes()
    z, scores = model([images + 0.1 * torch.randn_like(images) for _ in range(4)])
    codes = [assign(s) for s in model.assigning_scores(z[:2].detach(), False)]
    loss = swav_loss(scores, codes, 0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), torch.cat(codes)


@pytest.mark.parametrize("assign, collapses", [(lambda s: sinkhorn(s, 0.05, 3), False),
                                               (lambda s: (s / 0.05).softmax(1), True)])
def test_learns_clusters_and_collapses_without_sinkhorn(assign, collapses):
    """Eight clusters of images: their prototypes come to share the images, unless nothing makes
    them; then most prototypes are chosen by no image."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 2, 2).repeat(8, 1, 1, 1)
    model = SwAV(nn.Flatten(), 12, proj_dim=8, num_prototypes=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss, codes = toy_step(model, images, optimizer, assign)
    if collapses:
        assert code_entropy(codes.mean(0, keepdim=True)) < 0.9
    else:
        assert loss < 0.6 * math.log(8) and code_entropy(codes) < 0.6
        assert code_entropy(codes.mean(0, keepdim=True)) == pytest.approx(1, abs=0.01)


def test_collapse_shows_in_loss_and_code_entropy():
    """Where all views are alike, codes say nothing; but the mean code is as for a good model."""
    scores = torch.randn(1, 50).repeat(16, 1)
    codes = sinkhorn(scores, 0.05, 3)
    assert code_entropy(codes) == pytest.approx(1)
    assert code_entropy(codes.mean(0, keepdim=True)) == pytest.approx(1)
    assert swav_loss([scores, scores], [codes, codes], 0.1) >= math.log(50) - 1e-4


# ---- model


def tiny_backbone():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Counted(nn.Module):
    """A backbone that notes the shapes it is called with."""

    def __init__(self):
        super().__init__()
        self.network, self.shapes = tiny_backbone(), []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.network(x)


def test_one_pass_per_resolution():
    model = SwAV(Counted(), 6, proj_dim=5, num_prototypes=7)
    norms = []
    model.projector[1].register_forward_hook(lambda module, x, y: norms.append(len(y)))
    views = [torch.randn(4, 3, 12, 12)] * 2 + [torch.randn(4, 3, 8, 8) + i for i in range(3)]
    z, scores = model(views)
    assert model.backbone.shapes == [(8, 3, 12, 12), (12, 3, 8, 8)] and norms == [20]
    assert z.shape == (5, 4, 5) and scores.shape == (5, 4, 7)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(5, 4))  # else scores explode
    torch.testing.assert_close(scores, z @ model.prototypes.weight.T)
    model.eval()  # without batch statistics, each view is on its own: the order is kept
    z, _ = model(views)
    for row, view in zip(z, views):
        torch.testing.assert_close(row, model([view])[0][0])


def test_prototypes_are_normalised_in_place():
    model = SwAV(tiny_backbone(), 6, num_prototypes=9)
    weight = model.prototypes.weight
    before = weight.detach().clone()
    model.normalize_prototypes()
    assert model.prototypes.weight is weight and weight.requires_grad
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(nn.functional.cosine_similarity(weight, before), torch.ones(9))


@pytest.mark.parametrize("size, batch", [(12, 4), (10, 4), (6, 6), (3, 4)])
def test_queue_holds_the_latest_embeddings(size, batch):
    model = SwAV(tiny_backbone(), 6, proj_dim=2, num_prototypes=5, queue_size=size)
    assert {"queue", "queue_ptr"} <= model.state_dict().keys()
    seen = torch.empty(2, 0, 2)
    for _ in range(7):
        z = torch.randn(2, batch, 2)
        model.enqueue(z)
        seen = torch.cat([seen, z], 1)
        kept = seen[:, -size:]
        held = model.queue[:, :kept.shape[1]] if seen.shape[1] < size else model.queue
        for a, b in zip(kept, held):
            torch.testing.assert_close(a[a[:, 0].argsort()], b[b[:, 0].argsort()])
    assert seen.shape[1] > size


def test_queue_is_scored_against_the_prototypes_of_today():
    model = SwAV(tiny_backbone(), 6, proj_dim=3, num_prototypes=5, queue_size=4)
    old, new = torch.randn(2, 4, 3), torch.randn(2, 2, 3)
    model.enqueue(old)
    nn.init.normal_(model.prototypes.weight)
    scores = model.assigning_scores(new, True)
    assert scores.shape == (2, 6, 5) and not scores.requires_grad
    both = torch.cat([new, old], 1)  # the batch comes first
    torch.testing.assert_close(scores, both @ model.prototypes.weight.T)
    assert torch.equal(model.assigning_scores(new, False), new @ model.prototypes.weight.T)


class Angle(nn.Module):
    def forward(self, x):
        return torch.cat([x.cos(), x.sin()], 1)


def test_nearest_views():
    """Views of one brightness each; the prototypes are three brightnesses."""
    brightness = torch.tensor([0.9, 0.1, 0.5, 0.91, 0.52, 0.12, 0.93, 0.13, 0.94])
    views = brightness[:, None, None, None].expand(9, 3, 8, 8)
    model = SwAV(nn.Flatten(), 192, proj_dim=2, num_prototypes=3)
    model.projector = nn.Sequential(nn.AvgPool1d(192), Angle())
    model.prototypes.weight.data = 7 * Angle()(torch.tensor([[0.1], [0.5], [0.9]]))
    rows = nearest_views(model, views, count=2)
    assert rows.shape == (2, 2, 3, 8, 8)
    assert rows[0, :, 0, 0, 0].tolist() == pytest.approx([0.9, 0.91])  # of four; the nearest first
    assert rows[1, :, 0, 0, 0].tolist() == pytest.approx([0.1, 0.12])  # of three
    assert nearest_views(model, views[:1]).shape == (1, 1, 3, 8, 8)


# ---- optimizer and recipes


def test_all_parameters_are_decayed_and_adapted():
    model = SwAV(common.make_backbone("resnet8", 32), 128)
    for name in "lars", "adam":
        group, = swav.make_optimizer(name, model, 0.1).param_groups
        assert group["weight_decay"] == 0.1 and group.get("adapt", True)
        assert len(group["params"]) == len(list(model.parameters()))


def test_lars_is_larc_up_to_the_norm_of_the_decay():
    """LARC: rate 0.001 |w| / (|g| + decay |w|), then SGD with momentum; decay is tiny."""
    torch.manual_seed(0)
    w = torch.randn(4, 3, dtype=torch.float64)
    param, v = nn.Parameter(w.clone()), torch.zeros_like(w)
    optimizer = LARS([param], lr=0.6, weight_decay=1e-6)
    for _ in range(5):
        g = param.grad = torch.randn_like(w)
        v = 0.9 * v + 0.001 * w.norm() / (g.norm() + 1e-6 * w.norm()) * (g + 1e-6 * w)
        w = w - 0.6 * v
        optimizer.step()
    torch.testing.assert_close(param.detach(), w, rtol=1e-7, atol=0)


def test_small_crops_are_the_smaller_ones():
    swav.parse_args(["--small-crops", "0", "--small-crop-scale", "0.5", "--crop-scale", "0.2"])
    with pytest.raises(SystemExit) as end:
        swav.parse_args(["--small-crops", "2", "--small-crop-scale", "0.5", "--crop-scale", "0.2"])
    assert end.value.code == 2


# ---- the training loop itself: five epochs of one step


@pytest.fixture
def run_loop(class_folders, monkeypatch):
    """-> a function of flags, which trains and returns what it saw."""
    flags = ("--data images --recipe imagenet --arch resnet8 --image-size 12 --small-size 8 "
             "--small-crops 3 --num-prototypes 6 --proj-dim 5 -b 8 --max-images 8 --epochs 5 "
             "--warmup-epochs 0 --lr 288 --wd 0.1 --workers 0 --out out").split()
    seen = SimpleNamespace(sizes=[], lengths=[], weights=[], moves=[])
    forward, make_optimizer = SwAV.forward, swav.make_optimizer

    def watched_forward(model, views):
        seen.model = model
        seen.sizes.append([view.shape[-1] for view in views])
        seen.lengths.append(model.prototypes.weight.norm(dim=1))
        return forward(model, views)

    def watched_optimizer(*args):
        seen.optimizer = make_optimizer(*args)
        return seen.optimizer

    def log(args, done, total_steps, started, lr, loss, chance, code_entropy):
        assert chance == math.log(6) and 0 < code_entropy < 1
        seen.weights.append(seen.model.prototypes.weight.detach().clone())
        seen.moves.append(seen.model.prototypes.weight in seen.optimizer.state)

    def run(*more):
        swav.train(swav.parse_args([*flags, *more]))
        return seen

    monkeypatch.setattr(SwAV, "forward", watched_forward)
    monkeypatch.setattr(swav, "make_optimizer", watched_optimizer)
    monkeypatch.setattr(common, "log", log)
    monkeypatch.setattr(linear_probe, "evaluate", lambda *a, **k: {})
    return run


def test_views_prototypes_and_pictures_of_a_run(run_loop, class_folders):
    seen = run_loop()
    assert seen.sizes == [[12, 12, 8, 8, 8]] * 5 + [[12]]  # the last is for the picture
    for length in seen.lengths[:5]:  # unit length at every forward
        torch.testing.assert_close(length, torch.ones(6))
    assert {"views.png", "prototypes.png", "backbone.pth", "checkpoint.pth", "log.jsonl"} == {
        path.name for path in (class_folders.parent / "out").iterdir()}


@pytest.mark.parametrize("optimizer", ["lars", "adam"])
def test_frozen_prototypes_have_no_gradient_no_decay_and_no_momentum(run_loop, optimizer):
    seen = run_loop("--freeze-epochs", "2", "--optimizer", optimizer)
    w1, w2, w3, *_ = seen.weights
    torch.testing.assert_close(w1.norm(dim=1), torch.ones(6))  # no decay
    torch.testing.assert_close(w1, w2)
    assert (w3 - w2).abs().max() > 1e-4
    assert seen.moves == [False, False, True, True, True]


def test_queue_is_used_only_when_full(run_loop, monkeypatch):
    shapes = []

    def watched(scores, epsilon, iterations):
        shapes.append(tuple(scores.shape))
        return sinkhorn(scores, epsilon, iterations)

    monkeypatch.setattr(swav, "sinkhorn", watched)
    seen = run_loop("--queue-size", "12", "--queue-epoch", "1")  # fills in steps 1 and 2
    assert shapes == [(8, 6)] * 6 + [(20, 6)] * 4
    assert seen.model.queue.norm(dim=2).min() > 0.9
    assert seen.model.queue_ptr == 8 * 4 % 12
