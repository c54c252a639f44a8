"""Several processes and the one file of a test's metrics."""

import json
from types import SimpleNamespace

import pytest
from mmengine.hooks import LoggerHook
from mmengine.logging import MMLogger

from mmhybrid.compat import metrics_file


@pytest.mark.parametrize('first', [True, False])
def test_one_process_writes(tmp_path, monkeypatch, first):
    metrics_file.install()
    metrics_file.install()  # twice changes nothing
    monkeypatch.setattr(metrics_file, 'is_main_process', lambda: first)
    asked = []
    runner = SimpleNamespace(
        log_dir=str(tmp_path), test_dataloader=[1], logger=MMLogger.get_instance('mmengine'),
        log_processor=SimpleNamespace(
            get_log_after_epoch=lambda *a, **k: asked.append(a) or ({'AP': 0.5}, 'AP: 0.5')))
    hook = LoggerHook()
    hook.json_log_path = 'metrics.json'
    hook.after_test_epoch(runner, {'AP': 0.5})
    files = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert (files, len(asked)) == (([{'AP': 0.5}], 1) if first else ([], 0))
