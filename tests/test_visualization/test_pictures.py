import numpy as np
from PIL import Image

from mmhybrid.visualization import draw_instances, draw_regions, side_by_side


def _gray(height, width):
    return np.full((height, width, 3), 128, dtype=np.uint8)


def test_mask_and_box_sit_on_the_object():
    mask = np.zeros((1, 80, 120), dtype=bool)
    mask[0, 30:60, 40:90] = True
    boxes = np.array([[40., 30., 90., 60.]])
    picture = np.asarray(draw_instances(_gray(80, 120), boxes, ['zebra'], mask, [0.987]))
    assert picture.shape == (80 * 4, 120 * 4, 3)  # enlarged, so that the label is readable
    changed = (picture != 128).any(axis=2)
    assert changed[30 * 4:60 * 4, 40 * 4:90 * 4].all()
    assert not changed[60 * 4 + 1:].any() and not changed[:, 90 * 4 + 1:].any()
    # Above the box is the label, and nothing else.
    label = changed[:30 * 4 - 1]
    assert label.any()
    rows, columns = np.nonzero(label)
    assert columns.min() >= 40 * 4 - 1 and rows.min() > 30 * 4 - 30


def test_labels_stay_inside_the_picture():
    boxes = np.array([[0., 0., 20., 10.], [95., 5., 100., 9.]])
    picture = draw_instances(_gray(60, 100), boxes, ['a rather long name', 'baseball glove'])
    assert picture.size == (400, 240)
    pixels = np.asarray(picture)
    assert (pixels[2:18, 2:120] != 128).any(axis=2).mean() > 0.9


def test_no_instances_leave_the_image_alone():
    picture = draw_instances(_gray(50, 50), np.zeros((0, 4)), [], np.zeros((0, 50, 50), bool), [])
    assert (np.asarray(picture) == 128).all()


def test_names_in_other_alphabets_are_drawn():
    pictures = [np.asarray(draw_instances(_gray(60, 60), np.array([[5., 30., 50., 55.]]), [name]))
                for name in ('ö', 'я', 'ж')]
    assert not (pictures[0] == pictures[1]).all() and not (pictures[1] == pictures[2]).all()


def test_large_images_keep_their_size():
    assert draw_instances(_gray(600, 800), np.zeros((0, 4)), []).size == (800, 600)


def test_regions_take_the_color_of_their_class():
    labels = np.full((60, 60), 255)
    labels[:20] = 0
    labels[40:, 30:] = 2
    picture = np.asarray(draw_regions(_gray(60, 60), labels, ['wall', 'sky', 'floor'],
                                      [(250, 0, 0), (0, 250, 0), (0, 0, 250)]))
    scale = picture.shape[0] // 60
    assert picture[15 * scale, 5, 0] > 180 and picture[15 * scale, 5, 2] < 80
    assert picture[50 * scale, -5, 2] > 180
    assert (picture[30 * scale, 5] == 128).all()


def test_side_by_side_keeps_both():
    red, blue = Image.new('RGB', (30, 40), 'red'), Image.new('RGB', (50, 20), 'blue')
    sheet = np.asarray(side_by_side([('one', red), ('two', blue)]))
    assert (sheet == (255, 0, 0)).all(axis=2).sum() == 30 * 40
    assert (sheet == (0, 0, 255)).all(axis=2).sum() == 50 * 20
    assert sheet.shape[1] > 80


def test_regions_of_a_picture_of_many_rows():
    labels = np.zeros((1100, 20), np.uint8)
    labels[520:], labels[1090:] = 1, 255
    picture = np.asarray(draw_regions(_gray(1100, 20), labels, ['', ''], [(250, 0, 0), (0, 250, 0)],
                                      enlarge=False))
    assert picture.shape == (1100, 20, 3)
    for rows, color in ((slice(0, 500), (201, 51, 51)), (slice(540, 780), (51, 201, 51)),
                        (slice(1092, None), (128, 128, 128))):
        assert np.median(picture[rows].reshape(-1, 3), axis=0).tolist() == list(color)


def test_given_colors_and_large_pictures():
    boxes = np.array([[300., 300., 2000., 1500.]])
    picture = np.asarray(draw_instances(_gray(2000, 2800), boxes, ['x'], colors=[(9, 8, 7)]))
    assert (picture[1000, 300:304] == (9, 8, 7)).all()  # lines twice as thick
    assert (picture[1000, 310] == 128).all()


def test_labels_keep_apart():
    boxes = np.array([[20., 100., 60., 140.], [22., 101., 62., 141.], [24., 102., 64., 142.]])
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    one, three = (np.asarray(draw_instances(_gray(200, 200), boxes[:n], ['name'] * n,
                                            colors=colors[:n], enlarge=False)) for n in (1, 3))
    count = [(one == (255, 0, 0)).all(axis=2).sum(), (three == (255, 0, 0)).all(axis=2).sum()]
    assert count[1] > 0.7 * count[0]  # the first label is hardly covered
