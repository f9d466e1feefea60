"""SwAV against independent slow versions, and each of the details that are commonly wrong."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import linear_probe
import swav
from swav import LARS, SwAV, code_entropy, sinkhorn, swav_loss

# ---- codes


def slow_sinkhorn(scores, epsilon, iterations):
    """The paper's listing, without logarithms: a (K, B) matrix of total 1."""
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    num_prototypes, num_images = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / num_prototypes
        q = q / q.sum(0, keepdim=True) / num_images
    return (q * num_images).T


@pytest.mark.parametrize("epsilon, iterations", [(0.05, 3), (0.05, 1), (0.5, 10)])
def test_sinkhorn_equals_slow_version(epsilon, iterations):
    scores = torch.rand(7, 5, dtype=torch.float64) * 2 - 1
    codes = sinkhorn(scores, epsilon, iterations)
    expected = slow_sinkhorn(scores, epsilon, iterations)
    torch.testing.assert_close(codes, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(codes.sum(1), torch.ones(7, dtype=torch.float64))


def test_sinkhorn_solves_the_transport_problem():
    """At convergence: equal shares, and of the form Diag(u) exp(scores / ε) Diag(v)."""
    scores = torch.randn(12, 4, dtype=torch.float64)
    codes = sinkhorn(scores, 0.3, 500)
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64))
    log_uv = codes.log() - scores / 0.3  # log u_i + log v_j
    rest = log_uv - log_uv.mean(0) - log_uv.mean(1, keepdim=True) + log_uv.mean()
    assert rest.abs().max() < 1e-8


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sinkhorn_is_finite_at_any_scale(dtype, scale):
    scores = torch.rand(40, 9) * scale
    scores = scores.clamp(max=torch.finfo(dtype).max).to(dtype)
    codes = sinkhorn(scores, 0.03, 3)
    assert codes.dtype == torch.float32
    assert codes.isfinite().all() and (codes >= 0).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(40))
    assert torch.equal(codes, sinkhorn(scores.float(), 0.03, 3))


def test_no_gradient_through_codes():
    scores = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    codes = [sinkhorn(view_scores, 0.05, 3) for view_scores in scores]
    assert not codes[0].requires_grad and not codes[1].requires_grad


# ---- loss


def slow_loss(scores, codes, temperature):
    """The mean of equation 2 over images and pairs of views, one term after the other."""
    total = 0.0
    terms = 0
    for s in range(2):
        for t in range(len(scores)):
            if s == t:
                continue
            for q, score in zip(codes[s], scores[t]):
                p = torch.exp(score / temperature)
                total = total - sum(q[k] * torch.log(p[k] / p.sum()) for k in range(len(q)))
                terms += 1
    return total / terms


@pytest.mark.parametrize("num_views, temperature", [(2, 0.1), (5, 0.1), (3, 1.0)])
def test_loss_and_gradient_equal_slow_version(num_views, temperature):
    scores = torch.rand(num_views, 4, 6, dtype=torch.float64, requires_grad=True)
    codes = torch.rand(2, 4, 6, dtype=torch.float64).softmax(2)
    fast = swav_loss(list(scores), list(codes), temperature)
    slow = slow_loss(scores, codes, temperature)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    (fast_gradient,) = torch.autograd.grad(fast, scores)
    (slow_gradient,) = torch.autograd.grad(slow, scores)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-10, atol=1e-12)


def test_codes_are_constants_in_the_loss():
    scores = torch.randn(2, 4, 6, requires_grad=True)
    codes = torch.rand(2, 4, 6, requires_grad=True)
    swav_loss(scores, codes, 0.1).backward()
    assert codes.grad is None


