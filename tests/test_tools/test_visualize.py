"""tools/visualize.py draws what the model saw, and only what belongs together."""
import json
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmhybrid import cli
from mmhybrid.cli.actions import visualize as picture_tool

ORIENTATION = 0x112


def test_pictures_of_odd_files(task, tmp_path, capfd, monkeypatch):
    """Two files of one name; one lies on its side and says so, the other has 16 bits."""
    it = task('det', copy=tmp_path / 'copy')
    images = tmp_path / 'copy/val2017'
    path = tmp_path / 'copy/annotations/instances_val2017.json'
    content = json.loads(path.read_text())
    first, second = content['images'][:2]
    lying = Image.open(images / first['file_name']).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    grey = np.asarray(Image.open(images / second['file_name']).convert('L')).astype(np.uint16) * 256
    for record, folder in ((first, 'a'), (second, 'b')):
        (images / folder).mkdir()
        record['file_name'] = f'{folder}/same.png'
    lying.save(images / 'a/same.png', exif=exif)
    Image.fromarray(grey).save(images / 'b/same.png')
    path.write_text(json.dumps(content))
    seen = []
    draw = picture_tool.draw_instances
    monkeypatch.setattr(picture_tool, 'draw_instances',
                        lambda image, *args: seen.append(image) or draw(image, *args))
    cfg = Config.fromfile(it.config)
    init_default_scope('mmdet')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), 'whole.pth')
    argv = [it.config, 'whole.pth', '--data-root', it.data, '--num', '9', '--out-dir', 'pictures']
    assert cli.main(['visualize', *argv]) == 0, capfd.readouterr().err
    assert {file.name for file in Path('pictures').iterdir()} >= {'same.png', 'same_1.png'}
    assert seen[0].shape[:2] == (first['height'], first['width'])
    assert seen[2].max() > 100 and seen[2].max() < 256 and np.unique(seen[2]).size > 20

    options = ['--cfg-options', 'model.roi_head.mask_head.num_convs=3']
    assert cli.main(['visualize', *argv, *options]) == 1
    assert 'does not fit the model of this config' in capfd.readouterr().err
