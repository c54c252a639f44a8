"""Damaged, cut off and odd files: one sentence each, with the right cause."""
import collections
import contextlib
import io
import json
import os
import random
import socket
import struct
import time
import zipfile

import hostile_files as hostile
import numpy as np
import pytest
import torch
from hostile_files import Raw, called, tensor
from released_files import FAMILIES, dense, weights

from mmhybrid.engine.checkpoint_check import check_checkpoint_file
from mmhybrid.errors import UserError
from mmhybrid.models.checkpoints import fit_weights
from mmhybrid.weights import WeightsError, check_file, read_checkpoint, read_file, unwrap
from mmhybrid.weights.allowed import Budget
from mmhybrid.weights.conversion import publish, restore


def refused(path, message, read=read_file):
    with pytest.raises(WeightsError, match=message) as caught, hostile.watched():
        read(path)
    text = str(caught.value)
    assert '\n' not in text and text.startswith(str(path))
    return text


def saved(path, legacy=False):
    torch.save(dict(meta=dict(epoch=3), state_dict={f'layer{i}.weight': torch.randn(40)
                                                    for i in range(5)}),
               path, _use_new_zipfile_serialization=not legacy)
    return path


def test_every_flipped_bit_of_an_archive_is_noticed_or_harmless(tmp_path):
    content = saved(tmp_path / 'w.pth').read_bytes()
    right = read_file(tmp_path / 'w.pth')
    generator, noticed = random.Random(3), 0
    for _ in range(300):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        try:
            back = read_file(io.BytesIO(changed), name='w.pth')
        except WeightsError as error:
            noticed += 1
            assert str(error).startswith('w.pth ') and '\n' not in str(error)
        else:  # padding, dates, and the parts that nobody reads
            assert back['meta'] == right['meta']
            for name, value in right['state_dict'].items():
                assert torch.equal(back['state_dict'][name], value)
    assert noticed > 100


def test_a_wrong_weight_is_named_by_its_part(tmp_path):
    path = saved(tmp_path / 'w.pth')
    content = bytearray(path.read_bytes())
    value = bytes(torch.load(path, weights_only=True)['state_dict']['layer2.weight'].numpy())
    content[content.index(value) + 7] ^= 64
    path.write_bytes(content)
    refused(path, r'w.pth is damaged: w/data/2 in its archive is not what was written .*CRC')


