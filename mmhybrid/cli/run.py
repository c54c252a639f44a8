"""Run a tool of mmdet, mmseg or your own with mmhybrid as its plugin.

Stock tools stop at "No module named 'mmcv._ext'" where mmcv came without compiled operators, and do
not know configs that build on 'mmhybrid::...'. Here they start after `import mmhybrid`, so that
they do. What follows the tool goes to it, --help included.
"""

import argparse
import importlib.util
import os
import runpy
import sys

EXAMPLE = """mmhybrid run mmdet.tools.analysis_tools.confusion_matrix CONFIG RESULTS.pkl FOLDER
mmhybrid run mmseg.tools.analysis_tools.browse_dataset CONFIG --not-show --output-dir shown
mmhybrid run path/to/script.py --its-options
torchrun --nproc_per_node 2 -m mmhybrid run mmdet.tools.train CONFIG --launcher pytorch"""


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('tool', help='file of a script; or a module; or, for what the wheels of '
                                     'mmdet and mmseg bring in their folder .mim/tools, its dotted '
                                     'name such as mmdet.tools.test')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, metavar='...',
                        help='what the tool gets')


def run(args):
    """Run the tool as if it had been started itself."""
    import mmhybrid.plugin  # noqa: F401

    if args.tool.endswith('.py') or os.path.isfile(args.tool):
        return _run_file(args.tool, args.arguments)
    path = _shipped(args.tool)
    if path is not None:
        return _run_file(path, args.arguments)
    sys.path.insert(0, os.getcwd())  # as python -m does
    if not _is_module(args.tool):
        from mmhybrid.errors import UserError

        raise UserError(f'{args.tool} cannot be run: {_reason(args.tool)}')
    sys.argv = [args.tool, *args.arguments]
    runpy.run_module(args.tool, run_name='__main__', alter_sys=True)


def _run_file(path, arguments):
    if not os.path.isfile(path):
        from mmhybrid.errors import UserError

        raise UserError(f'There is no script {path}.')
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # as python does
    runpy.run_path(path, run_name='__main__')


def _shipped(name):
    """File of a tool that a wheel of OpenMMLab brings, None if ``name`` is none."""
    package, *folders = name.split('.')
    root = _tools_of(package)
    if folders[:1] != ['tools'] or root is None:
        return None
    path = os.path.join(root, *folders[1:]) + '.py'
    return path if os.path.isfile(path) else None


def _tools_of(package):
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for folder in spec.submodule_search_locations or () if spec else ():
        tools = os.path.join(folder, '.mim', 'tools')
        if os.path.isdir(tools):
            return tools
    return None


def _is_module(name):
    try:
        return all(part.isidentifier() for part in name.split('.')) and (
            importlib.util.find_spec(name) is not None)
    except ModuleNotFoundError:
        return False  # a package in front of it


def _reason(name):
    from mmhybrid.spelling import nearest_few

    package, _, rest = name.partition('.')
    root = _tools_of(package)
    if rest.partition('.')[0] != 'tools' or root is None:
        return ('it is neither a file that ends in .py, nor a module, nor a tool that the wheel of '
                f'{package} brings.')
    known = [
        '.'.join([package, 'tools', *os.path.relpath(path, root)[:-3].split(os.sep)])
        for folder, _, files in os.walk(root)
        for path in sorted(os.path.join(folder, file) for file in files if file.endswith('.py'))
    ]
    near = nearest_few(name, known, cutoff=0.5) or sorted(known)
    return f'{package} brings {", ".join(near)}.'
