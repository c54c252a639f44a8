"""Web servers that lie, stall or flood, and folders in which somebody has laid traps."""
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from mmhybrid import private_files
from mmhybrid.weights import WeightsError, fetch, transfer
from mmhybrid.weights import download as module
from mmhybrid.weights.addresses import parse_address, shown
from mmhybrid.weights.download import download
from mmhybrid.weights.sources import HubAddress

POSIX = pytest.mark.skipif(os.name != 'posix', reason='owners, links and locks are of POSIX')


class Server:
    """Answers each connection with the next of ``answers`` (the last again and again).

    An answer is what to send, byte by byte as given, or a function of (socket, request).
    """

    def __init__(self):
        self.socket = socket.create_server(('127.0.0.1', 0))
        self.url = f'http://127.0.0.1:{self.socket.getsockname()[1]}'
        self.answers, self.requests = [], []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        with suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with suppress(OSError), connection:
            head = b''
            while b'\r\n\r\n' not in head and (more := connection.recv(65536)):
                head += more
            self.requests.append(head.decode('latin1'))
            answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
            if callable(answer):
                answer(connection, self.requests[-1])
            else:
                connection.sendall(answer)

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(5)

    def ranges(self):
        return [header(request, 'Range') for request in self.requests]


def header(request, name):
    found = re.search(rf'^{name}: (.*)\r$', request, re.MULTILINE | re.IGNORECASE)
    return found and found[1]


def answer(body=b'', status='200 OK', length=True, **headers):
    lines = [f'HTTP/1.1 {status}', *(f'{k.replace("_", "-")}: {v}' for k, v in headers.items())]
    if length:
        lines.append(f'Content-Length: {len(body) if length is True else length}')
    return '\r\n'.join([*lines, '', '']).encode('latin1') + body


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setattr(module.time, 'sleep', lambda seconds, sleep=time.sleep: sleep(0.001))
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


@pytest.fixture(scope='module')
def file():
    """The bytes of a real file of weights."""
    buffer = io.BytesIO()
    torch.save({'w': torch.arange(30_000.)}, buffer)
    return buffer.getvalue()


def kept(cache):
    return sorted(x.name for x in cache.glob('*') if x.suffix != '.lock' and x.is_file())


def refusal(server, path='/w.pth', **arguments):
    """The one sentence with which a download ends."""
    with pytest.raises(WeightsError) as caught:
        download(f'{server.url}{path}', **arguments)
    text = str(caught.value)
    assert '\n' not in text and f'{server.url}/' in text and '; ' in text, text
    return text


def cut(file, tag='"one"', at=1000):
    """An answer that hangs up after so many bytes."""
    return answer(file[:at], length=len(file), ETag=tag)


def rest(file, begin=1000, text=None, **headers):
    """An honest continuation, or one with another Content-Range."""
    text = f'bytes {begin}-{len(file) - 1}/{len(file)}' if text is None else text
    headers = {'Content_Range': text, 'ETag': '"one"', **headers}
    return answer(file[begin:], '206 Partial Content', **headers)


def continued(server, cache, file, *answers):
    """Fetch with a first answer that is cut after 1,000 bytes; give what is kept at the end."""
    server.answers = [cut(file), *answers]
    assert download(f'{server.url}/w.pth').read_bytes() == file
    assert len(kept(cache)) == 1 and kept(cache)[0].endswith('-w.pth')
    return server.ranges()


# --- continuing ---

def test_an_honest_continuation(server, cache, file):
    assert continued(server, cache, file, rest(file)) == [None, 'bytes=1000-']


def test_a_server_may_send_less_than_it_was_asked_for(server, cache, file):
    first = answer(file[1000:1500], '206 Partial Content', ETag='"one"',
                   Content_Range=f'bytes 1000-1499/{len(file)}')
    ranges = continued(server, cache, file, first, rest(file, 1500))
    assert ranges == [None, 'bytes=1000-', 'bytes=1500-']


@pytest.mark.parametrize('text', [
    'bytes 0-{last}/{size}', 'bytes 999-{last}/{size}', 'bytes 1001-{last}/{size}',
    'bytes 1000-{last}/9999999', 'bytes 1000-{size}/{size}', 'bytes 1000-900/{size}',
    'bytes 1000-{last}/*', 'bytes */{size}', 'items 1000-{last}/{size}', 'bytes -1-{last}/{size}',
    'bytes 1000-{last}', 'bytes', '1000-{last}/{size}', 'bytes 1000-{last}/-5', '', '\xb2', '*'])
def test_the_wrong_part_is_never_appended(server, cache, file, text):
    wrong = rest(file, text=text.format(last=len(file) - 1, size=len(file)))
    ranges = continued(server, cache, file, wrong, answer(file, ETag='"one"'))
    assert ranges == [None, 'bytes=1000-', None]  # it starts over


