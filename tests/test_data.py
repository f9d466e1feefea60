"""Image files of all kinds, folders, torchvision sets, cache, streaming, the built-in set."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_images
from PIL import Image, features

import common
from common import Failure, find_images, find_sets, load_data, to_square

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


# ---- formats and modes


@pytest.mark.parametrize("suffix, options, tolerance", [
    ("png", {}, 0), ("bmp", {}, 0), ("ppm", {}, 0), ("tiff", {}, 0),
    ("webp", {"lossless": True}, 0),
    ("jpg", {"quality": 95, "subsampling": 0}, 6), ("avif", {"quality": 95}, 20)])
def test_formats(tmp_path, suffix, options, tolerance):
    if suffix in ("avif", "webp") and not features.check(suffix):
        pytest.skip(f"this Pillow has no {suffix}")
    picture().save(tmp_path / f"x.{suffix}", **options)
    assert find_images(tmp_path) == [str(tmp_path / f"x.{suffix}")]
    pixels, aspect = read(tmp_path / f"x.{suffix}")
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16) and aspect == 1
    difference = pixels.int() - pixels_of(picture()).int()
    assert difference.abs().max() <= tolerance


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:])
    for path in find_images(tmp_path):
        assert read(path)[0].flatten(1).unique(dim=1).T.tolist() == [[255, 0, 0]], path


def half_transparent(size):
    return Image.fromarray(np.tile(np.arange(size, dtype=np.uint8) * 15, (size, 1)))


def test_gray_and_alpha(tmp_path):
    gray, alpha = picture().convert("L"), half_transparent(16)
    gray.save(tmp_path / "l.png")
    Image.merge("LA", [gray, alpha]).save(tmp_path / "la.png")
    gray.save(tmp_path / "transparent.png", transparency=int(np.array(gray)[3, 3]))
    for path in find_images(tmp_path):
        expected = torch.from_numpy(np.array(gray)).expand(3, -1, -1)
        assert torch.equal(read(path)[0], expected), path


def test_alpha_is_dropped(tmp_path):
    colors = picture()
    Image.merge("RGBA", [*colors.split(), half_transparent(16)]).save(tmp_path / "rgba.png")
    colors.save(tmp_path / "rgb.png", transparency=colors.getpixel((3, 3)))
    for path in find_images(tmp_path):
        assert torch.equal(read(path)[0], pixels_of(colors)), path


@pytest.mark.parametrize("transparency", [None, 0, bytes(range(0, 240, 15))])
@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette(tmp_path, suffix, transparency):
    if suffix == "gif" and isinstance(transparency, bytes):
        pytest.skip("a GIF has one transparent colour")
    image = picture().quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / f"x.{suffix}", **options)
    with Image.open(tmp_path / f"x.{suffix}") as reopened:
        assert reopened.mode == "P"
    palette = np.array(image.getpalette()).reshape(-1, 3)
    expected = torch.from_numpy(palette[np.array(image)].astype(np.uint8)).permute(2, 0, 1)
    assert torch.equal(read(tmp_path / f"x.{suffix}")[0], expected)


def test_cmyk(tmp_path):
    inks = picture().convert("CMYK")
    inks.save(tmp_path / "x.tiff")
    inks.save(tmp_path / "x.jpg", quality=95, subsampling=0)
    for path in find_images(tmp_path):
        difference = read(path)[0].int() - pixels_of(picture()).int()
        assert difference.abs().max() <= (6 if path.endswith("jpg") else 0), path


def test_one_bit(tmp_path):
    image = picture().convert("1")
    image.save(tmp_path / "x.png")
    image.save(tmp_path / "x.tiff")
    expected = 255 * torch.from_numpy(np.array(image)).byte().expand(3, -1, -1)
    assert len(expected.unique()) == 2
    for path in find_images(tmp_path):
        assert torch.equal(read(path)[0], expected), path


def test_16_bit_gray_is_scaled(tmp_path):
    levels = torch.arange(256, dtype=torch.int32).view(16, 16)
    fine = (levels * 257 + (levels % 3 - 1) * 100).clamp(0, 65535)  # rounds to the level
    image = Image.fromarray(fine.numpy().astype(np.uint16))
    image.save(tmp_path / "x.png")
    image.save(tmp_path / "x.tiff")
    for path in find_images(tmp_path):
        assert torch.equal(read(path)[0], levels.byte().expand(3, -1, -1)), path


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_known_range_are_refused(tmp_path, kind):
    Image.fromarray(np.ones((16, 16), kind)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="range"):
        read(tmp_path / "x.tiff")


TURNED = {  # EXIF orientation -> how the camera stored the upright picture
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, upright in ("square", picture()), ("wide", picture(48, 24)):
        turned = TURNED[orientation]
        stored = upright if turned is None else upright.transpose(turned)
        stored.save(tmp_path / f"{name}.png", exif=exif)
        stored.save(tmp_path / f"{name}.jpg", exif=exif, quality=95, subsampling=0)
    assert torch.equal(read(tmp_path / "square.png")[0], pixels_of(picture()))
    difference = read(tmp_path / "square.jpg")[0].int() - pixels_of(picture()).int()
    assert difference.abs().max() <= 6
    assert read(tmp_path / "wide.png")[1] == read(tmp_path / "wide.jpg")[1] == 2


@pytest.mark.parametrize("width, height", [(1, 1), (1, 200), (300, 1), (5, 5), (48, 16)])
def test_any_size_and_aspect(tmp_path, width, height):
    Image.new("RGB", (width, height), (10, 200, 60)).save(tmp_path / "x.png")
    pixels, aspect = read(tmp_path / "x.png")
    assert aspect == width / height
    assert pixels.flatten(1).unique(dim=1).T.tolist() == [[10, 200, 60]]


def test_large_jpeg_keeps_its_picture(tmp_path):
    """Decoded at a fraction of its size, it must look as if decoded whole."""
    picture(1000, 500).save(tmp_path / "x.jpg", quality=95)
    pixels, aspect = read(tmp_path / "x.jpg")
    expected = pixels_of(picture(1000, 500).resize((16, 16), Image.Resampling.BICUBIC))
    assert aspect == pytest.approx(2, rel=0.02)
    assert (pixels.int() - expected.int()).abs().float().mean() < 3


# ---- unreadable files


def write_unreadable(folder):
    """One file of each kind -> their number."""
    picture(64, 64).save(folder / "whole.jpg")
    picture(64, 64).save(folder / "whole.webp")
    for suffix in "jpg", "webp":
        data = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
        (folder / f"whole.{suffix}").unlink()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("<html>not found</html>")
    Image.fromarray(np.ones((16, 16), np.float32)).save(folder / "float.tiff")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    return 6


@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_training_images_are_replaced(tmp_path, monkeypatch, capsys, streaming):
    """By the next readable image, which then has no label; one line on stderr names some."""
    if streaming:
        monkeypatch.setattr(common, "free_memory", lambda device: 0)
    for name in "cat", "dog":
        write_images(tmp_path / "images" / "train" / name, 3)
        write_images(tmp_path / "images" / "val" / name, 1)
    count = write_unreadable(tmp_path / "images" / "train" / "cat")
    files = [*range(3), *[9] * count, *range(9, 12)]
    for _ in range(2):  # the second time from the cache
        train, test = load_data("images", image_size=32)
        assert len(test) == 2
        expected = [read(find_images("images/train")[i], 32)[0] for i in files]
        images, aspect = all_images(train)
        assert torch.equal(images, torch.stack(expected)) and (aspect == 1).all()
        if not streaming:
            assert train.labels.tolist() == [0, 0, 0, *[-1] * count, 1, 1, 1]
            line, = capsys.readouterr().err.splitlines()
            assert f" {count} " in line
            names = os.listdir("images/train/cat")
            assert sum(f"'cat/{name}'" in line for name in names) == 3


def test_unreadable_image_after_many_readable_ones(tmp_path):
    write_images(tmp_path / "images", 64, size=(8, 8))
    (tmp_path / "images" / "last.png").write_text("no image")
    train, _ = load_data("images", image_size=32)
    images, _ = all_images(train)
    assert len(images) == 65 and torch.equal(images[64], images[0])


def test_unreadable_test_image_is_an_error(class_folders, capsys):
    (class_folders / "val" / "dog" / "bad.png").write_text("no image")
    with pytest.raises(Failure, match=r"'dog/bad\.png'"):
        load_data(class_folders, image_size=32)


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_text("no image")
    with pytest.raises(Failure, match="images"):
        load_data("images", image_size=32)


# ---- folders


def layout(*names, root="images"):
    """Empty files, which is enough to list them."""
    for name in names:
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()


def labelled(image_set):
    """{name: class or None}"""
    classes = [*image_set.classes, None]
    return {name: classes[label] for name, label in zip(image_set.names, image_set.labels.tolist())}


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_train_and_test_folders(held_out):
    layout("train/cat/1.png", "train/cat/deep/er/2.png", "train/dog/3.png", f"{held_out}/dog/4.png",
           f"{held_out}/cat/5.png", "train/README.txt")
    train, test = find_sets("images")
    assert labelled(train) == {"cat/1.png": "cat", "cat/deep/er/2.png": "cat", "dog/3.png": "dog"}
    assert labelled(test) == {"cat/5.png": "cat", "dog/4.png": "dog"}
    assert train.classes == test.classes == ["cat", "dog"]


def test_labels_of_a_test_folder_that_lacks_classes():
    layout(*(f"train/{c}/1.png" for c in "abcd"), "val/d/2.png", "val/b/3.png")
    train, test = find_sets("images")
    assert test.classes == train.classes
    assert labelled(test) == {"d/2.png": "d", "b/3.png": "b"}


def test_test_folder_of_one_class():
    layout("train/cat/1.png", "train/dog/2.png", "val/dog/3.png")
    train, test = find_sets("images")
    assert labelled(test) == {"dog/3.png": "dog"}


@pytest.mark.parametrize("others", [["val/cat/4.png"], []])
def test_class_that_only_the_test_folder_has(others):
    layout("train/cat/1.png", "train/dog/2.png", "val/bird/3.png", *others)
    with pytest.raises(Failure, match="'bird'"):
        find_sets("images")


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_tenth_is_held_out_where_there_is_no_test_folder(prefix):
    def split():
        train, test = find_sets("images")
        assert not set(train.names) & set(test.names)
        assert all(name.startswith(c) for s in (train, test) for name, c in labelled(s).items())
        return set(train.names), set(test.names)

    names = [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(300)]
    layout(*(prefix + name for name in names))
    train, test = split()
    assert train | test == set(names) and 40 <= len(test) <= 80
    layout(*(f"{prefix}{c}/new{i}.png" for c in ("cat", "dog", "bird") for i in range(50)))
    shutil.move("images", "elsewhere")  # neither new images nor a new place move the old ones
    shutil.move("elsewhere", "images")
    more_train, more_test = split()
    assert train < more_train and test < more_test


def test_images_without_labels():
    layout("1.png", "2.JPG", "deep/er/3.webp", ".hidden.png", "._2.JPG", "Thumbs.db", "notes.txt")
    train, test = find_sets("images")
    assert labelled(train) == {"1.png": None, "2.JPG": None, "deep/er/3.webp": None}
    assert train.classes == [] and test is None


def test_images_beside_class_folders_are_trained_on():
    layout("1.png", *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(40)))
    train, test = find_sets("images")
    assert train.classes == ["cat", "dog"] and test.labels.min() == 0
    assert "1.png" in train.names and labelled(train)["1.png"] is None


@pytest.mark.parametrize("folders", [["train/", "val/"], [""]])
def test_unlabeled_folder_adds_training_images(folders):
    layout(*(f"{f}{c}/{i}.png" for f in folders for c in ("cat", "dog") for i in range(40)),
           *(f"unlabeled/{i}.png" for i in range(40)))
    train, test = find_sets("images")
    assert train.classes == test.classes == ["cat", "dog"]
    assert (test.labels >= 0).all()
    extra = [name for name, label in labelled(train).items() if label is None]
    assert sorted(extra) == sorted(f"unlabeled/{i}.png" for i in range(40))  # none is held out


def test_hidden_and_foreign_files_are_left_out():
    layout("cat/1.png", "cat/._1.png", "cat/.DS_Store", "dog/2.png", ".cache/3.png",
           "dog/Thumbs.db", "__MACOSX/notes", "dog/4.png.part", "cat/5.png/6.png",
           "empty/readme.md")
    assert [os.path.relpath(f, "images") for f in find_images("images")] == [
        "cat/1.png", "cat/5.png/6.png", "dog/2.png"]  # a folder may be called 5.png
    assert find_sets("images")[0].classes == ["cat", "dog"]


def test_links():
    layout("cat/1.png", "dog/2.png")
    layout("3.png", root="elsewhere")
    os.symlink("..", "images/cat/loop")
    os.symlink("../elsewhere", "images/bird")
    os.symlink("nowhere", "images/cat/dangling.png")
    os.mkfifo("images/cat/pipe.png")
    expected = ["bird/3.png", "cat/1.png", "cat/dangling.png", "dog/2.png"]
    assert [os.path.relpath(f, "images") for f in find_images("images")] == expected


@pytest.mark.parametrize("name", [b"line\nbreak.png", b"\xff\xfe.png", "été 猫.png".encode()])
def test_odd_names(name, capsys):
    write_images(Path("images/cat"), 40)
    write_images(Path("images/dog"), 40)
    os.rename(b"images/cat/000.png", b"images/cat/" + name)
    open(b"images/cat/bad" + name, "w").close()
    train, test = load_data("images", image_size=32)
    assert os.fsdecode(b"cat/" + name) in train.names + test.names
    line, = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    common.save_file("names.pth", {"names": train.names})
    assert common.read_file("names.pth")["names"] == train.names


@pytest.mark.parametrize("make", [
    lambda: os.mkdir("images"), lambda: layout("notes.txt", "cat/readme.md"), lambda: None,
    lambda: open("images", "w").close(), lambda: layout("train/notes.txt", "val/cat/1.png")])
def test_folder_without_images_is_an_error(make):
    make()
    with pytest.raises(Failure, match="images"):
        find_sets("images")


# ---- torchvision's sets


def dataset_class(split_flag, count=6):
    """A stand-in for a torchvision set that is split by `train` or `split`."""
    class Pictures:
        classes = ["cat", "dog"]

        def __init__(self, root, download, **split):
            assert root == "data" and download and list(split) == [split_flag]
            self.gray = {True: 50, "train": 50, False: 200, "test": 200}[split[split_flag]]
            labels = [i % 2 for i in range(count)]
            setattr(self, "targets" if split_flag == "train" else "labels", labels)
            self.items = labels

        def __len__(self):
            return len(self.items)

        def __getitem__(self, i):
            return Image.new("RGB", (20, 20), (self.gray, i, 0)), self.items[i]

    def make_by_train(root, train=True, transform=None, download=False):
        return Pictures(root, download, train=train)

    def make_by_split(root, split="train", transform=None, download=False):
        return Pictures(root, download, split=split)

    return make_by_train if split_flag == "train" else make_by_split


@pytest.mark.parametrize("name, split_flag", [("CIFAR10", "train"), ("SVHN", "split")])
def test_torchvision_set(monkeypatch, name, split_flag):
    monkeypatch.setattr(torchvision.datasets, name, dataset_class(split_flag))
    for _ in range(2):  # the second time from the cache
        train, test = load_data(name.lower(), image_size=32)
        assert train.classes == test.classes == ["cat", "dog"]
        for image_set, gray in (train, 50), (test, 200):
            assert image_set.labels.tolist() == [0, 1] * 3
            (images, aspect), = image_set.batches([range(6)], CPU)
            assert images.shape == (6, 3, 20, 20) and aspect.tolist() == [1] * 6
            assert (images[:, 0] == gray).all() and images[:, 1, 0, 0].tolist() == [*range(6)]


@pytest.mark.parametrize("labels", [[[0, 1]] * 6, ["a"] * 6, [None] * 6])
def test_torchvision_labels_that_are_no_classes(monkeypatch, labels):
    class Odd(list):
        targets = labels

    monkeypatch.setattr(torchvision.datasets, "CIFAR10",
                        lambda root, train=True, download=False: Odd(range(6)))
    with pytest.raises(Failure, match="cannot load cifar10"):
        find_sets("cifar10")


def test_torchvision_set_without_split(monkeypatch):
    class Small(torchvision.datasets.FakeData):
        def __init__(self, transform=None):
            super().__init__(size=60, image_size=(3, 24, 24), num_classes=3)

    monkeypatch.setattr(torchvision.datasets, "FakeData", Small)
    train, test = load_data("fakedata", image_size=32)
    assert len(train) + len(test) == 60 and len(test) > 0 and len(train.classes) == 3
    i = train.names.index(next(name for name in train.names if name.endswith("/59")))
    (images, _), = train.batches([[i]], CPU)
    assert torch.equal(images[0], pixels_of(Small()[59][0]))
    assert train.labels[i] == Small()[59][1]


def test_torchvision_failure_names_the_set(monkeypatch):
    def offline(root, train=True, download=False):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(Failure, match="cifar10.*Error downloading"):
        find_sets("cifar10")
    with pytest.raises(Failure, match="no-such-set"):
        find_sets("no-such-set")


# ---- canvas, cache, memory


@pytest.mark.parametrize("image_size, sides, canvas", [
    (224, [400] * 5, 256), (96, [400] * 5, 109), (32, [400] * 5, 64), (32, [32] * 5, 32),
    (224, [100, 100, 120, 400, 400], 120)])
def test_canvas(image_size, sides, canvas):
    for i, side in enumerate(sides):
        os.makedirs("images", exist_ok=True)
        Image.new("RGB", (side * 3 // 2, side), (i, 0, 0)).save(f"images/{i}.png")
    train, _ = load_data("images", image_size=image_size)
    (images, aspect), = train.batches([range(5)], CPU)
    assert images.shape == (5, 3, canvas, canvas) and images[:, 0, 0, 0].tolist() == [*range(5)]
    assert aspect.tolist() == pytest.approx([1.5] * 5, rel=0.02)


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by an entry per image decoded."""
    calls, real = [], common.to_square
    monkeypatch.setattr(common, "to_square", lambda *a: calls.append(1) or real(*a))
    return calls


