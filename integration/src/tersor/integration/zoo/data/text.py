"""English prose and Python source code, from the packages of `zoo.training.corpus`, divided by document as there."""

import shlex
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tersor.integration.errors import UserError
from tersor.integration.zoo.data import splits
from tersor.integration.zoo.data.cache import cached, directory, library
from tersor.integration.zoo.training import corpus

if TYPE_CHECKING:
    from datasets import Dataset

LICENCES = {source.package: source.licence for source in corpus.SOURCES}
SOURCE_CODE = ["libpython3.11-stdlib"]
PROSE = [package for package in LICENCES if package not in SOURCE_CODE]


def prose(split: str = "train") -> "Dataset":
    """Novels, handbooks and documentation, 16 MB: `text` of a chapter, section or page, `name`, `source`, `licence`.

    92 of 100 documents are for training, 4 for validation and 4 for testing, by a hash of their names.

    Raises:
        UserError: the Debian packages in PROSE have not been fetched, or are damaged.
    """
    return _documents("prose", split, PROSE)


def source_code(split: str = "train") -> "Dataset":
    """Modules of the Python standard library, 4 MB: columns and splits as `prose`.

    Raises:
        UserError: the Debian package in SOURCE_CODE has not been fetched, or is damaged.
    """
    return _documents("source-code", split, SOURCE_CODE)


def _documents(name: str, split: str, packages: list[str]) -> "Dataset":
    splits.check(split)
    datasets = library()
    features = datasets.Features(dict.fromkeys(["text", "name", "source", "licence"], datasets.Value("string")))
    return cached(f"{name}-{split}", features, lambda: _rows(name, split, packages))


def _rows(name: str, split: str, packages: list[str]) -> Iterator[dict[str, str]]:
    folder = directory() / "corpus"
    fetch = f"python -m {corpus.__name__} {shlex.quote(str(folder))}"
    missing = [package for package in LICENCES if not (folder / package).is_dir()]
    if missing:
        raise UserError(f"{name} needs the Debian packages {', '.join(missing)}: {fetch}")
    read = set()
    try:
        for document in corpus.documents(folder):
            read.add(document["source"])
            if document["source"] in packages and document.pop("split") == split:
                yield {**document, "licence": LICENCES[document["source"]]}
    except (OSError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{folder} is damaged ({error}); delete it, then {fetch}") from error
    if empty := LICENCES.keys() - read:
        raise UserError(f"{folder} has no text of {', '.join(sorted(empty))}; delete it, then {fetch}")
