"""pack: safetensors files to one packed file."""

import os
from pathlib import Path

from .container.atomic import check_space, new_file
from .container.manifest import unsafe_paths
from .container.packed import Packed
from .container.writer import Progress, SourceFile, components, manifest_of, read_source, write_packed
from .errors import LosslessError
from .recipe import Recipe
from .recipes import zipnn

SUFFIX = ".safetensors"
_DEFAULT = zipnn()


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    recipe: Recipe = _DEFAULT,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Pack `source`, a safetensors file or a directory that holds some, into the one file `target`; returns it, open.

    Of a directory every file is packed (links to files as what they point to), its safetensors files tensor by tensor.
    `target` appears whole or not at all. Its own format, a safetensors file of frames, is described in README.md.

    Args:
        recipe: one of `tersor.lossless.recipes`; the default is `zipnn()`.
        overwrite: replace `target` if it exists.
        threads: None takes one per core. The packed bytes do not depend on it.
        progress: called as `progress(done, total)` with bytes of the source.

    Raises:
        CorruptFile: a file is named .safetensors and is none.
        LosslessError: there is nothing to pack, or a file changed meanwhile.
        OSError: less than half of the source's size is free beside `target`, or space runs out.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from safetensors.torch import save_file
    >>> here = Path(tempfile.mkdtemp())
    >>> weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    >>> save_file({"weight": weight}, here / "model.safetensors")
    >>> packed = pack(here / "model.safetensors", here / "model.tersor")
    >>> 0.66 < packed.stats.ratio < 0.68
    True
    >>> torch.equal(packed.get_tensor("weight"), weight)
    True
    """
    source, target = Path(source), Path(target)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe such as recipes.zipnn(), got {recipe!r}")
    _check_apart(source, target)
    with new_file(target, overwrite) as file:
        if source.is_dir():
            sources, empty = _walk(source)
        else:
            sources, empty = [read_source(source, source.name, tensors=True)], []
        check_space(target, sum(each.entry.nbytes for each in sources) // 2)
        manifest = manifest_of(sources, tuple(empty), source.is_dir(), recipe)
        write_packed(file, components(sources, manifest, recipe), manifest, threads, progress)
    return Packed(target)


def _check_apart(source: Path, target: Path) -> None:
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if target.resolve() == source.resolve() or (source.is_dir() and target.resolve().is_relative_to(source.resolve())):
        raise ValueError(f"{target} lies in the source {source}: choose a target outside of it")


def _walk(source: Path) -> tuple[list[SourceFile], list[str]]:
    """The files below `source` and its empty directories, sorted by path."""
    found: list[SourceFile] = []
    empty: list[str] = []
    for directory, directories, files in os.walk(source, onerror=_raise):
        directories.sort()
        here = Path(directory)
        if not directories and not files and here != source:
            empty.append(here.relative_to(source).as_posix())
        for name in directories:
            if (here / name).is_symlink():
                raise LosslessError(
                    f"{here / name} is a link to a directory, which cannot be restored: remove it or copy it"
                )
        for name in sorted(files):
            path = here / name
            if not path.is_file():
                raise LosslessError(f"{path} is no regular file: remove it from the directory")
            found.append(read_source(path, path.relative_to(source).as_posix(), name.endswith(SUFFIX)))
    names = [each.entry.path for each in found] + empty
    for name in names:
        if not _is_unicode(name):
            raise LosslessError(f"{name!r} in {source} is not valid Unicode: rename it")
    if reason := unsafe_paths(names):
        raise LosslessError(f"{source}: {reason}: rename it")
    if not any(each.entry.tensors for each in found):
        raise LosslessError(f"{source} holds no {SUFFIX} file: there is nothing to pack")
    return found, empty


def _raise(error: OSError) -> None:
    raise error


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
