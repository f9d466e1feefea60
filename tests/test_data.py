"""Image files of all kinds, folders, torchvision sets, streaming, the drawn set."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_images
from PIL import Image, features

import common
from common import Failure, find_sets, folder_set, load_data, to_square

pytestmark = [pytest.mark.filterwarnings("error::FutureWarning"),
              pytest.mark.filterwarnings("error::DeprecationWarning")]
CPU = torch.device("cpu")


def picture(width=16, height=16):
    """A smooth picture that no turn or mirror leaves as it is."""
    coarse = np.random.default_rng(0).integers(40, 220, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(image):
    """PIL RGB -> (3, H, W), by numpy."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read(path, size=16):
    with Image.open(path) as image:
        return to_square(image, size)


def assert_shows(path, expected, tolerance=0):
    """expected: PIL RGB, or (3, H, W) numbers"""
    expected = pixels_of(expected) if isinstance(expected, Image.Image) else expected
    pixels, aspect = read(path)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16) and aspect == 1
    assert (pixels.int() - expected.int()).abs().max() <= tolerance, path


# ---- formats and modes


@pytest.mark.parametrize("suffix, options, tolerance", [
    ("png", {}, 0), ("bmp", {}, 0), ("ppm", {}, 0), ("tiff", {}, 0),
    ("webp", {"lossless": True}, 0),
    ("jpg", {"quality": 95, "subsampling": 0}, 6), ("avif", {"quality": 95}, 20)])
def test_formats(suffix, options, tolerance):
    if suffix in ("avif", "webp") and not features.check(suffix):
        pytest.skip(f"this Pillow has no {suffix}")
    picture().save(f"x.{suffix}", **options)
    assert folder_set(".").names == [f"x.{suffix}"]
    assert_shows(f"x.{suffix}", picture(), tolerance)


def test_first_of_several_pages(capsys):
    write_images(Path("images"), 4, size=(16, 16))
    other = Image.new("RGB", (16, 16), "red")
    for name in "x.gif", "x.png", "x.tiff":
        picture().save(f"images/{name}", save_all=True, append_images=[other])
        assert_shows(f"images/{name}", picture(), 60 if name == "x.gif" else 0)
    load_data("images", image_size=16)
    assert "; pages beyond the first" in capsys.readouterr().out


def test_transparent_is_white():
    gray, colors = picture().convert("L"), picture()
    alpha = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 17, (16, 1)))
    share = torch.from_numpy(np.array(alpha)) / 255
    for image in Image.merge("LA", [gray, alpha]), Image.merge("RGBA", [*colors.split(), alpha]):
        image.save("x.png")
        opaque = pixels_of((gray if image.mode == "LA" else colors).convert("RGB"))
        assert_shows("x.png", opaque * share + 255 * (1 - share), 1)
    for mode in "L", "RGB", "P":  # one colour is transparent
        image = picture().convert(mode)
        hidden = image.getpixel((3, 3))
        image.save("x.png", transparency=hidden)
        hidden = torch.from_numpy((np.array(image) == hidden).reshape(16, 16, -1).all(-1))
        assert_shows("x.png", pixels_of(image.convert("RGB")).masked_fill(hidden, 255))


LEVELS = torch.arange(256).view(16, 16)


@pytest.mark.parametrize("kind, top", [
    (np.uint16, 65535), (np.uint16, 4095), (np.int32, 65535), (np.int32, 255), (np.float32, 1),
    (np.float32, 255), (">u2", 65535)])  # which has the high byte first
def test_more_than_8_bits_are_scaled(kind, top):
    """12 bits, too, of which some cameras and scanners make a 16-bit file."""
    Image.fromarray((LEVELS / 255 * top).round(decimals=4).numpy().astype(kind)).save("x.tiff")
    assert_shows("x.tiff", LEVELS.expand(3, -1, -1), 1)
    if kind == np.uint16:
        Image.fromarray((LEVELS / 255 * top).numpy().astype(kind)).save("x.png")
        assert_shows("x.png", LEVELS.expand(3, -1, -1), 1)


