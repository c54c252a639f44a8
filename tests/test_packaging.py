"""Wheel and editable install: what is shipped, and the mmhybrid:: prefix from another project."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from mmhybrid import hook_file

# Found, not imported: pip, setuptools and distutils are particular about their order.
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ('pip', 'setuptools', 'wheel')),
    reason='building and installing offline needs pip, setuptools and wheel',
)
ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    'mmhybrid', 'configs', 'tools', 'requirements', 'setup.py', 'setup.cfg', 'pyproject.toml',
    'MANIFEST.in', 'LICENSE', 'README.md', 'model-index.yml',
)


def run(command, **options):
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, **options
    )
    assert result.returncode == 0, f'{command}\n{result.stdout}\n{result.stderr}'
    return result.stdout


def clean_environment():
    """Without PYTHONPATH: the checkout must not be what is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    environment['PIP_NO_INDEX'] = '1'
    environment['PIP_DISABLE_PIP_VERSION_CHECK'] = '1'
    return environment


def pip_install(python, *arguments):
    pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '-q', '--no-deps']
    # The outer environment may hold an mmhybrid, which pip would see.
    run([*pip, '--ignore-installed', *arguments], env=clean_environment())


@pytest.fixture(scope='module')
def source_tree(tmp_path_factory):
    """A copy of what a clone has, so that building leaves no traces in the checkout."""
    target = tmp_path_factory.mktemp('source') / 'clone'
    target.mkdir()
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns('__pycache__', '.mim', '*.egg-info')
            shutil.copytree(source, target / name, ignore=ignore)
        elif source.exists():
            shutil.copy2(source, target / name)
    return target


@pytest.fixture(scope='module')
def wheel(source_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    run(
        [sys.executable, '-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps', '-q',
         '-w', folder, source_tree],
        env=clean_environment(),
    )
    (path,) = folder.glob('mmhybrid-*.whl')
    return path


def test_sdist_has_every_file(source_tree, tmp_path):
    """A wheel built from the source distribution must not lack what one from a clone has."""
    run([sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp_path], cwd=source_tree,
        env=clean_environment())
    (path,) = tmp_path.glob('mmhybrid-*.tar.gz')
    with tarfile.open(path) as archive:
        there = {name.partition('/')[2] for name in archive.getnames()}
    for folder in ('mmhybrid', 'configs', 'tools', 'requirements'):
        files = {file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob('*')
                 if file.is_file() and not {'__pycache__', '.mim'} & set(file.parts)}
        assert files and files <= there, sorted(files - there)


@pytest.fixture(scope='module')
def make_environment(tmp_path_factory):
    """Return a function that makes an environment which sees this one's packages."""

    def make(name):
        folder = tmp_path_factory.mktemp(name) / 'venv'
        run([sys.executable, '-m', 'venv', '--without-pip', folder])
        binaries = folder / ('Scripts' if os.name == 'nt' else 'bin')
        python = binaries / Path(sys.executable).name
        if not python.exists():
            python = binaries / 'python'
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(run([python, '-c', query]).strip())
        # Only a plain sys.path entry: this environment's own .pth files (an editable install of
        # mmhybrid may be among them) must not run there.
        (site / 'outer.pth').write_text(sysconfig.get_path('purelib') + '\n')
        return python

    return make


@pytest.fixture(scope='module')
def wheel_python(wheel, make_environment):
    python = make_environment('wheel-env')
    pip_install(python, wheel)
    return python


@pytest.fixture(scope='module')
def editable_python(source_tree, make_environment):
    python = make_environment('editable-env')
    pip_install(python, '--no-build-isolation', '-e', source_tree)
    return python


@pytest.fixture(params=['wheel', 'editable'])
def installed_python(request):
    return request.getfixturevalue(f'{request.param}_python')


def test_wheel_ships_the_mim_extension(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {n.removeprefix('mmhybrid/.mim/') for n in names if n.startswith('mmhybrid/.mim/')}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ('configs', 'tools')
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }
    wanted |= {'model-index.yml'} if (ROOT / 'model-index.yml').exists() else set()
    assert 'configs/cascade_mambavision_t_coco.py' in wanted
    assert shipped == wanted
    assert not [n for n in names if n.endswith('.pth')]  # nothing runs when Python starts
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / 'mmhybrid').rglob('*')
        if path.is_file() and not {'__pycache__', '.mim'} & set(path.parts)
    }
    assert package <= set(names)  # operators come with sources and READMEs
    assert not [n for n in names if n.split('/')[0] in ('tests', 'configs', 'tools')]


