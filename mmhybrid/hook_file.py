"""The start-up hook as a file, which ``mmhybrid install-hook`` writes.

Python runs the lines of ``.pth`` files in its site-packages folder that start with ``import``,
whenever it starts. One such line is all that ``_startup_hook.py`` needs; see there what it does.
"""

import ast
import os
import site
import sysconfig
from pathlib import Path

NAME = 'mmhybrid_config_scheme.pth'


def line():
    """``_startup_hook.py`` squeezed into the one line that a ``.pth`` file may hold."""
    tree = ast.parse(Path(__file__).with_name('_startup_hook.py').read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
                node) is not None:
            del node.body[0]
    code = ast.unparse(tree)
    return f"import sys; exec(compile({code!r}, 'mmhybrid/_startup_hook.py', 'exec'), {{}})\n"


def folders():
    """Where this Python looks for ``.pth`` files: its site-packages, then the user's."""
    found = [Path(sysconfig.get_path('purelib'))]
    if site.ENABLE_USER_SITE:
        found.append(Path(site.getusersitepackages()))
    return found


def installed():
    """Return the files of the hook that are there."""
    return [folder / NAME for folder in folders() if (folder / NAME).is_file()]


def install():
    """Write the hook where this Python may write; returns the file.

    Raises:
        OSError: there is no such place.
    """
    *others, last = folders()
    for folder in others:
        if os.access(folder, os.W_OK):
            return _write(folder)
    return _write(last)


def _write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    aside = path.with_name(f'.{NAME}.{os.getpid()}')  # half a line would tell at every start
    try:
        aside.write_text(line(), encoding='utf-8')
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def uninstall():
    """Remove the hook; returns the files that are gone.

    Raises:
        OSError: one cannot be removed.
    """
    found = installed()
    for path in found:
        path.unlink()
    return found