def test_files_without_checksums_are_read(tmp_path):
    if not hasattr(torch.serialization, 'set_crc32_options'):
        pytest.skip('this torch always writes them')
    torch.serialization.set_crc32_options(False)
    try:
        saved(tmp_path / 'w.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(read_file(tmp_path / 'w.pth')['state_dict']) == 5


def test_big_endian_files_are_turned_round(tmp_path):
    values = torch.arange(4.)
    code = hostile.program({'a': tensor()})
    hostile.archive(tmp_path / 'w.pth', code, {
        'data/0': values.numpy().astype('>f4').tobytes(), 'byteorder': b'big'})
    assert torch.equal(read_file(tmp_path / 'w.pth')['a'], values)


def test_what_was_packed_again_is_read_and_bombs_are_not(tmp_path):
    code = hostile.program({'a': tensor(count=1000)})
    hostile.archive(tmp_path / 'w.pth', code, {'data/0': bytes(4000)}, zipfile.ZIP_DEFLATED)
    assert read_file(tmp_path / 'w.pth')['a'].shape == (1000,)
    code = hostile.program({'a': tensor(count=50_000_000)})
    hostile.archive(tmp_path / 'w.pth', code, {'data/0': bytes(200_000_000)},
                    zipfile.ZIP_DEFLATED)
    refused(tmp_path / 'w.pth', 'w.pth is damaged: it would unpack to 200,000,[0-9]{3} bytes, and')
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        hostile.archive(tmp_path / 'w.pth', code, {'data/0': bytes(4)}, method)
        refused(tmp_path / 'w.pth', 'is compressed in a way that torch does not know')


def _laughs():
    return Raw(b']q\x00' + b''.join(
        b']q' + bytes([i + 1]) + b'(' + 10 * (b'h' + bytes([i])) + b'e' for i in range(30)))


def _colliding(count):
    """Pairs of numbers with one hash: Python's way to hash a tuple, solved for the second."""
    odd, even, start, mask = (11400714785074694791, 14029467366897019727, 2870177450012600261,
                              2**64 - 1)
    pairs, first = [], 0
    while len(pairs) < count:
        first += 1
        lanes = (start + first * even) & mask
        lanes = (lanes << 31 | lanes >> 33) * odd & mask
        second = (12345 - lanes) * pow(even, -1, 2**64) & mask
        if second < 2**60:
            pairs.append((first, second))
    return pairs


LARGE = Budget.STEPS + 10
BOMBS = {
    'values': (Raw(b'](' + LARGE * b'N' + b'e'), 'has more than 1,500,000 values'),
    'sets': (Raw(b'](' + LARGE // 3 * b'\x8f' + b'e'), 'has more than 1,500,000 values'),
    'marks': (Raw(LARGE // 3 * b'('), 'has more than 1,500,000 values'),
    'copies': (Raw(b']q\x00(' + 100_000 * b'N' + b'e(' + 100 * b'c__builtin__\nset\nh\x00\x85R'
                   + b't'), 'has more than 1,500,000 values'),
    'bytes': (Raw(b'(X' + struct.pack('<I', 10**6) + 10**6 * b'a' + b'q\x00c_codecs\nencode\nq\x01'
                  b'X\x06\x00\x00\x00latin1q\x02' + 200 * b'h\x01h\x00h\x02\x86R' + b't'),
              'many times larger than the file'),
    'numbers that collide': ({n * (2**61 - 1): None for n in range(30_000)}, 'as a key'),
    'tuples that collide': (dict.fromkeys(_colliding(6000)), 'has more than 1,500,000 values'),
    'long tuples': (Raw(b'}(' + 1000 * (b'(' + 32 * b'J\xfe\xff\xff\xff' + b'tN') + b'u'),
                    'has tuple as a key'),
    'keys that end the process': (Raw(b'}N' + 100_000 * b'\x85' + b'Ns'), 'has tuple as a key'),
    'steps of 0': (tensor(shape=(2**28,), strides=(0,)), 'many times larger than the file'),
    'many times': ([tensor(shape=(2**22,), strides=(0,))] * 10, 'many times larger than the file'),
    'laughs': (_laughs(), 'repeats its parts until it has more than'),
}


@pytest.mark.parametrize('kind', BOMBS)
def test_small_files_stay_small(kind, tmp_path):
    value, message = BOMBS[kind]
    start = time.process_time()
    path = hostile.archive(tmp_path / 'w.pth', hostile.program({'a': [value]}))
    text = refused(path, f'w.pth (is damaged|was not loaded): .*{message}')
    assert len(text) < 500
    assert time.process_time() - start < 10  # 2 on an idle machine


def test_claims_of_length_are_not_believed(tmp_path):
    for code in (b'X\xff\xff\xff\xff', b'\x8d' + b'\xff' * 7 + b'\x7f', b'\x8e' + b'\xff' * 8,
                 b'\x8b\xff\xff\xff\x7f', b'B\xff\xff\xff\x7f', b'\x96' + b'\xff' * 8,
                 b'c' + 10**6 * b'a', b'\x8a\xff', b'h', b'J\x00', b'G\x00', b'K'):
        hostile.archive(tmp_path / 'w.pth', b'\x80\x02' + code)
        refused(tmp_path / 'w.pth', 'w.pth (is (cut off|damaged): (it ends in the middle of its '
                'pickle|its pickle has no)|was not loaded: it contains the pickle instruction)')
        hostile.row(tmp_path / 'w.pth', b'\x80\x02' + code)
        refused(tmp_path / 'w.pth', 'w.pth (is (cut off|damaged)|was not loaded)')


@pytest.mark.parametrize(('code', 'message'), [
    (b'\x80\x02.', 'contradicts itself at byte 3'), (b'\x80\x02h\x05.', 'does not have'),
    (b'\x80\x02\xfe.', 'has no instruction at byte 3'), (b'\x80\x02e.', 'contradicts itself'),
    (b'\x80\x02]K\x01K\x02u.', 'contradicts itself'), (b'\x80\x02NNa.', 'is not a list'),
    (b'\x80\x02](K\x01K\x02u.', 'not a dictionary'), (b'\x80\x02}(K\x01u.', 'not a dictionary'),
    (b'\x80\x02}]Ns.', 'has list as a key'), (b'\x80\x02X\x01\x00\x00\x00\xff.', 'no instruction'),
    (b'\x80\x02c_codecs\nencode\nNR.', 'without arguments'), (b'\x80\x02NQ.', 'where torch.save'),
    (b'\x80\x02c\xff\n\xff\n.', 'no instruction'),
])
def test_pickles_that_break_the_rules(code, message, tmp_path):
    refused(hostile.archive(tmp_path / 'w.pth', code), f'w.pth is damaged: .*{message}')


def test_rows_are_checked_as_far_as_they_can_be(tmp_path):
    code = hostile.program({'a': tensor()})
    assert read_file(hostile.row(tmp_path / 'w.pth', code))['a'].shape == (4,)
    refused(hostile.row(tmp_path / 'w.pth', code, keys=('1',)), 'its list of values')
    refused(hostile.row(tmp_path / 'w.pth', code, keys=('0', '0')), 'its list of values')
    refused(hostile.row(tmp_path / 'w.pth', code, keys=()), 'its list of values')
    refused(hostile.row(tmp_path / 'w.pth', code, content=bytes(20)), 'another number of values')
    refused(hostile.row(tmp_path / 'w.pth', code, content=bytes(8)), 'cut off: .* bytes are there')
    wide = hostile.program({'a': tensor(count=2**40, shape=(4,))})
    refused(hostile.row(tmp_path / 'w.pth', wide), 'is cut off: [0-9,]+ of 4,398,046,5')


def test_archives_that_lie(tmp_path):
    code = hostile.program({'a': tensor()})
    for members, message in (
            ({'data/0': bytes(12)}, 'x/data/0 in its archive has 12 bytes, expected 16'),
            ({'data/1': bytes(16)}, 'its archive lacks x/data/0')):
        hostile.archive(tmp_path / 'w.pth', code, members)
        refused(tmp_path / 'w.pth', f'w.pth is damaged: {message}')
    both = hostile.program({'a': tensor(), 'b': tensor(count=2, kind='DoubleStorage')})
    refused(hostile.archive(tmp_path / 'w.pth', both), 'the same values two types')
    content = bytearray(hostile.archive(tmp_path / 'w.pth', code).read_bytes())
    entry = content.index(b'PK\x01\x02', content.index(b'PK\x01\x02') + 1)
    for offset, value, message in (
            (8, b'\x01\x00', 'encrypted'), (42, b'\x05\x00\x00\x00', 'is not what was written'),
            (42, b'\xf0\xff\xff\xff', 'is not what was written|table of contents'),
            (24, b'\xff\xff\xff\x7f', 'it would unpack to'), (46, b'\xff', 'lacks|not what|tab'),
            (10, b'\x63\x00', 'in a way that torch does not know')):
        changed = bytearray(content)
        changed[entry + offset:entry + offset + len(value)] = value
        (tmp_path / 'w.pth').write_bytes(changed)
        refused(tmp_path / 'w.pth', f'w.pth is damaged: .*{message}')


def _safetensors(header, content=b''):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + content


def _entry(dtype='F32', shape=(1,), span=(0, 4), **more):
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(span), **more)


@pytest.mark.parametrize(('content', 'message'), [
    (_safetensors(b'{"a":' + 50_000 * b'[' + 50_000 * b']' + b'}'), 'nested too deeply|is no desc'),
    (_safetensors({'a': _entry(span=('0', '4'))}, bytes(4)), 'a has no data_offsets'),
    (_safetensors({'a': _entry(span=(None, None))}, bytes(4)), 'a has no data_offsets'),
    (_safetensors({'a': _entry(span=(0,))}, bytes(4)), 'a has no data_offsets'),
    (_safetensors({'a': _entry(span=(4, 0))}, bytes(4)), 'a has no data_offsets'),
    (_safetensors({'a': _entry(span=(-4, 0))}, bytes(4)), 'a has no data_offsets'),
    (_safetensors({'a': _entry(span=(0, 2**62))}, bytes(4)), 'a has no data_offsets'),
    (_safetensors({'a': _entry(shape='x')}, bytes(4)), 'a has no shape'),
    (_safetensors({'a': _entry(shape=(1.5,))}, bytes(4)), 'a has no shape'),
    (_safetensors({'a': _entry(shape=(True,))}, bytes(4)), 'a has no shape'),
    (_safetensors({'a': _entry(shape=(3,))}, bytes(4)), 'a has 4 bytes, but F32'),
    (_safetensors({'a': _entry(dtype=None)}, bytes(4)), 'a has no dtype'),
    (_safetensors({'a': _entry(dtype='F33')}, bytes(4)), 'damaged, or newer than .*F33'),
    (_safetensors({'a': None}), 'a is not a description'),
    (_safetensors({'a': []}), 'a is not a description'),
    (_safetensors({'a': _entry(), 'b': _entry()}, bytes(4)), 'b does not begin where a ends'),
    (_safetensors({'a': _entry(span=(4, 8))}, bytes(8)), 'a does not begin where the header ends'),
    (_safetensors({'a': _entry()}, bytes(5)), '1 bytes follow its last tensor'),
    (_safetensors({'a': _entry()}, bytes(3)), 'is cut off: '),
    (_safetensors({'__metadata__': {'a': 1}}), 'are not texts by name'),
    (_safetensors({'__metadata__': ['a']}), 'are not texts by name'),
    (_safetensors(b'{"a": {}, "a": {}}'), "its header has 'a' twice"),
    (_safetensors(b'{"a": \xff}'), 'its header is not JSON'),
    (_safetensors(b'{"a": NaN}'), 'a is not a description'),
    (struct.pack('<Q', 2**63) + b'{"a"', 'should have 9,223,372,036,854,775,808 bytes'),
    (struct.pack('<Q', 0) + b'{', 'is not JSON|is cut off or damaged'),
])
def test_safetensors_headers(content, message, tmp_path):
    (tmp_path / 'w.safetensors').write_bytes(content)
    text = refused(tmp_path / 'w.safetensors', message)
    assert 'Error:' not in text


def test_safetensors_that_hold_nothing_much(tmp_path):
    (tmp_path / 'w').write_bytes(_safetensors({'a': _entry(shape=(0,), span=(0, 0))}))
    assert read_file(tmp_path / 'w')['a'].shape == (0,)
    (tmp_path / 'w').write_bytes(_safetensors({'__metadata__': {'format': 'pt'}}))
    assert read_file(tmp_path / 'w') == {}


@pytest.mark.parametrize('read', [read_file, read_checkpoint, check_file])
def test_paths_that_are_no_files(read, tmp_path, monkeypatch):
    refused(tmp_path, 'is a folder, expected a file of weights; give the path', read)
    os.mkfifo(tmp_path / 'pipe')
    refused(tmp_path / 'pipe', 'is a pipe, a device or a socket', read)
    refused('/dev/zero', 'is a pipe, a device or a socket', read)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        monkeypatch.chdir(tmp_path)  # addresses of sockets are short
        listening.bind('socket')
    refused(tmp_path / 'socket', 'is a pipe, a device or a socket', read)
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    (tmp_path / 'nowhere').symlink_to(tmp_path / 'x.pth')
    for path in (tmp_path / 'x.pth', tmp_path / 'nowhere', tmp_path / 'loop',
                 tmp_path / ('x' * 300), 'a\0b'):
        with pytest.raises(FileNotFoundError, match='there is no checkpoint file'):
            read(path)


def test_checks_before_a_run_say_the_same(tmp_path):
    os.mkfifo(tmp_path / 'pipe.pth')
    (tmp_path / 'zeros.pth').write_bytes(bytes(10_000))
    (tmp_path / 'folder.pth').mkdir()
    for name, message in (('pipe.pth', 'is a pipe'), ('folder.pth', 'is a folder'),
                          ('zeros.pth', 'begins with nothing but zeros'),
                          ('x.pth', 'does not exist')):
        with pytest.raises(UserError, match=rf'The checkpoint .*{name} {message}') as caught:
            check_checkpoint_file(str(tmp_path / name))
        assert ('also holds' in str(caught.value)) == (name != 'zeros.pth')


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    path = saved(tmp_path / 'w.pth')

    def denied(*_, **__):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr('builtins.open', denied)
    refused(path, 'w.pth may not be read by this user; change its permissions')
    monkeypatch.setattr('os.stat', denied)
    refused(path, 'w.pth cannot be looked at: this user may not enter')


def test_zeros_and_names_that_are_no_text(tmp_path):
    path = tmp_path / 'w.pth'
    for size in (1, 511, 512, 100_000):
        path.write_bytes(bytes(size))
        refused(path, 'w.pth begins with nothing but zeros')
    odd = os.fsencode(tmp_path) + b'/w\xff.pth'
    with open(odd, 'wb') as file:
        file.write(b'\x80\x02' + bytes(10))
    with pytest.raises(WeightsError) as caught:
        read_file(odd)
    str(caught.value).encode()  # can be printed
    assert 'w\\udcff.pth is damaged' in str(caught.value)


@pytest.mark.parametrize('legacy', [False, True])
def test_devices(legacy, tmp_path):
    path = hostile.row if legacy else hostile.archive
    path = path(tmp_path / 'w.pth', hostile.program({'a': tensor(location='cuda:77')}))
    for place in ('cpu', torch.device('cpu'), {'cuda:77': 'cpu'}, lambda memory, location: memory):
        assert read_file(path, place)['a'].device.type == 'cpu'
    assert read_file(path, 'meta')['a'].is_meta
    for place in (None, {}, lambda memory, location: None, 'cuda:77', 'nowhere'):
        with pytest.raises(WeightsError, match=r"w.pth has tensors that cannot go to the device "
                           r"'(cuda:77|nowhere)' .*read it with map_location='cpu'"):
            read_file(path, place)


def test_states_that_are_shared_and_odd_but_plain_pass(tmp_path):
    shared = [1., 2.]
    value = dict(a=shared, b=[shared] * 100, c={(224, 224): 1, None: 2, 3.5: 4, True: 5},
                 text='x\ud800', long=2**200, deep=[[[[[[[[[[1]]]]]]]]]], namespace=None)
    value['keys'] = {(1, 2, 3, 4, 5, 6): 1, ((1, 'x'), 2.): 2, np.int64(3): 3, np.float32(.5): 4}
    value['by default'] = collections.defaultdict(list, {0: [1.]})
    value['never made'] = collections.defaultdict(None, a=1)
    value['set'] = {(1, 2), np.int64(7)}
    torch.save(value, tmp_path / 'w.pth')
    back = read_file(tmp_path / 'w.pth')
    assert back == value and back['a'] is back['b'][5]
    assert type(back['by default']) is type(back['never made']) is dict
    empty = called('collections', 'OrderedDict', [['a', 1], ['b', 2]])
    hostile.archive(tmp_path / 'w.pth', hostile.program({'x': empty}))
    assert read_file(tmp_path / 'w.pth')['x'] == dict(a=1, b=2)


ODD = (torch.flatten, lambda t: t[None], lambda t: torch.zeros(()), lambda t: torch.zeros(0),
       lambda t: torch.zeros(0, *t.shape[1:]), lambda t: torch.zeros(3, *t.shape[1:]),
       lambda t: t.to(torch.complex64), lambda t: t.bool())


@pytest.mark.parametrize('family', FAMILIES)
def test_weights_of_odd_shapes_and_names(family):
    net, right, refused = dense(family), weights(family), 0
    for seed in range(20):
        generator, changed = random.Random(seed), dict(right)
        for name in generator.sample(list(changed), generator.choice((1, 3, len(changed)))):
            changed[name] = generator.choice(ODD)(changed[name])
        if seed % 3 == 0:  # stages and layers that cannot be counted through
            changed.update({f'levels.{10**9}.blocks.3.x': torch.ones(1),
                            'layers.99999999.blocks.0.op.x': torch.ones(1)})
        start = time.process_time()
        try:
            fit_weights(net, dict(state_dict=changed), 'w.pth', strict=seed % 2 == 0)
        except WeightsError as error:
            refused += 1
            assert str(error).startswith('w.pth ') and '\n' not in str(error)
        assert time.process_time() - start < 5
    assert refused > 3


@pytest.mark.parametrize('name', ['module.' * 100_000 + 'a', 'a' * 2000, 'a\nb', '\ud800'])
def test_names_that_are_none(name):
    with pytest.raises(WeightsError, match='as the name of a tensor, expected') as caught:
        unwrap({name: torch.ones(1), 'b': torch.ones(1)})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize('note', ['x', 5, [], {}, {'original': 5}, {'original': '{'},
                                  {'original': '[]'}, {'original': '{"entry": 5, "prefix": ""}'}])
def test_notes_of_converted_files(note, tmp_path):
    torch.save(dict(meta=dict(mmhybrid=note, dataset_meta=dict(classes=5)),
                    state_dict={'a': torch.ones(1)}), tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match='w.pth (does not say how it was|says in its note)'):
        restore(tmp_path / 'w.pth', tmp_path / 'x.pth')
    publish(tmp_path / 'w.pth', tmp_path / 'y.safetensors')