def test_wheel_names_no_distribution_of_the_mm_packages(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (n for n in archive.namelist() if n.endswith('.dist-info/METADATA'))
    lines = archive.read(metadata).decode().splitlines()
    required = [x.split(':', 1)[1].strip() for x in lines if x.startswith('Requires-Dist:')]
    always = [requirement for requirement in required if 'extra ==' not in requirement]
    assert any(requirement.startswith('torch>=2.4') for requirement in always)
    assert not [r for r in always if r.startswith(('mm', 'onedl'))]
    extras = {x.split(':')[1].strip() for x in lines if x.startswith('Provides-Extra:')}
    assert extras == {'runtime', 'mminstall', 'optional', 'onnx', 'tests'}
    assert any(r.startswith('onedl-mmcv') and 'mminstall' in r for r in required)
    assert 'License-File: LICENSE' in lines


def test_start_up_line_is_one_cheap_line():
    text = hook_file.line()
    assert text.startswith('import sys; ') and text.count('\n') == 1 and text.endswith('\n')
    code = text + '\nprint(sorted(set(sys.modules) - before))'
    before = 'import sys; before = set(sys.modules)\n'
    assert run([sys.executable, '-S', '-c', before + code]).strip() == '[]'


def command(python):
    return python.parent / ('mmhybrid.exe' if os.name == 'nt' else 'mmhybrid')


def test_command_is_installed(installed_python):
    assert 'install-hook' in run([command(installed_python), '--help'], env=clean_environment())


FOREIGN_CONFIG = "_base_ = 'mmhybrid::cascade_mambavision_t_coco.py'\nwork_dir = 'mine'\n"


@pytest.fixture
def project(tmp_path):
    pytest.importorskip('mmengine')
    (tmp_path / 'mine.py').write_text(FOREIGN_CONFIG)
    return tmp_path


@pytest.fixture
def hooked(installed_python):
    """The hook is there while a test runs."""
    wrote = run([command(installed_python), 'install-hook'], env=clean_environment())
    path = Path(wrote.removeprefix('wrote ').strip())
    assert path.name == 'mmhybrid_config_scheme.pth' and path.is_file()
    assert run([command(installed_python), 'install-hook'], env=clean_environment()) == wrote
    yield installed_python
    gone = run([command(installed_python), 'uninstall-hook'], env=clean_environment())
    assert gone == f'removed {path}\n' and not path.exists()
    again = run([command(installed_python), 'uninstall-hook'], env=clean_environment())
    assert again == 'there is no hook\n'


READ = "from mmengine.config import Config; print(Config.fromfile('{}').model.type)"


def test_without_the_hook_only_mmengine_speaks(installed_python, project):
    """docs/patches.md quotes both messages; nothing of ours has been imported."""
    page = ' '.join((ROOT / 'docs/patches.md').read_text().split())
    (project / 'deep.py').write_text("_base_ = 'mmhybrid::folder/config.py'\n")
    for name in ('mine', 'deep'):
        done = subprocess.run(
            [installed_python, '-c', READ.format(f'{name}.py')], cwd=project, text=True,
            capture_output=True, env=clean_environment())
        last = done.stderr.strip().splitlines()[-1].replace('`', '')
        assert done.returncode == 1 and last.partition(', just like')[0] in page, done.stderr


def test_ways_without_the_hook(wheel_python, project):
    (project / 'call.py').write_text(
        "_base_ = __import__('mmhybrid').config_path('cascade_mambavision_t_coco.py')\n")
    command_line = [command(wheel_python), 'config', 'cascade_mambavision_t_coco']
    (project / 'whole.py').write_text(run(command_line, env=clean_environment()))
    (project / 'script.py').write_text(READ.format('mine.py'))
    for words in (['-c', READ.format('call.py')], ['-c', READ.format('whole.py')],
                  ['-m', 'mmhybrid', 'run', 'script.py']):
        output = run([wheel_python, *words], cwd=project, env=clean_environment())
        assert output.strip().splitlines()[-1] == 'CascadeRCNN', words


def test_prefix_works_from_another_project(hooked, project):
    """As stock tools do: nothing imports mmhybrid before the config is parsed."""
    code = """
        import sys
        from mmengine.config import Config
        assert 'mmhybrid' not in sys.modules
        config = Config.fromfile('mine.py')
        assert config.work_dir == 'mine'
        assert config.model.type.endswith('CascadeRCNN'), config.model.type
        assert config.default_scope == 'mmdet'
        assert 'MambaVision' in config.model.backbone.type
        import mmhybrid
        print(mmhybrid.__file__)
    """
    output = run(
        [hooked, '-c', textwrap.dedent(code)], cwd=project, env=clean_environment()
    )
    assert str(ROOT) != str(Path(output.strip().splitlines()[-1]).parents[1])


def test_prefix_works_after_import_from_the_checkout(project):
    code = """
        import mmhybrid
        from mmengine.config import Config
        assert Config.fromfile('mine.py').model.type.endswith('CascadeRCNN')
    """
    environment = clean_environment() | {'PYTHONPATH': str(ROOT)}
    run([sys.executable, '-c', textwrap.dedent(code)], cwd=project, env=environment)


def test_editable_install_sees_edits(editable_python, source_tree, project):
    marker = source_tree / 'configs' / 'only_in_the_clone.py'
    marker.write_text('value = 17\n')
    (project / 'edited.py').write_text("_base_ = 'mmhybrid::only_in_the_clone.py'\n")
    code = f'import mmhybrid; {READ.format("edited.py").replace("model.type", "value")}'
    try:
        output = run([editable_python, '-c', code], cwd=project, env=clean_environment())
    finally:
        marker.unlink()
    assert output.strip().endswith('17')


def test_unknown_config_names_the_nearest(project):
    pytest.importorskip('mmengine')
    from mmhybrid import config_scheme

    with pytest.raises(FileNotFoundError) as caught:
        config_scheme.resolve('mmhybrid::cascade_mambavision_tiny_coco.py')
    assert "'mmhybrid::cascade_mambavision_t_coco.py'" in str(caught.value)
    with_folder = config_scheme.resolve('mmhybrid::configs/cascade_mambavision_t_coco.py')
    assert with_folder == config_scheme.resolve('mmhybrid::cascade_mambavision_t_coco.py')


def test_other_prefixes_and_relative_bases_keep_working(tmp_path):
    pytest.importorskip('mmengine')
    from mmengine.config import Config

    import mmhybrid.plugin  # noqa: F401

    (tmp_path / 'base.py').write_text('a = 1\n')
    (tmp_path / 'child.py').write_text("_base_ = './base.py'\nb = 2\n")
    config = Config.fromfile(tmp_path / 'child.py')
    assert (config.a, config.b) == (1, 2)
    (tmp_path / 'foreign.py').write_text("_base_ = 'nosuchpackage::x/y.py'\n")
    with pytest.raises(Exception, match='nosuchpackage'):
        Config.fromfile(tmp_path / 'foreign.py')
