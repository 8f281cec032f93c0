"""A hub on this machine that fails as it is told to, and a client in a process of its
own; without pytest, since that process imports this file"""
import hashlib
import http.server
import io
import json
import os
import sys
import threading
import time
import warnings
import zlib

ID, COMMIT = 'zalando-datasets/fashion_mnist', 'a'*40
CONFIGS = '''configs:
- config_name: fashion_mnist
  data_files:
  - split: train
    path: fashion_mnist/train-*
  - split: test
    path: fashion_mnist/test-*
  default: true
'''
TYPES = '''dataset_info:
  config_name: fashion_mnist
  features:
  - name: image
    dtype: image
  - name: label
    dtype: int64
'''


def hub_files():
    "{path: bytes} of a data set like the real one, but small"
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from nntrain.sources import _pngs
    files = {'README.md': f'---\n{TYPES}{CONFIGS}---\n'.encode()}
    for split, n in ('train', 60), ('test', 20):
        pictures = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
        rows = pa.array([dict(bytes=b, path=None) for b in _pngs(pictures)], kind)
        out = io.BytesIO()
        pq.write_table(pa.table({'image': rows, 'label': np.arange(n) % 10}), out)
        files[f'fashion_mnist/{split}-00000-of-00001.parquet'] = out.getvalue()
    return files


class Hub(http.server.ThreadingHTTPServer):
    "Serves `files` on the loopback; `mode` says what goes wrong"
    daemon_threads, mode, block_on_close = True, 'ok', False
    def __init__(self, files):
        super().__init__(('127.0.0.1', 0), _Answer)
        self.files, self.gets = files, []
        threading.Thread(target=self.serve_forever, daemon=True).start()
    @property
    def address(self): return f'http://127.0.0.1:{self.server_address[1]}'
    def handle_error(self, request, client_address): pass    # the client has left


class _Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def do_HEAD(self): self.answer()
    def do_GET(self): self.answer()

    def answer(self):
        path, mode = self.path.split('?')[0], self.server.mode
        is_data, head = path.endswith('.parquet'), self.command == 'HEAD'
        if is_data and not head: self.server.gets.append(path)
        if mode == 'close':
            self.close_connection = True
            return self.connection.close()
        if mode.isdigit(): return self.send(b'', int(mode))
        if mode == 'page': return self.send(b'<html>log in</html>', kind='text/html')
        if mode == 'hang' or mode == 'hanging file' and is_data and not head:
            return time.sleep(60)
        if mode == 'slow' and is_data: time.sleep(.5)
        if f'/datasets/{ID}/resolve/' in path:
            return self.send_file(path.split('/resolve/')[1].partition('/')[2])
        api = f'/api/datasets/{ID}'
        if path.startswith(f'{api}/tree/'):
            return self.send_json(self.tree(path.split('/tree/')[1].partition('/')[2]))
        if path in (api, f'{api}/revision/main', f'{api}/revision/{COMMIT}'):
            files = [dict(rfilename=name) for name in self.server.files]
            return self.send_json(dict(
                id=ID, sha=COMMIT, private=False, gated=False, disabled=False, tags=[],
                siblings=files, cardData={}, lastModified='2024-01-01T00:00:00.000Z'))
        self.send(b'', 404)

    def tree(self, under):
        "The files in a folder, and its folders"
        rows = {}
        for name, data in self.server.files.items():
            folder, _, base = name.rpartition('/')
            if folder == under:
                rows[name] = dict(
                    type='file', path=name, size=len(data), oid=_tag(data))
            elif not under:
                rows[folder] = dict(type='directory', path=folder, size=0, oid='b'*40)
        return list(rows.values())

    def send_json(self, value): self.send(json.dumps(value).encode())

    def send_file(self, name):
        if name not in self.server.files: return self.send(b'', 404)
        data = self.server.files[name]
        if self.server.mode == 'truncated, no types':
            data = data.replace(TYPES.encode(), b'')
        tag, mode = _tag(data), self.server.mode*name.endswith('.parquet')
        if mode.startswith('truncated'): data = data[:len(data)//2]   # nobody notices
        self.send(data, tag=tag, sent=len(data)//2 if mode == 'half' else None)

    def send(self, body, status=200, kind='application/json', tag=None, sent=None):
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        if status == 404: self.send_header('X-Error-Code', 'EntryNotFound')
        if tag:
            self.send_header('ETag', f'"{tag}"')
            self.send_header('X-Repo-Commit', COMMIT)
        self.end_headers()
        if self.command == 'HEAD': return
        self.wfile.write(body[:sent])
        self.close_connection = sent is not None


def _tag(data): return hashlib.sha1(data).hexdigest()


def client(pipe, address, home):
    "Ask for the sources that come through the pipe; answer with what was got, or said"
    assert not {'datasets', 'huggingface_hub'} & set(sys.modules)
    for fd in 1, 2: os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    for name in 'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'NNTRAIN_DATA', 'HF_HUB_CACHE':
        os.environ.pop(name, None)
    os.environ.update(
        HF_ENDPOINT=address, HF_HOME=home, NO_PROXY='127.0.0.1', NNTRAIN_BUDGET='short',
        HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_ETAG_TIMEOUT='1',
        HF_HUB_DOWNLOAD_TIMEOUT='1')
    os.chdir(home)
    from nntrain import hub, sources
    draw = sources.draw_clothes
    sources.draw_clothes = lambda n, seed: draw(20, seed)
    pipe.send('ready')
    while (source := pipe.recv()) is not None:
        memories = hub.hub_dataset, sources._tensors, sources._no_hub, sources._warn_toy
        for memory in memories: memory.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            try:
                data = sources.fashion_tensors(source)
                sums = {k: (len(y), *(zlib.crc32(t.numpy().tobytes()) for t in (x, y)))
                        for k, (x, y) in data.items()}
                said = dict(source=data.source, sums=sums)
            except Exception as e:
                said = dict(kinds=[k.__name__ for k in type(e).__mro__], text=str(e))
        said['notices'] = [str(w.message) for w in caught
                           if 'toy_fashion' in str(w.message)]
        pipe.send(said)
