"""The data of other people: kinds of pixels and files, folders, sets of torchvision, memory."""

import os
import random
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_images
from PIL import Image

import common
import simclr
from common import Failure, find_sets, to_square

CPU = torch.device("cpu")


def load(data="images", device=CPU, **flags):
    """-> the training and the test set that a run with these flags reads."""
    args = {"image_size": 32, "max_images": None, "memory": 8.0, "workers": 0, **flags}
    return common.load_data(Namespace(data=data, **args), device)


def all_pixels(images):
    """-> all images (N, 3, S, S), and their aspects."""
    return next(images.load([torch.arange(len(images))], CPU))


def labelled(images):
    """-> {name: class, or None}"""
    classes = [*images.classes, None]
    return {name: classes[label] for name, label in zip(images.names, images.labels.tolist())}


def test_stored_side_suits_the_larger_of_view_and_evaluation():
    write_images(Path("images"), 2, size=(200, 200))
    assert load(image_size=56)[0].side == 64
    assert load(image_size=56, eval_size=112)[0].side == 128
    assert load(image_size=112, eval_size=56)[0].side == 128


# ---- pixels


def picture(width=16, height=16):
    """A smooth picture that no turn or mirror leaves as it is."""
    coarse = np.random.default_rng(0).integers(40, 220, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def read(path):
    with Image.open(path) as image:
        return to_square(image, 16)[0]


def assert_shows(path, expected, tolerance=0):
    """expected: a PIL image, or numbers (H, W, 3) of 0 to 255."""
    difference = read(path).permute(1, 2, 0).numpy() - np.array(expected, dtype=float)
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize("suffix, options, tolerance", [
    ("png", {}, 0), ("bmp", {}, 0), ("ppm", {}, 0), ("tiff", {}, 0),
    ("webp", {"lossless": True}, 0), ("jpg", {"quality": 95, "subsampling": 0}, 6),
    ("avif", {"quality": 95}, 20)])
def test_format(suffix, options, tolerance):
    picture().save(f"x.{suffix}", **options)
    assert find_sets(".")[0].names == [f"x.{suffix}"]
    assert_shows(f"x.{suffix}", picture(), tolerance)


@pytest.mark.parametrize("mode, suffix, tolerance", [
    ("L", "png", 0), ("1", "png", 0), ("P", "png", 0), ("P", "gif", 0), ("CMYK", "tiff", 0),
    ("CMYK", "jpg", 40)])
def test_mode(mode, suffix, tolerance):
    image = picture().convert(mode)
    image.save(f"x.{suffix}")
    assert_shows(f"x.{suffix}", image.convert("RGB"), tolerance)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_is_on_white(mode):
    image = picture().convert(mode)
    alpha = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image.putalpha(Image.fromarray(alpha))
    image.save("x.png")
    opaque = np.array(image.convert("RGB"))
    share = alpha[:, :, None] / 255
    assert_shows("x.png", opaque * share + 255 * (1 - share), tolerance=1)


@pytest.mark.parametrize("name, options", [
    ("x.png", {}), ("x.gif", {}), ("x.webp", {"lossless": True})])
def test_the_transparent_half_becomes_white(name, options):
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 8, 16))
    image.save(name, **options)
    expected = Image.new("RGB", (16, 16), "red")
    expected.paste("white", (0, 0, 8, 16))
    assert_shows(name, expected)


@pytest.mark.parametrize("mode", ["RGBA", "RGBX"])  # the file calls it opacity, or nothing
def test_fourth_band_of_a_tiff_is_dropped(capsys, mode):
    """It may be infrared."""
    write_images(Path("images"), 3)
    bands = [*picture().split(), Image.new("L", (16, 16), 60)]
    Image.merge(mode, bands).save("images/x.tiff")
    assert_shows("images/x.tiff", picture())
    load()
    assert "left out: the fourth band\n" in capsys.readouterr().out


