"""Checks of the files of a built site: links, pictures, references.

Each checker returns a list of what is wrong; test_built.py feeds it the site and a bad
page.
"""
import html.parser
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

from conftest import ROOT

class Page(html.parser.HTMLParser):
    "What a page offers as targets, and what it points to"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.pictures = set(), [], []
        self.text = path.read_text(encoding='utf-8')
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {v for k, v in attrs.items()
                     if v and (k == 'id' or tag == 'a' and k == 'name')}
        for key in ('href', 'src'):
            if attrs.get(key):
                self.links.append((tag, attrs[key], attrs.get('rel') or ''))
        hidden = attrs.get('aria-hidden') == 'true'
        if tag == 'img' and not hidden and attrs.get('role') != 'presentation':
            self.pictures.append((attrs.get('src', ''), attrs.get('alt')))


def link_problem(docs, base, pages, name, tag, target, rel):
    "What is wrong with one link of the page `name`, or None"
    if re.match(r'(data|mailto|javascript):', target): return None
    address, anchor = urldefrag(urljoin(base + name, target))
    if not address.startswith(base.rstrip('/')):
        if tag == 'a' or 'canonical' in rel: return None
        return f'<{tag}> asks another site: {target[:80]}'
    path = unquote(address[len(base):]) or 'index.html'
    if not (docs/path).is_file(): return f'dead link {target[:80]}'
    spot = unquote(anchor)
    # the rest of a figure's place is its setting
    if spot.startswith('nnx'): spot = spot.split('--')[0]
    if spot and tag == 'a' and path in pages and spot not in pages[path].ids:
        return f'{path} has no #{anchor[:60]}'


def file_problems(docs, base):
    """Links, anchors, pictures, citations and cross-references of all pages of the
    folder `docs`, which will stand at the address `base`"""
    docs = Path(docs)
    pages = {p.relative_to(docs).as_posix(): Page(p)
             for p in sorted(docs.rglob('*.html'))}
    bad = []
    for name, page in pages.items():
        found = [link_problem(docs, base, pages, name, *link) for link in page.links]
        found += [f'picture {src[:60]} without alt text'
                  for src, alt in page.pictures if not (alt or '').strip()]
        words = re.sub(r'<(pre|code|script|style)\b.*?</\1>', '', page.text, flags=re.S)
        found += [f'Markdown in view: {m[:60]}' for m in
                  re.findall(r'\]\((?:https?:|[\w.-]+\.(?:ipynb|html))[^)<]*', words)]
        lost = (r'quarto-unresolved-ref[^>]*>([^<]*)|\?@[\w-]+|'
                r'<strong>[\w:-]+\?</strong>')
        found += [f'unresolved reference {m[:60]}' for m in re.findall(lost, page.text)]
        found += ['a box that only opens with JavaScript'
                  for _ in re.findall('data-bs-target="#?.callout-', page.text)]
        bad += [f'{name}: {problem}' for problem in filter(None, found)]
    return bad


def build(top):
    "`nbdev_docs` in a copy of the checkout without what git ignores -> its pages"
    shutil.copytree(ROOT, top, symlinks=True, ignore=shutil.ignore_patterns(
        '.git', '.hypothesis', '.pytest_cache', '.ruff_cache', '.ipynb_checkpoints',
        '.venv', 'venv', '_proc', '_docs', '__pycache__', 'node_modules'))
    done = subprocess.run(['nbdev_docs'], cwd=top, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(top)})
    said = done.stdout + done.stderr
    assert done.returncode == 0 and 'WARN' not in said, said[-3000:]
    return top/'_docs'
