"""unpack: the files of a packed file, byte for byte."""

import os
from contextlib import closing
from pathlib import Path

from .container.atomic import check_space, check_target, new_directory, new_file
from .container.packed import Packed
from .container.writer import Progress
from .errors import CorruptFile


def unpack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Restore what was packed into `source`: the file or the directory `target`, which is returned.

    `target` appears whole or not at all, and only if every checksum matches. Permissions and times are not kept.

    Args:
        overwrite: replace `target` if it exists; a directory with all that it holds.
        threads: None takes one per core.
        progress: called as `progress(done, total)` with restored bytes.

    Raises:
        NotPacked, CorruptFile, UnsupportedVersion: see `tersor.lossless.errors`.
        OSError: too little space is free beside `target`.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from safetensors.torch import save_file
    >>> from tersor.lossless import pack
    >>> model = Path(tempfile.mkdtemp()) / "model"
    >>> model.mkdir()
    >>> save_file({"weight": torch.zeros(8)}, model / "model.safetensors")
    >>> (model / "config.json").write_text("{}")
    2
    >>> packed = pack(model, model.with_suffix(".tersor"))
    >>> restored = unpack(packed.path, model.with_name("restored"))
    >>> (restored / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    True
    """
    source, target = Path(source), Path(target)
    packed = Packed(source)
    if source.resolve().is_relative_to(target.resolve()):
        raise ValueError(
            f"the packed file {source} lies in the target {target}, which would be replaced: choose another"
        )
    check_target(target, overwrite, directory=packed.manifest.directory)
    total = sum(entry.nbytes for entry in packed.manifest.files)
    check_space(target, total)
    done = 0

    def restore(path: str, file) -> None:
        nonlocal done
        begin = done
        with closing(packed.file_blocks(path, threads)) as blocks:
            for block in blocks:
                file.write(block)
                done += block.nbytes
                if progress:
                    progress(done, total)
        entry = next(entry for entry in packed.manifest.files if entry.path == path)
        if done - begin != entry.nbytes:
            raise CorruptFile(f"{source}: {path} has {done - begin} bytes, expected {entry.nbytes}")

    if not packed.manifest.directory:
        with new_file(target, overwrite) as file:
            restore(packed.manifest.files[0].path, file)
        return target
    with new_directory(target, overwrite) as directory:
        for path in packed.manifest.empty_directories:
            (directory / path).mkdir(parents=True)
        for entry in packed.manifest.files:
            path = directory / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                restore(entry.path, file)
                file.flush()
                os.fsync(file.fileno())
    return target