TURNED = {  # EXIF orientation -> how the camera stored the upright picture
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, upright in ("square", picture()), ("wide", picture(48, 24)):
        turned = TURNED[orientation]
        stored = upright if turned is None else upright.transpose(turned)
        stored.save(f"{name}.png", exif=exif)
        stored.save(f"{name}.jpg", exif=exif, quality=95, subsampling=0)
    assert_shows("square.png", picture())
    assert_shows("square.jpg", picture(), 6)
    assert read("wide.png")[1] == read("wide.jpg")[1] == 2


def test_large_jpeg_keeps_its_picture():
    """Decoded at a fraction of its size, it must look as if decoded whole."""
    picture(1000, 500).save("x.jpg", quality=95)
    pixels, aspect = read("x.jpg")
    expected = pixels_of(picture(1000, 500).resize((16, 16), Image.Resampling.BICUBIC))
    assert aspect == pytest.approx(2, rel=0.02)
    assert (pixels.int() - expected.int()).abs().float().mean() < 3


@pytest.mark.parametrize("color", [(3, 3, 3), (130, 130, 130), (200, 20, 20), (0, 5, 15)])
def test_images_of_one_colour_are_refused(color):
    """What wrong conversions make of a whole set; a few such images are left to the user."""
    os.mkdir("images")
    for i in range(3):
        Image.new("RGB", (16, 16), tuple(c + i for c in color)).save(f"images/{i}.png")
    with pytest.raises(Failure, match="^the images of images come out almost of one colour"):
        load_data("images", image_size=16)
    write_images(Path("images/more"), 3, size=(16, 16))
    assert len(load_data("images", image_size=16)[0]) == 6


# ---- unreadable files


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_images_are_left_out(monkeypatch, capsys, streaming):
    """20 of 200: the others are trained on, under their own labels; one line has the names."""
    if streaming:
        monkeypatch.setattr(common, "free_memory", lambda device: 0)
    for seed, name in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        write_images(Path("images", name), 100 if seed < 2 else 3, seed=seed, suffix=".jpg")
    whole, _ = load_data("images", image_size=32)
    kept = [i for i in range(200) if i % 10]
    expected = all_images(whole)[0][kept]
    for i in range(0, 100, 10):
        cut(Path(f"images/train/cat/{i:03}.jpg"))
        Path(f"images/train/dog/{i:03}.jpg").write_text("<html>not found</html>")
    for i in "080", "090":
        os.remove(f"images/train/dog/{i}.jpg")
    os.symlink("nowhere", "images/train/dog/090.jpg")
    os.mkfifo("images/train/dog/080.jpg")  # whoever opens it waits for one who writes
    Path("images/val/cat/001.jpg").write_bytes(b"")
    capsys.readouterr()
    train, test = load_data("images", image_size=32)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("training images: 180 of images/train, 2 classes (")
    assert first.endswith("'dog/080.jpg', 'dog/090.jpg')")
    assert "; 20 unreadable ('cat/000.jpg', 'cat/010.jpg', 'cat/020.jpg', " in first
    assert second.endswith("; 1 unreadable ('cat/001.jpg')")
    assert train.names == [whole.names[i] for i in kept] and len(test) == 5
    assert torch.equal(train.labels, whole.labels[kept])
    assert torch.equal(all_images(train)[0], expected)
    assert (all_images(train)[1] == 1).all()


def test_images_that_get_lost_later_stop_the_run(monkeypatch):
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    write_images(Path("images"), 4)
    train, _ = load_data("images", image_size=32)
    os.remove("images/002.png")
    with pytest.raises(Failure, match="images of images can be read no longer"):
        all_images(train)


def test_nothing_readable_is_an_error():
    os.mkdir("images")
    Path("images/bad.png").write_text("no image")
    with pytest.raises(Failure, match=r"images: nothing to read; 1 unreadable \('bad.png'\)"):
        load_data("images", image_size=32)


@pytest.mark.parametrize("change", [
    lambda images: [image.write_text("no image") for image in images],
    lambda images: [image.unlink() for image in images],
    lambda images: [Image.new("L", (32, 32)).save(image) for image in images],
    lambda images: [(folder / c).rename(folder / f"{c}fish") for folder in {
        image.parent.parent for image in images} for c in ("cat", "dog")]])
def test_fault_among_test_images_does_not_stop_training(class_folders, capsys, change):
    """Nor does a test set of classes that were never trained on: then there is no accuracy."""
    change([*(class_folders / "val").rglob("*.png")])
    train, test = load_data("images", image_size=32)
    assert len(train) == 24 and test is None
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "no test images with labels: nothing to evaluate on"


# ---- folders


def layout(*names):
    """Empty files, which is enough to list them."""
    for name in names:
        Path("images", name).parent.mkdir(parents=True, exist_ok=True)
        Path("images", name).touch()


def labelled(image_set):
    """{name: class or None}"""
    classes = [*image_set.classes, None]
    return {name: classes[label] for name, label in zip(image_set.names, image_set.labels.tolist())}


@pytest.mark.parametrize("train, test", [
    ("train", "val"), ("train", "valid"), ("train", "validation"), ("training", "testing"),
    ("Train", "Test"), ("TRAINING", "Validation"), ("train", "test")])
def test_split_folders(train, test):
    layout(f"{train}/cat/1.png", f"{train}/cat/deep/er/2.png", f"{train}/dog/3.png",
           f"{test}/dog/4.png", f"{test}/cat/5.png")
    train, test = find_sets("images")
    assert labelled(train) == {"cat/1.png": "cat", "cat/deep/er/2.png": "cat", "dog/3.png": "dog"}
    assert labelled(test) == {"cat/5.png": "cat", "dog/4.png": "dog"}
    assert train.classes == test.classes == ["cat", "dog"]


def test_test_folder_with_other_classes():
    layout(*(f"train/{c}/1.png" for c in "abcd"), "val/d/2.png", "val/b/3.png", "val/new/4.png")
    train, test = find_sets("images")
    assert test.classes == train.classes == [*"abcd"]
    assert labelled(test) == {"d/2.png": "d", "b/3.png": "b", "new/4.png": None}


def test_what_is_left_out_is_said(class_folders, capsys):
    for folder in "test", "unlabeled", ".cache", "__MACOSX":
        write_images(class_folders / folder, 2)
    layout("train/cat/1.heic", "train/cat/2.heic", "train/notes.txt", "train/dog/._0.png",
           "train/Thumbs.db", "train/cat/.DS_Store", "val/x.csv", "val/y.csv",
           *(f"train/dog/{i}" for i in range(30)))  # an entry each would hide the others
    os.symlink("cat", "images/train/link")
    os.symlink("..", "images/train/dog/parent")
    train, test = load_data("images", image_size=32)
    first, second = capsys.readouterr().out.splitlines()
    assert len(train) == 24 and len(test) == 8 and len(first) < 350
    assert re.match("training images: 24 of images/train, 2 classes .'?cat'?, '?dog'?.; ", first)
    for part in ("2 .heic: not decoded here", "1 .txt: ", "1 .db: ", "; folder test/",
                 "2 folder read already under another name",
                 "; folder unlabeled/", "; folder __MACOSX/"):
        assert part in first
    assert second.startswith("test images: 8 of images/val, 2 classes (")
    assert second.endswith("); 2 .csv: not decoded here")


def test_tiny_imagenet_as_downloaded(capsys):
    for seed, name in enumerate(("n01443537", "n01629819")):
        write_images(Path("images/train", name, "images"), 4, seed=seed, suffix=".JPEG")
        layout(f"train/{name}/{name}_boxes.txt")
    for folder in "val", "test":
        write_images(Path("images", folder, "images"), 3, suffix=".JPEG")
    layout("wnids.txt", "val/val_annotations.txt")
    train, test = load_data("images", image_size=32)
    first, second, third = capsys.readouterr().out.splitlines()
    assert train.classes == ["n01443537", "n01629819"] and len(train) == 8 and test is None
    assert "2 .txt: not decoded here" in first and "folder test/" in first
    assert "3 of images/val" in second and "3 of no class" in second and "1 .txt" in second
    assert third == "no test images with labels: nothing to evaluate on"  # those for training have


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_tenth_is_held_out_where_there_is_no_test_folder(prefix):
    """Always the same; the image beside the class folders has no label."""
    names = [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(150)]
    layout(*(prefix + name for name in (*names, "1.png")))
    train, test = find_sets("images")
    found = labelled(train) | labelled(test)
    assert found == {name: name[:3] for name in names} | {"1.png": None}
    assert len(test) == 31 and len(train) == 270 and {0, 1} <= {*test.labels.tolist()}
    assert find_sets("images")[1].names == test.names


def test_images_without_labels():
    layout("1.png", "2.JPG", "deep/er/3.webp", ".hidden.png", "._2.JPG", "Thumbs.db", "notes.txt")
    train, test = find_sets("images")
    assert labelled(train) == {"1.png": None, "2.JPG": None, "deep/er/3.webp": None}
    assert train.classes == [] and test is None
    assert sorted(train.left_out) == ["1 .db: not decoded here", "1 .txt: not decoded here"]


# ---- torchvision's sets


class Pictures:
    """A stand-in for a torchvision set."""

    def __init__(self, part, labels):
        self.gray = {True: 50, "train": 50, False: 200, "test": 200}[part]
        self.classes = ["cat", "dog"]
        setattr(self, labels, [0, 1] * 3)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return Image.new("RGB", (20, 20), (self.gray, i, 0)), i % 2


@pytest.mark.parametrize("name, make", [
    ("CIFAR10", lambda root, train, download: Pictures(train, "targets")),
    ("SVHN", lambda root, split, download: Pictures(split, "labels"))])
def test_torchvision_set(monkeypatch, name, make):
    monkeypatch.setattr(torchvision.datasets, name, make)
    monkeypatch.setattr(common, "describe", lambda images, device: images.origin)
    train, test = load_data(name.lower(), image_size=32)
    assert train.classes == test.classes == ["cat", "dog"]
    for image_set, gray in (train, 50), (test, 200):
        assert image_set.labels.tolist() == [0, 1] * 3
        images, aspect = all_images(image_set)
        assert images.shape == (6, 3, 20, 20) and aspect.tolist() == [1] * 6
        assert (images[:, 0] == gray).all() and images[:, 1, 0, 0].tolist() == [*range(6)]


@pytest.mark.parametrize("name", ["cifar10", "fakedata", "imagefolder", "flowers102"])
def test_torchvision_failure_names_the_set(monkeypatch, name):
    """Without a connection; sets that take other arguments, or have labels of another form."""
    def offline(root, train=True, download=False):
        raise RuntimeError("Error downloading")

    class Odd(list):
        def __init__(self, root, split="train", download=False):
            super().__init__([1, 2])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    monkeypatch.setattr(torchvision.datasets, "Flowers102", Odd)
    with pytest.raises(Failure, match=name):
        find_sets(name)
    with pytest.raises(Failure, match="no-such-set"):
        find_sets("no-such-set")


# ---- canvas, memory, streaming


def all_images(image_set):
    (images, aspect), = image_set.load([range(len(image_set))], CPU)
    return images.clone(), aspect.clone()


@pytest.mark.parametrize("image_size, sides, canvas", [
    (224, [400] * 5, 256), (96, [400] * 5, 109), (32, [400] * 5, 64), (32, [32] * 5, 32),
    (224, [100, 100, 120, 400, 400], 120)])
def test_canvas(monkeypatch, image_size, sides, canvas):
    monkeypatch.setattr(common, "describe", lambda images, device: images.origin)
    os.mkdir("images")
    for i, side in enumerate(sides):
        Image.new("RGB", (side * 3 // 2, side), (i, 0, 0)).save(f"images/{i}.png")
    images, aspect = all_images(load_data("images", image_size=image_size)[0])
    assert images.shape == (5, 3, canvas, canvas) and images[:, 0, 0, 0].tolist() == [*range(5)]
    assert aspect.tolist() == pytest.approx([1.5] * 5, rel=0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_gives_the_same_images(monkeypatch, workers):
    write_images(Path("images"), 5)
    write_images(Path("images/wide"), 4, size=(90, 40), suffix=".jpg")
    resident, _ = load_data("images", image_size=32)
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    streaming, _ = load_data("images", image_size=32)
    streaming.workers = workers
    assert resident.pixels is not None and streaming.pixels is None
    pairs = (images.load([[3, 0, 8], [8, 8, 1], [2, 4]], CPU) for images in (resident, streaming))
    for one, other in zip(*pairs, strict=True):
        for a, b in zip(one, other):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("limit, processes, free", [
    ("4096\n", "1", 2048), ("4096\n", "2", 1024), ("max\n", "1", 10240), (None, "1", 10240)])
def test_free_memory(monkeypatch, capsys, limit, processes, free):
    """Half of the machine's or the container's, shared by the processes."""
    def read_text(path):
        assert str(path) == "/sys/fs/cgroup/memory.max"
        if limit is None:
            raise FileNotFoundError
        return limit

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 5, "SC_PAGE_SIZE": 4096}.get)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert common.free_memory(CPU) == free
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    assert common.free_memory(CPU) == (free if limit == "4096\n" else 4e9)
    assert "4 GB are taken" in capsys.readouterr().out


def test_half_of_the_free_memory_is_used(monkeypatch):
    write_images(Path("images"), 4)
    needed = 4 * 3 * 32 * 32
    for free, resident in (2 * needed, True), (2 * needed - 2, False):
        monkeypatch.setattr(common, "free_memory", lambda device: free)
        assert (load_data("images", image_size=32)[0].pixels is not None) == resident


def test_max_images(class_folders):
    whole, test = load_data(class_folders, image_size=32)
    some, same_test = load_data(class_folders, image_size=32, max_images=10)
    assert len(some) == 10 and len(set(some.names)) == 10 and same_test.names == test.names
    assert set(labelled(some).items()) < set(labelled(whole).items())
    assert {0, 1} == set(some.labels.tolist())  # not simply the first ones
    fewer, _ = load_data(class_folders, image_size=32, max_images=5)
    assert set(fewer.names) < set(some.names)
    rows = [whole.names.index(name) for name in some.names]
    assert torch.equal(all_images(some)[0], all_images(whole)[0][rows])
    assert len(load_data(class_folders, image_size=32, max_images=100)[0]) == 24


# ---- the drawn set

# Mean gray level of each class over the training images. To be renewed with the set:
# [round(train.pixels[train.labels == c].float().mean().item()) for c in range(10)]
BUILTIN_MEANS = [129, 128, 125, 139, 127, 126, 129, 142, 113, 154]


def test_drawn_set():
    torch.manual_seed(1)
    train, test = load_data(None, image_size=32)
    for image_set, count in (train, 5000), (test, 1000):
        images, aspect = all_images(image_set)
        assert images.shape == (count, 3, 32, 32) and (aspect == 1).all()
        assert image_set.labels.bincount().tolist() == [count // 10] * 10
        assert len(image_set.classes) == 10 and len(set(image_set.names)) == count
    assert len({image.numpy().tobytes() for image in [*train.pixels, *test.pixels]}) == 6000
    means = [train.pixels[train.labels == c].float().mean().item() for c in range(10)]
    assert means == pytest.approx(BUILTIN_MEANS, abs=1)
    torch.manual_seed(2)
    assert torch.equal(all_images(load_data(None, 32, max_images=50)[1])[0], test.pixels)
