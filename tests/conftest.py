"""What every test gets: fixed seeds, few threads, and memory that is not zero by luck."""

import os
import random
import signal

import numpy as np
import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line(
        'markers', 'plain_empty: leave torch.empty alone (for tests that look at memory or graphs)'
    )
    config.addinivalue_line('markers', 'slow: takes minutes to hours; runs with -m slow only')
    config.addinivalue_line('markers', 'gpu: a GPU adds something; run_tests.sh --gpu takes these')
    torch.set_num_threads(min(2, int(os.environ.get('OMP_NUM_THREADS', '2') or 2)))
    # A shell that starts the tests in the background lets them ignore Ctrl-C, which some send.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take longest come first: with two processes, one that starts late ends alone.
LONG = ('test_distributed', 'test_readme', 'test_compile', 'test_configs',
        'test_selective_scan_static', 'test_selective_scan_triton', 'test_walks_triton',
        'test_get_flops', 'test_errors', 'test_registry', 'test_mambavision_mixer', 'test_doctor',
        'test_train_and_test')


def pytest_collection_modifyitems(config, items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
    if 'slow' not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker('slow'):
                item.add_marker(pytest.mark.skip(reason='slow: run with -m slow'))


def pytest_runtest_logreport(report):
    """On a GPU, whose time may end before the tests do, say at once why one failed."""
    if report.failed and os.environ.get('MMHYBRID_TEST_DEVICE') == 'cuda' and _terminal:
        _terminal[0].write_line(f'\nFAILED {report.nodeid}\n{report.longreprtext[-4000:]}')


_terminal = []


def pytest_sessionstart(session):
    """Where :func:`pytest_runtest_logreport` writes; workers of xdist have no terminal."""
    found = session.config.pluginmanager.get_plugin('terminalreporter')
    _terminal[:] = [found] if found and not hasattr(session.config, 'workerinput') else []


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state, alone or after others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


with torch.device('meta'):
    torch.empty(0)  # torch lists its constructors at first use; let it be the real ones


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if x.is_floating_point():
            with torch.no_grad():
                x.fill_(float('nan'))
        return x

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_empty(request, monkeypatch):
    """Fill uninitialised floating tensors with NaN, so that an unwritten element shows."""
    if request.node.get_closest_marker('plain_empty'):
        return
    monkeypatch.setattr(torch, 'empty', _poisoned(torch.empty))
    monkeypatch.setattr(torch, 'empty_like', _poisoned(torch.empty_like))
    for name in ('new_empty', 'new_empty_strided'):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
