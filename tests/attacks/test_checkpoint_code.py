"""Nothing in a checkpoint runs, and nothing but plain data comes out of it."""
import argparse
import collections
import os
import pathlib

import hostile_files as hostile
import numpy as np
import pytest
import torch
from hostile_files import DTYPE, RECORDS, Call, Global, Raw, array, called, scalar, tensor
from mmengine.logging import HistoryBuffer

from mmhybrid.weights import WeightsError, read_file
from mmhybrid.weights.tree import NotData, check_tree

WRITE = [hostile.archive, hostile.row]


def refused(path, message):
    with pytest.raises(WeightsError, match=message) as caught, hostile.watched():
        read_file(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and '\n' not in text
    return text


@pytest.mark.parametrize('write', WRITE)
@pytest.mark.parametrize('place', ['meta', 'message_hub', 'message_hub.runtime_info'])
@pytest.mark.parametrize('kind', RECORDS)
def test_numpy_never_sees_what_describes_memory(kind, place, write, tmp_path):
    value = RECORDS[kind]
    for key in reversed(place.split('.')):
        value = {key: value}
    path = write(tmp_path / 'w.pth', hostile.program({'state_dict': {'a': tensor()}, **value}))
    refused(path, rf'was not loaded: {place} is a numpy (record|value of the kind)|'
            'a numpy (dtype|array) has no state')


@pytest.mark.parametrize('value', [
    array((2,), DTYPE, bytes(8)), array((1, -1), DTYPE, b''), array((2**62, 4), DTYPE, b''),
    array(3, DTYPE, bytes(24)), array((1,), 'f8', bytes(8)), array((1,), DTYPE, 'żżżżżżżż'),
    scalar(DTYPE, bytes(7)), scalar(DTYPE, 5), scalar('f8', bytes(8)),
    array((2**40, 0, 2**40), DTYPE, bytes(8)),
    called('numpy.core.multiarray', '_reconstruct', Global('numpy', 'ndarray'), (5,), b'b'),
    called('numpy', 'dtype', 'f8'), called('numpy', 'dtype', 'f8', False, True, state=5),
    called('_codecs', 'encode', 'żółw', 'latin1'),
])
def test_arrays_have_the_bytes_that_they_need(value, tmp_path):
    refused(hostile.archive(tmp_path / 'w.pth', hostile.program({'a': value})),
            'w.pth is damaged: (a numpy|bytes)')


CODE = {
    'os': called('posix', 'system', 'true'),
    'python 2': called('__builtin__', 'execfile', 'x'),
    'eval': called('__builtin__', 'eval', '1'),
    'import': called('importlib', 'import_module', 'antigravity'),
    'encoding': called('_codecs', 'encode', 'x', 'antigravity'),
    'rot13': called('_codecs', 'encode', 'x', 'rot13'),
    'getattr': called('__builtin__', 'getattr', Global('argparse', 'Namespace'), 'mean'),
    'method': called('__builtin__', 'getattr', Global(
        'mmengine.logging.history_buffer', 'HistoryBuffer'), '__init__'),
    # a value that only calls itself so
    'imposter': called('__builtin__', 'getattr', called(
        'argparse', 'Namespace', state={'__name__': 'HistoryBuffer',
                                        '_statistics_methods': {'mean': 1}}), 'mean'),
    'array class': called('numpy.core.multiarray', '_reconstruct', Global('numpy', 'memmap'),
                          (0,), b'b'),
    'array itself': called('numpy', 'ndarray', (2**40,)),
    'state of a class': Call(Global('argparse', 'Namespace'), (), None),
    'call of a value': Call('text', ()),
    'call of a storage': Call(Global('torch', 'FloatStorage'), (10**12,)),
    'state of a list': Raw(b']}b'),
    'state of a name': Raw(b'cargparse\nNamespace\n}b'),
    'inst': Raw(b'(iposix\ngetcwd\n'), 'obj': Raw(b'(cposix\ngetcwd\no'),
    'extension': Raw(b'\x82\x01'), 'text id': Raw(b'Pabc\n'),
    'protocol 4 name': Raw(b'\x8c\x05posix\x8c\x06getcwd\x93)R'),
    'nested tensors': called('torch._utils', '_rebuild_tensor_v4', 1),
    'load': called('torch', 'load', 'x'), 'hub': called('torch.hub', 'load', 'x', 'y'),
    'from file': called('torch.storage', 'UntypedStorage', 10**12),
}


@pytest.mark.parametrize('write', WRITE)
@pytest.mark.parametrize('kind', CODE)
def test_nothing_is_called(kind, write, tmp_path):
    path = write(tmp_path / 'w.pth', hostile.program({'state_dict': {}, 'more': CODE[kind]}),
                 **dict(keys=()) if write is hostile.row else {})
    if kind == 'state of a class':
        assert read_file(path)['more'] == argparse.Namespace()
    else:
        refused(path, 'w.pth was not loaded: it contains .*could run code from the file.*TRUST')


@pytest.mark.parametrize(('value', 'what'), [
    (Global('argparse', 'Namespace'), 'the name argparse.Namespace'),
    (Global('torch', 'FloatStorage'), 'the name torch.FloatStorage'),
    (called('numpy', 'dtype', 'f8', False, True), 'a numpy value without its second half'),
    (called('__builtin__', 'getattr', Global('mmengine.logging.history_buffer', 'HistoryBuffer'),
            'mean'), 'a method'),
    (Call('persistent', ('storage', Global('torch', 'FloatStorage'), '0', 'cpu', 4)),
     'a part of a tensor'),
    (Raw(b']q\x00h\x00a'), 'contains itself'), (Raw(b'}q\x00X\x01\x00\x00\x00ah\x00s'),
                                                'contains itself'),
    (Raw(b'N' + 200 * b'\x85'), 'nested more than 100 levels deep'),
])
def test_only_plain_data_comes_out(value, what, tmp_path):
    path = hostile.archive(tmp_path / 'w.pth', hostile.program({'meta': [1, {'x': value}]}))
    refused(path, rf'was not loaded: meta\S* (is )?{what}')


def test_the_check_itself_knows_no_other_class():
    class Hidden(dict):
        pass

    for value in (Hidden(), np.void(b'x'), np.array([None]), np.array('a'), np.str_('a'),
                  np.zeros(1, [('a', 'f8')]), torch.zeros(2).to_sparse().storage_offset, object(),
                  collections.defaultdict(list), torch.nn.Linear(1, 1), os.system, print,
                  np.zeros(2).view(np.memmap), pathlib.Path('/x')):
        with pytest.raises(NotData, match=r'a\[0\] is'):
            check_tree({'a': [value]})
    shared = [1.0]
    check_tree({'a': [shared, shared], 'b': (shared, {3: shared}), 'c': np.float32(1)})
    laughs = []
    for _ in range(40):
        laughs = [laughs] * 10
    with pytest.raises(NotData, match='repeats its parts'):
        check_tree(laughs)


def test_states_hide_no_methods(tmp_path):
    value = called('collections', 'OrderedDict', state={
        'items': 'x', '__class__': 'x', 'copy': 1, '_metadata': {'': {'version': 1}}})
    space = called('argparse', 'Namespace', state={'__class__': 'x', 'lr': 0.1})
    back = read_file(hostile.archive(tmp_path / 'w.pth', hostile.program({'a': value, 'b': space})))
    assert vars(back['a']) == dict(_metadata={'': {'version': 1}})
    assert type(back['b']) is argparse.Namespace and back['b'].lr == 0.1


def test_curves_are_ours_and_their_methods_stay(tmp_path):
    HistoryBuffer()  # registers its methods
    before = dict(HistoryBuffer._statistics_methods)
    buffer = called('mmengine.logging.history_buffer', 'HistoryBuffer', state={
        '_log_history': array((2,), DTYPE, np.float64([1, 2]).tobytes()),
        '_count_history': array((2,), DTYPE, np.float64([1, 1]).tobytes()),
        'max_length': 5, '_statistics_methods': {'mean': 1}, 'mean': 1})
    back = read_file(hostile.archive(tmp_path / 'w.pth', hostile.program({'a': buffer})))['a']
    assert type(back) is HistoryBuffer and back.mean() == 1.5
    assert HistoryBuffer._statistics_methods == before
    for state in ({}, {'_log_history': [1], '_count_history': [1], 'max_length': 5}, None):
        bad = called('mmengine.logging.history_buffer', 'HistoryBuffer', state=state)
        refused(hostile.archive(tmp_path / 'w.pth', hostile.program({'a': bad})),
                'a loss curve has no values that mmengine writes')


@pytest.mark.parametrize('write', WRITE)
@pytest.mark.parametrize('value', [
    tensor(shape=(5,)), tensor(shape=(2, 3), strides=(2, 1)), tensor(offset=1), tensor(offset=-1),
    tensor(shape=(-1,)), tensor(strides=(-1,)), tensor(shape=(2**40,), strides=(2**40,)),
    tensor(shape=(2**70,), strides=(0,)), tensor(shape=(0, 2**62), strides=(1, 1)),
    tensor(shape=(4, 1)), tensor(shape=(1,) * 70, strides=(1,) * 70), tensor(shape=(2.0,)),
    tensor(shape=('a',)), tensor(count=-4, shape=(4,)), tensor(count=2**60, shape=(4,)),
    tensor(key='1'), tensor(key=5), tensor(location=5), tensor(function='_rebuild_tensor_v3'),
    tensor(kind='LongStorage'), called('torch._utils', '_rebuild_tensor_v2', 1, 2, 3),
    called('torch._utils', '_rebuild_parameter', 1, True, None),
    called('torch', 'device', 'system'), called('torch', 'device', 'cuda', -1),
    called('torch', 'Size', (1, -1)), called('torch', 'Size', 'ab'),
])
def test_tensors_stay_within_their_memory(value, write, tmp_path):
    path = write(tmp_path / 'w.pth', hostile.program({'a': value}))
    refused(path, 'w.pth is (damaged|cut off): ')


@pytest.mark.parametrize('legacy', [False, True])
def test_honest_views_come_back(legacy, tmp_path):
    base = torch.arange(24.).reshape(2, 3, 4)
    views = dict(view=base[1, 1:, ::2], turned=base.permute(2, 0, 1), wide=torch.ones(1).expand(50),
                 none=base[:0], one=base[1, 2, 3], base=base, whole=torch.ones(3).long(),
                 complex=torch.complex(base, base), flag=torch.tensor([True]), scalar=3 + 4j,
                 empty=np.array([]), turned_array=np.asfortranarray(np.arange(6).reshape(2, 3)),
                 big=np.arange(3, dtype='>i4'), some=frozenset('a'))
    torch.save(views, tmp_path / 'w.pth', _use_new_zipfile_serialization=not legacy)
    back = read_file(tmp_path / 'w.pth')
    for name, value in views.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(back[name], value) and back[name].stride() == value.stride()
        else:
            assert np.array_equal(back[name], value) and type(back[name]) is type(value)
    assert back['view'].untyped_storage().data_ptr() == back['base'].untyped_storage().data_ptr()


@pytest.mark.parametrize('legacy', [False, True])
def test_tensors_with_attributes_come_back_without(legacy, tmp_path):
    rate, noted = torch.nn.Parameter(torch.rand(3)), torch.rand(2, 3).t()
    rate._no_weight_decay, noted.note = True, 'x'
    buffer = torch.nn.Buffer(torch.arange(3)) if hasattr(torch.nn, 'Buffer') else torch.arange(3)
    torch.save(dict(rate=rate, noted=noted, buffer=buffer), tmp_path / 'w.pth',
               _use_new_zipfile_serialization=not legacy)
    back = read_file(tmp_path / 'w.pth')
    assert torch.equal(back['rate'], rate) and type(back['rate']) is torch.nn.Parameter
    assert torch.equal(back['noted'], noted) and not hasattr(back['noted'], 'note')
    assert torch.equal(back['buffer'], torch.arange(3)) and not vars(back['rate'])


@pytest.mark.parametrize(('make', 'kind', 'args'), [
    (Global('torch', 'Size'), Global('torch', 'Tensor'), ((1,),)),
    (Global('torch._utils', '_rebuild_tensor_v2'), Global('torch', 'Size'), ()),
    (Global('torch._utils', '_rebuild_tensor_v2'), Global('torch', 'Tensor'), [1]),
    (Global('torch', 'Tensor'), Global('torch', 'Tensor'), (2**40,)),
])
def test_other_makers_of_tensors(make, kind, args, tmp_path):
    path = hostile.archive(tmp_path / 'w.pth', hostile.program(
        {'a': called('torch._tensor', '_rebuild_from_type_v2', make, kind, args, {})}))
    refused(path, 'a tensor of a class of its own; expected ordinary dense tensors')
    hostile.archive(path, hostile.program({'a': called('torch', 'Tensor', 2**40)}))
    refused(path, 'a tensor of a form that torch.save does not write')


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_newer_protocols(protocol, legacy, tmp_path):
    weights = torch.rand(3, 4)
    value = dict(a=weights, b=weights.t(), bytes=bytes(300), set={1, (2, 'x')}, none=set(),
                 frozen=frozenset([3]), text='x' * 300, size=torch.Size([1, 2]), half=np.float16(2),
                 kind=torch.float16, tuple=(1, 2, 3, 4), namespace=argparse.Namespace(x=[1]))
    if protocol < 5:  # there numpy writes arrays in another way
        value['array'] = np.arange(3.)
    torch.save(value, tmp_path / 'w.pth', pickle_protocol=protocol,
               _use_new_zipfile_serialization=not legacy)
    back = read_file(tmp_path / 'w.pth')
    assert back['a'].untyped_storage().data_ptr() == back['b'].untyped_storage().data_ptr()
    for name in {'a', 'b', 'array'} & set(value):
        assert np.array_equal(back.pop(name), value.pop(name))
    assert back == value and type(back['half']) is np.float16


@pytest.mark.parametrize(('code', 'message'), [
    (b'\x80\x06N.', 'pickle protocol 6'), (b'\x80\x04NN\x93.', 'something that is not a name'),
    (b'\x80\x04](N\x90.', 'adds to something that is not a set'),
    (b'\x80\x04(]\x91.', 'has list as a key'), (b'\x80\x04\x8f(]\x90.', 'has list as a key'),
    (b'\x80\x04\x94.', 'contradicts itself'),
    (b'\x80\x04\x8e' + b'\xff' * 7 + b'\x0fx.', 'has no instruction|ends in the middle'),
])
def test_newer_protocols_that_break_the_rules(code, message, tmp_path):
    refused(hostile.archive(tmp_path / 'w.pth', code), message)


def test_long_texts_of_python_2(tmp_path):
    content = np.arange(100.).tobytes()
    text = Raw(b'T' + len(content).to_bytes(4, 'little') + content)  # BINSTRING
    path = hostile.archive(tmp_path / 'w.pth', hostile.program(
        {'a': hostile.array((100,), hostile.DTYPE, text)}))
    assert np.array_equal(read_file(path)['a'], np.arange(100.))


@pytest.mark.parametrize(('value', 'what'), [
    (torch.eye(2).to_sparse(), 'a sparse tensor'), (torch.eye(2).to_sparse_csr(), 'a sparse'),
    (torch.quantize_per_tensor(torch.ones(2), 1., 0, torch.qint8), 'a quantized tensor'),
    (torch.ones(2, device='meta'), "a tensor of the device 'meta'"),
    (torch.ones(2, dtype=torch.complex64).conj(), 'a tensor that is conjugated'),
    (torch.ones(2, dtype=torch.complex64).conj().imag, 'a tensor that is conjugated or negated'),
])
def test_tensors_that_are_no_weights(value, what, tmp_path):
    torch.save(dict(a=value), tmp_path / 'w.pth')
    text = refused(tmp_path / 'w.pth', rf'contains {what}.*expected ordinary dense tensors')
    assert 'run code' not in text


@pytest.mark.plain_empty  # an older torch cannot fill them
def test_float8_comes_back(tmp_path):
    value = torch.ones(3).to(torch.float8_e5m2)
    torch.save(dict(a=value), tmp_path / 'w.pth')
    assert torch.equal(read_file(tmp_path / 'w.pth')['a'].float(), value.float())


@pytest.mark.parametrize('kind', ['qint8', 'bits8', 'int1', 'complex32', 'float64'])
def test_other_young_dtypes_do_not(kind, tmp_path):
    storage = Call('persistent', ('storage', Global('torch.storage', 'UntypedStorage'), '0', 'cpu',
                                  16))
    value = called('torch._utils', '_rebuild_tensor_v3', storage, 0, (2,), (1,), False, None,
                   Global('torch', kind if hasattr(torch, kind) else 'float64'))
    path = hostile.archive(tmp_path / 'w.pth', hostile.program({'a': value}))
    refused(path, 'contains a tensor of the dtype torch')


def test_messages_are_one_line_that_any_log_can_show(tmp_path):
    path = hostile.archive(tmp_path / 'w\n.pth', hostile.program(
        {'a\nb\x1b[31m\ud800': hostile.RECORDS['record']}))
    with pytest.raises(WeightsError) as caught:
        read_file(path)
    assert r'w\n.pth was not loaded: a\nb\x1b[31m\ud800 is a numpy' in str(caught.value)
    assert str(caught.value).isprintable()