@pytest.mark.parametrize('change', [dict(ETag='"two"'), dict(ETag='', Last_Modified='"two"'),
                                    dict(Content_Encoding='gzip')])
def test_part_of_another_version_is_not_appended(server, cache, file, change):
    ranges = continued(server, cache, file, rest(file, **change), answer(file))
    assert ranges == [None, 'bytes=1000-', None]


def test_a_part_without_a_tag_is_the_one_that_was_asked_for(server, cache, file):
    bare = answer(file[1000:], '206 Partial Content',
                  Content_Range=f'bytes 1000-{len(file) - 1}/{len(file)}')
    assert continued(server, cache, file, bare) == [None, 'bytes=1000-']


def test_several_parts_in_one_answer(server, cache, file):
    many = answer(b'--x\r\n\r\nabc\r\n--x--', '206 Partial Content',
                  Content_Type='multipart/byteranges; boundary=x')
    assert continued(server, cache, file, many, answer(file)) == [None, 'bytes=1000-', None]


def test_a_server_that_only_sends_wrong_parts(server, cache, file):
    server.answers = [rest(file)]
    assert re.search(r'sent another part \(Content-Range .*\) than was asked for \(the whole '
                     r'file\); try again', refusal(server))
    assert kept(cache) == [] and len(server.requests) == 4


@pytest.mark.parametrize('answers', [
    lambda file: [answer(file, ETag='"two"')],  # does not know ranges
    lambda file: [answer(status='416 Range Not Satisfiable'), answer(file)],
    lambda file: [answer(status='416 No', Content_Range='bytes */5'), answer(file)]])
def test_whole_file_instead_of_a_part(server, cache, file, answers):
    continued(server, cache, file, *answers(file))


@pytest.mark.parametrize(('status', 'text'), [
    ('304 Not Modified', 'answered 304 Not Modified; download it elsewhere'),
    ('204 No Content', 'answered 204 No Content; download it elsewhere'),
    ('300 Choose', 'answered 300 Multiple Choices; '),
    ('418 \x1b[2Jteapot', "answered 418 I'm a Teapot; "), ('799 Odd', 'answered 799; '),
    ('404 Not Found', 'answered 404 Not Found; check the address'),
    ('407 Proxy', 'answered 407 Proxy Authentication Required; '),
    ('429 Slowly', 'answered 429 Too Many Requests; try again')])
def test_answers_that_bring_no_file(server, cache, status, text):
    server.answers = [answer(status=status, length=False)]
    assert text in refusal(server)
    assert len(server.requests) == (4 if status[:3] in ('429', '799') else 1)
    assert kept(cache) == []


@pytest.mark.parametrize('notes', [
    b'', b'{', b'null', b'[]', b'7', b'"x"', b'\xff\xfe', b'[' * 100_000, b'{}', b'x' * 200_000,
    b'{"tag": 5, "size": 9000}', b'{"tag": "a\\r\\nHost: b", "size": null}',
    b'{"tag": "\\u00e9", "size": null}', b'{"tag": "W/\\"a\\"", "size": null}',
    b'{"tag": "a", "size": "9"}', b'{"tag": "a", "size": -1}', b'{"tag": "a", "size": 3}',
    b'{"tag": "a", "size": true}', b'{"tag": "a", "size": 1e400}',
    b'{"tag": "a", "size": null, "sha256": [1]}', b'{"tag": "a", "size": null, "sha256": "z"}'])
def test_damaged_notes_start_over(server, cache, file, notes):
    server.answers = [answer(status='503 Later')]
    with pytest.raises(WeightsError):
        download(f'{server.url}/w.pth')
    name = hashlib.sha256(f'{server.url}/w.pth'.encode()).hexdigest()[:8] + '-w.pth'
    (cache / f'{name}.part').write_bytes(b'of another file')
    (cache / f'{name}.part.json').write_bytes(notes)
    server.answers, server.requests = [answer(file)], []
    assert download(f'{server.url}/w.pth').read_bytes() == file
    assert server.ranges() == [None] and kept(cache) == [name]


def test_notes_of_another_file_do_not_mix_two(server, cache, file):
    server.answers = [cut(file), answer(status='403 No')]
    refusal(server)
    (notes,) = cache.glob('*.part.json')
    notes.write_text(json.dumps(dict(tag='"else"', size=len(file), sha256=None)))
    # an honest server answers with all of it, as the condition does not hold
    server.answers = [lambda connection, request: connection.sendall(
        rest(file) if header(request, 'If-Range') == '"one"' else answer(file))]
    assert download(f'{server.url}/w.pth').read_bytes() == file