def all_images(image_set):
    (images, aspect), = image_set.batches([range(len(image_set))], CPU)
    return images.clone(), aspect.clone()


def test_second_start_reads_the_cache(class_folders, decoded):
    train, test = load_data(class_folders, image_size=32)
    assert len(decoded) == 32 and train.aspect.tolist() == [1] * 24
    again, test_again = load_data(class_folders, image_size=32)
    assert len(decoded) == 32
    assert torch.equal(train.pixels, again.pixels) and torch.equal(test.pixels, test_again.pixels)
    assert not torch.equal(train.pixels[:8], test.pixels)
    load_data(class_folders, image_size=32, max_images=8)  # another set of training images
    assert len(decoded) == 40


def change_file(folder):
    picture(32, 32).save(folder / "000.png")


def change_time_alone(folder):
    os.utime(folder / "000.png", ns=(1, 1))


def add_file(folder):
    picture(32, 32).save(folder / "new.png")


def remove_file(folder):
    (folder / "000.png").unlink()


def change_file_behind_a_link(folder):
    picture(32, 32).save(folder.parent / "target.png")


@pytest.mark.parametrize("change", [change_file, change_time_alone, add_file, remove_file,
                                    change_file_behind_a_link])
def test_cache_is_rebuilt_when_images_change(tmp_path, decoded, change):
    folder = tmp_path / "images"
    write_images(folder, 4)
    write_images(tmp_path, 1, seed=7)
    (tmp_path / "000.png").rename(tmp_path / "target.png")
    (folder / "link.png").symlink_to(tmp_path / "target.png")
    load_data("images", image_size=32)
    decoded.clear()
    change(folder)
    train, _ = load_data("images", image_size=32)
    expected = [read(path, 32)[0] for path in find_images("images")]
    assert torch.equal(all_images(train)[0], torch.stack(expected))
    assert decoded


