#!/usr/bin/env python
"""Make the two small fonts of the site: nbs/fonts/math.woff2 and nbs/fonts/icons.woff2.

    npm pack @fontsource/noto-sans-math bootstrap-icons   # and unpack both
    pip install fonttools brotli
    scripts/fonts.py FOLDER                               # that holds both

Formulas are MathML. A browser draws roots, sums and brackets in the right size only
with a font that has an OpenType MATH table, and many systems have none. The icons are
those of Quarto's pages, 3 KB instead of 176.
"""
import re
import sys
from pathlib import Path

FONTS = Path(__file__).resolve().parent.parent/'nbs/fonts'

ICONS = '''arrow-left-short arrow-right-short arrow-up body-text box-arrow-up-right
check chevron-down chevron-right chevron-up clipboard clipboard-check clock
cone-striped download exclamation-circle exclamation-triangle github info-
circle journal-code layout-text-sidebar-reverse lightbulb link-45deg list
quote search toggle-off toggle-on x'''.split()


def span(first, last): return set(range(ord(first), ord(last) + 1))


# what a formula may hold; tests/test_site.py compares it with the formulas of the pages
SYMBOLS = (
    'ϑϕϱϵℎ±·×÷¼½¬¯°²³¹µ′″‴‖∥…⋯⋮⋱←↑→↓↔⇐⇒⇔↦⟶⟵⟹∂∇∆∈∉∋∏∑−∓∗∘∙√∛∝∞∧∨∩∪'
    '∫∬∮∼≃≅≈≠≡≤≥≪≫⊂⊃⊆⊇⊕⊖⊗⊙⊤⊥⋅⌈⌉⌊⌋⟨⟩∀∃∄∅⟦⟧ℝℕℤℚℂℓℏℒℱ†⏞⏟⏠⏡𝒩𝒪𝒟𝒜𝔼'
    '\u0302\u0303\u0304\u0307\u0338\u20d7\u2061\u2062\u2063')
MATH = (span(' ', '~') | span('Α', 'ω') | span('𝐀', '𝑍') | span('𝑎', '𝑧')
        | span('𝛢', '𝜛') | span('𝟎', '𝟙') | set(map(ord, SYMBOLS)))


def make(source, target, letters):
    "A font with these letters alone and what belongs to them: larger forms, accents"
    from fontTools import subset
    options = subset.Options(flavor='woff2', hinting=False, layout_features=['*'],
                             notdef_outline=True, name_IDs=[0, 1, 2, 4, 5, 13, 14])
    font = subset.load_font(source, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=letters)
    subsetter.subset(font)
    subset.save_font(font, target, options)
    print(f'{target.name}: {target.stat().st_size} bytes')


def find(folder, name):
    return next(iter(sorted(Path(folder).rglob(name))), None) or sys.exit(f'no {name}')


if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    css = find(sys.argv[1], 'bootstrap-icons.css').read_text(encoding='utf-8')
    codes = dict(re.findall(r'\.bi-([\w-]+)::before *\{ *content: *"\\(\w+)"', css))
    make(find(sys.argv[1], 'noto-sans-math-*.woff2'), FONTS/'math.woff2', MATH)
    make(find(sys.argv[1], 'bootstrap-icons.woff*'), FONTS/'icons.woff2',
         [int(codes[name], 16) for name in ICONS])
