"""Checks of the data that a config names: are they there, and do they fit the model?

mmengine finds a missing file after minutes of building, at the bottom of a long traceback, and a
wrong annotation in the middle of a training or never.
"""
from __future__ import annotations

import inspect
import os
import os.path as osp
import reprlib
import sys

from mmengine.registry import DATASETS

from mmhybrid.errors import UserError
from mmhybrid.registry import find_type
from mmhybrid.weights import is_remote

from ..annotations import check_coco
from ..coco_file import AnnotationError
from ..coco_records import Records, forget_records, load_records
from ..label_images import IGNORED, check_label_images, pair_files
from .coco_reading import read_coco_alike
from .pipeline_guard import expect_labels

__all__ = ['check_classes', 'check_data', 'classes_of', 'num_classes_of']

LOADERS = {'train': ('train_dataloader',), 'val': ('val_dataloader', 'val_evaluator'),
           'test': ('test_dataloader', 'test_evaluator')}
COCO_METHODS = ('load_data_list', 'parse_data_info')
OWN_CLASSES = ('rpn_head', 'semantic_head', 'backbone', 'train_cfg', 'test_cfg')


def check_data(cfg, splits) -> None:
    """Raise UserError if a file or folder that ``splits`` (train, val, test) read is missing."""
    problems = []
    for split in splits:
        for key in LOADERS[split]:
            for path, is_folder in _paths(cfg.get(key)):
                problem = _missing(path, is_folder)
                if problem and (split, problem) not in problems:
                    problems.append((split, problem))
    if not problems:
        return
    lines = [f'  {split}: {problem}' for split, problem in problems]
    raise UserError('Data not found.\n' + '\n'.join(lines) + '\n' + _nested(cfg, problems)
                    + _data_advice(cfg))


def _nested(cfg, problems) -> str:
    """The data one folder further down: ADE20K, for example, unpacks into one of its own."""
    root = cfg.get('data_root') or ''
    first = problems[0][1].rpartition(' does not exist')[0] or problems[0][1].rpartition(' is ')[0]
    if not osp.isdir(root) or not first.startswith(root):
        return ''
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if osp.exists(osp.join(entry.path, osp.relpath(first, root))):
            return f'It is in {entry.path}: add --data-root {entry.path}\n'
    return ''


def _data_advice(cfg) -> str:
    seg = cfg.get('default_scope') == 'mmseg'
    real, mini = ('ade20k', 'mini-ade20k') if seg else ('coco', 'mini-coco')
    if any(hasattr(find_type(dataset, DATASETS, cfg.get('default_scope')), 'read_classes')
           for dataset in _datasets(cfg.get('train_dataloader'))):
        return (f'The config reads from data_root={cfg.get("data_root")!r}. Expected one folder '
                'per class in it, train/<class>/<name>.jpg and val/<class>/<name>.jpg.\n'
                '  your data is elsewhere: add --data-root FOLDER\n'
                '  a small generated set:  python tools/prepare_data.py mini-imagenet --root data/')
    return (f'The config reads from data_root={cfg.get("data_root")!r}. What to do, one of:\n'
            '  your data is elsewhere:        add --data-root FOLDER\n'
            f'  what is needed, and from where: python tools/prepare_data.py {real} --root data/\n'
            f'  a small generated set:         python tools/prepare_data.py {mini} --root data/')


def _missing(path: str, is_folder: bool) -> str | None:
    if is_remote(path):
        return None
    if not is_folder:
        return None if osp.isfile(path) else f'{path} does not exist'
    if not osp.isdir(path):
        return f'{path}/ does not exist'
    with os.scandir(path) as entries:
        return None if any(True for _ in entries) else f'{path}/ is empty'


