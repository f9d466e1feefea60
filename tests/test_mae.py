"""MAE against independent slow versions, and each of the details that are commonly wrong."""

import math

import pytest
import torch
from torch import nn

import linear_probe
import mae
from mae import MAE, SimMIM, ViT, mae_loss, patchify, random_masking, reconstruct, unpatchify


def tiny_mae(mask_ratio=0.75):
    """16 patches of 4 x 4 pixels, in float64."""
    torch.manual_seed(0)
    return MAE(ViT(16, 4, 16, 2, 2), mask_ratio, 8, 2, 2).double()


def images_and_noise(count=3):
    return (torch.randn(count, 3, 16, 16, dtype=torch.float64),
            torch.rand(count, 16, dtype=torch.float64))


# ---- patches and loss


def slow_patches(image, p):
    """One image, pixel by pixel -> list of patches, each a list of values."""
    _, height, width = image.shape
    return [[image[c, top + y, left + x] for y in range(p) for x in range(p) for c in range(3)]
            for top in range(0, height, p) for left in range(0, width, p)]


def test_patches_are_in_the_official_order():
    images = torch.randn(2, 3, 6, 8)
    expected = torch.tensor([slow_patches(image, 2) for image in images])
    assert torch.equal(patchify(images, 2), expected)
    square = torch.randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    assert torch.equal(unpatchify(patchify(square, 4), 4), square)


def slow_loss(prediction, images, mask, p, norm_pix):
    total = count = 0
    for b, image in enumerate(images):
        for i, values in enumerate(slow_patches(image, p)):
            if mask[b, i] == 1:
                if norm_pix:
                    mean = sum(values) / len(values)
                    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
                    values = [(v - mean) / (variance + 1e-6) ** 0.5 for v in values]
                total += sum((a - b) ** 2 for a, b in zip(prediction[b, i], values)) / len(values)
                count += 1
    return total / count


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_and_gradient_equal_slow_version(norm_pix):
    images, mask = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.zeros(2, 4)
    mask[0, 1] = mask[0, 3] = mask[1, 0] = 1
    prediction = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    fast = mae_loss(prediction, images, mask, 2, norm_pix)
    slow = slow_loss(prediction, images, mask, 2, norm_pix)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, prediction)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: mae_loss(x, images, mask, 2, norm_pix), prediction)
    assert gradients[0][mask == 0].count_nonzero() == 0  # what is visible is not to be predicted


def test_loss_at_extremes():
    images, mask = torch.randn(2, 3, 8, 8), torch.ones(2, 4)
    assert mae_loss(patchify(images, 4), images, mask, 4, norm_pix=False) == 0
    blank = torch.zeros(2, 4, 48)
    assert mae_loss(blank, images, mask, 4).item() == pytest.approx(47 / 48, abs=1e-5)
    assert mae_loss(blank, torch.ones(2, 3, 8, 8), mask, 4) == 0  # uniform patches: no 0 / 0
    assert mae_loss(blank, 1e15 * images, mask, 4).isfinite()
    assert mae_loss(blank, images, mask, 4) == mae_loss(blank, images, mask, 4, True)  # the default


def test_simmim_loss_is_the_absolute_error_of_removed_pixels():
    images, mask = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.zeros(2, 4)
    mask[0, 1] = mask[1, 0] = 1
    prediction = torch.randn(2, 4, 12, dtype=torch.float64)
    removed = [(0, 1), (1, 0)]
    expected = sum(abs(prediction[b, i, j] - slow_patches(images[b], 2)[i][j])
                   for b, i in removed for j in range(12)) / 24
    torch.testing.assert_close(mae.simmim_loss(prediction, images, mask, 2), expected)


# ---- masks


def test_masking_keeps_the_smallest_noise_and_restores():
    tokens, noise = torch.randn(5, 16, 7), torch.rand(5, 16)
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
    assert len(set(map(tuple, mask.tolist()))) > 55
    assert (mask.mean(0) - 0.75).abs().max() < 0.3  # anywhere alike
    assert random_masking(torch.randn(1, 10, 1), 0.9)[0].shape[1] == 1  # 10 · (1 - 0.9) < 1


# ---- model


