"""Hundreds of random changes of valid checkpoints: each is read as data, or refused in a sentence.
"""
import argparse
import collections
import io
import json
import pathlib
import pickletools
import random
import re
import resource
import struct
import time
import zipfile

import hostile_files as hostile
import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

import mmhybrid.plugin  # noqa: F401  (its import installs what is tested)
from mmhybrid.compat.embedded_config import plain_config, settled_text
from mmhybrid.weights import WeightsError, read_file

CONFIG = """default_scope = 'mmhybrid'
custom_imports = dict(allow_failed_imports=False, imports=['mmhybrid'])
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='mmhybrid.MambaVision', arch='tiny', init_cfg=None),
    test_cfg=dict(mode='slide', crop_size=(512, 512), nms=dict(type='nms', iou=-0.5)))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-4, type='AdamW'))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, best=float('inf'))
"""
PLAIN = (dict, collections.OrderedDict, collections.Counter, list, tuple, set, frozenset, str,
         bytes, int, float, complex, bool, type(None), torch.Tensor, torch.nn.Parameter, torch.Size,
         torch.device, torch.dtype, argparse.Namespace, HistoryBuffer, pathlib.PurePosixPath)


def checkpoint(config=CONFIG):
    """What tools/train.py writes, small."""
    generator = torch.Generator().manual_seed(1)
    state = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2), torch.nn.BatchNorm2d(3)).state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = torch.randn(value.shape, generator=generator)
    return dict(
        meta=dict(epoch=3, iter=60, cfg=config, seed=0, experiment_name='x', time='20260101',
                  mmengine_version='0.10', dataset_meta=dict(classes=('a', 'b'),
                                                             palette=[(1, 2, 3), [4, 5, 6]])),
        state_dict=state,
        message_hub=dict(
            log_scalars=collections.OrderedDict({'train/loss': HistoryBuffer([2., 1.], [1, 1]),
                                                 'train/lr': HistoryBuffer()}),
            runtime_info=collections.OrderedDict(cfg=config, iter=60, best=np.float64(0.5)),
            resumed_keys={'train/loss': True}),
        optimizer=dict(state={0: dict(step=torch.tensor(3.), exp_avg=torch.ones(2, 2))},
                       param_groups=[dict(lr=1e-4, betas=(0.9, 0.999), params=[0, 1])]),
        param_schedulers=[dict(milestones=collections.Counter({8: 1}), gamma=0.1)],
        random=dict(numpy=('MT19937', np.arange(624, dtype=np.uint32), 5), python=(3, (1, 2)),
                    torch=torch.get_rng_state()[:64]))


def written(value, legacy=False):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


# --- changes of bytes ---

def change_bytes(data, rng):
    """Flip, cut, insert, take away, swap, blank or repeat."""
    data, size = bytearray(data), len(data)
    at, length = rng.randrange(size), rng.choice((1, 4, 40, 400))
    kind = rng.choice(('flip', 'flip', 'cut', 'insert', 'take', 'swap', 'blank', 'repeat'))
    if kind == 'flip':
        for _ in range(rng.choice((1, 1, 3, 8))):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == 'cut':
        del data[at:]
    elif kind == 'insert':
        data[at:at] = rng.randbytes(length)
    elif kind == 'take':
        del data[at:at + length]
    elif kind == 'swap':
        other = rng.randrange(size)
        low, high = sorted((at, other))
        length = min(length, high - low, size - high)
        data[low:low + length], data[high:high + length] = (
            data[high:high + length], data[low:low + length])
    elif kind == 'blank':
        data[at:at + length] = bytes(len(data[at:at + length]))
    else:
        data[at:at] = data[at:at + length]
    return bytes(data)


# --- changes of the pickle, in an archive that is whole again afterwards ---

NAMES = (b'cposix\nsystem\n', b'c__builtin__\neval\n', b'c__builtin__\ngetattr\n',
         b'cnumpy.core.multiarray\nscalar\n', b'cnumpy\ndtype\n', b'cargparse\nNamespace\n',
         b'ctorch\nload\n', b'ctorch._utils\n_rebuild_tensor_v2\n', b'c_codecs\nencode\n',
         b'cmmengine.logging.history_buffer\nHistoryBuffer\n', b'ctorch\nFloatStorage\n',
         b'ctorch.storage\n_load_from_bytes\n', b'cmmengine.config\nConfig\n', b'ccollections\n'
         b'OrderedDict\n', b'cnumpy.core.multiarray\n_reconstruct\n', b'cnumpy\nmemmap\n')
VALUES = (b'N', b'\x88', b']', b'}', b')', b'\x8f', b'J\xff\xff\xff\xff', b'M\xff\xff', b'h\x00',
          b'\x8a\x08' + b'\xff' * 7 + b'\x7f', b'G\x7f\xf0' + bytes(6), b'X\x04\x00\x00\x00meta',
          b'X\x0a\x00\x00\x00state_dict', b'(', b'U\x01a', b'X\x02\x00\x00\x00O8')