def _datasets(node):
    """Yield the innermost data set configs below a data loader's config."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _datasets(item)
    elif isinstance(node, dict):
        if 'dataset' in node or 'datasets' in node:
            yield from _datasets(node.get('dataset'))
            yield from _datasets(node.get('datasets'))
        elif 'type' in node and any(
                key in node for key in ('data_root', 'ann_file', 'data_prefix')):
            yield node


def _paths(node):
    """Yield (path, is a folder) for data sets, or for the annotation file of evaluators."""
    if isinstance(node, (list, tuple)) or isinstance(node, dict) and 'type' in node:
        for evaluator in node if isinstance(node, (list, tuple)) else [node]:
            for path in _named(evaluator.get('ann_file') if isinstance(evaluator, dict) else None):
                yield path, False
        return
    for dataset in _datasets(node):
        root = next(_named(dataset.get('data_root')), '')
        for path in _named(dataset.get('ann_file')):
            yield osp.join(root, path), False
        for folder in _named(dataset.get('data_prefix')):
            yield osp.join(root, folder).rstrip('/'), True


def _named(value):
    """Yield the paths in a setting; data sets of the user's own may hold several, or no path."""
    if isinstance(value, (str, os.PathLike)) and str(value):
        yield os.fspath(value)
    elif isinstance(value, dict):
        yield from _named(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _named(item)


def check_classes(cfg, splits, facts: list[str] | None = None) -> list[str]:
    """Raise UserError if data sets and heads disagree about the classes, or data are unusable.

    Args:
        cfg: the config.
        splits: "train", "val", "test".
        facts: receives one sentence on each data set: what is given, used and left out.

    Returns:
        Warnings.
    """
    facts = [] if facts is None else facts
    try:
        notes = _check_splits(cfg, splits, facts)
    finally:
        forget_records()
    facts[:] = dict.fromkeys(facts)
    return list(dict.fromkeys(notes))


def _check_splits(cfg, splits, facts: list[str]) -> list[str]:
    notes, from_folders = [], {}
    heads = dict(num_classes_of(cfg.get('model')))
    for split in splits:
        for dataset in _datasets(cfg.get(f'{split}_dataloader')):
            classes = classes_of(dataset, cfg.get('default_scope'))
            if classes is None:
                continue
            if hasattr(find_type(dataset, DATASETS, cfg.get('default_scope')), 'read_classes'):
                _check_folders(from_folders, split, classes)
            wrong = {path: number for path, number in heads.items() if number != len(classes)}
            if wrong:
                listed = ', '.join(f'{path}.num_classes={n}' for path, n in wrong.items())
                shown = ', '.join(classes[:4]) + (', ...' if len(classes) > 4 else '')
                options = ' '.join(f'{path}.num_classes={len(classes)}' for path in wrong)
                raise UserError(
                    f'The {split} data has {len(classes)} classes ({shown}), but the model is '
                    f'built for another number: {listed}. Set the heads with --cfg-options '
                    f'{options} , or give the data set its classes: '
                    'metainfo=dict(classes=(...)).')
            notes += _check_instances(dataset, classes, split, cfg, facts)
            notes += _check_labels(dataset, classes, split, cfg, facts)
        notes += _check_evaluator_files(cfg, split)
    return notes


def num_classes_of(node, path='model'):
    """Yield the dotted names of a model's parts that tell the set's classes apart, and how many."""
    if isinstance(node, dict):
        for key, value in node.items():
            here = f'{path}.{key}'
            if key == 'num_classes' and isinstance(value, int):
                yield path, value
            # The region proposal network tells objects from background, whatever the classes; a
            # semantic head beside a detector, a loss or an assigner may count in its own way.
            elif key not in OWN_CLASSES and 'loss' not in key:
                yield from num_classes_of(value, here)
    elif isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            yield from num_classes_of(item, f'{path}.{index}')


def _check_folders(seen: dict, split: str, classes: tuple) -> None:
    """Classes that are folders have numbers by their order, so every split needs the same ones."""
    first, expected = next(iter(seen.items()), (split, classes))
    seen[split] = classes
    differ = sorted(set(expected) ^ set(classes))
    if differ:
        raise UserError(
            f'The {first} data has {len(expected)} class folders and the {split} data '
            f'{len(classes)}; {", ".join(differ[:4])}{", ..." if len(differ) > 4 else ""} '
            f'{"is" if len(differ) == 1 else "are"} in one of them only. Classes are numbered by '
            'their folders, so both need the same.')


def classes_of(dataset, scope) -> tuple | None:
    """Names of the classes of a data set's settings, or None where nothing tells."""
    described = dataset.get('metainfo') or {}
    if not isinstance(described, dict):
        return None  # building it tells what is wrong
    names = described.get('classes')
    if names is None:
        kind = find_type(dataset, DATASETS, scope)
        names = (getattr(kind, 'METAINFO', None) or {}).get('classes')
        if names is None and hasattr(kind, 'read_classes'):
            names = kind.read_classes(next(_paths(dict(dataset=dataset)))[0])
    if isinstance(names, str):
        if not osp.isfile(names):
            raise UserError(f'metainfo.classes names the file {names}, which does not exist.')
        with open(names, encoding='utf-8') as file:
            names = [line.strip() for line in file if line.strip()]
    return tuple(names) if isinstance(names, (list, tuple)) else None


def _check_instances(dataset, classes, split, cfg, facts) -> list[str]:
    """Check what mmdet's CocoDataset would read; notes on what it leaves out."""
    if not _reads_like_coco(dataset, cfg, *COCO_METHODS):
        return []
    _check_settings(dataset, split)
    path = _coco_file(dataset, cfg)
    if path is None:
        return []
    read_coco_alike()
    if not _is_first_of_node():
        return []
    metrics = [evaluator for evaluator in _coco_metrics(cfg, split).values()
               if osp.realpath(evaluator['ann_file']) == osp.realpath(path)]
    loads = [step for step in _label_loaders(dataset.get('pipeline')) if step.get('with_mask')]
    masks = bool(loads) or any(map(_scores_masks, metrics))
    folder = osp.join(dataset.get('data_root') or '',
                      (dataset.get('data_prefix') or {}).get('img') or '')
    own_filter = not _reads_like_coco(dataset, cfg, 'filter_data')
    problems, notes, summary = check_coco(
        _records(path, f' (the {split} data)'), classes, masks, not dataset.get('test_mode'),
        bool(metrics), None if is_remote(folder) else folder,
        {} if own_filter else _filter(dataset, split), dataset.get('indices'),
        any(not step.get('poly2mask', True) for step in loads))
    _raise_problems(path, f' (the {split} data)', problems)
    if own_filter:
        summary += f'; {dataset["type"]} filters them in a way of its own'
    facts.append(f'{path} (the {split} data): {summary}.')
    return [f'{path}: {note}.' for note in notes]


def _coco_file(dataset, cfg) -> str | None:
    """Path of the annotation file that mmdet's CocoDataset would read; None if it is another."""
    if not dataset.get('ann_file') or not _reads_like_coco(dataset, cfg, *COCO_METHODS):
        return None
    path = osp.join(dataset.get('data_root') or '', dataset['ann_file'])
    return None if is_remote(path) else path


def _reads_like_coco(dataset, cfg, *methods) -> bool:
    scope = cfg.get('default_scope')
    kind = find_type(dataset, DATASETS, scope)
    return _reads_like(kind, dict(type='mmdet.CocoDataset'), scope, *methods)


def _check_settings(dataset, split) -> None:
    """What mmengine's data sets take; their own errors do not name the setting."""
    for key, fits, expected in (
            ('ann_file', lambda value: isinstance(value, (str, os.PathLike)), 'one path'),
            ('data_root', lambda value: isinstance(value, (str, os.PathLike)), 'one path'),
            ('data_prefix', lambda value: isinstance(value, dict) and all(
                folder is None or isinstance(folder, str) for folder in value.values()),
             "the folders by name, such as dict(img='images/')"),
            ('filter_cfg', lambda value: isinstance(value, dict),
             'a dictionary, such as dict(filter_empty_gt=True)'),
            ('indices', lambda value: isinstance(value, int) or isinstance(
                value, (list, tuple, range)) and all(isinstance(each, int) for each in value),
             'a number of images or a list of their numbers')):
        value = dataset.get(key)
        if value is not None and not fits(value):
            raise UserError(f'{key} of the {split} data is {reprlib.repr(value)}; expected '
                            f'{expected}.')


def _filter(dataset, split) -> dict:
    filter_cfg = dataset.get('filter_cfg') or {}
    smallest = filter_cfg.get('min_size', 0)
    if not isinstance(smallest, (int, float)):
        raise UserError(f'filter_cfg.min_size of the {split} data is {smallest!r}; expected a '
                        'number of pixels.')
    return filter_cfg


def _records(path: str, role: str) -> Records:
    try:
        records, problems = load_records(path, _tell)
    except AnnotationError as error:
        raise UserError(f'{error}.') from error
    _raise_problems(path, role, problems)
    return records


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # there is no logger yet


def _raise_problems(path: str, role: str, problems: list[str]) -> None:
    if problems:
        raise UserError(f'{path}{role} does not fit:\n'
                        + '\n'.join(f'  it {problem}.' for problem in problems))


def _is_first_of_node() -> bool:
    """Whether this process is the one that torchrun's others on this machine leave checks to.

    If it finds something, torchrun ends them all.
    """
    # As text: what is not a number is told when the processes are connected.
    return os.environ.get('WORLD_SIZE', '1') == '1' or os.environ.get('LOCAL_RANK', '0') == '0'


def _reads_like(kind, base, scope, *methods) -> bool:
    """Whether a data set class reads its files as the class that ``base`` names does."""
    base = find_type(base, DATASETS, scope)
    return base is not None and kind is not None and all(
        getattr(kind, name, None) is getattr(base, name) for name in methods)


def _coco_metrics(cfg, split) -> dict:
    """Evaluators that compare with a file of COCO's form, by their keys."""
    evaluators = cfg.get(f'{split}_evaluator') or []
    if isinstance(evaluators, (list, tuple)):
        named = {f'{split}_evaluator.{index}': evaluator
                 for index, evaluator in enumerate(evaluators)}
    else:
        named = {f'{split}_evaluator': evaluators}
    return {key: evaluator for key, evaluator in named.items()
            if isinstance(evaluator, dict) and _type_name(evaluator)[1] == 'CocoMetric'
            and evaluator.get('ann_file') and not evaluator.get('format_only')}


def _scores_masks(evaluator) -> bool:
    metric = evaluator.get('metric', 'bbox')
    return 'segm' in (metric if isinstance(metric, (list, tuple)) else [metric])


def _check_evaluator_files(cfg, split) -> list[str]:
    """CocoMetric compares with a file of its own, and finds a wrong one only after an epoch."""
    datasets, notes = list(_datasets(cfg.get(f'{split}_dataloader'))), []
    paths = [_coco_file(dataset, cfg) for dataset in datasets]
    if None in paths or not paths or not _is_first_of_node():
        return []
    classes = classes_of(datasets[0], cfg.get('default_scope'))
    for key, evaluator in _coco_metrics(cfg, split).items():
        other = evaluator['ann_file']
        if is_remote(other) or {osp.realpath(other)} == {*map(osp.realpath, paths)}:
            continue  # elsewhere, or checked as the data
        role = f' ({key}.ann_file)'
        records = _records(other, role)
        problems, more, _ = check_coco(records, classes, _scores_masks(evaluator), False, True)
        _raise_problems(other, role, problems)
        notes += [f'{other}: {note}.' for note in more]
        there = set(records.image_ids)
        here = {number for path in paths for number in _records(path, '').image_ids}
        if here != there:
            differ = ', '.join(map(str, sorted(here ^ there, key=str)[:3]))
            raise UserError(
                f'The {split} data is {paths[0]}, but it would be compared with {other}, which '
                f'lists other images (id {differ}{", ..." if len(here ^ there) > 3 else ""} in one '
                f'of them only). Set {key}.ann_file to the file of the data.')
    return notes


def _check_labels(dataset, classes, split, cfg, facts) -> list[str]:
    """Check the folders that mmseg's BaseSegDataset would read; warnings. Counts go to facts."""
    scope = cfg.get('default_scope')
    kind, prefix = find_type(dataset, DATASETS, scope), dataset.get('data_prefix') or {}
    if not _reads_like(kind, dict(type='mmseg.BaseSegDataset'), scope, 'load_data_list'):
        return []
    _check_settings(dataset, split)
    if not prefix.get('img_path'):
        return []
    root = dataset.get('data_root') or ''
    images, labels = (osp.join(root, prefix[key]) if prefix.get(key) else None
                      for key in ('img_path', 'seg_map_path'))
    if is_remote(images) or labels and is_remote(labels):
        return []
    image_suffix, label_suffix, zero, ann_file = _own_settings(
        kind, dataset, ('img_suffix', 'seg_map_suffix', 'reduce_zero_label', 'ann_file'))
    pairs = pair_files(images, labels, image_suffix, label_suffix,
                       osp.join(root, ann_file) if ann_file else None)
    if pairs.problems:
        raise UserError('. '.join(pairs.problems) + '.')
    indices = dataset.get('indices')
    facts.append(f'The {split} data: {pairs.summary}'
                 + (f'; of these indices={indices}' if indices is not None else '') + '.')
    notes = pairs.notes
    if labels is not None and _loads_labels(dataset):
        own = (kind.METAINFO or {}).get('classes')  # else a choice of these, and numbered anew
        head = cfg.model.get('decode_head')
        head = head[-1] if isinstance(head, list) else head or {}
        ignored = head.get('ignore_index', IGNORED)
        expect_labels(labels, len(classes), len(own or classes), ignored)
        problems, more = check_label_images(
            [(osp.join(images, stem + image_suffix), osp.join(labels, stem + label_suffix))
             for stem in pairs.stems],
            labels, len(own or classes), ignored, zero, not dataset.get('test_mode') and
            split == 'train')
        if problems:
            raise UserError('. '.join(problems) + '.')
        notes = notes + more
    return [f'{note}.' for note in notes]


def _own_settings(kind, dataset, names) -> list:
    """Settings of a data set: the config's, what its class hands to its base, or defaults."""
    try:
        built = kind(**{key: value for key, value in dataset.items()
                        if key not in ('type', '_scope_')} | dict(pipeline=[], lazy_init=True))
    except Exception:  # building it later tells what is wrong
        built = None
    defaults = {name: parameter.default for cls in reversed(kind.__mro__) if '__init__' in vars(cls)
                for name, parameter in inspect.signature(cls.__init__).parameters.items()}
    return [dataset.get(name, getattr(built, name, defaults[name])) for name in names]


def _loads_labels(dataset) -> bool:
    """Whether mmseg's own transform reads the label images, as far as the config shows."""
    return not dataset.get('pipeline') or any(_label_loaders(dataset['pipeline']))


def _label_loaders(node):
    """Yield mmdet's and mmseg's own transforms for annotations, also inside other transforms."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _label_loaders(item)
    elif isinstance(node, dict):
        home, name = _type_name(node)
        if name == 'LoadAnnotations' and home.partition('.')[0] in ('', 'mmcv', 'mmdet', 'mmseg'):
            yield node
        for value in node.values():
            yield from _label_loaders(value)


def _type_name(node) -> tuple[str, str]:
    """Where a type is from, as far as the config says it, and its name."""
    kind = node.get('type')
    home, _, name = (f'{kind.__module__}.{kind.__qualname__}' if inspect.isclass(kind)
                     else str(kind)).rpartition('.')
    return home, name
