"""A folder of vectors as one archive, of the same bytes whenever and wherever it is made of the same files."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

from executors._files.whole import replacing


def write_archive(directory: Path, archive: Path) -> None:
    """Writes a .tar.gz with the files of a folder, in order, without times and owners, whole or not at all.

    Args:
        directory: the folder; its name is that of the folder in the archive.
        archive: the file.

    Raises:
        OSError: it cannot be written.
    """
    with (
        replacing(archive) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for path in sorted(directory.iterdir()):
            entry = tarfile.TarInfo(f"{directory.name}/{path.name}")
            data = path.read_bytes()
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
