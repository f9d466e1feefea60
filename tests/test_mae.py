"""MAE against independent slow versions, and each of the details that are commonly wrong."""

import math

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import linear_probe
import mae
from mae import MAE, SimMIM, ViT, mae_loss, patchify, random_masking, reconstruct, unpatchify

DOUBLE = torch.float64


def tiny_vit(depth=2):
    """16 patches of 4 x 4 pixels."""
    return ViT(image_size=16, patch_size=4, dim=16, depth=depth, num_heads=2)


def tiny_mae():
    return MAE(tiny_vit(), 0.75, decoder_dim=8, decoder_depth=2, num_heads=2)


# ---- patches and loss


def slow_patches(image, p):
    """One image, pixel by pixel -> list of patches, each a list of values."""
    _, height, width = image.shape
    patches = []
    for top in range(0, height, p):
        for left in range(0, width, p):
            values = []
            for y in range(p):
                for x in range(p):
                    values += [image[c, top + y, left + x] for c in range(3)]
            patches.append(values)
    return patches


def test_patches_are_in_the_official_order():
    images = torch.randn(2, 3, 6, 8)
    expected = torch.tensor([slow_patches(image, 2) for image in images])
    assert torch.equal(patchify(images, 2), expected)
    square = torch.randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    assert torch.equal(unpatchify(patchify(square, 4), 4), square)


def slow_normalised(values):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return [(v - mean) / (variance + 1e-6) ** 0.5 for v in values]


def slow_loss(prediction, images, mask, p, norm_pix):
    errors = []
    for b, image in enumerate(images):
        for i, values in enumerate(slow_patches(image, p)):
            if mask[b, i] == 0:
                continue  # what is visible is not to be predicted
            if norm_pix:
                values = slow_normalised(values)
            errors.append(sum((prediction[b, i, j] - v) ** 2 for j, v in enumerate(values))
                          / len(values))
    return sum(errors) / len(errors)


@pytest.fixture
def example():
    """Images of four patches, a mask that removes three of them, and a prediction."""
    images = torch.randn(2, 3, 4, 4, dtype=DOUBLE)
    mask = torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 0]])
    prediction = torch.randn(2, 4, 12, dtype=DOUBLE, requires_grad=True)
    return images, mask, prediction


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_and_gradient_equal_slow_version(example, norm_pix):
    images, mask, prediction = example
    fast = mae_loss(prediction, images, mask, 2, norm_pix)
    slow = slow_loss(prediction, images, mask, 2, norm_pix)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    (fast_gradient,) = torch.autograd.grad(fast, prediction)
    (slow_gradient,) = torch.autograd.grad(slow, prediction)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-10, atol=1e-12)
    assert fast_gradient[mask == 0].count_nonzero() == 0
    assert torch.autograd.gradcheck(lambda x: mae_loss(x, images, mask, 2, norm_pix), prediction)


def test_loss_at_extremes():
    images = torch.randn(2, 3, 8, 8)
    mask = torch.ones(2, 4)
    zeros = torch.zeros(2, 4, 48)
    assert mae_loss(patchify(images, 4), images, mask, 4, norm_pix=False) == 0
    assert mae_loss(zeros, images, mask, 4).item() == pytest.approx(47 / 48, abs=1e-5)
    assert mae_loss(zeros, torch.ones(2, 3, 8, 8), mask, 4) == 0  # uniform patches: no 0 / 0
    assert mae_loss(zeros, 1e15 * images, mask, 4).isfinite()
    assert mae_loss(zeros, images, mask, 4) == mae_loss(zeros, images, mask, 4, norm_pix=True)


def test_simmim_loss_is_the_absolute_error_of_removed_pixels(example):
    images, mask, prediction = example
    errors = []
    for b, i in (0, 1), (0, 3), (1, 0):
        values = slow_patches(images[b], 2)[i]
        errors += [abs(prediction[b, i, j] - v) for j, v in enumerate(values)]
    expected = sum(errors) / len(errors)
    torch.testing.assert_close(mae.simmim_loss(prediction, images, mask, 2), expected)


# ---- masks


