"""A checkpoint is whole or not there, and ``--resume`` finds the newest whole one."""
import errno
import io
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.hooks import CheckpointHook

from mmhybrid import processes
from mmhybrid.compat import whole_checkpoints as whole
from mmhybrid.compat.whole_checkpoints import remove_left_overs, write_aside
from mmhybrid.engine.checkpointing import newest_whole
from mmhybrid.engine.config import apply_resume
from mmhybrid.engine.explanations import explain
from mmhybrid.errors import UserError
from mmhybrid.weights import read_checkpoint

EPOCHS = dict(by_epoch=True, max_epochs=3, val_interval=1)
ITERS = dict(by_epoch=False, max_iters=8, val_interval=100)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir()
                  if path.is_file() and path.suffix != '.py')  # the run's own config


def parts(folder):
    return list(Path(folder).glob('.checkpoint-*'))


# --- writing ---

class Killed(BaseException):
    """What a kill looks like from inside: nothing that runs afterwards counts."""


def stop_at(monkeypatch, count, error):
    """Let the ``count``-th write fail, when half of it is on the disk."""
    write, calls = io.BufferedWriter.write, []

    def half(handle, content):
        calls.append(content)
        if len(calls) == count:
            write(handle, bytes(content)[:len(content) // 2])
            raise error
        return write(handle, content)

    class File:
        def __init__(self, handle):
            self.handle = handle

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.handle.close()

        def write(self, content):
            return half(self.handle, content)

    monkeypatch.setattr(whole, 'open', lambda *given, **more: File(open(*given, **more)),
                        raising=False)
    return calls


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), Killed()],
                         ids=['full', 'killed'])
@pytest.mark.parametrize('loop', ['epoch', 'iterations'])
def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path, monkeypatch, loop, error):
    """Writes 1 and 2 are the first checkpoint and last_checkpoint, 3 is the second."""
    stop_at(monkeypatch, 3, error)
    train, checkpoint, first = {
        'epoch': (EPOCHS, dict(interval=1, max_keep_ckpts=1), 'epoch_1.pth'),
        'iterations': (ITERS, dict(interval=3, by_epoch=False, max_keep_ckpts=1), 'iter_3.pth'),
    }[loop]
    with pytest.raises(type(error)) as caught:
        toy.run(tmp_path, train, checkpoint, val=False,
                sampler='DefaultSampler' if loop == 'epoch' else 'InfiniteSampler')
    assert names(tmp_path) == sorted([first, 'last_checkpoint'])
    assert read_checkpoint(tmp_path / first)['meta']['iter'] == (6 if loop == 'epoch' else 3)
    assert newest_whole(str(tmp_path)) == (str(tmp_path / first), [])
    if isinstance(error, OSError):
        text = explain(caught.value)
        assert ('epoch_2.pth' if loop == 'epoch' else 'iter_6.pth') in text
        assert 'Free some space' in text and '--resume' in text


def test_killed_between_the_checkpoint_and_its_record(tmp_path, monkeypatch):
    stop_at(monkeypatch, 4, Killed())
    with pytest.raises(Killed):
        toy.run(tmp_path, EPOCHS, dict(interval=1, max_keep_ckpts=1), val=False)
    assert names(tmp_path) == ['epoch_1.pth', 'epoch_2.pth', 'last_checkpoint']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_1.pth')


def test_best_checkpoint_stays_until_the_better_one_is_whole(tmp_path, monkeypatch):
    """toy/noise with a rule that is always better: every validation replaces the best one."""
    monkeypatch.setitem(CheckpointHook.rule_map, 'less', lambda x, y: True)
    best = dict(interval=1, max_keep_ckpts=1, save_best='toy/mean', rule='less')
    written = stop_at(monkeypatch, 7, Killed())
    with pytest.raises(Killed):
        toy.run(tmp_path, EPOCHS, best)
    # checkpoint, record, best, checkpoint again, record; then checkpoint 2, and its record fails
    assert len(written) == 7
    assert names(tmp_path) == ['best_toy_mean_epoch_1.pth', 'epoch_1.pth', 'epoch_2.pth',
                               'last_checkpoint']
    monkeypatch.undo()
    monkeypatch.setitem(CheckpointHook.rule_map, 'less', lambda x, y: True)
    toy.run(tmp_path, EPOCHS, best, resume=str(tmp_path / 'epoch_2.pth'))
    assert names(tmp_path) == ['best_toy_mean_epoch_3.pth', 'epoch_1.pth', 'epoch_3.pth',
                               'last_checkpoint']


def test_what_is_kept_is_as_before(tmp_path):
    """Honest settings: rotation, the last one, published keys, a folder of its own."""
    (tmp_path / 'w').mkdir()
    toy.run(tmp_path / 'w', EPOCHS, dict(
        interval=1, max_keep_ckpts=2, out_dir=str(tmp_path / 'out'), filename_tmpl='of_{}.pth',
        published_keys=['meta', 'state_dict']))
    published, = (tmp_path / 'out/w').glob('of_3-????????.pth')
    assert set(read_checkpoint(published)) == {'meta', 'state_dict'}
    assert names(tmp_path / 'out/w') == sorted(['of_2.pth', 'of_3.pth', published.name])
    assert newest_whole(str(tmp_path / 'w')) == (str(tmp_path / 'out/w/of_3.pth'), [])


