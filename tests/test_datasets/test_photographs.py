import numpy as np
import pytest

from mmhybrid.datasets.photographs import PHOTOGRAPHS, load_photographs


def test_no_photograph_is_in_both_splits():
    train, val = set(PHOTOGRAPHS['train']), set(PHOTOGRAPHS['val'])
    assert not train & val
    # A stereo pair shows one scene twice.
    assert len({name for name in train | val if name.startswith('motorcycle')}) <= 1


@pytest.mark.parametrize('split', ['train', 'val'])
def test_photographs_come_with_the_wheel(split, monkeypatch):
    import socket

    def no_network(*args, **kwargs):
        raise AssertionError('the network was used')

    monkeypatch.setattr(socket, 'socket', no_network)
    photographs = load_photographs(split)
    assert tuple(photographs) == PHOTOGRAPHS[split]
    for image in photographs.values():
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert min(image.shape[:2]) >= 256


def test_unknown_split():
    with pytest.raises(ValueError, match="'test'; expected 'train' or 'val'"):
        load_photographs('test')


def test_missing_photograph_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr('mmhybrid.datasets.photographs.photograph_dir', lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match='pip install --force-reinstall'):
        load_photographs('val')
