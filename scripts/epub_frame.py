"""What an e-book holds beside its chapters: title page, table of contents, pages of the
parts, and the list of its files (see epub.py)."""
from urllib.parse import quote

from epub_links import file_of
from xhtml import escaped

KINDS = dict(xhtml='application/xhtml+xml', css='text/css', png='image/png',
             jpg='image/jpeg', jpeg='image/jpeg', gif='image/gif', webp='image/webp',
             svg='image/svg+xml', woff2='font/woff2')

CONTAINER = '''<?xml version="1.0" encoding="utf-8"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="EPUB/book.opf"
media-type="application/oebps-package+xml"/></rootfiles>
</container>
'''
PAGE = '''<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"
lang="en" xml:lang="en">
<head><meta charset="utf-8"/><title>{title}</title>
<link rel="stylesheet" type="text/css" href="figures.css"/>
<link rel="stylesheet" type="text/css" href="book.css"/></head>
<body>
{body}
</body></html>
'''
COVER = ('<section epub:type="cover" class="cover"><img src="cover.png" alt="{}"/>'
         '</section>')
TITLE = '''<section epub:type="titlepage">
<h1>{title}</h1>
<p class="lead">{description}</p>
<p>{author}</p>
<p>Version {version}. Text and code are under the Apache licence 2.0.</p>
<h2>This e-book and the site</h2>
<p>The book lives at <a href="{site}">{site}</a>, and this is its text.</p>
<ul>
<li>A figure that is interactive on the site shows its first setting. A link below it
leads to the figure on the site.</li>
<li>Hints and answers stand at the end of each chapter. An arrow leads there, and the
sign ↩ leads back.</li>
<li>What the site folds is open here. Imports, what each line of code makes, and the
reference of the modules are on the site only.</li>
<li>To run a chapter, take its notebook from <a href="{repo}">{repo}</a>.</li>
</ul>
</section>'''
OPF = '''<?xml version="1.0" encoding="utf-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="book"
xml:lang="en">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:identifier id="book">urn:uuid:{uuid}</dc:identifier>
<dc:title>{title}</dc:title>
<dc:creator>{author}</dc:creator>
<dc:language>en</dc:language>
<dc:description>{description}</dc:description>
<dc:source>{site}</dc:source>
<dc:rights>Apache licence 2.0</dc:rights>
<meta property="dcterms:modified">{date}T00:00:00Z</meta>
<meta property="schema:accessMode">textual</meta>
<meta property="schema:accessMode">visual</meta>
<meta property="schema:accessModeSufficient">textual</meta>
<meta property="schema:accessibilityFeature">alternativeText</meta>
<meta property="schema:accessibilityFeature">MathML</meta>
<meta property="schema:accessibilityFeature">tableOfContents</meta>
<meta property="schema:accessibilityHazard">none</meta>
</metadata>
<manifest>
{items}
</manifest>
<spine>
{spine}
</spine>
</package>
'''


def part_page(part, listed, pages):
    items = ''.join(f'<li><a href="{file_of(name)}">{escaped(title)}</a>: '
                    f'{escaped(pages[name].promise)}</li>\n' if pages[name].promise else
                    f'<li><a href="{file_of(name)}">{escaped(title)}</a></li>\n'
                    for name, title in listed)
    return (f'<section epub:type="part"><h1>{escaped(part)}</h1>\n<ul>\n{items}</ul>'
            '</section>')


def nav(parts, part_files):
    "The table of contents by part and chapter"
    out = []
    for part, listed in parts:
        items = ''.join(f'<li><a href="{file_of(name)}">{escaped(title)}</a></li>\n'
                        for name, title in listed)
        out.append(f'<li><a href="{part_files[part]}">{escaped(part)}</a>\n'
                   f'<ol>\n{items}</ol></li>\n' if part else items)
    first = next(file_of(name) for _, listed in parts for name, _ in listed)
    return ('<nav epub:type="toc" id="toc"><h1>Contents</h1>\n'
            f'<ol>\n{"".join(out)}</ol></nav>\n'
            '<nav epub:type="landmarks" hidden="hidden"><ol>\n'
            '<li><a epub:type="cover" href="cover.xhtml">Cover</a></li>\n'
            '<li><a epub:type="toc" href="nav.xhtml">Contents</a></li>\n'
            f'<li><a epub:type="bodymatter" href="{first}">Text</a></li>\n</ol></nav>')


def package(files, order, words):
    "book.opf: what the book is, its files, and the order of its pages"
    items, ids = [], {}
    for i, (name, data) in enumerate(sorted(files.items())):
        ids[name] = f'i{i}'
        ending = name.rpartition('.')[2].lower()
        if ending not in KINDS:
            raise ValueError(f'{name} is no kind of file that an e-book may hold: use '
                             'PNG, JPEG, GIF, WebP or SVG')
        has = {'nav': name == 'nav.xhtml', 'cover-image': name == 'cover.png'}
        if ending == 'xhtml':
            has |= {'mathml': b'<math' in data, 'svg': b'<svg' in data}
        said = ' '.join(k for k, v in sorted(has.items()) if v)
        said = f' properties="{said}"' if said else ''
        items.append(f'<item id="{ids[name]}" href="{quote(name)}" '
                     f'media-type="{KINDS[ending]}"{said}/>')
    spine = [f'<itemref idref="{ids[name]}"/>' for name in order]
    return OPF.format(items='\n'.join(items), spine='\n'.join(spine), **words)