def test_stopped_between_the_last_byte_and_the_checks(server, cache, file, monkeypatch):
    server.answers = [answer(file, ETag='"one"')]
    with monkeypatch.context() as patch:
        patch.setattr(module, 'check_file', lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            download(f'{server.url}/w.pth')
    assert download(f'{server.url}/w.pth').read_bytes() == file and len(server.requests) == 1


def test_without_a_tag_nothing_is_continued(server, cache, file):
    server.answers = [answer(file[:1000], length=len(file)), answer(file)]
    assert download(f'{server.url}/w.pth').read_bytes() == file
    assert server.ranges() == [None, None]


# --- what HTTP does not allow ---

@pytest.mark.parametrize(('sent', 'text'), [
    (b'', 'closed the connection without an answer'),
    (b'\x00\xff' * 50, 'does not speak HTTP'),
    (b'SSH-2.0-OpenSSH_9.6\r\n', 'does not speak HTTP'),
    (b'HTTP/7.0 200 OK\r\n\r\n', 'does not speak HTTP 1'),
    (b'HTTP/1.1 abc OK\r\n\r\n', 'does not speak HTTP'),
    (b'HTTP/1.1 200 ' + b'x' * 70_000, 'an endless line'),
    (b'HTTP/1.1 200 OK\r\nA: ' + b'x' * 70_000, 'an endless line'),
    (b'HTTP/1.1 200 OK\r\n' + b'A: b\r\n' * 200 + b'\r\n', 'got more than 100 headers'),
    (b'HTTP/1.1 100 Continue\r\n\r\n' * 60_000, 'without content'),
    (answer(b'5\r\nPK\x03', length=False, Transfer_Encoding='chunked'), 'ended in the middle'),
    (answer(b'zz\r\nPK\r\n', length=False, Transfer_Encoding='chunked'), 'ended in the middle'),
    (answer(b'0\r\n' + b'A: b\r\n' * 400_000, length=False, Transfer_Encoding='chunked'),
     'without content')])
def test_what_is_no_http(server, cache, sent, text):
    server.answers = [sent]
    assert text in refusal(server) and len(server.requests) == 4
    assert [x for x in kept(cache) if x.endswith('.pth')] == []


@pytest.mark.parametrize('lengths', [('-5',), ('abc',), ('1e3',), ('5', '6'), ('5, 6',), ('',),
                                     ('0x10',), ('9' * 5000,), ('\xb2',)])
def test_odd_lengths(server, cache, file, lengths):
    lines = '\r\n'.join(f'Content-Length: {x}' for x in lengths)
    server.answers = [f'HTTP/1.1 200 OK\r\n{lines}\r\n\r\n'.encode('latin1') + file]
    assert re.search('gives the length .*expected one number of bytes; ', refusal(server))
    assert kept(cache) == [] and len(server.requests) == 1


def test_good_answers_in_other_forms(server, file):
    size = len(file)
    chunks = b''.join(b'%x;extension\r\n%s\r\n' % (len(x), x) for x in (file[:7], file[7:]))
    good = [f'HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nContent-Length: {size}\r\n\r\n'.encode()
            + file, b'HTTP/1.0 200\r\n\r\n' + file,
            answer(file, Content_Encoding='identity'),
            answer(chunks + b'0\r\nA: trailer\r\n\r\n', length=False, Transfer_Encoding='chunked'),
            answer(chunks + b'0\r\n\r\n', length=3, Transfer_Encoding='chunked'),
            answer(file + b'more than was announced', length=size),
            b'HTTP/1.1 100 Continue\r\n\r\n' + answer(file)]
    for number, each in enumerate(good):
        server.answers, server.requests = [each], []
        assert download(f'{server.url}/{number}.pth').read_bytes() == file, number


def test_shorter_than_announced(server, cache, file):
    server.answers = [answer(file[:-1], length=len(file)), answer(status='500 x')]
    assert 'answered 500' in refusal(server)
    server.answers = [answer(file[:-1], length=len(file))]
    size = f'{len(file):,}'
    assert f'ended after {len(file) - 1:,} of {size} bytes ({len(file) - 1:,} bytes are kept' in (
        refusal(server))


def test_compressed_although_asked_not_to(server, cache, file):
    server.answers = [answer(gzip.compress(file), Content_Encoding='gzip')]
    assert "sends it compressed (Content-Encoding 'gzip') although it was asked not to; " in (
        refusal(server))
    assert header(server.requests[0], 'Accept-Encoding') == 'identity'
    assert kept(cache) == []


# --- stalling and flooding ---

def trickle(connection, _, first=None):
    connection.sendall(first or answer(length=900_000, ETag='"one"'))
    while True:
        connection.sendall(b'P')
        threading.Event().wait(0.01)


def test_a_trickle_is_ended(server, cache, monkeypatch):
    monkeypatch.setattr(transfer, '_WINDOW', 0.15)
    monkeypatch.setattr(transfer, '_SLOWEST', 100_000)
    server.answers = [trickle]
    text = refusal(server)
    assert re.search(r'only \d+ bytes came in 0 s \(\d+ bytes are kept, the next try cont', text)
    assert server.ranges()[0] is None and server.ranges()[1].startswith('bytes=')


def test_a_trickle_of_headers_is_ended(server, monkeypatch):
    monkeypatch.setattr(transfer, '_WINDOW', 0.15)
    monkeypatch.setattr(transfer, '_SLOWEST', 100_000)
    server.answers = [lambda connection, request: trickle(connection, request, b'HTTP/1.1 200 O')]
    assert re.search(r'only \d+ bytes came in 0 s; ', refusal(server))


def test_silence_is_ended(server, monkeypatch):
    monkeypatch.setattr(transfer, '_TIMEOUT', 0.1)
    gone = threading.Event()
    server.answers = [lambda connection, request: gone.wait(5)]
    assert 'timed out; try again' in refusal(server)
    gone.set()


def test_slow_but_steady_is_fine(server, file, monkeypatch):
    """Slower than the limit for a while, and a pause before the first byte."""
    monkeypatch.setattr(transfer, '_WINDOW', 0.2)
    monkeypatch.setattr(transfer, '_SLOWEST', 5000)

    def slowly(connection, _):
        threading.Event().wait(0.3)
        connection.sendall(answer(length=len(file)))
        for begin in range(0, len(file), 10_000):
            connection.sendall(file[begin:begin + 10_000])
            threading.Event().wait(0.04)

    server.answers = [slowly]
    assert download(f'{server.url}/w.pth').read_bytes() == file and len(server.requests) == 1


def test_too_large(server, cache, file, monkeypatch):
    monkeypatch.setenv(module.LARGEST_VARIABLE, '0.0002')
    server.answers = [answer(b'PK', length=200_001)]
    assert re.search('it has 200,001 bytes, and 0.0002 GB are allowed; if that is right, set '
                     f'{module.LARGEST_VARIABLE} to more', refusal(server))

    def flood(connection, _):
        connection.sendall(answer(length=False))
        while True:
            connection.sendall(bytes(5000))

    server.answers = [flood]
    assert 'it does not end, and 0.0002 GB are allowed' in refusal(server)
    assert kept(cache) == []
    server.answers = [answer(file)]
    assert download(f'{server.url}/w.pth').read_bytes() == file  # not too large


@pytest.mark.parametrize('value', ['much', '0', '-1', 'nan'])
def test_the_limit_must_be_a_number(server, file, monkeypatch, value):
    monkeypatch.setenv(module.LARGEST_VARIABLE, value)
    server.answers = [answer(file)]
    with pytest.raises(WeightsError, match=f"{module.LARGEST_VARIABLE} is '{value}', expected"):
        download(f'{server.url}/w.pth')


def test_larger_than_the_disk(server, cache, monkeypatch):
    server.answers = [answer(b'PK', length=31 * 10 ** 9)]
    usage = module.shutil.disk_usage('.')._replace(free=10 ** 9)
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda folder: usage)
    assert re.search('31,000,000,000 bytes are to come and .* has room for 1,000,000,000; make',
                     refusal(server))
    assert kept(cache) == []