def slow_prediction(model, images, noise):
    """One image at a time: patches in a list, removed, encoded, put back, decoded."""
    encoder, rows = model.backbone, []
    for image, values in zip(images, noise.tolist()):
        tokens = encoder.patch_embed(image[None])[0]
        visible = sorted(range(16), key=lambda i: values[i])[:4]
        visible.sort()  # attention knows places by their embedding only
        sequence = [encoder.cls_token[0, 0]]
        sequence += [tokens[i] + encoder.pos_embed[0, 1 + i] for i in visible]
        encoded = encoder.norm(encoder.blocks(torch.stack(sequence)[None]))[0]
        small = list(model.decoder_embed(encoded))
        places = [model.mask_token[0, 0] + model.decoder_pos_embed[0, 1 + i] for i in range(16)]
        for token, i in zip(small[1:], visible):
            places[i] = token + model.decoder_pos_embed[0, 1 + i]
        decoded = model.decoder_blocks(torch.stack([small[0], *places])[None])
        rows.append(model.decoder_pred(model.decoder_norm(decoded))[0, 1:])
    return torch.stack(rows)


def test_model_equals_slow_version():
    model = tiny_mae()
    for token in model.mask_token, model.backbone.cls_token:
        nn.init.normal_(token)
    images, noise = images_and_noise()
    prediction, mask = model(images, noise)
    assert prediction.shape == (3, 16, 48) and mask.shape == (3, 16)
    torch.testing.assert_close(prediction, slow_prediction(model, images, noise))


@pytest.mark.parametrize("kind", [MAE, SimMIM])
def test_what_is_removed_is_not_seen(kind):
    torch.manual_seed(0)
    model = kind(ViT(16, 4, 16, 2, 2), 0.75)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    prediction, mask = model(images, noise)
    other = torch.randn_like(images)
    swapped = torch.where(mask[:, :, None] == 1, patchify(other, 4), patchify(images, 4))
    assert torch.equal(model(unpatchify(swapped, 4), noise)[0], prediction)
    swapped = torch.where(mask[:, :, None] == 0, patchify(other, 4), patchify(images, 4))
    assert (model(unpatchify(swapped, 4), noise)[0] - prediction).abs().min() > 0


@pytest.mark.parametrize("kind, length", [(MAE, 1 + 4), (SimMIM, 1 + 16)])
def test_encoder_sees_visible_patches_only_in_mae(kind, length):
    model, lengths = kind(ViT(16, 4, 16, 1, 2), 0.75), []
    model.backbone.blocks.register_forward_hook(lambda *a: lengths.append(a[2].shape[1]))
    model(torch.randn(2, 3, 16, 16))
    assert lengths == [length]


def test_simmim_predicts_with_one_linear_layer_from_all_places():
    model = SimMIM(ViT(16, 4, 16, 1, 2), 0.6)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    prediction, mask = model(images, noise)
    vit = model.backbone
    tokens = vit.patch_embed(images)
    tokens[mask == 1] = model.mask_token[0, 0]
    tokens = torch.cat([vit.cls_token.expand(2, 1, 16), tokens], 1) + vit.pos_embed
    expected = model.decoder(vit.norm(vit.blocks(tokens))[:, 1:])
    torch.testing.assert_close(prediction, expected)
    assert (mask.sum(1) == 10).all()


def test_block_equals_torch_transformer_layer():
    block = mae.Block(16, 4)
    layer = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "gelu", 1e-6, True, norm_first=True)
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
             "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2."}
    weights = block.state_dict()
    for theirs, ours in names.items():
        for kind in "weight", "bias":
            weights[theirs + kind] = weights.pop(ours + kind)
    layer.load_state_dict(weights)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(block(x), layer(x))