def test_cache_of_one_folder_is_not_that_of_another(tmp_path):
    """Names, sizes and times alike, as in unpacked archives of uncompressed images."""
    for seed, folder in enumerate(("one", "other")):
        write_images(tmp_path / folder, 4, seed=seed, suffix=".bmp")
        for path in find_images(folder):
            os.utime(path, ns=(1, 1))
    one, other = (all_images(load_data(folder, image_size=32)[0]) for folder in ("one", "other"))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text",
    lambda data: data[:9000] + bytes(b ^ 1 for b in data[9000:9001]) + data[9001:]])
def test_damaged_cache_is_rebuilt(tmp_path, decoded, damage):
    write_images(tmp_path / "images", 12)
    before = all_images(load_data("images", image_size=32)[0])
    cache, = (tmp_path / "data" / "cache").iterdir()  # and no temporary file is left
    cache.write_bytes(damage(cache.read_bytes()))
    for count in 24, 24:  # decoded again, and only once
        after = all_images(load_data("images", image_size=32)[0])
        assert torch.equal(before[0], after[0]) and len(decoded) == count


def test_cache_is_not_needed(tmp_path, decoded):
    write_images(tmp_path / "images", 4)
    (tmp_path / "data").touch()  # so data/cache cannot be made
    for count in 4, 8:
        train, _ = load_data("images", image_size=32)
        assert len(train) == 4 and len(decoded) == count


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_gives_the_same_images(tmp_path, monkeypatch, workers):
    write_images(tmp_path / "images", 5)
    write_images(tmp_path / "images" / "wide", 4, size=(90, 40), suffix=".jpg")
    orders = [[3, 0, 8], [8, 8, 1], [2, 4]]
    resident, _ = load_data("images", image_size=32)
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    streaming, _ = load_data("images", image_size=32, workers=workers)
    assert resident.pixels is not None and streaming.pixels is None
    pairs = zip(resident.batches(orders, CPU), streaming.batches(orders, CPU), strict=True)
    for one, other in pairs:
        for a, b in zip(one, other):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs Linux")
