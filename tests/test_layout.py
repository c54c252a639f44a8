"""The house rules about imports: they point one way, and the lower floors stay light."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'mmhybrid'

# What each part may import from mmhybrid, beside itself. Whoever is missing here fails the test.
# A part is a file or folder of the package; a folder inside one, if it is listed, is another part.
EVERYWHERE = {'spelling'}
MAY_IMPORT = {
    'errors': set(),
    'spelling': set(),
    'private_files': set(),
    'families': set(),
    'ops': {'private_files'},
    'layers': {'ops'},
    'datasets': set(),
    'datasets.loading': {'datasets', 'registry', 'compat', 'weights', 'errors'},
    'evaluation': {'registry'},
    'visualization': {'datasets'},
    'registry': {'compat'},
    'roi_align': set(),
    'processes': set(),
    'torch_ops': set(),
    'mmcv_ops': {'roi_align', 'torch_ops'},
    'config_scheme': set(),
    'hook_file': set(),
    'weights': {'private_files', 'families'},
    'compat': {'weights', 'mmcv_ops', 'config_scheme', 'processes'},
    'analysis': set(),
    'models': {'layers', 'ops', 'registry', 'weights', 'families'},
    'engine': {
        'models', 'weights', 'layers', 'ops', 'registry', 'datasets', 'datasets.loading',
        'families', 'evaluation', 'mmcv_ops', 'config_scheme', 'compat', 'processes', 'errors',
        'visualization',
    },
    'analysis.models': {
        'analysis', 'engine', 'models', 'layers', 'ops', 'registry', 'errors',
    },
    'prediction': {
        'engine', 'datasets.loading', 'models', 'weights', 'visualization', 'compat', 'errors',
        '__init__',
    },
    'export': {'ops', 'prediction', 'errors', '__init__'},
    'starter': {'models', 'weights', 'families', 'datasets', 'errors'},
    'papers': {'config_scheme', 'errors'},
    'doctor': {'ops', 'mmcv_ops', 'config_scheme'},
    # Runs in child processes only, and looks at everything.
    'doctor_probes': {
        '__init__', 'ops', 'mmcv_ops', 'config_scheme', 'compat', 'engine', 'datasets.loading',
        'plugin', 'hook_file',
    },
    'cli': {
        '__init__', 'plugin', 'compat', 'doctor', 'engine', 'analysis', 'datasets', 'weights',
        'hook_file', 'papers', 'cli.actions', 'analysis.models', 'export', 'errors',
    },
    'cli.actions': {
        'cli', 'engine', 'prediction', 'starter', 'families', 'datasets', 'datasets.loading',
        'models', 'layers', 'ops', 'weights', 'visualization', 'analysis', 'analysis.models',
        'errors', 'compat', '__init__',
    },
    '__main__': {'cli'},
    '_startup_hook': {'config_scheme'},
    'plugin': {'models', 'engine', 'evaluation', 'datasets.loading'},
    '__init__': {'plugin', 'config_scheme', 'prediction'},
}
# The start-up hook names config_scheme in a string that runs later.
WITHOUT_MM = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'torchvision')
FORBIDDEN_OUTSIDE = {
    'ops': WITHOUT_MM,
    'analysis': WITHOUT_MM,
    'layers': WITHOUT_MM + ('timm',),  # importing timm imports torchvision
    'families': WITHOUT_MM + ('torch', 'timm', 'numpy'),
    'datasets': ('mmcv', 'mmdet', 'mmseg', 'torch'),
    'doctor': WITHOUT_MM + ('torch', 'timm', 'numpy'),  # it looks at them from child processes
    'cli': WITHOUT_MM + ('torch', 'timm', 'numpy'),  # each subcommand asks others for them
    '_startup_hook': WITHOUT_MM + ('torch', 'timm', 'numpy'),
}


def source_files():
    return sorted(
        path for path in PACKAGE.rglob('*.py') if '.mim' not in path.relative_to(PACKAGE).parts
    )


def part_of(path):
    return part_named('.'.join(path.relative_to(PACKAGE).with_suffix('').parts))


def part_named(name):
    """The part that holds a module, by its name below the package."""
    top, _, rest = name.partition('.')
    inner = f'{top}.{rest.partition(".")[0]}'
    return inner if inner in MAY_IMPORT else top or '__init__'


def imported_names(path, source=None):
    """Absolute dotted names of everything a file imports, with `from x import y` as x.y."""
    package = ['mmhybrid', *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text(encoding='utf-8') if source is None else source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            yield from (f'{module}.{alias.name}' for alias in node.names)


def complaints(path, source=None):
    part = part_of(path)
    for name in imported_names(path, source):
        top, _, rest = name.partition('.')
        if top == 'mmhybrid':
            target = part_named(rest)
            if target not in MAY_IMPORT:
                continue  # a name such as __version__
            if target != part and target not in MAY_IMPORT[part] | EVERYWHERE:
                yield f'{part} must not import {target} ({path.name}: {name})'
        elif top in FORBIDDEN_OUTSIDE.get(part, ()):
            yield f'{part} must not import {top} ({path.name}: {name})'


@pytest.mark.parametrize('path', source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert part_of(path) in MAY_IMPORT, f'say in {Path(__file__).name} what {path} may import'
    assert list(complaints(path)) == []


@pytest.mark.parametrize(
    ('file', 'source'),
    [
        ('ops/x.py', 'from mmhybrid.layers import mixer'),
        ('ops/selective_scan/x.py', 'from ...models import backbones'),
        ('ops/x.py', 'def f():\n    import mmcv.ops'),
        ('layers/x.py', 'from ..registry import MODELS'),
        ('layers/x.py', 'from timm.layers import DropPath'),
        ('models/x.py', 'import mmhybrid.engine.hooks'),
        ('models/backbones/x.py', 'from mmhybrid import engine'),
    ],
)
def test_the_check_itself_sees_a_wrong_import(file, source):
    assert len(list(complaints(PACKAGE / file, source))) == 1


def imported_modules(path, modules, source=None):
    """Names of the modules of ours that a file imports, inside functions too."""
    for name in imported_names(path, source):
        # `from package import module` names a module, `from module import thing` does not
        found = name if name in modules else name.rpartition('.')[0]
        if found in modules:
            yield found


def cycle_in(graph):
    """A list of modules, each of which imports the next and the last one the first; or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module):]
        if module in done:
            return None
        path.append(module)
        found = next(filter(None, map(visit, sorted(graph.get(module, ())))), None)
        path.pop()
        done.add(module)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def test_no_module_imports_itself_through_others():
    modules = {module_of(path) for path in source_files()}
    graph = {module_of(path): {*imported_modules(path, modules)} for path in source_files()}
    # The package itself: it has a version, and asks for its parts when it is used.
    graph.pop('mmhybrid')
    assert cycle_in(graph) is None


