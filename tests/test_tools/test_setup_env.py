"""tools/setup_env.sh and tools/run_tests.sh: their sentences, and reuse of an environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ('tools/setup_env.sh', 'tools/run_tests.sh', 'setup.py', 'setup.cfg', 'pyproject.toml',
          'requirements')
SHELL_TOOLS = ('bash', 'cat', 'cksum', 'dirname', 'ls', 'rm', 'sed', 'sort', 'tail', 'env')

pytestmark = pytest.mark.skipif(
    os.name == 'nt' or not shutil.which('bash'), reason='the scripts are for a POSIX shell'
)


@pytest.fixture
def clone(tmp_path):
    """What the scripts read, without the package: installing it must not get that far."""
    root = tmp_path / 'clone'
    for name in NEEDED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, root / name)
    return root


@pytest.fixture
def bare_path(tmp_path):
    """A PATH with shell tools and no Python."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for tool in SHELL_TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def bash(script, *arguments, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'PYENV'))}
    return subprocess.run(
        [shutil.which('bash'), script, *arguments], cwd=cwd, env=clean | environment,
        capture_output=True, text=True, timeout=120,
    )


def script(path, text):
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)
    return path


def refusal(result):
    assert result.returncode != 0 and result.stdout == ''
    (line,) = (x for x in result.stderr.splitlines() if x.startswith('[setup] ERROR: '))
    return line


def test_unknown_stack(clone):
    line = refusal(bash('tools/setup_env.sh', 'newest', cwd=clone))
    assert "'newest'" in line and "'default' or 'upstream'" in line


def test_no_python_at_all(clone, bare_path, tmp_path):
    result = bash('tools/setup_env.sh', cwd=clone, PATH=str(bare_path), HOME=str(tmp_path))
    assert 'no Python 3.11 or 3.12 or 3.10 found' in refusal(result)
    assert not (clone / '.venv').exists()


def test_an_unsuitable_python_is_passed_over(clone, bare_path, tmp_path):
    script(bare_path / 'python3', 'echo 3.8')
    result = bash('tools/setup_env.sh', 'upstream', cwd=clone, PATH=str(bare_path),
                  HOME=str(tmp_path))
    assert 'no Python 3.10 or 3.11 found' in refusal(result)


def test_python_without_venv_module(clone, bare_path, tmp_path):
    script(bare_path / 'python3.11', '[[ "$2" == *ensurepip* ]] && exit 1; echo 3.11')
    result = bash('tools/setup_env.sh', cwd=clone, PATH=str(bare_path), HOME=str(tmp_path))
    assert 'sudo apt install python3.11-venv' in refusal(result)


@pytest.mark.parametrize(
    ('answer', 'expected'), [('echo 3.13', 'is Python 3.13'), ('exit 1', 'does not run')]
)
def test_the_wished_python_must_fit(clone, tmp_path, answer, expected):
    wished = script(tmp_path / 'mypython', answer)
    line = refusal(bash('tools/setup_env.sh', cwd=clone, PYTHON=str(wished)))
    assert str(wished) in line and expected in line and '3.11 or 3.12 or 3.10' in line


def test_failing_installation_keeps_pip_s_words(clone):
    if sys.version_info[:2] not in ((3, 10), (3, 11), (3, 12)):
        pytest.skip('the environment needs Python 3.10 to 3.12')
    nowhere = {'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': '', 'PIP_CONFIG_FILE': os.devnull}
    result = bash('tools/setup_env.sh', cwd=clone, PYTHON=sys.executable, **nowhere)
    assert 'Is there a network connection' in refusal(result)
    assert 'No matching distribution' in result.stderr  # the end of pip's log
    assert (clone / '.venv' / 'install.log').is_file()
    assert not (clone / '.venv' / 'mmhybrid-stamp').exists()


def stamped(clone):
    """An environment that the script takes for finished."""
    python = clone / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    script(python, 'printf "%s|" "$@" >> "$CALLS"; echo >> "$CALLS"')
    text = (clone / 'tools' / 'setup_env.sh').read_text()
    start, end = text.index('fingerprint() {'), text.index('stamp=')
    code = f'stack=default; root="{clone}"\n{text[start:end]}\nfingerprint'
    stamp = subprocess.run(
        [shutil.which('bash'), '-c', code], cwd=clone, capture_output=True, text=True
    )
    assert stamp.returncode == 0 and stamp.stdout
    (clone / '.venv' / 'mmhybrid-stamp').write_text(stamp.stdout)
    return python


def test_a_finished_environment_is_reused_from_anywhere(clone, tmp_path):
    python = stamped(clone)
    calls = tmp_path / 'calls'
    result = bash(str(clone / 'tools/setup_env.sh'), cwd=tmp_path, CALLS=str(calls))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f'{python}\n'
    assert 'install' not in calls.read_text()