def test_loss_at_chance_and_at_extremes():
    one_hot = torch.eye(8)
    codes = [one_hot, one_hot]
    equal = torch.zeros(5, 8, 8)
    right = one_hot.repeat(5, 1, 1)
    wrong = one_hot.roll(1, 0).repeat(5, 1, 1)
    assert swav_loss(equal, codes, 0.1).item() == pytest.approx(math.log(8))
    assert swav_loss(right, codes, 0.01).item() == pytest.approx(0, abs=1e-6)
    assert swav_loss(wrong * 1e4, codes, 0.01).isfinite()


def test_a_view_does_not_predict_its_own_code():
    scores = torch.stack([torch.eye(4), torch.eye(4).roll(1, 0)])
    own_codes = scores
    swapped_codes = scores.flip(0)
    assert swav_loss(scores, own_codes, 0.1) == pytest.approx(10, rel=1e-3)
    assert swav_loss(scores, swapped_codes, 0.1) == pytest.approx(0, abs=1e-3)


# ---- health


def test_code_entropy():
    assert code_entropy(torch.full((6, 4), 0.25)) == pytest.approx(1)
    assert code_entropy(torch.eye(4)) == 0


def test_collapse_shows_in_loss_and_code_entropy():
    """Where all views are alike, codes say nothing; but the mean code is as for a good model."""
    scores = torch.randn(1, 50).repeat(16, 1)
    codes = sinkhorn(scores, 0.05, 3)
    assert code_entropy(codes) == pytest.approx(1)
    assert code_entropy(codes.mean(0, keepdim=True)) == pytest.approx(1)
    assert swav_loss([scores, scores], [codes, codes], 0.1) >= math.log(50) - 1e-4


def softmax_codes(scores, epsilon, iterations):
    """What stands in Sinkhorn's place when nothing balances the clusters."""
    return (scores / epsilon).softmax(1)


