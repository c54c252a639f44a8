"""Commands in processes that have the big libraries already: a fork takes no seconds to import.

A command's process is its own in all else: working directory, environment, arguments, output. Only
libraries of others are imported before; ours comes from the tree that the command belongs to.
"""
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess

LIBRARIES = ['torch', 'torchvision', 'timm', 'matplotlib.pyplot', 'scipy.optimize', 'cv2',
             'pycocotools.mask', 'mmengine.runner', 'mmcv']


def run(words: list[str], tree: Path, env: dict[str, str], output: Path) -> CompletedProcess:
    """Run ``python FILE ...`` or ``mmhybrid ...`` in ``tree``, with its mmhybrid.

    Args:
        words: the command.
        tree: the working directory, a clone.
        env: the environment.
        output: a file for what the command prints.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(LIBRARIES)
    child = context.Process(target=_command, args=(words, str(tree), env, str(output)))
    child.start()
    child.join(600)
    if child.is_alive():
        child.kill()
        child.join()
    return CompletedProcess(words, child.exitcode, output.read_text())


def _command(words, tree, env, output):
    os.chdir(tree)
    os.environ.clear()
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.path[:] = [path for path in sys.path if not (Path(path) / 'mmhybrid').exists()]
    sys.path.insert(0, tree)
    if words[0] == 'mmhybrid':
        sys.argv = ['mmhybrid', *words[1:]]
        runpy.run_module('mmhybrid', run_name='__main__', alter_sys=True)
    else:
        assert words[0] == 'python', words
        sys.argv = words[1:]
        sys.path.insert(0, str(Path(words[1]).resolve().parent))
        runpy.run_path(words[1], run_name='__main__')
