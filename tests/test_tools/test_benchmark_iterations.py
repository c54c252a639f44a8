"""iterations.py: what it runs, what it reads of a run, and what it does with one that fails.

Whole runs are in the dry run of gpu_run.sh (test_gpu_run.py).
"""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs' / 'cascade_mambavision_mini_coco.py'


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'benchmark'))
    return importlib.import_module('iterations')


def line(seconds, memory=900):
    return json.dumps(dict(time=seconds, data_time=0.001, lr=1e-3, memory=memory)) + '\n'


def write_run(work, *lines):
    folder = work / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text(''.join(lines))


def test_the_first_fifth_and_cut_lines_are_left_out(tool, tmp_path):
    evaluation = json.dumps({'coco/bbox_mAP': 0.1, 'time': 9.0}) + '\n'
    write_run(tmp_path, line(50), *[line(t) for t in (1, 2, 3, 4)], evaluation, '{"time": 7, "l')
    assert [row['time'] for row in tool.iterations(tmp_path)] == [1, 2, 3, 4]
    assert tool.iterations(tmp_path / 'nothing') == []


def measured(tool, monkeypatch, tmp_path, runs, *options):
    """Rows of runs that are made up: way -> (lines of the log, end, output)."""
    commands = []

    def run(command, seconds, log):
        commands.append(command)
        way = next((w for w, given in tool.WAYS.items() if given and given[0] in command), 'eager')
        lines, end, output = runs[way]
        write_run(Path(command[command.index('--work-dir') + 1]), *lines)
        log.write_text(output)
        return end

    monkeypatch.setattr(tool, 'run', run)
    monkeypatch.setattr(tool, 'prepare', lambda task, folder, small: folder / task)
    path = tmp_path / 'rows.csv'
    code = tool.main([str(CONFIG), '--csv', str(path), '--data', str(tmp_path), *options])
    with open(path, newline='') as file:
        return code, list(csv.DictReader(file)), commands


def test_rows(tool, tmp_path, monkeypatch):
    said = 'x - CUDA graphs: 1 graphs recorded\nx - CUDA graphs: 2 graphs recorded, 0 dropped\n'
    runs = dict(eager=([line(0.4)] * 10, 'finished', ''),
                graphs=([line(9.0), line(9.0)] + [line(0.1, 950)] * 8, 'stopped', said))
    code, rows, commands = measured(tool, monkeypatch, tmp_path, runs, '--ways', 'eager', 'graphs')
    eager, graphs = rows
    assert code == 0 and eager['p50_ms'] == '400' and graphs['p50_ms'] == '100'
    assert (eager['eager_over_this'], graphs['eager_over_this']) == ('1.00', '4.00')
    assert graphs['graphs'] == '2 graphs recorded, 0 dropped' and eager['graphs'] == ''
    assert (graphs['end'], graphs['peak_MB'], graphs['turns']) == ('stopped', '950', '8')
    assert '--cuda-graphs' in commands[1] and '--cuda-graphs' not in commands[0]
    for command in commands:
        assert command[1] == str(ROOT / 'tools' / 'train.py') and '--amp' in command
        assert 'randomness.seed=0' in command and 'train_dataloader.batch_size=2' in command


@pytest.mark.parametrize(('lines', 'end'), [
    ([line(0.4)] * 10, 'failed, exit code 1'), ([line(0.4)] * 5, 'stopped'), ([], 'finished'),
], ids=['failed', 'too few', 'none'])
def test_a_run_that_says_nothing_costs_only_itself(tool, tmp_path, monkeypatch, capsys, lines, end):
    runs = dict(eager=(lines, end, 'what went wrong'), compile=([line(0.2)] * 10, 'finished', ''))
    code, rows, _ = measured(tool, monkeypatch, tmp_path, runs, '--ways', 'eager', 'compile')
    assert code == 1 and [row['way'] for row in rows] == ['compile']
    assert rows[0]['eager_over_this'] == ''
    said = capsys.readouterr().out
    assert 'what went wrong' in said and f'{end}, ' in said


def test_a_run_is_ended_at_its_time(tool, tmp_path):
    code = 'import time; print("begun", flush=True); time.sleep(600)'
    assert tool.run([sys.executable, '-c', code], 3, tmp_path / 'log') == 'stopped'
    assert tool.run([sys.executable, '-c', 'raise SystemExit(3)'], 60, tmp_path / 'log') == (
        'failed, exit code 3')


def test_a_config_that_is_not_there(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(['configs/none.py'])
    assert 'there is no configs/none.py' in capsys.readouterr().err


def test_default_configs_exist(tool):
    assert all((ROOT / config).exists() for config in tool.CONFIGS)