def test_masking_keeps_the_smallest_noise_and_restores():
    tokens = torch.randn(5, 16, 7)
    noise = torch.rand(5, 16)
    kept, mask, restore = random_masking(tokens, 0.75, noise)
    assert kept.shape == (5, 4, 7) and mask.dtype == torch.float32
    for b in range(5):
        smallest = sorted(range(16), key=lambda i: noise[b, i])[:4]
        assert torch.equal(kept[b], tokens[b, smallest])
        assert mask[b].tolist() == [0 if i in smallest else 1 for i in range(16)]  # 1 = removed
        assert torch.equal(kept[b, restore[b, smallest]], tokens[b, smallest])
        assert sorted(restore[b].tolist()) == list(range(16))


def test_each_image_loses_other_patches_and_as_many():
    tokens = torch.randn(64, 16, 1)
    _, mask, _ = random_masking(tokens, 0.75)
    assert (mask.sum(1) == 12).all()
    assert len({tuple(row) for row in mask.tolist()}) > 55
    assert (mask.mean(0) - 0.75).abs().max() < 0.2  # each place as often


def test_number_of_kept_patches_is_rounded():
    kept, _, _ = random_masking(torch.randn(1, 10, 1), 0.9)
    assert kept.shape[1] == 1  # in floats, 10 · (1 - 0.9) < 1


# ---- model


def slow_prediction(model, images, noise):
    """One image at a time: patches in a list, removed, encoded, put back, decoded."""
    encoder = model.backbone
    rows = []
    for image, values in zip(images, noise.tolist()):
        tokens = encoder.patch_embed(image[None])[0]
        visible = sorted(range(16), key=lambda i: values[i])[:4]
        visible.sort()  # attention knows places by their embedding only
        sequence = [encoder.cls_token[0, 0]]
        sequence += [tokens[i] + encoder.pos_embed[0, 1 + i] for i in visible]
        encoded = encoder.norm(encoder.blocks(torch.stack(sequence)[None]))[0]
        cls_token, *small = model.decoder_embed(encoded)
        places = [model.mask_token[0, 0] + model.decoder_pos_embed[0, 1 + i] for i in range(16)]
        for token, i in zip(small, visible):
            places[i] = token + model.decoder_pos_embed[0, 1 + i]
        decoded = model.decoder_blocks(torch.stack([cls_token, *places])[None])
        rows.append(model.decoder_pred(model.decoder_norm(decoded))[0, 1:])
    return torch.stack(rows)


def test_model_equals_slow_version():
    model = tiny_mae().double()
    nn.init.normal_(model.mask_token)
    nn.init.normal_(model.backbone.cls_token)
    images = torch.randn(3, 3, 16, 16, dtype=DOUBLE)
    noise = torch.rand(3, 16, dtype=DOUBLE)
    prediction, mask = model(images, noise)
    assert prediction.shape == (3, 16, 48) and mask.shape == (3, 16)
    torch.testing.assert_close(prediction, slow_prediction(model, images, noise))


@pytest.mark.parametrize("kind", [MAE, SimMIM])
def test_what_is_removed_is_not_seen(kind):
    model = kind(tiny_vit(), 0.75)
    images = torch.randn(2, 3, 16, 16)
    noise = torch.rand(2, 16)
    prediction, mask = model(images, noise)
    removed = mask[:, :, None] == 1
    patches = patchify(images, 4)
    others = torch.randn_like(patches)
    with_others_removed = unpatchify(torch.where(removed, others, patches), 4)
    assert torch.equal(model(with_others_removed, noise)[0], prediction)
    with_others_visible = unpatchify(torch.where(removed, patches, others), 4)
    assert (model(with_others_visible, noise)[0] - prediction).abs().min() > 0


@pytest.mark.parametrize("kind, length", [(MAE, 1 + 4), (SimMIM, 1 + 16)])
def test_encoder_sees_visible_patches_only_in_mae(kind, length):
    model = kind(tiny_vit(), 0.75)
    lengths = []
    model.backbone.blocks.register_forward_hook(
        lambda module, inputs, tokens: lengths.append(tokens.shape[1]))
    model(torch.randn(2, 3, 16, 16))
    assert lengths == [length]


