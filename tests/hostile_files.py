"""Files as an attacker writes them: pickles put together by hand, archives with any content."""
import contextlib
import io
import os
import struct
import sys
import zipfile
from dataclasses import dataclass


@dataclass(frozen=True)
class Global:
    """A name that the pickle looks up."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """A call of a name, and the state that its result is given."""

    called: object
    args: tuple
    state: object = None
    with_state: bool = False


@dataclass(frozen=True)
class Raw:
    """Instructions as they are."""

    code: bytes


def called(module, name, *args, **state):
    """``module.name(*args)``, then BUILD with ``state=...`` if that is given."""
    return Call(Global(module, name), args, state.get('state'), 'state' in state)


def tensor(count=4, shape=None, strides=None, offset=0, key='0', kind='FloatStorage',
           function='_rebuild_tensor_v2', location='cpu', more=(False, None)):
    """A tensor as torch.save describes it, and as it does not."""
    storage = Call('persistent', ('storage', Global('torch', kind), key, location, count))
    return called('torch._utils', function, storage, offset, shape or (count,), strides or (1,),
                  *more)


# What numpy pickles for float64, and what it never does.
DTYPE = called('numpy', 'dtype', 'f8', False, True,
               state=(3, '<', None, None, None, -1, -1, 0))


def dtype(code, *state):
    return called('numpy', 'dtype', code, False, True, state=state)


def array(shape, kind, content, by_columns=False):
    made = called('numpy.core.multiarray', '_reconstruct', Global('numpy', 'ndarray'), (0,), b'b')
    return Call(made.called, made.args, (1, shape, kind, by_columns, content), True)


def scalar(kind, content, place='core'):
    return called(f'numpy.{place}.multiarray', 'scalar', kind, content)


RECORD = dtype('V8', 3, '|', None, ('config',), {'config': (DTYPE, 0)}, 8, 1, 16)
RECORDS = {
    'record': scalar(RECORD, bytes(8)),
    'record2': scalar(RECORD, bytes(8), '_core'),
    'array of records': array((1,), RECORD, bytes(8)),
    'objects': scalar(dtype('O8', 3, '|', None, None, None, -1, -1, 63), bytes(8)),
    'array of objects': array((1,), dtype('O8', 3, '|', None, None, None, -1, -1, 63), [1]),
    'text': scalar(dtype('U5', 3, '<', None, None, None, 20, 4, 0), bytes(20)),
    'date': scalar(dtype('M8', 4, '<', None, None, None, -1, -1, 0, ({}, (b'D', 1, 1, 1))),
                   bytes(8)),
    'fields on a number': scalar(dtype('f8', 3, '<', None, ('a',), {'a': (DTYPE, 0)}, -1, -1, 0),
                                 bytes(8)),
    'object flag on a number': array((1,), dtype('f8', 3, '<', None, None, None, -1, -1, 63),
                                     bytes(8)),
    'another size': scalar(dtype('f8', 3, '<', None, None, None, 400, 1, 0), bytes(8)),
    'sub-array': scalar(dtype('f8', 3, '<', (DTYPE, (2,)), None, None, -1, -1, 0), bytes(8)),
}


def program(value):
    """Pickle of protocol 2, without memo."""
    return b'\x80\x02' + _code(value) + b'.'


def _code(value):
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, Global):
        return f'c{value.module}\n{value.name}\n'.encode('latin1')
    if isinstance(value, Call):
        if value.called == 'persistent':
            return _code(value.args) + b'Q'
        code = _code(value.called) + _code(value.args) + b'R'
        return code + _code(value.state) + b'b' if value.with_state else code
    if value is None or isinstance(value, bool):
        return {None: b'N', True: b'\x88', False: b'\x89'}[value]
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
        return b'\x8a' + bytes([len(data)]) + data
    if isinstance(value, float):
        return b'G' + struct.pack('>d', value)
    if isinstance(value, str):
        data = value.encode('utf-8', 'surrogatepass')
        return b'X' + struct.pack('<I', len(data)) + data
    if isinstance(value, bytes):
        return _code(called('_codecs', 'encode', value.decode('latin1'), 'latin1'))
    if isinstance(value, tuple):
        return b'(' + b''.join(map(_code, value)) + b't'
    if isinstance(value, list):
        return b'](' + b''.join(map(_code, value)) + b'e'
    assert isinstance(value, dict), value
    return b'}(' + b''.join(_code(each) for pair in value.items() for each in pair) + b'u'


def archive(path, code, members=None, compression=zipfile.ZIP_STORED, folder='x'):
    """What torch.save writes since 1.6, around any pickle."""
    with zipfile.ZipFile(path, 'w', compression) as opened:
        opened.writestr(f'{folder}/data.pkl', code)
        for name, content in (members or {'data/0': bytes(16)}).items():
            opened.writestr(f'{folder}/{name}', content)
    return path


def row(path, code, content=bytes(16), keys=('0',)):
    """What torch.save wrote before 1.6, around any pickle."""
    head = [program(0x1950a86a20f9469cfc6c), program(1001), program(dict(little_endian=True))]
    values = struct.pack('<q', len(content) // 4) + content if keys else b''
    path.write_bytes(b''.join(head) + code + program(list(keys)) + values)
    return path


def in_memory(code, **more):
    """An archive that is not a file."""
    file = io.BytesIO()
    archive(file, code, **more)
    return file


_SEEN, _WATCHING = [], [False]
_HARM = ('os.', 'subprocess.', 'socket.', 'ctypes.', 'shutil.', 'compile', 'exec', 'urllib.',
         'webbrowser.', 'pickle.find_class', 'pty.', 'marshal.')
_HARMLESS = ('os.scandir', 'os.listdir')


def _hook(event, args):
    if not _WATCHING[0]:
        return
    written = event == 'open' and not (isinstance(args[1], str) and args[1] in ('r', 'rb')
                                       or args[1] is None)
    known = event == 'import' and args[0].partition('.')[0] in sys.modules
    if event == 'compile' and args[1] == '<unknown>':
        return  # ast.parse, which runs nothing
    if event == 'exec' and os.path.isfile(args[0].co_filename):
        return  # a part of a package that is imported already
    if written or event == 'import' and not known or event.startswith(_HARM) and (
            event not in _HARMLESS):
        _SEEN.append((event, *(str(arg)[:80] for arg in args[:2])))


sys.addaudithook(_hook)  # once, and for good: hooks cannot be taken away


@contextlib.contextmanager
def watched():
    """Fail if something within runs code, imports a new package, or writes a file."""
    _SEEN.clear()
    _WATCHING[0] = True
    try:
        yield
    finally:
        _WATCHING[0] = False
    assert _SEEN == []
