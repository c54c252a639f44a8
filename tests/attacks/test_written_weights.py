"""Files of weights that we write: not through links, not half, and nothing beside them lost."""
import os
import stat

import pytest
import torch

from mmhybrid.weights import conversion
from mmhybrid.weights.addresses import shown


@pytest.fixture
def source(tmp_path):
    torch.save(dict(state_dict={'w': torch.ones(3)}, optimizer={}), tmp_path / 'source.pth')
    return tmp_path / 'source.pth'


def write(how, source, target):
    """Write in one of three ways; gives the file."""
    if how == 'publish':
        return conversion.publish(source, target)
    conversion.convert(source, target)
    if how == 'restore':
        conversion.restore(target, target)
    return target


WAYS = ['convert', 'publish', 'restore']


@pytest.mark.parametrize('how', WAYS)
def test_what_lies_beside_the_target_stays(source, tmp_path, how):
    treasure = tmp_path / 'treasure'
    treasure.write_text('precious')
    target = tmp_path / 'out' / 'w.pth'
    target.parent.mkdir()
    (target.parent / 'w.pth.part').symlink_to(treasure)
    written = write(how, source, target)
    assert torch.load(written, weights_only=True)
    assert treasure.read_text() == 'precious'
    assert sorted(x.name for x in target.parent.iterdir()) == sorted([written.name, 'w.pth.part'])


@pytest.mark.parametrize('how', WAYS)
def test_a_link_in_the_place_of_the_target_is_replaced(source, tmp_path, how):
    treasure = tmp_path / 'treasure'
    treasure.write_text('precious')
    (tmp_path / 'w.pth').symlink_to(treasure)
    write(how, source, tmp_path / 'w.pth')
    assert treasure.read_text() == 'precious'


def test_publishing_under_the_name_of_the_source_keeps_the_source(source):
    whole = source.read_bytes()
    slim = conversion.publish(source, source)
    assert source.read_bytes() == whole and slim.name.startswith('source-')


@pytest.mark.parametrize('how', ['convert', 'publish'])
def test_a_failure_leaves_the_old_file_and_no_half(source, tmp_path, monkeypatch, how):
    target = tmp_path / 'w.pth'
    target.write_text('old')

    def fail(value, path):
        path.write_text('half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(conversion.torch, 'save', fail)
    with pytest.raises(OSError, match='No space left'):
        write(how, source, target)
    assert target.read_text() == 'old'
    assert sorted(x.name for x in tmp_path.iterdir()) == ['source.pth', 'w.pth']


@pytest.mark.skipif(os.name != 'posix', reason='modes are of POSIX')
def test_others_may_read_as_the_umask_says(source, tmp_path):
    previous = os.umask(0o027)
    try:
        written = write('convert', source, tmp_path / 'w.pth')
    finally:
        os.umask(previous)
    assert stat.S_IMODE(written.stat().st_mode) == 0o640


def test_a_token_does_not_get_into_a_file(source, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, 'fetch', lambda _: source)
    address = 'https://me:secret@h/w.pth?token=secret#sha256=ab'
    facts = conversion.convert(address, tmp_path / 'w.pth')
    assert facts['source'] == 'https://***@h/w.pth?...'
    assert b'secret' not in (tmp_path / 'w.pth').read_bytes()


def test_paths_are_shown_as_they_are():
    for path in ('a#b?c@d.pth', '/x y/é.pth', 'hf:a'):
        assert shown(path) == path