def test_fourth_band_of_cmyk_is_read(capsys):
    write_images(Path("images"), 3)
    picture().convert("CMYK").save("images/x.tiff")
    load()
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("top", [4000, 4200, 65535])
def test_gray_of_16_bits_by_its_full_range(suffix, top):
    """Were each image stretched by its own maximum, all three would look alike."""
    ramp = np.linspace(0, top, 256).reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint16)).save(f"x.{suffix}")
    mean = read(f"x.{suffix}").float().mean().item()
    assert mean == pytest.approx(ramp.mean() * 255 / 65535, rel=0.01)


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.float32])
def test_pixels_of_no_known_range_are_not_read(capsys, kind):
    os.mkdir("images")
    for i in range(3):
        Image.fromarray(np.arange(256).reshape(16, 16).astype(kind)).save(f"images/{i}.tiff")
    words = r"3 unreadable \('0.tiff': pixels of mode [IF]: convert to 8 bits\)"
    with pytest.raises(Failure, match=words):
        load()
    write_images(Path("images"), 4)
    train, _ = load()
    assert len(train) == 4 and "convert to 8 bits" in capsys.readouterr().out


TURNED = {  # EXIF orientation -> how the camera stored the upright picture
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().transpose(TURNED[orientation]).save("x.png", exif=exif)
    assert_shows("x.png", picture())
    picture(48, 24).transpose(TURNED[orientation]).save("x.jpg", exif=exif)
    with Image.open("x.jpg") as image:
        assert to_square(image, 16)[1] == 2  # width / height


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff"])
def test_first_page_is_read(capsys, suffix):
    write_images(Path("images"), 3)
    first = picture().quantize(32)
    second = Image.new("P", (16, 16))
    first.save(f"images/x.{suffix}", save_all=True, append_images=[second])
    assert_shows(f"images/x.{suffix}", first.convert("RGB"))
    load()
    assert "left out: pages beyond the first\n" in capsys.readouterr().out


def test_large_jpeg_keeps_its_picture():
    """It is decoded at a fraction of its size."""
    picture(1000, 500).save("x.jpg", quality=95)
    assert_shows("x.jpg", picture(1000, 500).resize((16, 16), Image.Resampling.BICUBIC), 10)


@pytest.mark.parametrize("gray", [3, 130, 250])
def test_images_of_almost_one_color_are_refused(gray):
    """What wrong conversions make of a whole set; a few such images are left to the user."""
    os.mkdir("images")
    for i in range(3):
        Image.new("L", (16, 16), gray + i).save(f"images/{i}.png")
    words = f"one color, with values of {gray} to {gray + 2} of 255: convert them to 8 bits"
    with pytest.raises(Failure, match=words):
        load()
    write_images(Path("images/more"), 3)
    assert len(load()[0]) == 6


@pytest.mark.parametrize("memory", [8.0, 0.0])
def test_images_of_12_bits_in_16_are_refused(memory):
    """As some cameras and scanners write them: by the full range, they are almost black."""
    os.mkdir("images")
    for i in range(3):
        ramp = np.linspace(0, 4095, 256).reshape(16, 16)
        Image.fromarray(ramp.astype(np.uint16)).save(f"images/{i}.png")
    with pytest.raises(Failure, match="almost of one color.*: convert them to 8 bits"):
        load(memory=memory)


# ---- files that cannot be read


def spoil(folder):
    """Five files in the folder that look like images, and are none."""
    whole = Path(folder, "whole.jpg")
    picture(64, 64).save(whole)
    Path(folder, "truncated.jpg").write_bytes(whole.read_bytes()[:-100])
    whole.unlink()
    Path(folder, "empty.jpg").touch()
    Path(folder, "page.jpg").write_text("<html>not found</html>")
    os.mkfifo(Path(folder, "pipe.jpg"))  # whoever opens it waits for one who writes
    os.symlink("nowhere", Path(folder, "link.jpg"))


def test_unreadable_files_are_left_out_and_counted(capsys, class_folders):
    whole, _ = load()
    spoil("images/train/cat")
    os.mkdir("images/train/dog/folder.jpg")
    capsys.readouterr()
    train, test = load()
    assert labelled(train) == labelled(whole) and len(test) == 8
    assert torch.equal(train.pixels, whole.pixels)
    line, _ = capsys.readouterr().out.splitlines()
    assert line.startswith("training images: 24 of images/train; 2 classes (cat, dog); "
                           "left out: 5 unreadable ('cat/empty.jpg': cannot identify image file")


def test_unreadable_files_of_a_streamed_set_are_counted_among_fifty(capsys, class_folders):
    spoil("images/train/cat")
    train, _ = load(memory=0)
    assert len(train) == 29
    assert "5 of 29 tried unreadable ('cat/empty.jpg': " in capsys.readouterr().out


def test_nothing_readable():
    os.mkdir("images")
    spoil("images")
    with pytest.raises(Failure, match="0 of images; no class folders; left out: 5 unreadable"):
        load()


def test_empty_test_folder(class_folders):
    shutil.rmtree("images/val")
    os.mkdir("images/val")
    with pytest.raises(Failure, match="nothing that can be read: 0 of images/val; "):
        load()


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_left_out():
    """Sixty of several formats, each with a stretch of bytes that is noise, missing or zero."""
    write_images(Path("images"), 3)
    draw = random.Random(0)
    suffixes = "jpg png gif bmp tiff ppm webp avif".split()
    for number in range(60):
        path = Path(f"images/damaged{number}.{suffixes[number % 8]}")
        picture(48, 40).save(path)
        data = bytearray(path.read_bytes())
        start = draw.choice([draw.randrange(64), draw.randrange(len(data))])  # often in the header
        length = draw.choice([1, 4, 64])
        data[start : start + length] = draw.choice([b"", bytes(length), draw.randbytes(length)])
        path.write_bytes(data)
    train, _ = load()
    assert 3 < len(train) < 63 and (train.aspect > 0).all()
    assert train.left_out[-1].startswith(f"{63 - len(train)} unreadable (")


# ---- folders


def files(names):
    """Empty files below images/, which is enough to list them."""
    for name in names:
        path = Path("images", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("folders", [
    ["bus", "car", "plane", "train"], ["invalid", "valid"], ["other", "test"], ["test", "valid"],
    ["Training", "walking"]])
def test_classes_may_be_called_like_splits(folders):
    files([f"{folder}/{i}.png" for folder in folders for i in range(20)])
    train, test = find_sets("images")
    assert train.classes == test.classes == folders
    assert len(train) + len(test) == 20 * len(folders)


@pytest.mark.parametrize("train, test", [
    ("train", "val"), ("train", "valid"), ("train", "validation"), ("training", "testing"),
    ("Train", "Test"), ("TRAINING", "Validation"), ("download/chest/train", "download/chest/test")])
def test_split_folders(train, test):
    files([f"{train}/cat/1.png", f"{train}/cat/deep/er/2.png", f"{train}/dog/3.png",
           f"{test}/dog/4.png", f"{test}/cat/5.png", f"{test}/bird/6.png"])
    train_set, test_set = find_sets("images")
    assert train_set.origin == f"images/{train}" and test_set.origin == f"images/{test}"
    assert labelled(train_set) == {
        "cat/1.png": "cat", "cat/deep/er/2.png": "cat", "dog/3.png": "dog"}
    assert labelled(test_set) == {"dog/4.png": "dog", "cat/5.png": "cat", "bird/6.png": None}


@pytest.mark.parametrize("parent", ["", "train/", "download/", "download/train/"])
def test_a_folder_that_is_alone_is_entered(parent):
    files([f"{parent}{name}/{i}.png" for name in ("cat", "dog") for i in range(2)])
    files(["._1.png", f"{parent}.hidden/1.png"])
    train, test = find_sets("images")
    assert train.classes == test.classes == ["cat", "dog"]


def test_hidden_folders_are_no_classes():
    names = ["cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"]
    files(names)
    files(["@eaDir/1.png", "cat/@eaDir/1.png/SYNOPHOTO.jpg", "__MACOSX/cat/5.png", "cat/._1.png",
           ".hidden/6.png", "dog/.hidden/7.png"])
    train, test = find_sets("images")
    assert train.classes == ["cat", "dog"]
    assert sorted(train.names + test.names) == names


def test_images_without_labels():
    files(["1.png", "2.JPG", "deep/er/3.webp"])
    train, test = find_sets("images")
    assert labelled(train) == {"1.png": None, "2.JPG": None, "deep/er/3.webp": None}
    assert train.classes == [] and test is None


def test_test_images_of_no_known_class_are_not_evaluated(capsys, class_folders):
    os.rename("images/val/cat", "images/val/lion")
    os.rename("images/val/dog", "images/val/wolf")
    _, test = load()
    assert test.labels.max() < 0 and "8 of no class" in capsys.readouterr().out


def test_what_is_left_out_is_said(capsys, class_folders):
    files(["train/cat/1.heic", "train/cat/2.heic", "train/notes.txt", "val/table.csv",
           "test/cat/1.png", "unlabeled/1.png", "train/dog/1", "train/dog/2"])
    train, test = load()
    first, second = capsys.readouterr().out.splitlines()
    assert len(train) == 24 and len(test) == 8
    assert first.startswith("training images: 24 of images/train; 2 classes (cat, dog); left out: ")
    for part in "2 .heic", "1 .txt", "2 without extension", "folder test/", "folder unlabeled/":
        assert part in first
    assert second == "test images: 8 of images/val; 2 classes (cat, dog); left out: 1 .csv"


def test_a_folder_without_permission_is_said_to_be_left_out(monkeypatch):
    files(["cat/1.png", "dog/2.png", "wolf/3.png"])
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "wolf":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    train, _ = find_sets("images")
    assert train.left_out == ["[Errno 13] Permission denied: 'images/wolf'"]


def test_images_beside_train_and_test_are_said_to_be_left_out():
    files(["train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "4.png"])
    train, _ = find_sets("images")
    assert len(train) == 2 and len(train.left_out) == 1


def test_each_folder_is_read_once():
    names = ["cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"]
    files(names)
    os.symlink("..", "images/cat/loop")
    os.symlink("dog", "images/wolf")
    train, test = find_sets("images")
    assert sorted(train.names + test.names) == names
    assert train.classes == ["cat", "dog"]


def test_names_that_are_no_text(capsys):
    """common.main has the screen show them somehow."""
    odd = os.fsdecode(b"\xff\xfe")
    for folder in "cat", odd:
        write_images(Path("images", folder), 10)
        os.rename(f"images/{folder}/000.png", f"images/{folder}/line\nbreak{odd}.png")
        Path(f"images/{folder}/text\n{odd}.png").touch()
    sets = []
    common.main(lambda args: sets.extend(load()), lambda argv: None)
    assert len(sets[0]) + len(sets[1]) == 20 and sets[0].classes == ["cat", odd]
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("parent", ["", "photos/"])
def test_runs_is_no_class(no_report, parent):
    for name in "cat", "dog":
        write_images(Path(parent + name), 10)
    flags = "--data . -a resnet8x0.25 -b 8 --epochs 1 --device cpu".split()
    simclr.train(simclr.parse_args(flags))
    assert Path("runs/simclr/views.png").exists()
    train, _ = find_sets(".")
    assert train.classes == ["cat", "dog"] and len(train) == 18
    simclr.train(simclr.parse_args("--resume --epochs 2 --device cpu".split()))
    assert common.read_run("runs/simclr", "simclr")["step"] == 4


# ---- which images


def test_a_tenth_is_held_out():
    """The same one on every machine; kept results depend on it."""
    files([f"{name}/{i}.png" for name in ("cat", "dog") for i in range(12)])
    files(["notes.txt"])
    train, test = find_sets("images")
    assert test.names == ["cat/4.png", "dog/10.png", "dog/5.png"]
    assert len(train) == 21 and not set(train.names) & set(test.names)
    assert train.left_out == ["1 .txt"] and test.left_out == []


def test_max_images_limits_both_sets(class_folders):
    train, test = load(max_images=4)
    assert train.names == ["cat/000.png", "cat/001.png", "cat/008.png", "dog/006.png"]
    assert test.names == ["cat/000.png", "cat/001.png", "cat/002.png", "cat/003.png"]
    whole, _ = load(max_images=100)
    rows = [whole.names.index(name) for name in train.names]
    assert torch.equal(train.pixels, whole.pixels[rows])
    assert torch.equal(train.labels, whole.labels[rows])


# ---- sets of torchvision


class Fake(torchvision.datasets.FakeData):
    """Random images with labels as torchvision's sets have them; the tests have another seed."""

    def __init__(self, root, train, download):
        super().__init__(20 if train else 10, (3, 8, 8), num_classes=3, random_offset=train)
        self.classes = ["cat", "dog", "bird"]
        self.targets = [i % 3 for i in range(self.size)]


@pytest.mark.parametrize("memory", [8.0, 0.0])
def test_torchvision_set(monkeypatch, memory):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    train, test = load("cifar10", memory=memory)
    assert (train.pixels is None) == (memory == 0)
    for images, count, is_train in (train, 20, True), (test, 10, False):
        pixels, aspect = all_pixels(images)
        assert pixels.shape == (count, 3, 8, 8) and (aspect == 1).all()
        image, _ = Fake("data", is_train, True)[7]
        assert np.array_equal(pixels[7].permute(1, 2, 0), np.array(image))
        assert images.labels.tolist() == [i % 3 for i in range(count)]
        assert images.classes == ["cat", "dog", "bird"]


def test_stl10_trains_on_its_unlabelled_images_too(monkeypatch):
    splits = []

    def make(root, split, download):
        splits.append(split)
        return torchvision.datasets.FakeData(4, (3, 8, 8), num_classes=2)

    monkeypatch.setattr(torchvision.datasets, "STL10", make)
    find_sets("stl10")
    assert splits == ["train+unlabeled", "test"]


def test_torchvision_set_without_lists(monkeypatch):
    """Of labels and class names."""
    def make(root, split, download):
        return torchvision.datasets.FakeData(20, (3, 8, 8), num_classes=3)

    monkeypatch.setattr(torchvision.datasets, "SVHN", make)
    train, _ = find_sets("svhn")
    assert train.labels.tolist() == [label for _, label in make("data", "train", True)]
    assert train.classes == ["0", "1", "2"]


def test_large_torchvision_set_gets_workers(monkeypatch):
    def make(root, train, download):
        images = Fake(root, train, download)
        if train:
            images.size = 1001
            images.targets = [0] * 1001
        return images

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", make)
    train, test = load("cifar10", memory=0, workers=2)
    assert train.workers == 2 and test.workers == 0


def offline(root, train, download):
    raise RuntimeError("Error downloading")


@pytest.mark.parametrize("name, words", [
    ("nowhere", "no such folder, and no torchvision set of that name"), ("", "no such folder"),
    ("cifar10", "Error downloading"), ("fakedata", "torchvision cannot load it")])
def test_torchvision_failure_names_the_set(monkeypatch, name, words):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(Failure, match=f"--data {name}: .*{words}"):
        find_sets(name)


def test_images_are_shrunk_bicubically():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(noise)
    square, _ = to_square(image, 16)
    expected = image.resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(square.permute(1, 2, 0), np.array(expected))


# ---- size, memory, streaming


@pytest.mark.parametrize("image_size, sides, canvas", [
    (224, [400], 256), (96, [400], 109), (32, [400], 64), (32, [32], 32),
    (224, [100, 100, 120, 400, 400], 120)])
def test_canvas(image_size, sides, canvas):
    """8/7 of the view, at least 64 pixels, no larger than the median image."""
    os.mkdir("images")
    for i, side in enumerate(sides):
        picture(side * 3 // 2, side).save(f"images/{i}.png")
    train, _ = load(image_size=image_size)
    assert train.pixels.shape == (len(sides), 3, canvas, canvas)
    assert train.aspect.tolist() == [1.5] * len(sides)


def test_images_larger_than_the_view_are_mentioned(capsys):
    write_images(Path("images"), 3, size=(64, 64))
    load(image_size=32)
    assert "images of 64 pixels, seen at 32\n" in capsys.readouterr().out
    load(image_size=64)
    assert "seen at" not in capsys.readouterr().out


NEEDED = (24 + 8) * 3 * 32 * 32 / 1e9  # GB, of class_folders


@pytest.mark.parametrize("memory, processes, kept", [
    (1.01 * NEEDED, 1, True), (0.99 * NEEDED, 1, False), (4.01 * NEEDED, 4, True),
    (3.99 * NEEDED, 4, False)])
def test_what_fits_into_memory_is_kept(monkeypatch, class_folders, memory, processes, kept):
    """It is shared by the processes of this machine."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for images in load(memory=memory):
        assert (images.pixels is not None) == kept


@pytest.mark.parametrize("free, kept", [(4.01 * NEEDED, True), (3.99 * NEEDED, False)])
def test_a_quarter_of_the_free_memory_of_a_gpu(monkeypatch, class_folders, free, kept):
    decoded = []

    def free_and_total(device):
        return free * 1e9, 80e9

    def decode(images, device):
        decoded.append(images)
        return images

    monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_total)
    monkeypatch.setattr(common, "decode", decode)
    monkeypatch.setattr(common, "check_readable", lambda images, device: None)
    load(device=torch.device("cuda"))
    assert len(decoded) == (2 if kept else 0)


def test_the_process_with_the_least_memory_decides(monkeypatch, class_folders):
    def gather(budget):
        return torch.tensor([8e9, 0.0])

    monkeypatch.setattr(common, "gather", gather)
    train, _ = load()
    assert train.pixels is None


def recorded(function, calls):
    """The function, which also adds its arguments to the list."""
    def record(*args):
        calls.append(args)
        return function(*args)

    return record


def stop(*args):
    raise KeyboardInterrupt


def test_a_streamed_set_is_not_decoded_before_the_first_step(monkeypatch):
    """But for 50 images that are looked at, and 10 in the picture of the views. The size of the
    images is in the headers of 100."""
    write_images(Path("images"), 300)
    opened = []
    decoded = []
    monkeypatch.setattr(Image, "open", recorded(Image.open, opened))
    monkeypatch.setattr(common, "to_square", recorded(common.to_square, decoded))
    monkeypatch.setattr(common, "batches", stop)
    with pytest.raises(KeyboardInterrupt):
        simclr.train(simclr.parse_args("--data images --memory 0 --device cpu".split()))
    assert len(decoded) == 60 and len(opened) == 160


def test_a_streamed_set_with_labels_is_not_decoded_before_the_first_step(monkeypatch):
    """50 training and 40 test images are looked at, one of each class is in the picture; the
    untrained network's kNN comes later."""
    for folder, count in ("train/cat", 150), ("train/dog", 150), ("val/cat", 20), ("val/dog", 20):
        write_images(Path("images", folder), count)
    decoded = []
    monkeypatch.setattr(common, "to_square", recorded(common.to_square, decoded))
    monkeypatch.setattr(common, "batches", stop)
    with pytest.raises(KeyboardInterrupt):
        simclr.train(simclr.parse_args("--data images --memory 0 --device cpu".split()))
    assert len(decoded) == 50 + 40 + 2


def test_few_batches_start_few_workers(monkeypatch):
    """Where they are not forked, each imports torch first, which takes seconds."""
    started = []

    def count(images, num_workers, **options):
        started.append(num_workers)
        return ()

    monkeypatch.setattr(common, "DataLoader", count)
    images = common.ImageSet("images", ["1.png"], [0], [])
    images.workers = 4
    rows = torch.tensor([0])
    for index_lists in [rows], [rows] * 4, (rows,) * 4, [rows] * 100, (rows for _ in range(100)):
        list(images.load(index_lists, CPU))
    assert started == [0, 2, 2, 4, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_gives_the_same_images(workers):
    """And draws no random number."""
    write_images(Path("images"), 5)
    write_images(Path("images/wide"), 4, size=(90, 40), suffix=".jpg")
    kept, _ = load()
    streamed, _ = load(memory=0)
    streamed.workers = workers  # so few images get none
    indices = [torch.tensor(some) for some in ([3, 0, 8], [8, 8, 1], [2, 4])]
    state = torch.get_rng_state()
    pairs = zip(kept.load(indices, CPU), streamed.load(iter(indices), CPU), strict=True)
    for (pixels1, aspect1), (pixels2, aspect2) in pairs:
        assert torch.equal(pixels1, pixels2) and torch.equal(aspect1, aspect2)
    assert torch.equal(torch.get_rng_state(), state)


def test_streaming_gives_the_same_weights(class_folders, no_report):
    flags = "--data images -a resnet8x0.25 -b 8 --epochs 2 --device cpu --out".split()
    simclr.train(simclr.parse_args([*flags, "kept"]))
    simclr.train(simclr.parse_args([*flags, "streamed", "--memory", "0"]))
    kept = common.read_file("kept/backbone.pth")
    streamed = common.read_file("streamed/backbone.pth")
    for name in kept:
        assert torch.equal(kept[name], streamed[name])


def test_an_image_lost_while_streaming_is_replaced_by_the_next(capsys, class_folders):
    train, _ = load(memory=0)
    Path("images/train/cat/003.png").write_text("no image")
    args = Namespace(batch_size=24, epochs=1, seed=0)
    (_, pixels, aspect), = common.batches(train, args, 0, CPU)
    next_image, *_ = train[4]
    assert (pixels == next_image).flatten(1).all(1).sum() == 2 and (aspect == 1).all()
    assert "'cat/003.png': cannot identify image" in capsys.readouterr().out


def test_a_set_lost_while_streaming_ends_the_run(class_folders):
    train, _ = load(memory=0)
    os.rename("images", "elsewhere")
    with pytest.raises(Failure, match="images/train: 20 images in a row cannot be read"):
        next(train.load([torch.tensor([3, 7])], CPU, replace=True))


def test_progress_of_long_work(monkeypatch):
    """Four items of four seconds each: a line once five seconds have passed since the last."""
    now = [0.0]
    said = []
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(common, "say", said.append)
    for _ in common.progress(range(4), "decoding", 4):
        now[0] += 4
    assert said == ["decoding: 50%, 0:00:08 left", "decoding: 100%, 0:00:00 left"]


# ---- batches


def draws(seed):
    """-> of two epochs of four steps: the numbers of the images in the first and in the second, and
    a random number of each step."""
    images = common.ImageSet("made", range(20), [0] * 20, [])
    images.pixels = torch.arange(20)
    images.aspect = torch.ones(20)
    args = Namespace(batch_size=5, epochs=2, seed=seed)
    order = []
    numbers = []
    for _, indices, _ in common.batches(images, args, 0, CPU):
        order += indices.tolist()
        numbers.append(torch.rand(()).item())
    return order[:20], order[20:], numbers


def test_each_epoch_has_its_order_and_each_step_its_numbers():
    first, second, numbers = draws(seed=0)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert len(set(numbers)) == 8
    other, _, other_numbers = draws(seed=1)
    assert other not in (first, second)
    assert not set(numbers) & set(other_numbers)


def test_the_gpus_generator_is_seeded_as_the_cpus(monkeypatch):
    class Images:
        pixels = None

        def __len__(self):
            return 8

        def load(self, index_lists, device, replace):
            for indices in index_lists:
                yield indices, torch.ones(4)

    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    args = Namespace(batch_size=4, epochs=2, seed=3)
    for _ in common.batches(Images(), args, 0, torch.device("cuda")):
        assert seeds[-1] == torch.initial_seed()
    assert len(set(seeds)) == 4


# ---- synthetic images

# Mean gray level of each class over the training images. To be renewed with the set:
# [round(train.pixels[train.labels == c].float().mean().item()) for c in range(10)]
SYNTHETIC_MEANS = [129, 128, 125, 139, 127, 126, 129, 142, 113, 154]


def test_synthetic_images():
    """The same, whatever random numbers were drawn before."""
    torch.manual_seed(1)
    train, test = load(None)
    for images, count in (train, 5000), (test, 1000):
        assert images.pixels.shape == (count, 3, 32, 32) and (images.aspect == 1).all()
        assert images.labels.bincount().tolist() == [count // 10] * 10
        assert len(images.classes) == 10
    assert len({image.numpy().tobytes() for image in [*train.pixels, *test.pixels]}) == 6000
    means = [train.pixels[train.labels == c].float().mean().item() for c in range(10)]
    assert means == pytest.approx(SYNTHETIC_MEANS, abs=1)
    # the green of a pixel in the middle of ten images, one of each class
    assert train.pixels[::501, 1, 16, 16].tolist() == pytest.approx(
        [174, 125, 129, 151, 140, 144, 103, 125, 85, 94], abs=1)
