"""Checks of label images of one's own."""
import numpy as np
from PIL import Image

from mmhybrid.datasets.label_images import check_label_images, pair_files


def pairs(folder, labels, suffix='.png'):
    (folder / 'images' / 'sub').mkdir(parents=True)
    (folder / 'labels' / 'sub').mkdir(parents=True)
    for index, values in enumerate(labels):
        Image.new('RGB', (8, 6)).save(folder / 'images' / 'sub' / f'{index}.jpg')
        Image.fromarray(values).save(folder / 'labels' / 'sub' / f'{index}{suffix}')
    return str(folder / 'images'), str(folder / 'labels'), '.jpg', '.png'


def check(folders, *args, **kwargs):
    found = pair_files(*folders)
    if found.problems:
        return found.problems, found.notes
    paths = [tuple(f'{folder}/{stem}{suffix}' for folder, suffix in zip(folders, folders[2:],
                                                                      strict=False))
             for stem in found.stems]
    problems, notes = check_label_images(paths, folders[1], *args, **kwargs)
    return problems, found.notes + notes


def grey(*values):
    labels = np.zeros((6, 8), np.uint8)
    labels.flat[:len(values)] = values
    return labels


def test_good_label_images(tmp_path):
    folders = pairs(tmp_path, [grey(1, 2, 255), grey(2)])
    assert check(folders, 3) == ([], [])
    assert check(folders, 2, zero=True) == ([], [])
    assert 'has label 2, but with 2 classes' in check(folders, 2)[0][0]


def test_sizes_channels_and_partners(tmp_path):
    for name, labels, problem in (
            ('rgb', np.zeros((6, 8, 3), np.uint8), 'colour picture'),
            ('small', np.zeros((3, 4), np.uint8), 'is 4 x 3, its image 8 x 6')):
        assert problem in check(pairs(tmp_path / name, [labels]), 2)[0][0]
    folders = pairs(tmp_path / 'names', [grey(1)], suffix='_mask.png')
    assert 'have no label image' in check(folders, 2)[0][0]
    assert 'holds 1 x .jpg' in check([*folders[:2], '.tif', '.png'], 2)[0][0]


def test_an_object_drawn_as_ignore(tmp_path):
    problems, notes = check(pairs(tmp_path, [grey(255, 255)]), 2)
    assert not problems and 'there is only 0 beside 255' in notes[0]