@pytest.mark.parametrize("dim, grid", [(8, 3), (192, 8)])
def test_positions_are_sines_and_cosines_of_column_and_row(dim, grid):
    code = mae.positions(dim, grid)
    assert code.shape == (1, 1 + grid * grid, dim) and code.dtype == torch.float32
    assert not code[0, 0].any()  # of the class token
    for place in range(grid * grid):
        row, column = divmod(place, grid)
        omega = [10000 ** (-4 * i / dim) for i in range(dim // 4)]
        expected = [f(w * v) for v in (column, row) for f in (math.sin, math.cos) for w in omega]
        torch.testing.assert_close(code[0, 1 + place], torch.tensor(expected))


def test_positions_are_not_trained_but_saved():
    model = tiny_mae()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = mae.make_optimizer(model, 0.05)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    images, noise = images_and_noise()
    prediction, mask = model(images, noise)
    mae_loss(prediction, images, mask, 4).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    fixed = {"backbone.pos_embed", "decoder_pos_embed"}
    assert changed == set(before) - fixed  # everything else has a gradient, as DDP needs


def test_initialisation_is_that_of_the_official_code():
    torch.manual_seed(0)
    vit = ViT(32, 4, 64, 2, 2)
    weights = {k: v.clone() for k, v in vit.state_dict().items()}
    model = MAE(vit, 0.75, 32, 2, 1)
    assert all(torch.equal(v, weights[k]) for k, v in vit.state_dict().items())  # --init survives
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_out, fan_in = module.weight.flatten(1).shape  # the convolution as a matrix
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.98 * bound < module.weight.abs().max() <= bound, name
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, nn.LayerNorm))
    assert 0.015 < torch.cat([vit.cls_token, model.mask_token], 2).std() < 0.025


# ---- names and files of others


def transformer_names(prefix, dim, depth):
    """Of timm's blocks -> {name: shape}."""
    shapes = {"norm1.weight": (dim,), "norm1.bias": (dim,), "attn.qkv.weight": (3 * dim, dim),
              "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
              "norm2.weight": (dim,), "norm2.bias": (dim,), "mlp.fc1.weight": (4 * dim, dim),
              "mlp.fc1.bias": (4 * dim,), "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,)}
    return {f"{prefix}blocks.{i}.{k}": v for i in range(depth) for k, v in shapes.items()}


def official_names(dim, depth, patch, patches):
    """Of a released MAE -> {name: shape} of the encoder, which timm's ViT has, and the decoder."""
    encoder = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + patches, dim),
               "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,),
               **transformer_names("", dim, depth), "norm.weight": (dim,), "norm.bias": (dim,)}
    decoder = {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, 1 + patches, 512),
               "decoder_embed.weight": (512, dim), "decoder_embed.bias": (512,),
               **transformer_names("decoder_", 512, 8),
               "decoder_norm.weight": (512,), "decoder_norm.bias": (512,),
               "decoder_pred.weight": (3 * patch**2, 512), "decoder_pred.bias": (3 * patch**2,)}
    return encoder, decoder


