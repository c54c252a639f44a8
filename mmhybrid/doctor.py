"""``mmhybrid doctor``: one table of what is installed, what will be used, and what to do.

It must run with any package missing or broken, so this process imports none of them: it asks
child processes (``doctor_probes.py``), and decides from the facts that they print.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import __version__, mmcv_ops

OK, NOTE, PROBLEM = 'ok', 'note', 'PROBLEM'
TASKS = ('detection', 'segmentation')

# One child process each. The first sees no mmengine, so that the scan can be judged without it.
_CHILDREN = (
    (False, ('torch', 'gpu', 'torchvision', 'triton', 'scan')),
    (True, ('numpy', 'opencv', 'mmengine', 'checkpoints', 'mmcv', 'mmhybrid', 'patches',
            'operators', 'mmdet', 'pycocotools')),
    (True, ('mmhybrid', 'mmseg', 'step')),
)
_TIMEOUT = 300  # seconds; a cold start of torch from a network disk takes a minute

# Import name -> distributions that bring it: maintained fork first, then upstream.
_DISTRIBUTIONS = {
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
}
_UPSTREAM = {
    'mmengine': 'mmengine==0.10.7',
    'mmcv': 'mmcv-lite==2.1.0',
    'mmdet': 'mmdet==3.3.0',
    'mmseg': 'mmsegmentation==1.2.2',
}
_TORCHVISION = {'2.4': '0.19', '2.5': '0.20', '2.6': '0.21', '2.7': '0.22', '2.8': '0.23',
                '2.9': '0.24', '2.10': '0.25', '2.11': '0.26'}


class Row(NamedTuple):
    """One line of the table; ``remedy`` says what to do about a note or a problem."""

    what: str
    found: str
    state: str = OK
    remedy: str = ''


# ---------------------------------------------------------------- facts
def run_probes(with_mm, names):
    """Run probes in one child process.

    Args:
        with_mm (bool): whether mmengine can be seen there.
        names (tuple[str]): functions of ``doctor_probes``.

    Returns:
        dict[str, dict]: facts by name, each with ``ok``, and ``error`` where it is False.
    """
    probes = Path(__file__).with_name('doctor_probes.py')
    code = (
        'import sys, json, runpy\n'
        'sys.path[:] = json.loads(sys.argv[1])\n'
        + ('' if with_mm else "sys.modules['mmengine'] = None\n")
        + f"runpy.run_path({str(probes)!r})['main'](sys.argv[2:])\n"
    )
    command = [sys.executable, '-c', code, json.dumps(sys.path), *names]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
        output, errors = child.stdout, child.stderr
        end = f'the process ended with status {child.returncode}'
        if child.returncode < 0:
            end = f'the process was killed by signal {-child.returncode}'
    except subprocess.TimeoutExpired as timeout:
        output, errors = (
            text.decode(errors='replace') if isinstance(text, bytes) else text or ''
            for text in (timeout.stdout, timeout.stderr)
        )
        end = f'nothing came back within {_TIMEOUT} s'

    facts = dict(
        json.loads(line.removeprefix('mmhybrid-doctor:'))
        for line in output.splitlines()
        if line.startswith('mmhybrid-doctor:')
    )
    last_words = errors.strip().splitlines()[-1:] or ['no error output']
    for name in names:
        if name not in facts:
            facts[name] = {'ok': False, 'error': f'{end} ({last_words[0]})', 'where': ''}
            end = f'not reached: {end}' if not end.startswith('not reached') else end
    return facts


def installed_distributions():
    """Return {import name: ['distribution version', ...]} for the mm packages."""
    found = {}
    for package, names in _DISTRIBUTIONS.items():
        found[package] = []
        for name in names:
            try:
                found[package].append(f'{name} {importlib.metadata.version(name)}')
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def _is_importable(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a finder of somebody else's refuses, or no __spec__
        return False


def collect_facts():
    """Ask all children, two at a time.

    Returns:
        dict: facts by probe, and 'python', 'distributions', 'nvidia_driver'.
    """
    facts = {
        'python': list(sys.version_info[:3]),
        'distributions': installed_distributions(),
        'nvidia_driver': os.path.exists('/proc/driver/nvidia/version'),
        'importable': {
            name: _is_importable(name)
            for name in ('torch', 'torchvision', 'triton', 'numpy', 'cv2', 'pycocotools',
                         *_DISTRIBUTIONS)
        },
    }
    with ThreadPoolExecutor(max_workers=2) as pool:
        for answer in pool.map(lambda child: run_probes(*child), _CHILDREN):
            facts.update(answer)
    return facts


# ---------------------------------------------------------------- judging them
def _release(version):
    return tuple(int(part) for part in re.findall(r'\d+', version.split('+')[0])[:2])


def _uses_upstream(facts):
    return any(
        entry.split()[0] in names[1:]
        for package, names in _DISTRIBUTIONS.items()
        for entry in facts['distributions'][package]
    )


def _install_mm(facts, package):
    if _uses_upstream(facts):
        return f"pip install '{_UPSTREAM[package]}'"
    return f'pip install {_DISTRIBUTIONS[package][0]}'


def _matching_torchvision(facts):
    version = facts['torch'].get('version')
    if not version:
        return 'pip install torch==2.11.0 torchvision==0.26.0'
    wanted = _TORCHVISION.get('.'.join(map(str, _release(version))))
    if wanted is None:
        return f'install the torchvision release made for torch {version}'
    return f"pip install 'torchvision=={wanted}.*'   (the release made for torch {version})"


def _explain(facts, error, otherwise):
    """Remedy for an import error that has a well-known cause, else ``otherwise``."""
    if 'libGL.so' in error or 'libgthread' in error:
        return 'pip install --force-reinstall --no-deps opencv-python-headless'
    numpy_2 = r'dtype size changed|_ARRAY_API|multiarray|NumPy 1\.x'
    if 'numpy' in error and re.search(numpy_2, error):
        return "pip install 'numpy<2'   (a compiled package here was built for numpy 1)"
    if '_ext' in error and re.search(r'undefined symbol|DLL load|cannot open shared', error):
        return f'compiled mmcv does not fit this torch; compile it again: {_compile_command(facts)}'
    if 'torchvision' in error:
        return _matching_torchvision(facts)
    if 'pkg_resources' in error:
        return "pip install 'setuptools<81'"
    if re.search(r'MMCV==.* is used but incompatible|MMEngine==.* is used but', error):
        return f"{_install_mm(facts, 'mmcv')}   (the message names the versions it accepts)"
    missing = re.search(r"No module named '([\w.]+)'", error)
    if missing:
        name = missing[1].partition('.')[0]
        if name in _DISTRIBUTIONS:
            return _install_mm(facts, name)
        return f'pip install {name}'
    return otherwise


def _compile_command(facts):
    return facts['operators'].get('compile_command') or mmcv_ops.compile_command()


def _python_row(facts):
    version = '.'.join(map(str, facts['python']))
    if (3, 10) <= tuple(facts['python'][:2]) <= (3, 12):
        return Row('python', version)
    return Row('python', version, PROBLEM, 'use Python 3.10, 3.11 or 3.12')


def _torch_row(facts):
    torch = facts['torch']
    if not torch['ok']:
        what = torch['error'] if facts['importable']['torch'] else 'not installed'
        return Row('torch', what, PROBLEM, 'pip install torch==2.11.0 torchvision==0.26.0')
    build = f"CUDA {torch['cuda']}" if torch['cuda'] else 'ROCm' if torch['hip'] else 'CPU build'
    found = f"{torch['version']} ({build})"
    if _release(torch['version']) < (2, 4):
        return Row('torch', found, PROBLEM, "pip install 'torch>=2.4' with its torchvision")
    return Row('torch', found)


def _gpu_row(facts):
    gpu, torch = facts['gpu'], facts['torch']
    if not torch['ok']:
        return Row('GPU', 'unknown without torch', NOTE, 'install torch first')
    if not gpu['ok']:
        return Row('GPU', gpu['error'], PROBLEM, 'the GPU is seen but does not compute: check the '
                   'driver with nvidia-smi, or hide it with CUDA_VISIBLE_DEVICES= ')
    if gpu['names']:
        return Row('GPU', ', '.join(gpu['names']))
    if facts['nvidia_driver']:
        return Row('GPU', 'an NVIDIA driver is loaded, but torch sees no GPU', NOTE,
                   'install a CUDA build of torch that the driver supports, and check that '
                   'CUDA_VISIBLE_DEVICES is not empty; training would run on the CPU')
    return Row('GPU', 'none, training runs on the CPU')


def _torchvision_row(facts):
    torchvision = facts['torchvision']
    if torchvision['ok']:
        return Row('torchvision', torchvision['version'])
    missing = not facts['importable']['torchvision']
    found = 'not installed' if missing else torchvision['error']
    return Row('torchvision', found, PROBLEM, _matching_torchvision(facts))


def _triton_row(facts):
    if facts['triton']['ok']:
        return Row('triton', facts['triton']['version'])
    found = facts['triton']['error'] if facts['importable']['triton'] else 'not installed'
    remedy = 'only a GPU needs it; it comes with the CUDA builds of torch (pip install triton)'
    return Row('triton', found, NOTE, remedy)


def _scan_rows(facts):
    scan = facts['scan']
    if not scan['ok']:
        remedy = 'install torch first'
        if facts['torch']['ok']:
            remedy = 'the scan of mmhybrid itself fails: install mmhybrid again, or report this'
        return [Row('scan', scan['error'], PROBLEM, remedy)]
    chosen = ', '.join(f'{name} on {device}' for device, name in scan['chosen'].items())
    rows = [Row('scan backend', chosen)]
    for name, (usable, reason) in scan['backends'].items():
        if name == 'mamba_ssm':
            rows.append(_mamba_ssm_row(scan, usable, reason))
        elif not usable:
            rows.append(Row(f"scan '{name}'", 'not usable', NOTE, reason))
    if not scan.get('direct', True):
        found = "left to Triton's ordinary path (MMHYBRID_DIRECT_LAUNCH=0)"
        rows.append(Row('scan launches', found, NOTE, 'unset it for calls with less host time'))
    elif scan.get('unknown'):
        remedy = f"{scan['unknown']}; results are the same, and a call costs more host time"
        rows.append(Row('scan launches', "left to Triton's ordinary path", NOTE, remedy))
    return rows


def _mamba_ssm_row(scan, usable, reason):
    """An optional package, which matters only on a GPU that has nothing better."""
    if scan['chosen'].get('cuda') == 'mamba_ssm':
        return Row("scan 'mamba_ssm'", "found and used: 'auto' has nothing better on this GPU")
    if usable:
        return Row("scan 'mamba_ssm'", "found; used when asked for, or on a GPU without 'triton'")
    if scan['chosen'].get('cuda') == 'torch':
        remedy = f"{reason}; on this GPU 'auto' would take it in place of the slower 'torch'"
        return Row("scan 'mamba_ssm'", 'not usable', NOTE, remedy)
    return Row("scan 'mamba_ssm'", "not used (only a GPU without 'triton' could need it)")


def _plain_row(facts, probe, module, package):
    if facts[probe]['ok']:
        return Row(probe, facts[probe].get('version', 'works'))
    if not facts['importable'][module]:
        return Row(probe, 'not installed', PROBLEM, f'pip install {package}')
    error = facts[probe]['error']
    remedy = _explain(facts, error, f'pip install --force-reinstall --no-deps {package}')
    return Row(probe, error, PROBLEM, remedy)


def _mm_row(facts, package, needed=True):
    entries = facts['distributions'][package]
    # mmcv-full shares its files with mmcv; any two owners of one folder overwrite each other.
    if len(entries) > 1:
        names = ' and '.join(entries)
        pip_names = ' '.join(entry.split()[0] for entry in entries)
        return Row(package, f'{names} own the same files', PROBLEM,
                   f'pip uninstall -y {pip_names} && {_install_mm(facts, package)}')
    bad = PROBLEM if needed else NOTE
    probe = facts[package]
    if not facts['importable'][package]:
        return Row(package, 'not installed', bad, _install_mm(facts, package))
    found = entries[0] if entries else f"version {probe.get('version', 'unknown')}, no metadata"
    if probe['ok']:
        return Row(package, found)
    error = probe['error']
    remedy = _explain(
        facts, error, f'install it again: {_install_mm(facts, package)}, with --force-reinstall'
    )
    if package in ('mmdet', 'mmseg') and not (facts['mmengine']['ok'] and facts['mmcv']['ok']):
        remedy = 'repair mmengine and mmcv first, then run this again'
    return Row(package, f'{found}: {error}', bad, remedy)


def _checkpoint_row(facts):
    if facts['checkpoints']['ok']:
        return Row('checkpoints', 'can be saved and loaded')
    error = facts['checkpoints']['error']
    if not facts['mmengine']['ok']:
        return Row('checkpoints', 'unknown without mmengine', NOTE, 'repair mmengine first')
    if re.search('weights.only|WeightsUnpickler', error, re.IGNORECASE):
        return Row('checkpoints', 'this mmengine cannot load what it saves under torch >= 2.6',
                   PROBLEM, 'replace mmengine by its maintained fork (pip uninstall -y mmengine && '
                   'pip install onedl-mmengine), or use torch<2.6')
    return Row('checkpoints', error, PROBLEM, 'see the error; is the temporary folder full?')


def _operators_row(facts):
    operators = facts['operators']
    if not facts['mmcv']['ok']:
        return Row('mmcv operators', 'unknown without mmcv', NOTE, 'repair mmcv first')
    if not operators['ok']:
        remedy = _explain(facts, operators['error'], 'see the rows above; repair those first')
        return Row('mmcv operators', operators['error'], PROBLEM, remedy)
    if operators['implementation'] == 'compiled':
        found = f"compiled (mmcv._ext; {operators['compiler']}, CUDA {operators['cuda']})"
        return Row('mmcv operators', found)
    return Row('mmcv operators', 'torchvision stands in for mmcv._ext (nms, roi_align)', NOTE,
               'nothing to do for Mask R-CNN, Cascade Mask R-CNN and UperNet; other operators '
               f'need compiled mmcv: {_compile_command(facts)}')


def _patch_rows(facts):
    """What mmhybrid changes in other packages; docs/patches.md says why."""
    patches = facts['patches']
    if not patches['ok']:
        return [Row('patches', patches['error'], PROBLEM, 'report this')]
    active, more = (', '.join(patches[key]) or 'none' for key in ('active', 'in_commands'))
    rows = [Row('patches', f'{active} (by importing mmhybrid); {more} (by its commands)')]
    if patches['off']:
        names = ', '.join(patches['off'])
        rows.append(Row('patches left out', names, NOTE, f"{patches['variable']} names them; unset "
                        'it where something below or in a training fails'))
    if patches['hook']:
        rows.append(Row('start-up hook', ', '.join(patches['hook'])))
    return rows


def _own_rows(facts):
    own, step = facts['mmhybrid'], facts['step']
    if not facts['mmengine']['ok']:
        return [Row('mmhybrid', f'{__version__}, without mmengine nothing to train', PROBLEM,
                    'repair mmengine first')]
    if not own['ok']:
        remedy = _explain(facts, own['error'], 'install mmhybrid again, or report this')
        if 'MMHYBRID_WITHOUT' in own['error']:
            remedy = 'correct or unset MMHYBRID_WITHOUT'
        return [Row('mmhybrid', own['error'], PROBLEM, remedy)]
    rows = [Row('mmhybrid', f"{own['version']} in {own['path']}"), Row('configs', own['configs'])]
    rows += _patch_rows(facts)
    if step['ok']:
        found = f"a small backbone learned on {step['device']} in {step['seconds']:.1f} s"
        rows.append(Row('training step', found))
    else:
        rows.append(Row('training step', step['error'], PROBLEM,
                        f"see the error ({step.get('where')}); repair the rows above, then "
                        "run this again"))
    return rows


def diagnose(facts, tasks=TASKS):
    """Turn facts into the rows of the table.

    Args:
        facts (dict): from :func:`collect_facts`.
        tasks (tuple[str]): what training must work for, of 'detection' and 'segmentation'.

    Returns:
        list[Row]: training would work when none of them is a problem.
    """
    rows = [_python_row(facts), _torch_row(facts), _gpu_row(facts), _torchvision_row(facts)]
    if rows[3].state == PROBLEM and facts['operators'].get('implementation') == 'compiled':
        # Nothing of ours uses torchvision then; mmdet says itself when it does.
        rows[3] = rows[3]._replace(state=NOTE)
    rows += [_triton_row(facts), *_scan_rows(facts)]
    rows += [_plain_row(facts, 'numpy', 'numpy', 'numpy')]
    rows += [_plain_row(facts, 'opencv', 'cv2', 'opencv-python-headless')]
    rows += [_mm_row(facts, 'mmengine'), _checkpoint_row(facts), _mm_row(facts, 'mmcv')]
    rows += [_operators_row(facts)]
    rows += [_mm_row(facts, 'mmdet', 'detection' in tasks)]
    if 'detection' in tasks:
        rows += [_plain_row(facts, 'pycocotools', 'pycocotools', 'pycocotools')]
    rows += [_mm_row(facts, 'mmseg', 'segmentation' in tasks)]
    return rows + _own_rows(facts)


# ---------------------------------------------------------------- showing them
def render(rows):
    """Return the table, and below it one remedy per note and problem."""
    marks = {OK: 'ok', NOTE: 'note', PROBLEM: 'PROBLEM'}
    width = max(len(row.what) for row in rows)
    lines = [f'mmhybrid {__version__} doctor', '']
    for row in rows:
        found = textwrap.shorten(row.found, 2000)
        first, *rest = textwrap.wrap(found, 100 - width - 11) or ['']
        lines.append(f'  {marks[row.state]:<7}  {row.what:<{width}}  {first}')
        lines += [' ' * (width + 13) + line for line in rest]
    for state, title in ((PROBLEM, 'Problems, and what to do'), (NOTE, 'Notes')):
        chosen = [row for row in rows if row.state == state]
        if chosen:
            lines += ['', f'{title}:']
            # Commands stay on one line, so that they can be copied.
            lines += [f'  {row.what}: {row.remedy}' for row in chosen]
    return '\n'.join(lines)


def main(tasks=TASKS):
    """Print the table.

    Args:
        tasks (tuple[str]): see :func:`diagnose`.

    Returns:
        int: 0 when training would work, else 1.
    """
    rows = diagnose(collect_facts(), tasks)
    print(render(rows))
    works = all(row.state != PROBLEM for row in rows)
    print(f"\nTraining ({' and '.join(tasks)}) would {'work' if works else 'NOT work'} here.")
    return 0 if works else 1