def run_forked(work, *arguments):
    """Start a process as the kernel does, without importing everything again."""
    process = multiprocessing.get_context('fork').Process(target=work, args=arguments)
    process.start()
    return process


def download_with_small_files(url, results):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        download(url)
    except WeightsError as error:
        results.send(str(error))


@POSIX
def test_a_disk_that_fills_up(server, cache, file):
    """A limit on the size of files makes writing fail as a full disk does."""
    server.answers = [answer(file, ETag='"one"')]
    ours, theirs = multiprocessing.Pipe()
    process = run_forked(download_with_small_files, f'{server.url}/w.pth', theirs)
    assert ours.poll(60)
    assert re.search('w.pth cannot be kept: File too large .1,000 bytes are kept, the next try '
                     'continues there.; make room', ours.recv())
    process.join()
    server.answers, server.requests = [rest(file)], []
    assert download(f'{server.url}/w.pth').read_bytes() == file
    assert server.ranges() == ['bytes=1000-']


# --- redirections ---

def led(server, *targets, status='302 Found'):
    server.answers = [answer(status=status, Location=target) for target in targets]


@pytest.mark.parametrize('target', [
    'ftp://127.0.0.1/w.pth', 'file:///etc/passwd', 'data:,PK', 'gopher://x/', 'http://[',
    'http://127.0.0.1:port/', 'javascript:1', 'ftp://\x1b[2J'])
