"""Prose and source code are the packages' documents, divided as for training, with their licences."""

import re
import shutil
import zlib

import pytest

from tersor.integration.errors import UserError
from tersor.integration.zoo import data
from tersor.integration.zoo.data import cache, text
from tersor.integration.zoo.training import corpus

pytestmark = pytest.mark.usefixtures("empty_cache")
SPLITS = ("train", "validation", "test")
# where the user has it: the tests move the cache
USERS_CORPUS = cache.directory() / "corpus"


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


def test_cut_text_database_is_damaged():
    database = b"\0\0\0\1" + zlib.compress(bytes(range(256)))
    with pytest.raises(zlib.error, match="ends within a record"):
        list(corpus._string_vectors(database[:-5]))