def test_simmim_predicts_with_one_linear_layer_from_all_places():
    vit = tiny_vit()
    model = SimMIM(vit, 0.6)
    images = torch.randn(2, 3, 16, 16)
    prediction, mask = model(images, torch.rand(2, 16))
    tokens = vit.patch_embed(images)
    tokens[mask == 1] = model.mask_token[0, 0]
    tokens = torch.cat([vit.cls_token.expand(2, 1, 16), tokens], 1) + vit.pos_embed
    expected = model.decoder(vit.norm(vit.blocks(tokens))[:, 1:])
    torch.testing.assert_close(prediction, expected)
    assert (mask.sum(1) == 10).all()


@pytest.mark.parametrize("dim, grid", [(8, 3), (192, 8)])
def test_positions_are_sines_and_cosines_of_column_and_row(dim, grid):
    code = mae.positions(dim, grid)
    assert code.shape == (1, 1 + grid * grid, dim) and code.dtype == torch.float32
    assert not code[0, 0].any()  # of the class token
    omega = [10000 ** (-4 * i / dim) for i in range(dim // 4)]
    for place in range(grid * grid):
        row, column = divmod(place, grid)
        expected = ([math.sin(w * column) for w in omega] + [math.cos(w * column) for w in omega]
                    + [math.sin(w * row) for w in omega] + [math.cos(w * row) for w in omega])
        torch.testing.assert_close(code[0, 1 + place], torch.tensor(expected))


def test_positions_are_saved_but_not_trained():
    model = tiny_mae()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = mae.make_optimizer(model, 0.05)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    images = torch.randn(3, 3, 16, 16)
    prediction, mask = model(images)
    mae_loss(prediction, images, mask, 4).backward()
    optimizer.step()
    unchanged = {name for name, value in model.state_dict().items()
                 if torch.equal(value, before[name])}
    # Everything else has a gradient, as DistributedDataParallel needs.
    assert unchanged == {"backbone.pos_embed", "decoder_pos_embed"}


def test_initialisation_is_that_of_the_official_code():
    vit = ViT(32, 4, 64, 2, 2)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    model = MAE(vit, 0.75, 32, 2, 1)
    for name, value in vit.state_dict().items():
        assert torch.equal(value, before[name])  # what --init has loaded stays
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_out, fan_in = module.weight.flatten(1).shape  # the convolution as a matrix
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.98 * bound < module.weight.abs().max() <= bound, name
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
    assert 0.015 < torch.cat([vit.cls_token, model.mask_token], 2).std() < 0.025


@pytest.mark.filterwarnings("ignore:The nodes obtained by tracing the model in train mode")
def test_features_of_a_layer_can_be_extracted_by_torchvision():
    vit = tiny_vit().eval()
    extractor = create_feature_extractor(vit, {"blocks.0.mlp.fc2": "inner", "norm": "tokens"})
    images = torch.randn(2, 3, 16, 16)
    features = extractor(images)
    assert features["inner"].shape == (2, 17, 16)
    torch.testing.assert_close(features["tokens"][:, 0], vit(images))


# ---- names and files of others


def shapes_of_blocks(prefix, dim, depth):
    """Of timm's blocks -> {name: shape}."""
    shapes = {}
    for i in range(depth):
        block = f"{prefix}blocks.{i}"
        shapes.update({
            f"{block}.norm1.weight": (dim,), f"{block}.norm1.bias": (dim,),
            f"{block}.attn.qkv.weight": (3 * dim, dim), f"{block}.attn.qkv.bias": (3 * dim,),
            f"{block}.attn.proj.weight": (dim, dim), f"{block}.attn.proj.bias": (dim,),
            f"{block}.norm2.weight": (dim,), f"{block}.norm2.bias": (dim,),
            f"{block}.mlp.fc1.weight": (4 * dim, dim), f"{block}.mlp.fc1.bias": (4 * dim,),
            f"{block}.mlp.fc2.weight": (dim, 4 * dim), f"{block}.mlp.fc2.bias": (dim,)})
    return shapes


@pytest.mark.parametrize("arch, dim, depth, num_heads, p", [
    ("vit_base", 768, 12, 12, 16), ("vit_large", 1024, 24, 16, 16), ("vit_huge", 1280, 32, 16, 14)])
def test_names_and_shapes_are_those_of_official_checkpoints(arch, dim, depth, num_heads, p):
    """The encoder's are timm's."""
    patches = (224 // p) ** 2
    encoder = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + patches, dim),
               "patch_embed.proj.weight": (dim, 3, p, p), "patch_embed.proj.bias": (dim,),
               "norm.weight": (dim,), "norm.bias": (dim,)}
    encoder.update(shapes_of_blocks("", dim, depth))
    decoder = {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, 1 + patches, 512),
               "decoder_embed.weight": (512, dim), "decoder_embed.bias": (512,),
               "decoder_norm.weight": (512,), "decoder_norm.bias": (512,),
               "decoder_pred.weight": (3 * p * p, 512), "decoder_pred.bias": (3 * p * p,)}
    decoder.update(shapes_of_blocks("decoder_", 512, 8))
    assert mae.VITS[arch] == (dim, depth, num_heads)
    with torch.device("meta"):
        vit = ViT(224, p, dim, depth, num_heads)
        model = MAE(vit)
    expected = {f"backbone.{name}": shape for name, shape in encoder.items()}
    expected.update(decoder)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert {block.attn.num_heads for block in vit.blocks} == {num_heads}
    assert {block.attn.num_heads for block in model.decoder_blocks} == {16}