def test_a_cycle_is_seen():
    modules = {'mmhybrid.a', 'mmhybrid.b', 'mmhybrid.c'}
    sources = {'a': 'from .b import f', 'b': 'def f():\n    from mmhybrid import c',
               'c': 'import mmhybrid.a'}
    graph = {f'mmhybrid.{name}': {*imported_modules(PACKAGE / f'{name}.py', modules, source)}
             for name, source in sources.items()}
    assert cycle_in(graph) == ['mmhybrid.a', 'mmhybrid.b', 'mmhybrid.c']
    graph['mmhybrid.c'].clear()
    assert cycle_in(graph) is None
    assert cycle_in({'a': {'a'}}) == ['a']


def test_tools_are_imported_by_nobody():
    for path in source_files():
        assert not [n for n in imported_names(path) if n.split('.')[0] == 'tools'], path


def test_few_know_the_registry():
    knows = {
        part_of(path)
        for path in source_files()
        for name in imported_names(path)
        if name.startswith('mmhybrid.registry') or name.startswith('mmengine.registry')
    }
    assert knows <= {
        'registry', 'models', 'datasets.loading', 'evaluation', 'engine', 'analysis.models',
        'prediction', 'cli.actions', 'compat', 'doctor_probes',
    }


BLOCK = """
    import importlib.abc, sys

    class Block(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition('.')[0] in {blocked!r}:
                raise ModuleNotFoundError(f'blocked: {{name}}', name=name)

    sys.meta_path.insert(0, Block())
"""


def run_blocked(code, blocked):
    source = textwrap.dedent(BLOCK).format(blocked=tuple(blocked)) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, '-c', source], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


def test_ops_and_layers_import_no_mm_package_and_no_torchvision():
    # The top package itself registers models where mmengine can be seen; without it (an empty
    # sys.modules entry makes find_spec answer None) only ops and layers load.
    code = """
        sys.modules['mmengine'] = None
        import pkgutil, importlib
        import mmhybrid
        loaded = []
        for part in ('ops', 'layers'):
            package = importlib.import_module('mmhybrid.' + part)
            loaded.append(package.__name__)
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
                importlib.import_module(module.name)
                loaded.append(module.name)
        print(' '.join(loaded))
    """
    blocked = [name for name in WITHOUT_MM if name != 'mmengine']
    result = run_blocked(code, blocked)
    assert result.returncode == 0, result.stderr
    assert 'mmhybrid.ops.selective_scan' in result.stdout
    assert 'mmhybrid.layers.' in result.stdout


def test_importing_the_package_needs_neither_mmengine_nor_torch():
    code = """
        sys.modules['mmengine'] = None
        import mmhybrid
        assert mmhybrid.__version__
        assert 'mmhybrid.models' not in sys.modules
    """
    result = run_blocked(code, ['torch', 'torchvision', 'mmcv', 'timm', 'numpy'])
    assert result.returncode == 0, result.stderr


def test_importing_the_package_registers_the_models():
    pytest.importorskip('mmengine')
    code = """
        import mmhybrid
        from mmengine.registry import MODELS
        assert MODELS.get('MambaVision') is not None
        assert MODELS.get('mmhybrid.MambaVision') is MODELS.get('MambaVision')
        assert 'mmdet' not in sys.modules and 'mmseg' not in sys.modules
    """
    result = run_blocked(code, [])
    assert result.returncode == 0, result.stderr


def test_mmengine_alone_is_enough_to_register():
    pytest.importorskip('mmengine')
    code = """
        for name in ('mmcv', 'mmdet', 'mmseg', 'timm'):
            sys.modules[name] = None
        import mmhybrid
        from mmengine.registry import MODELS
        assert MODELS.get('MambaVision') is not None
    """
    result = run_blocked(code, [])
    assert result.returncode == 0, result.stderr


def test_a_bug_in_our_own_modules_surfaces():
    pytest.importorskip('mmengine')
    result = run_blocked('import mmhybrid', ['torch'])
    assert result.returncode != 0 and 'blocked: torch' in result.stderr