def test_redirections_to_elsewhere_are_not_followed(server, cache, target):
    led(server, target)
    text = refusal(server)
    assert 'it redirects to ' in text and 'only valid addresses of http and https' in text
    assert '\x1b' not in text and len(server.requests) == 1 and kept(cache) == []


def test_redirections_without_end(server, cache):
    led(server, '/w.pth')
    assert 'it redirects more than 10 times; check the address' in refusal(server)
    assert len(server.requests) == 11
    server.answers = [answer(status='301 Moved')]
    assert 'redirects without saying where' in refusal(server, '/2.pth')


def test_https_is_not_left():
    secure, plain = parse_address('https://a.org/w'), parse_address('http://a.org/w')
    with pytest.raises(WeightsError, match='https://a.org/w was not fetched: it redirects from '
                       'https to http://b.org/x, where anybody'):
        transfer._next(secure, secure, 'http://b.org/x')
    assert transfer._next(plain, plain, 'https://b.org/x').url == 'https://b.org/x'
    assert transfer._next(secure, secure, '//b.org/x').url == 'https://b.org/x'
    with pytest.raises(WeightsError, match='from https'):
        transfer._next(plain, secure, 'http://a.org/w')  # on the way back


@pytest.mark.parametrize('status', ['301 x', '302 x', '303 x', '307 x', '308 x'])
def test_good_redirections(server, file, status):
    server.answers = [answer(status=status, Location='/f\xc3\xa4 r.pth?a=b c'), answer(file)]
    assert download(f'{server.url}/w.pth').read_bytes() == file
    assert server.requests[1].startswith('GET /f%C3%A4%20r.pth?a=b%20c HTTP/1.1')


def test_a_login_stays_with_its_server(server, file):
    other = Server()
    other.answers = [answer(file)]
    server.answers = [answer(status='302 x', Location='/b'),
                      answer(status='302 x', Location=f'{other.url}/w.pth')]
    address = server.url.replace('//', '//me:pass%40word@')
    assert download(f'{address}/w.pth').read_bytes() == file
    other.close()
    assert [header(x, 'Authorization') for x in server.requests] == ['Basic bWU6cGFzc0B3b3Jk'] * 2
    assert header(other.requests[0], 'Authorization') is None


# --- addresses ---

@pytest.mark.parametrize(('address', 'sent'), [
    ('http://h/a b.pth', 'http://h/a%20b.pth'), ('http://h/a%20b.pth', 'http://h/a%20b.pth'),
    ('http://h/%23v2/w.pth', 'http://h/%23v2/w.pth'), ('http://h/100%.pth', 'http://h/100%25.pth'),
    ('http://h/ä.pth', 'http://h/%C3%A4.pth'), ('http://h/w?file=a/b c', 'http://h/w?file=a/b%20c'),
    ('http://h/w?a=%2F&b=+', 'http://h/w?a=%2F&b=+'), ('HTTP://h/w', 'http://h/w'),
    ('http://bücher.de/w', 'http://xn--bcher-kva.de/w'), ('http://[::1]:80/w', 'http://[::1]:80/w'),
    ('http://h:/w', 'http://h/w'), ('http://h', 'http://h'), ('http://h/a\x00\x7f', 'http://h/a%00%7F'),
    ('http://me:x@h:1/w#sha256=1', 'http://h:1/w'), ('http://h/a@2,b=(c)', 'http://h/a@2,b=(c)')])
def test_how_addresses_are_sent(address, sent):
    assert parse_address(address).url == sent


@pytest.mark.parametrize('address', [
    'http://', 'http:///w', 'https://:80/w', 'http://h:port/w', 'http://h:99999/w', 'http://h:-1/w',
    'http://[::1/w', 'http://a b/w', 'http://..../w', 'http://h\\x/w', f'http://{"a" * 300}/w',
    'http://a..b/w', 'http://me:se#cret@h/w', 'http://me:se/cret@h/w', 'http://me:se?cret@h/w'])
def test_addresses_that_are_none(address):
    with pytest.raises(WeightsError, match='^got the address http.*not valid.*expected') as caught:
        fetch(address)
    assert 'cret' not in str(caught.value) and 'me:' not in str(caught.value)