def train_on_eight_clusters(make_codes):
    """60 steps on images of eight kinds -> the last loss and codes."""
    images = torch.randn(8, 3, 2, 2).repeat(8, 1, 1, 1)
    model = SwAV(nn.Flatten(), 12, proj_dim=8, num_prototypes=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        views = [images + 0.1 * torch.randn_like(images) for _ in range(4)]
        model.normalize_prototypes()
        z, scores = model(views)
        codes = [make_codes(view_scores, 0.05, 3)
                 for view_scores in model.scores_for_codes(z[:2], use_queue=False)]
        loss = swav_loss(scores, codes, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), torch.cat(codes)


def test_learns_clusters():
    loss, codes = train_on_eight_clusters(sinkhorn)
    assert loss < 0.6 * math.log(8)
    assert code_entropy(codes) < 0.6
    assert code_entropy(codes.mean(0, keepdim=True)) == pytest.approx(1, abs=0.01)


def test_without_sinkhorn_most_prototypes_get_no_image():
    _, codes = train_on_eight_clusters(softmax_codes)
    assert code_entropy(codes.mean(0, keepdim=True)) < 0.9


# ---- model


class TinyBackbone(nn.Module):
    """Convolution, BN and mean over the pixels; it notes the shapes that it is called with."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.layers(x).mean((2, 3))


def test_one_pass_per_size():
    model = SwAV(TinyBackbone(), 6, proj_dim=5, num_prototypes=7)
    model.normalize_prototypes()
    large = [torch.randn(4, 3, 12, 12) for _ in range(2)]
    small = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    z, scores = model(large + small)
    assert model.backbone.shapes == [(8, 3, 12, 12), (12, 3, 8, 8)]
    assert z.shape == (5, 4, 5) and scores.shape == (5, 4, 7)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(5, 4))  # else scores explode
    torch.testing.assert_close(scores, z @ model.prototypes.weight.T)


def test_head_is_that_of_the_official_code():
    """BN and ReLU after the first layer of two, and prototypes without bias."""
    model = SwAV(TinyBackbone(), 6, proj_dim=5, num_prototypes=7)
    layers = [type(layer) for layer in model.projector]
    assert layers == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert model.projector[3].bias is not None
    assert model.prototypes.bias is None


def test_all_views_share_a_pass_of_the_projector():
    model = SwAV(TinyBackbone(), 6, proj_dim=5, num_prototypes=7)
    before = model.projector[1].num_batches_tracked.item()
    model([torch.randn(4, 3, 12, 12), torch.randn(4, 3, 12, 12), torch.randn(4, 3, 8, 8)])
    assert model.projector[1].num_batches_tracked.item() == before + 1


@pytest.mark.parametrize("sizes", [(12, 12, 8, 8), (12, 8, 12)])
def test_views_keep_their_order(sizes):
    model = SwAV(TinyBackbone(), 6, proj_dim=5, num_prototypes=7).eval()  # each image on its own
    views = [torch.randn(4, 3, size, size) for size in sizes]
    z, _ = model(views)
    for i, view in enumerate(views):
        alone, _ = model([view])
        torch.testing.assert_close(z[i], alone[0])


def test_prototypes_are_normalized_in_place():
    model = SwAV(TinyBackbone(), 6, num_prototypes=9)
    weight = model.prototypes.weight
    before = weight.detach().clone()
    model.normalize_prototypes()
    assert model.prototypes.weight is weight and weight.requires_grad
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(F.cosine_similarity(weight, before), torch.ones(9))


# ---- queue


@pytest.mark.parametrize("queue_size, batch_size", [(12, 4), (10, 4), (6, 6), (3, 4)])
def test_queue_holds_the_latest_embeddings(queue_size, batch_size):
    model = SwAV(nn.Flatten(), 6, proj_dim=1, num_prototypes=5, queue_size=queue_size)
    seen = torch.zeros(2, queue_size, 1)  # an empty queue holds zeros
    for _ in range(7):
        z = torch.randn(2, batch_size, 1)
        model.enqueue(z)
        seen = torch.cat([seen, z], 1)
        latest = seen[:, -queue_size:]
        assert torch.equal(model.queue.sort(1).values, latest.sort(1).values)


def test_queue_is_saved_with_the_model():
    state = SwAV(nn.Flatten(), 6, queue_size=4).state_dict()
    assert "queue" in state and "queue_ptr" in state


def test_queue_is_compared_with_the_present_prototypes():
    model = SwAV(nn.Flatten(), 6, proj_dim=3, num_prototypes=5, queue_size=4)
    old = torch.randn(2, 4, 3)
    new = torch.randn(2, 2, 3)
    model.enqueue(old)
    nn.init.normal_(model.prototypes.weight)
    scores = model.scores_for_codes(new, use_queue=True)
    assert not scores.requires_grad
    both = torch.cat([new, old], 1)  # the batch comes first
    torch.testing.assert_close(scores, both @ model.prototypes.weight.T)
    scores = model.scores_for_codes(new, use_queue=False)
    torch.testing.assert_close(scores, new @ model.prototypes.weight.T)


# ---- optimizer


@pytest.mark.parametrize("name", ["lars", "adam"])
def test_all_parameters_are_decayed_and_adapted(name):
    model = SwAV(common.make_backbone("resnet8", 32), 128)
    (group,) = swav.make_optimizer(name, model, 0.1).param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert group["weight_decay"] == 0.1
    if name == "lars":
        assert group["adapt"]


def test_lars_is_larc_up_to_the_norm_of_the_decay():
    """LARC: rate 0.001 |w| / (|g| + decay |w|), then SGD with momentum; decay is tiny."""
    w = torch.randn(4, 3, dtype=torch.float64)
    v = torch.zeros_like(w)
    param = nn.Parameter(w.clone())
    optimizer = LARS([param], lr=0.6, weight_decay=1e-6)
    for _ in range(5):
        g = torch.randn_like(w)
        rate = 0.001 * w.norm() / (g.norm() + 1e-6 * w.norm())
        v = 0.9 * v + rate * (g + 1e-6 * w)
        w = w - 0.6 * v
        param.grad = g
        optimizer.step()
    torch.testing.assert_close(param.detach(), w, rtol=1e-7, atol=0)


# ---- a whole run


def test_augmentation_is_that_of_the_paper(operations, monkeypatch, class_folders):
    monkeypatch.setattr(linear_probe, "quick_knn", lambda *args, **kwargs: None)
    swav.train(swav.parse_args("--data images --recipe imagenet --arch resnet8 --image-size 32 "
                               "--small-size 16 -b 8 --max-images 8 --epochs 1 -j 0".split()))
    after_the_crop = [
        ("random_horizontal_flip", {"p": 0.5}),
        ("color_jitter", {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2,
                          "p": 0.8}),
        ("random_grayscale", {"p": 0.2}),
        ("gaussian_blur", {"p": 0.5, "kernel_size": 13, "sigma": (0.1, 2.0)}),
        ("normalize", {}),
    ]
    large = [("random_resized_crop", {"size": 32, "scale": (0.14, 1.0)}), *after_the_crop]
    small = [("random_resized_crop", {"size": 16, "scale": (0.05, 0.14)}), *after_the_crop]
    views = 2 * large + 6 * small
    assert operations[: 2 * len(views)] == 2 * views  # in views.png, and in the only step
    # then a picture, of what the prototypes see
    assert all(operation == ("normalize", {}) for operation in operations[2 * len(views) :])


@pytest.fixture
def run_loop(class_folders, monkeypatch, no_report):
    """-> a function of flags, which trains for five epochs of one step and returns what it saw."""
    flags = ("--data images --recipe imagenet --arch resnet8 --image-size 12 --small-size 8 "
             "--small-crops 3 --num-prototypes 6 --proj-dim 5 -b 8 --max-images 8 --epochs 5 "
             "--warmup-epochs 0 --lr 288 --wd 0.1 --workers 0 --out out").split()
    seen = SimpleNamespace(sizes=[], lengths=[], scores=[], codes=[], targets=[], weights=[],
                           moves=[], rates=[])
    forward = SwAV.forward
    make_optimizer = swav.make_optimizer

    def watched_forward(model, views):
        seen.model = model
        seen.sizes.append([view.shape[-1] for view in views])
        seen.lengths.append(model.prototypes.weight.norm(dim=1))
        return forward(model, views)

    def watched_optimizer(*args):
        seen.optimizer = make_optimizer(*args)
        return seen.optimizer

    def watched_sinkhorn(scores, epsilon, iterations):
        codes = sinkhorn(scores, epsilon, iterations)
        seen.scores.append(scores)
        seen.codes.append(codes)
        return codes

    def watched_loss(scores, codes, temperature):
        seen.targets += codes
        return swav_loss(scores, codes, temperature)

    def log(args, done, total_steps, first_step, started, lr, loss, chance, code_entropy):
        assert chance == math.log(6)
        assert 0 < code_entropy < 1
        seen.rates.append(lr)
        seen.weights.append(seen.model.prototypes.weight.detach().clone())
        seen.moves.append(seen.model.prototypes.weight in seen.optimizer.state)

    def run(*more_flags):
        swav.train(swav.parse_args([*flags, *more_flags]))
        return seen

    monkeypatch.setattr(SwAV, "forward", watched_forward)
    monkeypatch.setattr(swav, "make_optimizer", watched_optimizer)
    monkeypatch.setattr(swav, "sinkhorn", watched_sinkhorn)
    monkeypatch.setattr(swav, "swav_loss", watched_loss)
    monkeypatch.setattr(common, "log", log)
    return run


def test_views_prototypes_and_rates_of_a_run(run_loop, class_folders):
    seen = run_loop()
    assert seen.sizes == [[12, 12, 8, 8, 8]] * 5
    for length in seen.lengths:  # unit length at every forward pass
        torch.testing.assert_close(length, torch.ones(6))
    assert seen.rates[0] == 9  # 288 per 256 images
    last = 0.009 + (9 - 0.009) * (1 + math.cos(math.pi * 4 / 5)) / 2  # on the way to a thousandth
    assert seen.rates[-1] == pytest.approx(last)
    files = {path.name for path in (class_folders.parent / "out").iterdir()}
    assert {"views.png", "backbone.pth", "checkpoint.pth"} <= files


@pytest.mark.parametrize("optimizer", ["lars", "adam"])
def test_frozen_prototypes_have_no_gradient_no_decay_and_no_momentum(run_loop, optimizer):
    seen = run_loop("--freeze-epochs", "2", "--optimizer", optimizer)
    first, second, third = seen.weights[:3]  # after the step
    torch.testing.assert_close(first.norm(dim=1), torch.ones(6))  # no decay
    torch.testing.assert_close(first, second)
    assert (third - second).abs().max() > 1e-4
    assert seen.moves == [False, False, True, True, True]


def test_queue_is_used_only_when_full(run_loop):
    seen = run_loop("--queue-size", "12", "--queue-epoch", "1")  # filled in steps 1 and 2
    shapes = [tuple(scores.shape) for scores in seen.scores]  # two of each step
    assert shapes == [(8, 6)] * 6 + [(20, 6)] * 4
    assert seen.model.queue.norm(dim=2).min() > 0.9
    assert seen.model.queue_ptr == 8 * 4 % 12


def test_codes_of_the_queue_are_no_targets(run_loop):
    seen = run_loop("--queue-size", "12", "--queue-epoch", "1")
    assert len(seen.codes) == len(seen.targets) == 10
    for codes, target in zip(seen.codes, seen.targets):
        assert torch.equal(codes[:8], target)


def test_a_batch_enters_the_queue_after_its_codes_are_made(run_loop):
    seen = run_loop("--queue-size", "8", "--queue-epoch", "0")
    for scores in seen.scores[2:]:
        batch, queue = scores.split(8)
        assert torch.cdist(batch, queue).min() > 1e-4, "an image is compared with itself"


def test_each_large_view_has_its_half_of_the_queue(run_loop, monkeypatch):
    large = []
    forward = SwAV.forward

    def recorded(model, views):
        z, scores = forward(model, views)
        large.append(z[:2].detach().clone())
        return z, scores

    monkeypatch.setattr(SwAV, "forward", recorded)
    seen = run_loop("--queue-size", "8", "--queue-epoch", "0")  # as many as a batch
    torch.testing.assert_close(seen.model.queue, large[-1])


def test_temperatures_and_iterations_of_a_run(run_loop, monkeypatch):
    settings = []

    def recorded_sinkhorn(scores, epsilon, iterations):
        settings.append((epsilon, iterations))
        return sinkhorn(scores, epsilon, iterations)

    def recorded_loss(scores, codes, temperature):
        settings.append(temperature)
        return swav_loss(scores, codes, temperature)

    monkeypatch.setattr(swav, "sinkhorn", recorded_sinkhorn)
    monkeypatch.setattr(swav, "swav_loss", recorded_loss)
    run_loop("--epsilon", "0.07", "--sinkhorn-iterations", "2", "--temperature", "0.3")
    assert settings == 5 * [(0.07, 2), (0.07, 2), 0.3]


def test_a_resumed_run_has_the_queue_of_a_straight_one(run_loop, monkeypatch):
    flags = ["--queue-size", "12", "--queue-epoch", "1"]
    seen = run_loop(*flags)
    straight = seen.model.state_dict()
    assert len(seen.rates) == 5

    def stop(*args, **health):
        done = args[1]
        if done == 4:  # before its checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "SAVE_SECONDS", 0)
        patch.setattr(common, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            run_loop(*flags, "--out", "stopped")
    resumed = run_loop(*flags, "--out", "stopped", "--resume").model.state_dict()
    assert len(seen.rates) == 5 + 2  # it went on after step 3
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