def test_backbone_loads_into_timm():
    timm = pytest.importorskip("timm")
    vit = ViT(224, 16, *mae.VITS["vit_tiny"]).eval()
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    other.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(vit(images), other(images), atol=1e-5, rtol=1e-5)


def our_checkpoint(model):
    return {"method": "mae", "args": {"image_size": 32}, "model": model.state_dict()}


def official_checkpoint(model):
    weights = {name.removeprefix("backbone."): value for name, value in model.state_dict().items()}
    return {"model": weights}


def our_backbone(model):
    return model.backbone.state_dict()


@pytest.mark.parametrize("contents", [our_checkpoint, official_checkpoint, our_backbone])
def test_linear_probe_gives_the_same_class_token(tmp_path, contents):
    model = MAE(ViT(32, 8, 128, 2, 2), 0.75, 32, 1, 1)
    torch.save(contents(model), tmp_path / "file.pth")
    backbone, _, size = linear_probe.load_backbone(str(tmp_path / "file.pth"))
    assert size == 32
    images = torch.randn(2, 3, 32, 32)
    class_token = model.backbone.encode(model.backbone.embed(images))[:, 0]
    assert torch.equal(model.backbone(images), class_token)
    torch.testing.assert_close(backbone.eval()(images), class_token)


# ---- training


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_of_true_targets_is_the_image(norm_pix):
    images = torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    target = patchify(images, 4)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    if norm_pix:
        target = (target - target.mean(2, keepdim=True)) / target.std(2, keepdim=True)
    target[mask == 0] = torch.randn(48, dtype=DOUBLE)  # of what is visible: not shown
    visible, filled = reconstruct(target, images, mask, 4, norm_pix)
    torch.testing.assert_close(filled, images, atol=1e-5, rtol=1e-5)
    assert not patchify(visible, 4)[mask == 1].any()
    assert torch.equal(patchify(visible, 4)[mask == 0], patchify(images, 4)[mask == 0])