def test_secrets_are_not_shown(server, cache, caplog, capfd):
    server.answers = [answer(status='404 No')]
    address = server.url.replace('//', '//me:secret@') + '/w.pth?token=secret&x=1#secret'
    with pytest.raises(WeightsError) as caught:
        fetch(address)
    assert f'{server.url}/w.pth?... could not be fetched' in str(caught.value)
    server.answers = [answer(b'<html>')]
    with pytest.raises(WeightsError, match=r'/w.pth\?\.\.\. is a web page') as again:
        fetch(address)
    told = f'{caught.value}{again.value}{caplog.text}{"".join(capfd.readouterr())}'
    assert 'secret' not in told
    with pytest.raises(WeightsError) as caught:
        fetch('s3://me:secret@bucket/w.pth?secret')
    assert 'got s3://***@bucket/w.pth?..., expected' in str(caught.value)
    assert len(shown('http://h/' + 'x' * 10_000)) < 200


@pytest.mark.parametrize(('path', 'name'), [
    ('/..', 'weights'), ('/.', 'weights'), ('/', 'weights'), ('', 'weights'),
    ('/a%2F..%2F..%2Fetc%2Fpasswd', 'a_.._.._etc_passwd'), ('/%2Fetc%2Fpasswd', '_etc_passwd'),
    ('/..%5C..%5Cw.pth', '_.._w.pth'), ('/C:%5Cw.pth', 'C__w.pth'), ('/w%00.pth', 'w_.pth'),
    ('/%FF.pth', '_.pth'), ('/ä.pth', '_.pth'), ('/.bashrc', 'bashrc'), ('/w.pth...', 'w.pth'),
    ('/' + 'x' * 5000 + '-0676ba61.pth', 'x' * 87 + '-0676ba61.pth'), ('/w.pth?a=/b', 'w.pth')])
def test_names_of_files(server, cache, file, path, name):
    server.answers = [answer(file)]
    found = download(f'{server.url}{path}', sha256=hashlib.sha256(file).hexdigest()[:8]
                     ) if '0676' in path else download(f'{server.url}{path}')
    assert found.parent == cache and found.name[9:] == name and found.read_bytes() == file


def test_long_text_is_no_path():
    for text in ('x' * 5000, 'a\0b', '~nobody-of-this-name/w.pth'):
        with pytest.raises(FileNotFoundError, match='there is no checkpoint file'):
            fetch(text)


@pytest.mark.parametrize('address', ['hf://a/b/../c', 'hf://a/b/./c', 'hf://a/b//c', 'hf://../b/c',
                                     'hf://a/..', 'hf://a/b/c\0d'])
def test_addresses_of_the_hub_have_no_dots(address):
    with pytest.raises(WeightsError, match='expected hf://organisation/repository'):
        HubAddress.parse(address)


def hub_error(*names, **attributes):
    """An error as huggingface_hub raises it: its class, and those above it, by name."""
    kind = Exception
    for name in reversed(names):
        kind = type(name, (kind,), {})
    error = kind('Client Error. (Request ID: Root=1-abc)\n\nSee https://hub/?token=secret')
    vars(error).update(attributes)
    return error


@pytest.mark.parametrize(('error', 'reason'), [
    (hub_error('GatedRepoError', 'RepositoryNotFoundError', 'HfHubHTTPError'), 'its conditions are '
     'not accepted; accept them on its page and sign in'),
    (hub_error('RepositoryNotFoundError', 'HfHubHTTPError'), 'there is no such repository, or it'),
    (hub_error('RevisionNotFoundError', 'HfHubHTTPError'), 'the repository has no such revision; '),
    (hub_error('RemoteEntryNotFoundError', 'HfHubHTTPError', 'EntryNotFoundError'),
     'the repository has no such file; check the name'),
    (hub_error('LocalEntryNotFoundError', 'EntryNotFoundError', 'FileNotFoundError'),
     'it is not in the cache of the hub, and the hub cannot be asked; check the connection'),
    (hub_error('OfflineModeIsEnabled', 'ConnectionError'), 'HF_HUB_OFFLINE is set; unset it'),
    (hub_error('HFValidationError', 'ValueError'), 'the hub allows no such name; check it'),
    (hub_error('ReadTimeout', 'Timeout', 'RequestException'), 'the hub did not answer in time; '),
    (hub_error('ConnectTimeout', 'TimeoutException', 'TransportError'), 'did not answer in time; '),
    (hub_error('SSLError', 'ConnectionError', 'RequestException'), 'there is no connection to the'),
    (hub_error('ConnectError', 'NetworkError', 'TransportError'), 'there is no connection to the'),
    (hub_error('HfHubHTTPError', response=SimpleNamespace(status_code=503)), 'the hub answered 50'),
    (OSError(28, 'No space left on device', '/c/f'), 'No space left on device (/c/f); make room, '
     'or name another folder with HF_HOME'),
    (hub_error('Odd'), 'huggingface_hub failed with Odd (Client Error. (Request ID: Root=1-abc))')])