def test_changed_requirements_are_noticed(clone, tmp_path, bare_path):
    stamped(clone)
    with open(clone / 'requirements' / 'tests.txt', 'a') as file:
        file.write('hypothesis\n')
    result = bash('tools/setup_env.sh', cwd=clone, CALLS=str(tmp_path / 'calls'),
                  PATH=str(bare_path), HOME=str(tmp_path))
    assert 'no Python' in refusal(result)  # it went on to install


def test_run_tests_passes_its_arguments_on(clone, tmp_path):
    stamped(clone)
    calls = tmp_path / 'calls'
    result = bash('tools/run_tests.sh', 'tests/a b', '-k', 'x or y', cwd=clone, CALLS=str(calls))
    assert result.returncode == 0, result.stderr
    lines = calls.read_text().splitlines()
    assert lines[-4:-1] == ['-m|ruff|check|.|', '-m|codespell_lib|.|', '-m|mypy|']
    assert lines[-1].startswith('-m|pytest|') and lines[-1].endswith('|tests/a b|-k|x or y|')


def test_run_tests_stops_at_the_linters(clone, tmp_path):
    python = stamped(clone)
    script(python, 'echo "$2" >> "$CALLS"; [[ "$2" != ruff ]]')
    calls = tmp_path / 'calls'
    result = bash('tools/run_tests.sh', cwd=clone, CALLS=str(calls))
    assert result.returncode != 0
    assert 'pytest' not in calls.read_text()


def test_run_tests_refuses_an_unknown_stack(clone):
    result = bash('tools/run_tests.sh', '--stack', 'newest', cwd=clone)
    assert result.returncode != 0 and "'newest'" in result.stderr


def gpu_environment(clone, tmp_path, *, gpu=True, without=''):
    """A Python that sees a GPU or none, lacks some modules, and notes how pytest is called."""
    (clone / 'tests').mkdir()
    (clone / 'tests' / 'test_a.py').write_text('pytestmark = pytest.mark.gpu')
    (clone / 'tests' / 'test_b.py').write_text('def test(): pass')
    (clone / 'tests' / 'a_cases.py').write_text('pytestmark = pytest.mark.gpu')
    return script(tmp_path / 'python', f"""
case "$*" in
*is_available*) exit {int(not gpu)} ;;
*find_spec*) echo "{without}" ;;
*'import pytest'*) [[ "{without}" != *pytest* ]] ;;
*'-m pytest'*) printf '%s|' "$@" >> "$CALLS" ;;
esac""")


def test_gpu_takes_an_environment_as_it_is(clone, tmp_path, bare_path):
    python, calls = gpu_environment(clone, tmp_path), tmp_path / 'calls'
    (bare_path / 'grep').symlink_to(shutil.which('grep'))  # and nothing that installs
    result = bash('tools/run_tests.sh', '--gpu', '-k', 'x or y', cwd=clone, CALLS=str(calls),
                  PYTHON=str(python), PATH=str(bare_path))
    assert result.returncode == 0, result.stderr
    assert calls.read_text() == (
        '-m|pytest|-m|gpu and not slow|-rs|--durations|15|-n|10|--dist|load|tests/a_cases.py|'
        '-k|x or y|-m|pytest|-m|gpu|-rs|--durations|15|-n|4|--dist|loadfile|tests/test_a.py|'
        '-k|x or y|')
    assert not (clone / '.venv').exists() and '[setup]' not in result.stderr


def test_gpu_names_what_is_missing(clone, tmp_path):
    python = gpu_environment(clone, tmp_path, without='mmdet xdist')
    calls = tmp_path / 'calls'
    result = bash('tools/run_tests.sh', '--gpu', cwd=clone, CALLS=str(calls), PYTHON=str(python))
    assert result.returncode == 0, result.stderr
    assert 'not installed: mmdet xdist.' in result.stderr and '|-n|' not in calls.read_text()


@pytest.mark.parametrize(('options', 'message'), [
    (dict(gpu=False), 'PyTorch sees no GPU; run this on a machine with one, or leave out --gpu.'),
    (dict(without='pytest'), 'has no pytest; install it there, or unset PYTHON.'),
])
def test_gpu_says_in_a_sentence_why_not(clone, tmp_path, options, message):
    python = gpu_environment(clone, tmp_path, **options)
    calls = tmp_path / 'calls'
    result = bash('tools/run_tests.sh', '--gpu', cwd=clone, CALLS=str(calls), PYTHON=str(python))
    assert result.returncode == 1 and not calls.exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith('[tests] ERROR: ') and line.endswith(message)
