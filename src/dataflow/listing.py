"""The files of a store of images, with their sizes; as a program too, so that a second core can look at a million."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

MANY = 400
"""Images in the first folder (of 256 alike) from which on a process of its own is worth its start."""

_FOLDER = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{32}(?:_[0-9]+)?\.(?:png|webp|jpg)")


def folders(root: str) -> list[str]:
    """The folders of a store; none if it does not exist yet."""
    try:
        return [name for name in os.listdir(root) if _FOLDER.fullmatch(name)]
    except FileNotFoundError:
        return []


def images(root: str) -> Iterator[tuple[str, int]]:
    """Name (as ``ab/abcd….png``) and bytes of every image, in no particular order. The work starts with the call.

    Raises:
        OSError: a folder cannot be read.
    """
    names = folders(root)
    if not names or len(os.listdir(os.path.join(root, names[0]))) < MANY:  # noqa: PTH118
        return _images(root, names)
    # Not the current folder's modules, nor anybody's: nothing but the standard library is needed.
    command = [sys.executable, "-I", "-S", __file__, os.path.abspath(root)]  # noqa: PTH100
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    return _from(child, root)


def images_in(root: str, folder: str) -> Iterator[tuple[str, int]]:
    """Those in one folder.

    Raises:
        OSError: it cannot be read.
    """
    return _images(root, [folder])


def _from(child: subprocess.Popen[bytes], root: str) -> Iterator[tuple[str, int]]:
    assert child.stdout is not None
    with child, child.stdout as lines:
        for line in lines:
            name, _, size = line.decode("ascii").partition(" ")
            yield name, int(size)
    if child.returncode:
        # Whatever kept it from its work is found, or not, here: what was listed once may be listed twice.
        yield from _images(root, folders(root))


def _images(root: str, names: list[str]) -> Iterator[tuple[str, int]]:
    is_image = _FILE.fullmatch
    for folder in names:
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                if is_image(entry.name):
                    yield f"{folder}/{entry.name}", entry.stat().st_size


def main() -> None:
    """Print the images of a store, once all are known: a full pipe must not stop the work."""
    root = sys.argv[1]
    listed = ["".join(f"{name} {size}\n" for name, size in _images(root, [folder])) for folder in folders(root)]
    sys.stdout.writelines(listed)


if __name__ == "__main__":
    main()
