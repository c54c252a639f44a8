"""Writing a generated data set so that it is there completely or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

# Written into every generated set: says what it is, and so what may be replaced.
MARKER = 'mini_set.json'

Progress = Callable[[int, int], None]


def existing_recipe(folder: Path, marker: str = MARKER) -> dict | None:
    """Return the recipe of the generated set in `folder`, None when it holds no complete one."""
    try:
        recipe = json.loads((folder / marker).read_text())
    except (OSError, ValueError):
        return None
    return recipe if isinstance(recipe, dict) else None


def needs_writing(folder: Path, recipe: dict, force: bool = False) -> bool:
    """Decide whether a set must be generated.

    Args:
        folder: Where the set goes.
        recipe: What it is made of (kind, counts, seed, version).
        force: Replace a generated set, be it the same or another.

    Returns:
        False when the same set is already there and `force` is off.

    Raises:
        FileExistsError: Something else is there and `force` is off, or it is not a generated set
            (that is never replaced).
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    found = existing_recipe(folder)
    if found == recipe and not force:
        return False
    if found is None:
        raise FileExistsError(
            f'{folder} exists and was not made by this program (it has no readable {MARKER}); '
            'nothing was changed. Move it away or choose another --root.')
    if not force:
        changed = ', '.join(f'{key} {found.get(key)!r} instead of {value!r}'
                            for key, value in recipe.items() if found.get(key) != value)
        raise FileExistsError(
            f'{folder} holds a different generated set ({changed}); nothing was changed. Pass '
            '--force to replace it, or choose another --root.')
    return True


@contextmanager
def atomic_folder(folder: Path, recipe: dict, marker: str = MARKER):
    """Give a temporary folder that becomes `folder` only when the body finishes.

    Args:
        folder: Final place; what is there is replaced at the end.
        recipe: Written as the marker file, last.
        marker: Name of that file.

    Yields:
        The temporary folder, on the same file system.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
    try:
        yield work
        (work / marker).write_text(json.dumps(recipe, indent=1, sort_keys=True) + '\n')
        work.chmod(0o755)  # mkdtemp makes private folders
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.old.', dir=folder.parent))
            os.replace(folder, old)
            os.replace(work, folder)
            shutil.rmtree(old)
        else:
            os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