def test_errors_of_the_hub(monkeypatch, error, reason):
    def hf_hub_download(*_, **__):
        raise error

    monkeypatch.setitem(sys.modules, 'huggingface_hub', SimpleNamespace(
        hf_hub_download=hf_hub_download))
    with pytest.raises(WeightsError) as caught:
        fetch('hf://org/repo/w.pth')
    said = str(caught.value)
    assert said.startswith('hf://org/repo/w.pth could not be fetched: ') and reason in said
    assert said.endswith('; or download the file and give its path')
    assert '\n' not in said and 'secret' not in said


def test_without_the_package_names_are_encoded(server, file, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    server.answers = [answer(file)]
    assert fetch('hf://org/repo/a b/100%.pth@refs/pr/1').read_bytes() == file
    assert server.requests[0].startswith(
        'GET /org/repo/resolve/refs%2Fpr%2F1/a%20b/100%25.pth HTTP/1.1')


# --- checksums ---

def test_checksums_that_are_none(server, file):
    server.answers = [answer(file)]
    for wrong in ('xyz', 'abc', 'ab' * 33, '../../etc'):
        assert f'got the SHA-256 {wrong!r} for it, expected 64' in refusal(server, sha256=wrong)
    assert not server.requests


def test_a_kept_file_is_checked_when_a_checksum_is_given(server, file):
    server.answers = [answer(file)]
    digest = hashlib.sha256(file).hexdigest()
    path = download(f'{server.url}/w.pth')
    assert download(f'{server.url}/w.pth#sha256={digest.upper()}') == path
    with pytest.raises(WeightsError, match=f'{path.name}, fetched earlier, has the SHA-256 '
                       f'{digest}, expected abababab; remove it'):
        download(f'{server.url}/w.pth', sha256='abababab')


def test_digits_in_names(server, file):
    digest = hashlib.sha256(file).hexdigest()
    server.answers = [answer(file)]
    for good in (f'w-{digest[:8]}.pth', f'w-{digest}.pth', f'w-{digest[:8]}.pth.tar',
                 'w-20240131.pth', 'w-1234567.pth', 'w_deadbeef.pth', 'w-deadbeef'):
        assert download(f'{server.url}/{good}').read_bytes() == file
    for wrong in ('w-deadbeef.pth', 'w-deadbeef.pth.tar', 'w-20249931.pth'):
        assert 'it was changed on the server or on its way' in refusal(server, f'/{wrong}')


# --- traps in the folder ---

@pytest.fixture
def place(server, cache):
    """Where the parts of /w.pth will be: a function of the suffix."""
    cache.mkdir(parents=True)
    name = hashlib.sha256(f'{server.url}/w.pth'.encode()).hexdigest()[:8] + '-w.pth'
    return lambda suffix: cache / f'{name}{suffix}'


@POSIX
@pytest.mark.parametrize('suffix', ['.part', '.part.json', ''])
def test_links_are_replaced_and_their_targets_stay(server, file, place, tmp_path, suffix):
    treasure = tmp_path / 'treasure'
    treasure.write_text('precious')
    (place(suffix)).symlink_to(treasure if suffix else tmp_path / 'missing')
    if suffix == '.part':
        place('.part.json').write_text('{"tag": "\\"one\\"", "size": null}')
    server.answers = [answer(file, ETag='"one"')]
    assert download(f'{server.url}/w.pth').read_bytes() == file
    assert treasure.read_text() == 'precious' and not (tmp_path / 'missing').exists()
    assert server.ranges() == [None] and not place('').is_symlink()


@POSIX
def test_a_part_with_a_second_name_is_not_continued(server, file, place, tmp_path):
    treasure = tmp_path / 'treasure'
    treasure.write_text('precious')
    os.link(treasure, place('.part'))
    place('.part.json').write_text('{"tag": "\\"one\\"", "size": null}')
    server.answers = [answer(file, ETag='"one"')]
    assert download(f'{server.url}/w.pth').read_bytes() == file
    assert treasure.read_text() == 'precious' and server.ranges() == [None]


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid(), reason='only root gives files away')
def test_a_part_of_another_user_is_not_continued(server, file, place):
    place('.part').write_text('planted')
    place('.part.json').write_text('{"tag": "\\"one\\"", "size": null}')
    os.chown(place('.part'), 12345, -1)
    server.answers = [answer(file, ETag='"one"')]
    assert download(f'{server.url}/w.pth').read_bytes() == file
    assert server.ranges() == [None]