ACTIONS = (b'R', b'b', b'\x81', b'a', b'e', b's', b'u', b't', b'\x85', b'\x86', b'\x87', b'Q', b'.',
           b'0', b'2', b'i', b'o', b'\x93', b'\x94', b'\x80\x04')


def change_pickle(code, rng):
    """Replace, repeat, take away or exchange instructions."""
    steps = [(instruction.name, place) for instruction, _, place in pickletools.genops(code)]
    ends = [place for _, place in steps[1:]] + [len(code)]
    pieces = [(name, code[place:end]) for (name, place), end in zip(steps, ends, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(1, len(pieces) - 1), rng.randrange(6)
        if kind == 0:
            named = [i for i, (name, _) in enumerate(pieces) if name == 'GLOBAL']
            pieces[rng.choice(named or [at])] = ('GLOBAL', rng.choice(NAMES))
        elif kind == 1:
            pieces[at] = ('', rng.choice(VALUES))
        elif kind == 2:
            pieces[at] = ('', rng.choice(ACTIONS))
        elif kind == 3:
            del pieces[at]
        elif kind == 4:
            pieces.insert(at, pieces[rng.randrange(1, len(pieces) - 1)])
        else:
            other = rng.randrange(1, len(pieces) - 1)
            pieces[at], pieces[other] = pieces[other], pieces[at]
    return b''.join(piece for _, piece in pieces)


def repacked(data, change, compression=zipfile.ZIP_STORED):
    """An archive with other members, and right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as archive:
        for name, content in change(members):
            archive.writestr(name, content)
    return file.getvalue()


def change_zip_pickle(data, rng):
    return repacked(data, lambda members: [
        (name, change_pickle(content, rng) if name.endswith('data.pkl') else content)
        for name, content in members])


def change_row_pickle(data, rng):
    ends, stream = [0], io.BytesIO(data)
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    which = rng.choice((0, 1, 2, 3, 3, 3, 3, 4))
    return data[:ends[which]] + change_pickle(data[ends[which]:ends[which + 1]], rng) \
        + data[ends[which + 1]:]


def change_members(data, rng):
    def change(members):
        at, kind = rng.randrange(len(members)), rng.randrange(6)
        name, content = members[at]
        if kind == 0:
            del members[at]
        elif kind == 1:
            members[at] = rng.choice(('x', '../x', '/etc/x', 'a/data.pkl')), content
        elif kind == 2:
            members.append((rng.choice(('b/data.pkl', 'archive/code/a.py', 'archive/constants.pkl',
                                        name)), content))
        elif kind == 3:
            members[at] = name, content[:rng.randrange(len(content) + 1)]
        elif kind == 4:
            members[at] = name, content + rng.randbytes(9)
        else:
            rng.shuffle(members)
        return members

    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED,
                         zipfile.ZIP_BZIP2))
    return repacked(data, change, method)


# --- changes of the other descriptions ---

def change_header(data, rng):
    length = struct.unpack('<Q', data[:8])[0]
    header = json.loads(data[8:8 + length])
    strange = (None, True, -1, 2**63, 2**70, 1.5, float('nan'), 'x', '\ud800', [], {},
               [0, 4], [[0]])
    key = rng.choice(list(header))
    entry, kind = header[key], rng.randrange(5)
    if kind == 0:
        header[key] = rng.choice(strange)
    elif kind == 1:
        entry[rng.choice(list(entry))] = rng.choice(strange)
    elif kind == 2 and entry.get('shape'):
        field = entry[rng.choice(('shape', 'data_offsets'))]
        field[rng.randrange(len(field))] = rng.choice((*strange, 0, 1, 7, 10**6))
    elif kind == 3:
        del entry[rng.choice(list(entry))]
    else:
        header[rng.choice(('__metadata__', 'new', key))] = rng.choice((*strange, entry))
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.9 else rng.randrange(2**64)
    return struct.pack('<Q', length) + text + data[8 + length:]


LINES = ('model = dict(type="os.system", command="x")', 'custom_imports = dict(imports=["evil"])',
         '_base_ = "/elsewhere/x.py"', 'import os', 'x = "{{$A:1}}"', 'x = open("y")',
         'default_scope = "os"',
         'x = dict(type="mmengine.fileio.load", file="x.pkl")', 'x = [', 'x = "', 'x = f"{y}"',
         'x = dict(_scope_="subprocess", type="Popen")', 'x = __import__("os").system("true")')


def change_config(rng):
    text, kind = CONFIG, rng.randrange(4)
    if kind == 0:
        lines = text.splitlines()
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(LINES))
        text = '\n'.join(lines)
    elif kind == 1:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice('()[]{}\'"\\=,:.-+*@\n \t#;\0\ud800é') + text[at + 1:]
    elif kind == 2:
        words = re.findall(r"'[\w.]+'", text)
        text = text.replace(rng.choice(words), rng.choice(
            ("'os.system'", "'antigravity'", "'exec'", "'mmengine.load'", "'x.pkl'", "'..a'")))
    else:
        at, other = sorted(rng.randrange(len(text)) for _ in range(2))
        text = text[:at] + text[other:]
    return written(checkpoint(text))


ZIP, ROW = written(checkpoint()), written(checkpoint(), legacy=True)


def safetensors():
    save = pytest.importorskip('safetensors.torch').save
    return save(dict(checkpoint()['state_dict']), {'format': 'pt', 'note': 'x'})


GROUPS = {  # how to change, how many times, and whether checksums cover the change
    'bytes of an archive': (lambda rng: change_bytes(ZIP, rng), 60, True),
    'bytes of a row': (lambda rng: change_bytes(ROW, rng), 50, False),
    'bytes of safetensors': (lambda rng: change_bytes(safetensors(), rng), 30, False),
    'pickle of an archive': (lambda rng: change_zip_pickle(ZIP, rng), 60, False),
    'pickle of a row': (lambda rng: change_row_pickle(ROW, rng), 30, False),
    'members': (lambda rng: change_members(ZIP, rng), 30, False),
    'header': (lambda rng: change_header(safetensors(), rng), 40, False),
    'config': (change_config, 40, True),
}


def load(path):
    if path.suffix == '.safetensors':
        return read_file(path)
    return CheckpointLoader.load_checkpoint(str(path))


def check_plain(value, seen):
    """A walk of its own, not the one that is tested."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, (np.generic, np.ndarray)):
        assert value.dtype.kind in 'biufc' and value.dtype.names is None
        assert type(value) is np.ndarray or not isinstance(value, np.ndarray)
        return
    assert type(value) in PLAIN or isinstance(value, np.dtype), type(value)
    parts = vars(value).values() if isinstance(value, (argparse.Namespace, HistoryBuffer)) else ()
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values(), *(vars(value).values() if hasattr(
            value, '__dict__') else ())]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    for part in parts:
        check_plain(part, seen)


def check_content(back):
    check_plain(back, {})
    if not isinstance(back, dict):
        return
    for holder in (back.get('meta'), (back.get('message_hub') or {}).get('runtime_info')):
        if isinstance(holder, dict) and 'cfg' in holder:
            values = plain_config(holder['cfg'])
            assert settled_text(holder['cfg'], values) == (holder['cfg'], [])
        assert 'config' not in (holder or {})


def check_same_tensors(back):
    for name, value in checkpoint()['state_dict'].items():
        assert torch.equal(back['state_dict'][name], value)


@pytest.fixture(scope='module')
def memory(tmp_path_factory):
    """Most bytes that reading the files as they were written has taken."""
    folder = tmp_path_factory.mktemp('whole')
    for name, data in (('zip.pth', ZIP), ('row.pth', ROW), ('w.safetensors', safetensors())):
        (folder / name).write_bytes(data)
        back = load(folder / name)
        if name != 'w.safetensors':
            check_content(back)
            check_same_tensors(back)
            assert back['meta']['cfg'] == CONFIG and back['random']['numpy'][1][623] == 623
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize('group', GROUPS)
def test_changed_files_are_data_or_refused_in_a_sentence(group, tmp_path, memory):
    change, count, covered = GROUPS[group]
    suffix = '.safetensors' if group in ('bytes of safetensors', 'header') else '.pth'
    path, refused = tmp_path / f'changed{suffix}', 0
    for seed in range(count):
        path.write_bytes(change(random.Random(f'{group} {seed}')))
        start = time.process_time()
        try:
            with hostile.watched():
                back = load(path)
        except WeightsError as error:
            refused += 1
            text = str(error)
            assert text.startswith(f'{path} ') and '\n' not in text and len(text) < 700, text
            assert not re.search(r'\b[A-Z]\w*(Error|Exception|Zip[Ff]ile)\b', text.replace(
                'SafetensorError', '')), f'{group} {seed}: {text}'
            text.encode()
        else:
            check_content(back) if suffix == '.pth' else check_plain(back, {})
            if covered:
                check_same_tensors(back)
        assert time.process_time() - start < 5, f'{group} {seed}'
    # a config is left out or cleaned, and the rest of the file is read
    assert refused == 0 if group == 'config' else refused > count // 4
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert most < memory + 2**30


def test_there_are_as_many_as_promised():
    assert sum(count for _, count, _ in GROUPS.values()) == 340