@pytest.mark.parametrize("arch, patch", [("vit_base", 16), ("vit_large", 16), ("vit_huge", 14)])
def test_names_and_shapes_are_timms_and_those_of_official_checkpoints(arch, patch):
    with torch.device("meta"):
        vit = ViT(224, patch, *mae.VITS[arch])
        model = MAE(vit)
    encoder, decoder = official_names(*mae.VITS[arch][:2], patch, (224 // patch) ** 2)
    assert len(encoder) == 6 + 12 * mae.VITS[arch][1]
    assert {k: tuple(v.shape) for k, v in vit.state_dict().items()} == encoder
    expected = {**{f"backbone.{k}": v for k, v in encoder.items()}, **decoder}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert {b.attn.num_heads for b in model.decoder_blocks} == {16}
    assert {b.attn.num_heads for b in vit.blocks} == {mae.VITS[arch][2]}


def test_backbone_loads_into_timm():
    timm = pytest.importorskip("timm")
    vit = ViT(224, 16, *mae.VITS["vit_tiny"]).eval()
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    other.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(vit(images), other(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arrange", [
    lambda model: {"method": "mae", "args": {"image_size": 32}, "model": model.state_dict()},
    lambda model: {"model": {k.removeprefix("backbone."): v
                             for k, v in model.state_dict().items()}},
    lambda model: model.backbone.state_dict()])
def test_linear_probe_gives_the_same_class_token(tmp_path, arrange):
    torch.manual_seed(0)
    model = MAE(ViT(32, 8, 128, 2, 2), 0.75, 32, 1, 1)
    torch.save(arrange(model), tmp_path / "file.pth")
    backbone, _, size = linear_probe.load_backbone(str(tmp_path / "file.pth"))
    images = torch.randn(2, 3, 32, 32)
    assert size == 32
    torch.testing.assert_close(backbone.eval()(images), model.backbone(images))
    class_token = model.backbone.encode(model.backbone.embed(images))[:, 0]
    assert torch.equal(model.backbone(images), class_token)


# ---- training


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_of_true_targets_is_the_image(norm_pix):
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    target = patchify(images, 4)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    if norm_pix:
        target = (target - target.mean(2, keepdim=True)) / target.std(2, keepdim=True)
    noise = torch.randn_like(target) * (1 - mask[:, :, None])  # on what is visible: not shown
    masked, drawn = reconstruct(target + noise, images, mask, 4, norm_pix)
    torch.testing.assert_close(drawn, images, atol=1e-5, rtol=1e-5)
    assert not patchify(masked, 4)[mask == 1].any()
    assert torch.equal(patchify(masked, 4)[mask == 0], patchify(images, 4)[mask == 0])


def test_biases_and_norms_are_not_decayed_and_tokens_are():
    model = tiny_mae()
    optimizer = mae.make_optimizer(model, 0.05)
    weights, others = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert weights["betas"] == others["betas"] == (0.9, 0.95)
    assert weights["weight_decay"] == 0.05 and others["weight_decay"] == 0
    names = {id(p): k for k, p in model.named_parameters()}
    assert {names[id(p)] for p in others["params"]} == {
        k for k in names.values() if k.endswith("bias") or "norm" in k}
    assert len(weights["params"]) + len(others["params"]) == len(names)


def test_schedule_warms_up_and_ends_at_its_ends():
    values = [mae.cosine(step, 100, 10, 2.0) for step in range(100)]
    assert values[0] == pytest.approx(0.2) and values[9] == values[10] == 2.0
    assert max(values) == 2.0 and 0 < values[-1] < 0.01


def test_loss_falls_below_the_variance_only_if_the_encoder_sees():
    """The health number. Each image repeats a patch or its negative, as the visible ones tell."""
    torch.manual_seed(0)
    patch = torch.randn(1, 3, 4, 4).tile(1, 1, 4, 4)

    def loss_over_variance(blind):
        torch.manual_seed(0)
        model = MAE(ViT(16, 4, 16, 1, 1), 0.75, 32, 1, 1)
        optimizer = mae.make_optimizer(model, 0.05)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for _ in range(30):
            images = patch * torch.randint(2, (32, 1, 1, 1)).mul(2).sub(1)
            prediction, mask = model(torch.zeros_like(images) if blind else images)
            loss = mae_loss(prediction, images, mask, 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (loss / mae_loss(torch.zeros_like(prediction), images, mask, 4)).item()

    assert loss_over_variance(blind=False) < 0.5
    assert loss_over_variance(blind=True) > 0.9


@pytest.mark.parametrize("objective, flags", [("mae", []), ("mae", ["--no-norm-pix"]),
                                              ("simmim", [])])
def test_run_writes_pictures(class_folders, monkeypatch, objective, flags):
    drawn, evaluated = [], []
    monkeypatch.setattr(linear_probe, "evaluate", lambda *a, **k: evaluated.append(k))
    monkeypatch.setattr(mae, "reconstruct", lambda *a: drawn.append(a) or reconstruct(*a))
    mae.train(mae.parse_args(["--data", "images", "--recipe", "demo", "-b", "8", "--epochs", "1",
                              "--objective", objective, "--out", "out", *flags]))
    assert {"views.png", "reconstruction.png", "backbone.pth"} <= {
        p.name for p in (class_folders.parent / "out").iterdir()}
    assert drawn[0][-1] == (objective == "mae" and not flags)  # undoes what the loss did
    assert evaluated == [{"layers": True}]  # the best features are not at the end


def test_pixels_are_normalised_unless_a_flag_says_no():
    assert mae.parse_args(["--recipe", "imagenet"]).norm_pix  # the headline result
    assert not mae.parse_args(["--no-norm-pix"]).norm_pix


@pytest.mark.parametrize("flags", [
    ["--arch", "resnet18"], ["--image-size", "30"], ["--mask-ratio", "1"], ["--mask-ratio", "0"],
    ["--mask-ratio", "0.001"], ["--decoder-dim", "48"], ["--objective", "dino"]])
def test_wrong_arguments(flags, capsys):
    with pytest.raises(SystemExit) as end:
        mae.parse_args(flags)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flags[0] in error