@POSIX
def test_a_lock_that_is_a_link_or_a_pipe(server, file, place, tmp_path):
    treasure = tmp_path / 'treasure'
    treasure.write_text('precious')
    place('.lock').symlink_to(treasure)
    assert 'it is a link, which is not followed; make room or remove what is in the way' in (
        refusal(server))
    assert treasure.read_text() == 'precious'
    place('.lock').unlink()
    os.mkfifo(place('.lock'))
    assert 'it is not a regular file' in refusal(server)
    place('.lock').unlink()
    place('.lock').write_text('of an older version')
    server.answers = [answer(file)]
    assert download(f'{server.url}/w.pth').read_bytes() == file


@POSIX
def test_a_folder_in_the_way(server, file, place):
    server.answers = [answer(file, ETag='"one"')]
    place('').mkdir()
    (place('') / 'x').mkdir()
    assert 'Is a directory' in refusal(server)
    place('.part').unlink()
    place('.part').mkdir()
    assert re.search(r'cannot be kept: .*w.pth.part: .*remove what is in the way', refusal(server))


def test_a_file_where_the_folder_should_be(server, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text('')
    assert re.search('cannot be kept: .*checkpoints: .*TORCH_HOME', refusal(server))


@POSIX
def test_a_folder_open_to_everybody_is_named(server, file, cache, caplog):
    server.answers = [answer(file)]
    path = download(f'{server.url}/w.pth')
    assert not caplog.text
    cache.chmod(0o777)
    download(f'{server.url}/w.pth')
    assert (f'{path.name} is taken from a folder that everybody may write to; run: chmod o-w '
            f'{cache}') in caplog.text


# --- several processes ---

def honest(file):
    """Answers as servers do, with what was asked for."""
    def send(connection, request):
        begin = int((header(request, 'Range') or 'bytes=0-')[6:-1])
        connection.sendall(rest(file, begin) if begin else answer(file, ETag='"one"'))
    return send


@POSIX
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_what_it_has(server, cache, file, how):
    gone = threading.Event()

    def stall(connection, _):
        connection.sendall(cut(file, at=50_000))
        gone.wait(60)

    server.answers = [stall, honest(file)]
    process = run_forked(download, f'{server.url}/w.pth')
    deadline = time.monotonic() + 60
    while not any(x.stat().st_size > 40_000 for x in cache.glob('*.part')):
        assert time.monotonic() < deadline
    os.kill(process.pid, how)
    process.join(60)
    gone.set()
    assert process.exitcode not in (0, None)
    assert download(f'{server.url}/w.pth').read_bytes() == file  # no lock is left behind
    begin = int(server.ranges()[-1][6:-1])
    assert len(server.requests) == 2 and 50_000 >= begin > 40_000


@POSIX
def test_two_processes_fetch_once(server, cache, file):
    started, both = threading.Event(), threading.Event()

    def wait_and_send(connection, _):
        started.set()
        both.wait(60)
        connection.sendall(answer(file))

    server.answers = [wait_and_send]
    processes = [run_forked(download, f'{server.url}/w.pth') for _ in range(2)]
    assert started.wait(60)
    both.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0] and len(server.requests) == 1
    assert len(kept(cache)) == 1


@POSIX
def test_a_holder_that_does_not_get_on_is_named(server, place, monkeypatch):
    monkeypatch.setattr(private_files, '_PATIENCE', 0.05)
    server.answers = [answer(status='404 No')]
    with private_files.alone(place('.lock')):
        assert re.search('another process has held .*w.pth.lock for 0 s and does not get on; end',
                         refusal(server))
    assert 'answered 404' in refusal(server)


@POSIX
def test_a_holder_that_gets_on_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(private_files, '_PATIENCE', 0.05)
    released, steps = threading.Event(), iter(range(10 ** 9))

    def hold():
        with private_files.alone(tmp_path / 'lock'):
            released.wait(0.3)

    holder = threading.Thread(target=hold)
    holder.start()
    while not (tmp_path / 'lock').exists():
        pass
    with private_files.alone(tmp_path / 'lock', lambda: next(steps)):
        assert not holder.is_alive() or released.is_set() or not holder.join(1)
    holder.join()


@pytest.mark.parametrize(('proxy', 'text'), [
    ('http://', "no host given (by the proxy '')"),
    ('http://127.0.0.1:port', "is not valid (by the proxy '127.0.0.1:port')"),
    ('ftp://me:secret@127.0.0.1:9', "unknown url type: ftp (by the proxy '127.0.0.1:9')"),
    ('http:/me:secret@h', 'the settings of the proxy (http_proxy, https_proxy) are not valid')])
def test_proxies_that_are_none(server, monkeypatch, proxy, text):
    monkeypatch.setenv('http_proxy', proxy)
    monkeypatch.setenv('no_proxy', '')
    said = refusal(server)
    assert text in said and 'secret' not in said
