"""Weights from servers, the hub and short names: complete and right, or not there."""
import hashlib
import json
import multiprocessing
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import CheckpointLoader
from released_files import dense, key_lists, weights

from mmhybrid.models.backbones import localvim, localvmamba, mambavision, vim, vmamba
from mmhybrid.models.checkpoints import load_backbone
from mmhybrid.weights import (
    RELEASED,
    WeightsError,
    fetch,
    identify,
    kind_of,
    released_as,
    strip_wrappers,
)
from mmhybrid.weights import download as module
from mmhybrid.weights.download import download, sha256_of
from mmhybrid.weights.sources import HubAddress


class Server(ThreadingHTTPServer):
    """Serves ``files``; ``faults`` say per request how many bytes to send before hanging up."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.faults, self.requests, self.redirects = {}, [], [], {}
        self.ranges = True

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_address[1]}'


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        server = self.server
        server.requests.append((self.path, self.headers.get('Range')))
        if self.path in server.redirects:
            target, headers = server.redirects[self.path]
            self.send_response(302)
            self.send_header('Location', target)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        if isinstance(content, int):
            self.send_error(content)
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        wanted = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if wanted and server.ranges and self.headers.get('If-Range') == tag:
            start = int(wanted[1])
        if start >= len(content) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(content) - start))
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.send_header('ETag', tag)
        if '/resolve/' in self.path:  # as Hugging Face's servers do
            self.send_header('X-Repo-Commit', 'c' * 40)
        self.end_headers()
        rest = content[start:]
        if body:
            self.wfile.write(rest[:server.faults.pop(0)] if server.faults else rest)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setattr(module.time, 'sleep', lambda seconds: None)
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


@pytest.fixture
def file(tmp_path):
    torch.save(weights('VMamba'), tmp_path / 'source.pth')
    return (tmp_path / 'source.pth').read_bytes()


def kept(cache):
    return sorted(path.name for path in cache.glob('*') if path.suffix != '.lock')


def test_a_file_is_fetched_once(server, file, cache, capfd):
    server.files['/w.pth'] = file
    path = fetch(f'{server.url}/w.pth')
    assert path.read_bytes() == file and path.parent == cache and path.name.endswith('-w.pth')
    assert fetch(f'{server.url}/w.pth') == path and len(server.requests) == 1
    assert kept(cache) == [path.name]
    assert re.search(r'w.pth: 0\.\d MB \(100%\)|w.pth: 0\.\d of 0\.\d MB \(100%\)',
                     capfd.readouterr().err)


def test_every_way_in_takes_an_address(server, file):
    server.files['/w.pth'] = file
    net = dense('VMamba')
    assert load_backbone(net, f'{server.url}/w.pth').comparison.share == 1
    loaded = CheckpointLoader.load_checkpoint(f'{server.url}/w.pth', map_location='cpu')
    assert loaded.keys() == weights('VMamba').keys()
    net = dense('VMamba', init_cfg=dict(type='Pretrained', checkpoint=f'{server.url}/w.pth'))
    net.init_weights()
    name = 'layers.0.blocks.0.op.in_proj.weight'
    assert torch.equal(net.state_dict()[name], weights('VMamba')[name])


def test_equal_names_at_two_addresses_are_two_files(server, file):
    server.files.update({'/a/model.pth': file, '/b/model.pth': file})
    assert fetch(f'{server.url}/a/model.pth') != fetch(f'{server.url}/b/model.pth')


def test_interrupted_download_continues(server, file, cache):
    server.files['/w.pth'] = file
    server.faults = [1000, 500]
    assert fetch(f'{server.url}/w.pth').read_bytes() == file
    assert [wanted for _, wanted in server.requests] == [None, 'bytes=1000-', 'bytes=1500-']


def test_given_up_and_taken_up_later(server, file, cache):
    server.files['/w.pth'] = file
    server.faults = [1000, 0, 0, 0]
    with pytest.raises(WeightsError, match=r'ended after 1,000 of [\d,]+ bytes \(1,000 bytes are '
                       'kept, the next try continues'):
        fetch(f'{server.url}/w.pth')
    assert not [name for name in kept(cache) if name.endswith('.pth')]
    server.faults = []
    assert fetch(f'{server.url}/w.pth').read_bytes() == file
    assert server.requests[-1][1] == 'bytes=1000-'
    assert len(kept(cache)) == 1


def test_a_file_that_changed_meanwhile_starts_anew(server, file):
    server.files['/w.pth'] = b'PK' + bytes(5000)
    server.faults = [1000, 0, 0, 0]
    with pytest.raises(WeightsError):
        fetch(f'{server.url}/w.pth')
    server.files['/w.pth'], server.faults = file, []
    assert fetch(f'{server.url}/w.pth').read_bytes() == file


def test_servers_without_ranges(server, file):
    server.files['/w.pth'], server.faults, server.ranges = file, [1000], False
    assert fetch(f'{server.url}/w.pth').read_bytes() == file


@pytest.mark.parametrize('page', [b'<!DOCTYPE html><html>log in</html>',
                                  b'version https://git-lfs.github.com/spec/v1\n', b''])
def test_what_is_no_file_of_weights_is_not_kept(page, server, cache):
    server.files['/w.pth'] = page
    with pytest.raises(WeightsError, match=f'{server.url}/w.pth is (a web page|the pl|empty)'):
        fetch(f'{server.url}/w.pth')
    assert kept(cache) == []


def test_server_errors(server, cache):
    with pytest.raises(WeightsError, match='answered 404 .*check the address'):
        fetch(f'{server.url}/gone.pth')
    assert len(server.requests) == 1  # asking again would not help
    server.files['/private.pth'] = 403
    with pytest.raises(WeightsError, match='answered 403 .*sign in or accept'):
        fetch(f'{server.url}/private.pth')
    server.files['/broken.pth'] = 503
    with pytest.raises(WeightsError, match='answered 503'):
        fetch(f'{server.url}/broken.pth')
    assert len(server.requests) == 2 + 4
    with pytest.raises(WeightsError, match='could not be fetched'):
        fetch('http://127.0.0.1:9/w.pth')
    assert kept(cache) == []


def test_checksums(server, file, cache):
    digest = hashlib.sha256(file).hexdigest()
    wrong = 'ab' * 32
    for path in ('/w.pth', f'/w-{digest[:8]}.pth', f'/w-{wrong[:8]}.pth'):
        server.files[path] = file
    assert sha256_of(fetch(f'{server.url}/w-{digest[:8]}.pth')) == digest
    with pytest.raises(WeightsError, match=f'SHA-256 {digest}, expected {wrong[:8]}: it was ch'):
        fetch(f'{server.url}/w-{wrong[:8]}.pth')
    with pytest.raises(WeightsError, match='is not kept'):
        download(f'{server.url}/w.pth', sha256=wrong)
    with pytest.raises(WeightsError, match='is not kept'):
        fetch(f'{server.url}/w.pth#sha256={wrong}')
    assert fetch(f'{server.url}/w.pth#sha256={digest}').read_bytes() == file
    # Hugging Face tells the checksum while it redirects
    server.redirects['/r.pth'] = (f'{server.url}/w.pth', {'X-Linked-ETag': f'"{wrong}"'})
    with pytest.raises(WeightsError, match=f'expected {wrong}'):
        fetch(f'{server.url}/r.pth')
    assert len(kept(cache)) == 2


def test_files_of_torch_hub_are_used(server, file, cache):
    digest = hashlib.sha256(file).hexdigest()[:8]
    cache.mkdir(parents=True)
    (cache / f'r-{digest}.pth').write_bytes(file)
    assert fetch(f'{server.url}/r-{digest}.pth') == cache / f'r-{digest}.pth'
    assert server.requests == []


def _fetch_in_process(url, results):
    results.put(str(fetch(url)))


@pytest.mark.skipif(sys.platform == 'win32', reason='processes wait for each other on POSIX only')
def test_processes_share_a_download(server, file):
    server.files['/w.pth'] = file
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    processes = [context.Process(target=_fetch_in_process, args=(f'{server.url}/w.pth', results))
                 for _ in range(3)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(paths) == 1 and len(server.requests) == 1


# --- Hugging Face's hub ---

def test_addresses_of_the_hub():
    assert HubAddress.parse('hf://a/b') == ('a/b', None, None)
    assert HubAddress.parse('hf://a/b@v1.0') == ('a/b', None, 'v1.0')
    assert HubAddress.parse('hf://a/b/sub/w.pth.tar') == ('a/b', 'sub/w.pth.tar', None)
    assert HubAddress.parse('hf://a/b/w.pth@refs/pr/1') == ('a/b', 'w.pth', 'refs/pr/1')
    for wrong in ('hf://a', 'hf://a/b@', 'hf:///b'):
        with pytest.raises(WeightsError, match='expected hf://organisation/repository'):
            HubAddress.parse(wrong)


class Hub:
    """What we use of huggingface_hub, over a folder."""

    def __init__(self, folder, offline=False):
        self.folder, self.calls = folder, []
        self.constants = SimpleNamespace(HF_HUB_OFFLINE=offline)

    def HfApi(self):
        assert not self.constants.HF_HUB_OFFLINE
        return self

    def list_repo_files(self, repository, revision=None):
        return [str(p.relative_to(self.folder)) for p in self.folder.rglob('*') if p.is_file()]

    def snapshot_download(self, repository, revision=None, local_files_only=False):
        assert local_files_only
        return str(self.folder)

    def hf_hub_download(self, repository, file, revision=None):
        self.calls.append((repository, file, revision))
        if not (self.folder / file).is_file():
            raise OSError(f'404 for {file}')
        return str(self.folder / file)


@pytest.mark.parametrize('offline', [False, True])
def test_the_hub(offline, file, tmp_path, monkeypatch):
    hub = Hub(tmp_path / 'hub', offline)
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / 'w.pth').write_bytes(file)
    (tmp_path / 'hub' / 'README.md').write_text('read me')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    net = dense('VMamba')
    assert load_backbone(net, 'hf://org/repo').comparison.share == 1
    assert CheckpointLoader.load_checkpoint('hf://org/repo/w.pth@v1').keys()
    assert hub.calls == [('org/repo', 'w.pth', None), ('org/repo', 'w.pth', 'v1')]
    with pytest.raises(WeightsError, match='hf://org/repo/x.pth could not be fetched: .*OSError'):
        fetch('hf://org/repo/x.pth')
    (tmp_path / 'hub' / 'v.pth').write_bytes(file)
    with pytest.raises(WeightsError, match='holds .*; name the file that you want'):
        fetch('hf://org/repo')
    (tmp_path / 'hub' / 'model.safetensors').write_bytes(b'')
    assert fetch('hf://org/repo').name == 'model.safetensors'


def test_without_the_package(server, file, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    server.files['/org/repo/resolve/v1/w.pth'] = file
    assert fetch('hf://org/repo/w.pth@v1').read_bytes() == file
    with pytest.raises(ImportError, match='pip install huggingface_hub; or name the file'):
        fetch('hf://org/repo')


@pytest.mark.slow  # the package tries again and again where the network is odd
def test_the_real_package_against_a_loopback_server(server, file, tmp_path):
    pytest.importorskip('huggingface_hub')
    import os
    import subprocess
    server.files['/org/repo/resolve/main/w.pth'] = file
    environment = {**os.environ, 'HF_ENDPOINT': server.url, 'HF_HOME': str(tmp_path / 'hf'),
                   'HF_HUB_DISABLE_XET': '1', 'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1'}
    # without the models, which take seconds to import
    code = ('import sys; sys.modules["mmengine"] = None\n'
            'from mmhybrid.weights import fetch\n'
            'print("PATH", fetch("hf://org/repo/w.pth"))')
    for offline in ('0', '1'):
        requests = len(server.requests)
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                              env={**environment, 'HF_HUB_OFFLINE': offline})
        assert done.returncode == 0, done.stderr
        path = done.stdout.partition('PATH ')[2].strip()
        with open(path, 'rb') as opened:
            assert opened.read() == file
        if offline == '1':
            assert len(server.requests) == requests  # from its cache
    done = subprocess.run(
        [sys.executable, '-c', code.replace('w.pth', 'other.pth')], capture_output=True, text=True,
        env={**environment, 'HF_HUB_OFFLINE': '1'})
    assert 'WeightsError: hf://org/repo/other.pth could not be fetched' in done.stderr


# --- short names and recognition ---

def test_short_names(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr('mmhybrid.weights.sources.download',
                        lambda url: asked.append(url) or tmp_path / 'source.pth')
    assert fetch('MambaVision-T-1K') == tmp_path / 'source.pth'
    assert asked == ['https://huggingface.co/nvidia/MambaVision-T-1K/resolve/main/'
                     'mambavision_tiny_1k.pth.tar']
    with pytest.raises(WeightsError, match='localvim-s has no address: never published.*give its'):
        fetch('localvim-s')
    with pytest.raises(FileNotFoundError, match="Did you mean 'vmamba-t-s1l8'"):
        fetch('vmamba-t-s1l9')
    (tmp_path / 'vim-t').write_bytes(file)  # an own file has precedence
    assert fetch('vim-t').read_bytes() == file


def test_the_table_of_released_files():
    assert len(RELEASED) == 11 + 7 + 29 + 6 + 5
    architectures = dict(MambaVision=mambavision, VMamba=vmamba, Vim=vim, LocalVim=localvim,
                         LocalVMamba=localvmamba)
    for name, row in RELEASED.items():
        assert name == name.lower() == row.name
        assert row.arch in architectures[row.family].ARCHITECTURES
        assert row.license in ('CC-BY-NC-SA-4.0', 'MIT', 'Apache-2.0')
        assert row.source.startswith('https://github.com/')
        assert row.address or row.remark
        assert row.address.startswith(('https://', 'hf://')) or not row.address
        assert not row.address or row.address.endswith(row.file)
    addresses = [row.address for row in RELEASED.values() if row.address]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize(('name', 'end'), [
    ('vmamba-t-s1l8', 'v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth'),
    ('vmamba-v0-t', 'v0cls/vssmtiny_dp01_ckpt_epoch_292.pth'),
    ('vmamba-v0-s-mask-rcnn-coco-3x', 'v0det/vssmsmall_mask_rcnn_swin_fpn_coco_ms_3x_epoch_34.pth'),
    ('vmamba-t-s2l5-upernet-ade20k',
     'v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_tiny_iter_160000.pth'),
    ('vmamba-v0-b-upernet-ade20k',
     'v0seg/vssmbase_upernet_4xb4-160k_ade20k-512x512_iter_128000.pth'),
])
def test_addresses_of_vmamba_have_the_tag_of_their_release(name, end):
    """Its repository prints all 29 of them; '#' begins each tag and is escaped in an address."""
    assert RELEASED[name].address == (
        f'https://github.com/MzeroMiko/VMamba/releases/download/%23{end}')
    assert all(row.address for row in RELEASED.values() if row.family == 'VMamba')


def test_windows_are_in_the_rows_of_classifiers_that_have_them():
    for name, row in RELEASED.items():
        assert (row.window_size is not None) == (
            (row.family, row.kind) == ('MambaVision', 'classification'))
        if row.window_size:
            other = row.window_size != mambavision.ARCHITECTURES[row.arch]['window_size']
            assert other == (name in ('mambavision-l2-512-21k', 'mambavision-l3-512-21k'))
            assert other == ('window_size=(8, 8, 32, 16)' in row.remark)


@pytest.mark.parametrize(('source', 'name'), [
    ('mambavision-l3-512-21k', 'mambavision-l3-512-21k'),
    ('MambaVision-L3-512-21K', 'mambavision-l3-512-21k'),
    ('mambavision_L3_21k_740m_512.pth.tar', 'mambavision-l3-512-21k'),
    ('/data/w/mambavision_L2_21k_240m_512.pth.tar', 'mambavision-l2-512-21k'),
    ('weights/mambavision_L3_21k_740m_512.safetensors', 'mambavision-l3-512-21k'),  # converted
    ('cache/0a1b2c3d-mambavision_L3_21k_740m_256.pth.tar', 'mambavision-l3-256-21k'),
    ('hf://nvidia/MambaVision-L3-512-21K', 'mambavision-l3-512-21k'),
    ('hf://nvidia/MambaVision-L3-512-21K/model.safetensors@refs/pr/1', 'mambavision-l3-512-21k'),
    ('https://a:b@mirror.org/nvidia/MambaVision-L2-512-21K/resolve/main/model.safetensors?x=/y',
     'mambavision-l2-512-21k'),
    ('~/.cache/huggingface/hub/models--nvidia--MambaVision-L2-512-21K/snapshots/1/pytorch_model.bin',
     'mambavision-l2-512-21k'),
    ('hf://hustvl/Vim-tiny-midclstok', None),  # has two files
    ('hf://hustvl/Vim-tiny-midclstok/vim_t_midclstok_ft_78p3acc.pth', 'vim-t-stride8'),
    ('work_dirs/mambavision-l3-512-21k/epoch_10.pth', None),  # a folder of one's own
    ('mambavision_L3_21k_740m_512_tuned.pth', None), ('epoch_10.pth', None), ('', None),
])
def test_the_published_file_that_a_source_names(source, name):
    row = released_as(source)
    assert row == (name and RELEASED[name])


def test_every_row_is_named_by_its_name_file_and_address():
    for name, row in RELEASED.items():
        sources = [name, *filter(None, (row.file, row.address, row.file and f'dir/{row.file}'))]
        assert [released_as(source) for source in sources] == [row] * len(sources)


def test_names_in_configs_are_in_the_table():
    from pathlib import Path

    from mmengine.config import Config
    found = 0
    for path in sorted((Path(__file__).parents[2] / 'configs').glob('*.py')):
        cfg = Config.fromfile(path)
        published = cfg.get('published_checkpoint')
        if published:
            found += 1
            row = RELEASED[published]
            assert row.address, path.name
            backbone = cfg.model.backbone
            assert (f'mmhybrid.{row.family}', row.arch) == (backbone.type, backbone.arch), path.name
    assert found


@pytest.mark.parametrize(('name', 'family'), [
    ('layers.0.blocks.0.attn.relative_position_bias_table', 'Swin'),
    ('layer1.0.conv1.weight', 'ResNet'), ('stages.0.blocks.0.conv_dw.weight', 'ConvNeXt'),
    ('blocks.0.attn.qkv.weight', 'ViT')])
def test_other_networks_are_called_by_their_names(name, family):
    found = identify({name: (1,)})
    assert (str(found), found.ours) == (family, False)


@pytest.mark.parametrize('name', key_lists())
def test_published_networks_are_recognised(name):
    shapes = key_lists()[name]
    identity = identify(strip_wrappers(shapes)[0])
    expected = json.loads(_EXPECTED_FAMILIES)[name.split('_')[0]] if not name.startswith(
        'local_') else {'vim': 'LocalVim', 'vssm': 'LocalVMamba'}[name.split('_')[1]]
    assert identity.family == expected and identity.ours
    if 'search' in name:
        assert identity.variant is None and 'dim=' in str(identity)
    else:
        assert identity.variant == _variant(name)
    kind = kind_of(shapes)
    assert kind == ('classification' if 'cls' in name or name.endswith('classification') else
                    'detector' if name.startswith('det_full') else
                    'segmentor' if name.startswith('seg_full') else 'backbone')


_EXPECTED_FAMILIES = ('{"mambavision": "MambaVision", "vmamba": "VMamba", "cls": "Vim", '
                      '"det": "Vim", "seg": "Vim"}')
_MAMBAVISION = dict(T='tiny', T2='tiny2', S='small', B='base', L='large', L2='large2', L3='large3')


def _variant(name):
    parts = name.split('_')
    if parts[0] == 'mambavision':
        return _MAMBAVISION[parts[1]]
    if parts[0] == 'vmamba':
        return '_'.join(parts[1:3])
    if parts[0] == 'local':
        return parts[2]
    return dict(t='tiny', s='small', b='base')[parts[parts.index('vim') + 1]]


def test_networks_of_others_are_named():
    shapes = {'layer1.0.conv1.weight': (64, 64, 1, 1), 'conv1.weight': (64, 3, 7, 7)}
    assert str(identify(shapes)) == 'ResNet' and not identify(shapes).ours
    assert identify({'a': (1,)}) is None
