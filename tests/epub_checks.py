"""What a file that calls itself an EPUB has to be; each checker says what is wrong."""
import re
from pathlib import PurePosixPath
from posixpath import dirname, join, normpath
from urllib.parse import unquote
from xml.etree import ElementTree
from zipfile import ZIP_STORED, ZipFile

XHTML, MATH = '{http://www.w3.org/1999/xhtml}', '{http://www.w3.org/1998/Math/MathML}'
SVG, OPF = '{http://www.w3.org/2000/svg}', '{http://www.idpf.org/2007/opf}'
HREF = '{http://www.w3.org/1999/xlink}href'
NEVER = 'script style button input select form canvas iframe details'.split()


def files_of(path):
    with ZipFile(path) as z: return {n: z.read(n) for n in z.namelist()}


def spine(files):
    "Names of the pages in reading order"
    opf = ElementTree.fromstring(files['EPUB/book.opf'])
    names = {i.get('id'): unquote(i.get('href')) for i in opf.iter(OPF + 'item')}
    return [names[i.get('idref')] for i in opf.iter(OPF + 'itemref')]


def bad_container(path):
    "The zip and its lists: what comes first, what is listed, what a page needs"
    problems = []
    with ZipFile(path) as z:
        first = z.infolist()[0]
        if first.filename != 'mimetype' or first.compress_type != ZIP_STORED:
            problems.append('mimetype is not first, or is compressed')
        if len(z.namelist()) != len(set(z.namelist())): problems.append('a name twice')
    files = files_of(path)
    if files.get('mimetype') != b'application/epub+zip': problems.append('mimetype')
    roots = ElementTree.fromstring(files['META-INF/container.xml'])
    if [r.get('full-path') for r in roots.iter() if r.get('full-path')] != [
            'EPUB/book.opf']: problems.append('container.xml')
    opf = ElementTree.fromstring(files['EPUB/book.opf'])
    items = {unquote(i.get('href')): i for i in opf.iter(OPF + 'item')}
    there = {n.removeprefix('EPUB/') for n in files if n.startswith('EPUB/')} - {
        'book.opf'}
    problems += [f'{n} is not both listed and there' for n in there ^ set(items)]
    ids = [e.get('id') for e in opf.iter() if e.get('id')]
    if len(ids) != len(set(ids)): problems.append('an id of the list stands twice')
    for name, item in items.items():
        if PurePosixPath(name).suffix != '.xhtml': continue
        text, said = files['EPUB/' + name], (item.get('properties') or '').split()
        for word, sign in (('mathml', b'<math'), ('svg', b'<svg')):
            if (word in said) != (sign in text): problems.append(f'{name}: {word}')
    pages = [n for n in items if n.endswith('.xhtml')]
    if sorted(spine(files)) != sorted(pages): problems.append('spine and pages differ')
    return problems


def bad_pages(files):
    "Pages that are no XML, ids twice, what acts or is gone, links that lead nowhere"
    problems, trees = [], {}
    for name in sorted(n for n in files if n.endswith('.xhtml')):
        try: trees[name] = ElementTree.fromstring(files[name])
        except ElementTree.ParseError as e: problems.append(f'{name}: {e}')
    places = {}
    for name, tree in trees.items():
        ids = [e.get('id') for e in tree.iter() if e.get('id')]
        places[name] = set(ids)
        problems += [f'{name}: id {i} twice' for i in places[name] if ids.count(i) > 1]
    for name, tree in trees.items():
        body = tree.find(XHTML + 'body')
        for e in body.iter():
            tag = e.tag.rpartition('}')[2]
            if tag in NEVER or any(a.startswith('on') for a in e.attrib):
                problems.append(f'{name}: <{tag}>')
            if e.tag == XHTML + 'img' and e.get('alt') is None:
                problems.append(f'{name}: a picture without alt')
            if tag == 'math' and not e.tag.startswith(MATH):
                problems.append(f'{name}: a formula outside of MathML')
            for href in (e.get('href'), e.get(HREF), e.get('src')):
                if href is None or re.match('https?:|mailto:', href): continue
                path, _, place = href.partition('#')
                to = normpath(join(dirname(name), unquote(path))) if path else name
                if to not in files: problems.append(f'{name}: {href} is not there')
                elif place and unquote(place) not in places.get(to, ()):
                    problems.append(f'{name}: {href} has no such place')
            for place in re.findall(r'url\(#([^)]+)\)', ' '.join(e.attrib.values())):
                if place not in places[name]: problems.append(f'{name}: url(#{place})')
    for name, data in files.items():
        if not name.endswith('.css'): continue
        for url in re.findall(r'url\("?([^")]+)', data.decode()):
            if join(dirname(name), url) not in files: problems.append(f'{name}: {url}')
    return problems