def test_a_subclass_of_the_users_writes_aside_too(tmp_path, monkeypatch):
    class Own(CheckpointHook):
        def _save_checkpoint_with_step(self, runner, step, meta):
            super()._save_checkpoint_with_step(runner, step, meta)

    from mmengine.registry import HOOKS
    HOOKS.register_module(name='OwnCheckpointHook', module=Own, force=True)
    stop_at(monkeypatch, 3, Killed())
    with pytest.raises(Killed):
        toy.run(tmp_path, EPOCHS, dict(type='OwnCheckpointHook', interval=1, max_keep_ckpts=1),
                val=False)
    assert names(tmp_path) == ['epoch_1.pth', 'last_checkpoint']


def test_other_stores_are_asked_as_before(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(whole, '_mmengines_save', lambda *given: asked.append(given[1:]))
    whole._save_checkpoint({}, 's3://bucket/epoch_1.pth')
    whole._save_checkpoint({}, str(tmp_path / 'a.pth'), dict(backend='disk'))
    assert asked == [('s3://bucket/epoch_1.pth', None, None),
                     (str(tmp_path / 'a.pth'), dict(backend='disk'), None)]
    whole._save_checkpoint({}, str(tmp_path / 'a.pth'), backend_args=dict(backend='local'))
    assert len(asked) == 2 and read_checkpoint(tmp_path / 'a.pth') == {}


def test_a_link_is_followed_and_a_folder_is_refused(tmp_path):
    (tmp_path / 'real').write_bytes(b'old')
    (tmp_path / 'link').symlink_to(tmp_path / 'real')
    write_aside(tmp_path / 'link', b'new')
    assert (tmp_path / 'real').read_bytes() == b'new' and (tmp_path / 'link').is_symlink()
    (tmp_path / 'folder').mkdir()
    with pytest.raises(OSError, match='folder'):
        write_aside(tmp_path / 'folder', b'new')
    assert parts(tmp_path) == []


def test_long_names_fit(tmp_path):
    path = tmp_path / ('e' * 250 + '.pth')
    write_aside(path, b'x')
    assert path.read_bytes() == b'x'


def test_a_disk_that_cannot_be_told_to_write(tmp_path, monkeypatch):
    def unable(code):
        def fsync(handle):
            raise OSError(code, os.strerror(code))
        return fsync
    monkeypatch.setattr(os, 'fsync', unable(errno.EINVAL))
    write_aside(tmp_path / 'a', b'x')
    assert (tmp_path / 'a').read_bytes() == b'x'
    monkeypatch.setattr(os, 'fsync', unable(errno.EIO))
    with pytest.raises(OSError, match='Input/output'):
        write_aside(tmp_path / 'b', b'x')
    assert names(tmp_path) == ['a']


def test_left_overs_of_dead_processes_go_and_others_stay(tmp_path):
    """Dead: no such process, or one that got the number later. Not ours: another machine's."""
    host, start = processes.host(), processes.started(os.getpid())
    dead = [f'.checkpoint-{host}-{2**22 + 1}-{start}-0.part',
            f'.checkpoint-{host}-{os.getpid()}-earlier.1-3.part']
    kept = [f'.checkpoint-{host}-{os.getpid()}-{start}-7.part',
            f'.checkpoint-other-host-{2**22 + 1}-{start}-0.part', '.checkpoint-notes.part',
            'epoch_1.pth']
    for name in dead + kept:
        (tmp_path / name).write_bytes(b'half')
    assert sorted(remove_left_overs(str(tmp_path))) == sorted(dead)
    assert names(tmp_path) == sorted(kept)
    old = tmp_path / kept[1]
    os.utime(old, (1, 1))
    assert remove_left_overs(str(tmp_path)) == [old.name]
    assert remove_left_overs(str(tmp_path / 'nowhere')) == []


def test_a_start_removes_them(tmp_path):
    left = tmp_path / f'.checkpoint-{processes.host()}-{2**22 + 1}-x.1-0.part'
    left.write_bytes(b'half')
    toy.run(tmp_path, dict(EPOCHS, max_epochs=1), dict(interval=1), val=False)
    assert not left.exists() and names(tmp_path) == ['epoch_1.pth', 'last_checkpoint']


def write_until_killed(folder):
    fsync, calls = os.fsync, []

    def kill(handle):
        calls.append(handle)
        if len(calls) == 5:  # two files and their folder, twice; then the second checkpoint
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = kill
    content = (folder / 'source.pt').read_bytes()
    write_aside(folder / 'epoch_1.pth', content)
    write_aside(folder / 'last_checkpoint', f'{folder}/epoch_1.pth'.encode())
    write_aside(folder / 'epoch_2.pth', content)


@pytest.mark.skipif(os.name == 'nt', reason='SIGKILL is of POSIX')
def test_a_real_kill(tmp_path):
    save(tmp_path / 'source.pt', 6)
    process = multiprocessing.get_context('fork').Process(
        target=write_until_killed, args=(tmp_path,), daemon=True)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    part, = parts(tmp_path)
    assert set(names(tmp_path)) == {'source.pt', 'epoch_1.pth', 'last_checkpoint',
                                    part.name}
    cfg = Config(dict(work_dir=str(tmp_path)))
    assert apply_resume(cfg, 'auto') == [] and cfg.load_from == str(tmp_path / 'epoch_1.pth')
    assert remove_left_overs(str(tmp_path)) == [part.name]


# --- finding ---

def save(path, iterations, **more):
    torch.save(dict(meta=dict(epoch=1, iter=iterations), state_dict=dict(w=torch.ones(3)),
                    optimizer={}, **more), path)
    return str(path)


def cut(path):
    path = Path(path)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize('record, says', [
    (None, 'does not exist'), (b'', 'is empty'), (b' \n', 'is empty'),
    (b'\xff\xfe\x00binary', 'is not text'), (b'a\x00b', 'does not hold a path'),
    (b'x' * 5000, 'does not hold a path'), (b'/gone/epoch_7.pth', 'names /gone/epoch_7.pth, which'),
    (b'epoch_11.pth', 'epoch_11.pth is cut off'), (b'weights.pth', 'no checkpoint of a training'),
    (b'text.pth', 'text.pth is text'), ('folder', 'is not a file'), ('pipe', 'is not a file')])
def test_resume_without_a_good_record(tmp_path, record, says):
    save(tmp_path / 'epoch_9.pth', 90)
    save(tmp_path / 'epoch_10.pth', 100)
    os.utime(tmp_path / 'epoch_10.pth', (1, 1))  # older by its date
    cut(save(tmp_path / 'epoch_11.pth', 110))
    save(tmp_path / 'best_mIoU_epoch_12.pth', 120)
    torch.save(dict(w=torch.ones(2)), tmp_path / 'weights.pth')
    (tmp_path / 'text.pth').write_text('{"a": 1}')
    path = tmp_path / 'last_checkpoint'
    if record == 'folder':
        path.mkdir()
    elif record == 'pipe':
        os.mkfifo(path)
    elif record is not None:
        path.write_bytes(record)
    cfg = Config(dict(work_dir=str(tmp_path)))
    note, = apply_resume(cfg, 'auto')
    assert cfg.load_from == str(tmp_path / 'epoch_10.pth') and cfg.resume is True
    assert says in note
    assert f'{tmp_path}/epoch_10.pth (iteration 100)' in note
    assert 'epoch_11.pth is cut off' in note and 'best_mIoU_epoch_12.pth lacks' in note


def test_a_good_record_is_followed_without_a_word(tmp_path):
    """Also to an older checkpoint: somebody started anew in this folder."""
    save(tmp_path / 'epoch_12.pth', 120)
    save(tmp_path / 'epoch_1.pth', 10)
    (tmp_path / 'last_checkpoint').write_text(f'{tmp_path}/epoch_1.pth\n')
    assert newest_whole(str(tmp_path)) == (str(tmp_path / 'epoch_1.pth'), [])


def test_names_of_several_kinds_are_compared_by_their_iterations(tmp_path):
    save(tmp_path / 'epoch_12.pth', 120)
    save(tmp_path / 'iter_90.pth', 90)
    save(tmp_path / 'interrupted.pth', 127)
    assert newest_whole(str(tmp_path))[0] == str(tmp_path / 'interrupted.pth')
    cut(tmp_path / 'interrupted.pth')
    assert newest_whole(str(tmp_path))[0] == str(tmp_path / 'epoch_12.pth')


def test_nothing_whole_is_an_error_that_names_each(tmp_path):
    cut(save(tmp_path / 'epoch_1.pth', 10))
    save(tmp_path / 'best_x_epoch_1.pth', 10)
    with pytest.raises(UserError) as caught:
        newest_whole(str(tmp_path))
    text = str(caught.value)
    assert f'{tmp_path}/epoch_1.pth is cut off' in text
    assert 'best_x_epoch_1.pth lacks the state of the optimizer' in text
    assert '--resume PATH' in text


def test_weights_to_start_from_are_no_reason_to_stop(tmp_path):
    torch.save(dict(w=torch.ones(2)), tmp_path / 'backbone.pth')
    torch.save(dict(state_dict={}, meta=dict(iter=5)), tmp_path / 'mask_rcnn-d4b0c5d6.pth')
    assert newest_whole(str(tmp_path)) == (None, [])
    assert newest_whole(str(tmp_path / 'nowhere')) == (None, [])
