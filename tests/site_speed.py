#!/usr/bin/env python
"""How long a reader waits: pages of a built site on a slow line and a slow computer.

    tests/site_speed.py _docs [page.html …]

prints a table: time to the first paint, kilobytes on the line, height in screens of
1280 px. The computer is four times slower than this one, the line carries 1.6 Mbit/s
with a delay of 150 ms, and the server compresses, as that of most hosts.
"""
import gzip
import http.server
import mimetypes
import statistics
import sys
import threading
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

LINE = dict(offline=False, latency=150, downloadThroughput=200_000,  # bytes a second
            uploadThroughput=94_000)
SLOWER = 4
TEXT = '.html', '.css', '.js', '.json', '.svg', '.xml', '.txt'

PAINT = '''() => new Promise(done => {
  const first = performance.getEntriesByName('first-contentful-paint')[0]
  if (first) return done(first.startTime)
  new PerformanceObserver(list => {
    for (const e of list.getEntriesByName('first-contentful-paint')) done(e.startTime)
  }).observe({type: 'paint', buffered: true})
})'''


@lru_cache(maxsize=None)
def packed(path): return gzip.compress(path.read_bytes(), 6)


@contextmanager
def served(docs):
    "A server of the folder that compresses text -> its address"
    docs = Path(docs).resolve()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def do_GET(self):
            path = docs/unquote(self.path.partition('?')[0].lstrip('/'))
            if not path.is_file(): return self.send_error(404)
            small = path.suffix in TEXT
            body = packed(path) if small else path.read_bytes()
            self.send_response(200)
            kind = mimetypes.guess_type(path.name)[0] or 'application/octet-stream'
            self.send_header('Content-Type', kind)
            if small: self.send_header('Content-Encoding', 'gzip')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args): pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/'
    finally: server.shutdown()


def measured(browser, address):
    "One page, loaded once with nothing kept -> {paint: seconds, kb, requests, screens}"
    context = browser.new_context(viewport=dict(width=1280, height=800))
    page = context.new_page()
    page.set_default_timeout(120_000)
    tool = context.new_cdp_session(page)
    tool.send('Network.enable')
    tool.send('Network.emulateNetworkConditions', LINE)
    tool.send('Emulation.setCPUThrottlingRate', dict(rate=SLOWER))
    sizes = []
    tool.on('Network.loadingFinished', lambda e: sizes.append(e['encodedDataLength']))
    page.goto(address, wait_until='load')
    paint = page.evaluate(PAINT) / 1000
    page.wait_for_load_state('networkidle')
    screens = page.evaluate('document.documentElement.scrollHeight') / 800
    context.close()
    return dict(paint=paint, kb=sum(sizes) / 1000, requests=len(sizes), screens=screens)


def table(docs, names=(), tries=1):
    "{page: what was measured}, the best of some tries, printed as it comes"
    from site_checks import start_browser
    rows = {}
    names = names or sorted(p.name for p in Path(docs).glob('*.html'))
    print(f'{"page":28} paint s    KB  files  screens')
    with start_browser() as browser, served(docs) as address:
        for name in names:
            runs = [measured(browser, address + name) for _ in range(tries)]
            rows[name] = r = min(runs, key=lambda r: r['paint'])
            print(f'{name:28} {r["paint"]:7.2f} {r["kb"]:5.0f} {r["requests"]:6}'
                  f' {r["screens"]:8.1f}', flush=True)
    middle = {k: statistics.median(r[k] for r in rows.values()) for k in r}
    print(f'{"median":28} {middle["paint"]:7.2f} {middle["kb"]:5.0f}'
          f' {middle["requests"]:6.0f} {middle["screens"]:8.1f}')
    return rows


if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    table(sys.argv[1], sys.argv[2:])