def test_biases_and_norms_are_not_decayed_and_tokens_are():
    model = tiny_mae()
    optimizer = mae.make_optimizer(model, 0.05)
    assert type(optimizer) is torch.optim.AdamW
    weights, others = optimizer.param_groups
    assert weights["betas"] == others["betas"] == (0.9, 0.95)
    assert weights["weight_decay"] == 0.05 and others["weight_decay"] == 0
    names = {p: name for name, p in model.named_parameters()}
    not_decayed = {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert {names[p] for p in others["params"]} == not_decayed
    assert {names[p] for p in weights["params"]} == set(names.values()) - not_decayed


@pytest.mark.parametrize("blind", [False, True])
def test_loss_falls_below_the_variance_only_if_the_encoder_sees(blind):
    """The health number. Each image repeats a patch or its negative, as the visible ones tell."""
    patch = torch.randn(1, 3, 4, 4).tile(1, 1, 4, 4)
    model = MAE(tiny_vit(depth=1), 0.75, 32, 1, 1)
    optimizer = mae.make_optimizer(model, 0.05)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(30):
        sign = 2 * torch.randint(2, (32, 1, 1, 1)) - 1
        images = sign * patch
        prediction, mask = model(torch.zeros_like(images) if blind else images)
        loss = mae_loss(prediction, images, mask, 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    variance = mae_loss(torch.zeros_like(prediction), images, mask, 4)
    if blind:
        assert loss > 0.9 * variance
    else:
        assert loss < 0.5 * variance


@pytest.mark.parametrize("flags, norm_pix", [("--objective mae", True),
                                             ("--objective mae --no-norm-pix", False),
                                             ("--objective simmim", False)])
def test_run_writes_pictures_and_evaluates_the_stages(class_folders, monkeypatch, flags, norm_pix):
    evaluations = []
    pictures = []
    losses = []

    def recorded(*args):
        pictures.append(args)
        return reconstruct(*args)

    def recorded_loss(prediction, images, mask, **options):
        losses.append((mask.mean().item(), options))
        return mae_loss(prediction, images, mask, **options)

    monkeypatch.setattr(linear_probe, "evaluate", lambda *args, **given: evaluations.append(given))
    monkeypatch.setattr(mae, "reconstruct", recorded)
    monkeypatch.setattr(mae, "mae_loss", recorded_loss)
    mae.train(mae.parse_args(f"--data images --recipe demo -b 8 --epochs 1 --out out "
                             f"--mask-ratio 0.5 {flags}".split()))
    written = {path.name for path in (class_folders.parent / "out").iterdir()}
    assert written >= {"views.png", "reconstruction.png", "backbone.pth"}
    (given,) = pictures
    assert given[-1] == norm_pix  # undoes what the loss did
    if "simmim" not in flags:
        assert (0.5, {"patch_size": 4, "norm_pix": norm_pix}) in losses
    assert evaluations == [{"layers": True}]  # the best features are not at the end


def test_the_stages_of_the_largest_are_not_evaluated(class_folders, monkeypatch):
    evaluations = []
    monkeypatch.setattr(linear_probe, "evaluate", lambda *args, **given: evaluations.append(given))
    monkeypatch.setitem(mae.VITS, "vit_large", (32, 1, 2))
    mae.train(mae.parse_args("--data images --recipe demo -b 8 --epochs 1 --out out "
                             "-a vit_large".split()))
    assert evaluations == [{"layers": False}]


def test_augmentation_is_that_of_the_paper(operations, class_folders):
    mae.train(mae.parse_args("--data images --recipe imagenet -a vit_micro --image-size 96 -b 8 "
                             "--epochs 0 --decoder-depth 1".split()))
    expected = [("random_resized_crop", {"size": 96, "scale": (0.2, 1.0),
                                         "interpolation": "bicubic"}),
                ("random_horizontal_flip", {"p": 0.5}),
                ("normalize", {})]
    assert operations[:3] == expected
    of_knn_and_reconstruction = operations[3:]
    assert all(operation == ("normalize", {}) for operation in of_knn_and_reconstruction)


def test_pixels_are_normalised_unless_a_flag_says_no():
    assert mae.parse_args(["--recipe", "imagenet"]).norm_pix
    assert not mae.parse_args(["--no-norm-pix"]).norm_pix


@pytest.mark.parametrize("flags, message", [
    ("--arch resnet18", "--arch resnet18: the encoder must be one of vit_micro"),
    ("--image-size 30", "--image-size 30 is no multiple of --patch-size 4"),
    ("--decoder-dim 100", "--decoder-dim 100 is no multiple of 32")])
def test_wrong_arguments(flags, message, refusal):
    assert message in refusal(mae.parse_args, flags.split())