@pytest.mark.parametrize("limit, free", [("4096\n", 4096), ("max\n", None), (None, None)])
def test_free_memory_is_at_most_the_limit_of_a_container(monkeypatch, limit, free):
    read = Path.read_text

    def read_text(path):
        if str(path) == "/proc/meminfo":
            return "MemTotal: 16 kB\nMemAvailable:    8 kB\n"
        if limit is None:
            raise FileNotFoundError
        return limit if str(path) == "/sys/fs/cgroup/memory.max" else read(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert common.free_memory(torch.device("cpu")) == (free or 8192)


def test_half_of_the_free_memory_is_used(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 4)
    needed = 4 * 3 * 32 * 32
    for free, resident in (2 * needed, True), (2 * needed - 2, False):
        monkeypatch.setattr(common, "free_memory", lambda device: free)
        assert (load_data("images", image_size=32)[0].pixels is not None) == resident


def test_killed_loader_process_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    monkeypatch.setattr(common, "to_square", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    write_images(tmp_path / "images", 4)
    train, _ = load_data("images", image_size=32, workers=1)
    with pytest.raises(RuntimeError, match="DataLoader worker"):  # `main` makes it one line
        list(train.batches([[0, 1], [2, 3]], CPU))


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


# ---- the built-in set

# Mean gray level of each class over the training images. To be renewed with the set:
# [round(train.pixels[train.labels == c].float().mean().item()) for c in range(10)]
BUILTIN_MEANS = [124, 124, 121, 107, 124, 127, 125, 123, 123, 124]


def test_builtin_set():
    train, test = load_data(None, image_size=32)
    for image_set, count in (train, 5000), (test, 1000):
        images, aspect = all_images(image_set)
        assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
        assert (aspect == 1).all()
        assert image_set.labels.bincount().tolist() == [count // 10] * 10
        assert len(image_set.classes) == 10 and len(set(image_set.names)) == count
        assert images.flatten(1).unique(dim=0).shape[0] == count  # none twice
    together = torch.cat([train.pixels, test.pixels]).flatten(1)
    assert together.unique(dim=0).shape[0] == 6000  # no test image is a training image
    means = [train.pixels[train.labels == c].float().mean().item() for c in range(10)]
    assert means == pytest.approx(BUILTIN_MEANS, abs=1)


def test_builtin_set_is_always_the_same():
    torch.manual_seed(1)
    one = find_sets(None)[1]
    torch.manual_seed(2)
    other = find_sets(None)[1]
    assert torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)
