"""Plain, native English: what a script can decide. Reading aloud finds the rest."""
import io
import re
import tokenize
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT/'nbs').glob('*.ipynb'))
TEXTS = [ROOT/name for name in ('README.md', 'CONTRIBUTING.md', 'benchmarks/README.md')]
NOUN_GOES_ON = (r'(?:run|set|data|loop|image|picture|batch|loss|phase|split|step|mode|'
                r'loader|sample|curve|example|code|epoch|time|accuracy|pass|recipe|'
                r'script|rows|seed|rate|order|word|row|label|statistic|half|error|'
                r'program|flag|side|reading|'
                r'framework|librar|speed|budget|throughput|schedule|machine|process)')
# what we found in reviews: pattern, and what to write instead
PATTERNS = {
    (r'\b(?:a|each|every|one|both|another|whole|two|three) trainings?\b'
     rf'(?! {NOUN_GOES_ON})'):
        'a training run, a run',
    r'\b[Ww]hoever\b': 'if you …',
    r'(?<![Tt]here )\b(?:is|are|was) none\b(?! of that)': 'is not one; there is no …',
    r'\bshall\b': 'must, should, will',
    r', too[.;:)!?]': 'also, or put "too" without a comma',
    r'\bbehind (?:his|her|your|its) back\b': 'without telling you',
    r'\bby much\b': 'by far; much',
    r"\bhas(?: not|n't) got\b": 'has not become; does not have',
    r'\bthe patient\b': 'the broken network',
    r'\bnoughts?\b': 'zero',
    r'\brightly\b': 'correctly',
    r'\bby heart\b': 'memorise',
    r'\bbelongs? into\b': 'belongs in',
    r'\binside of\b': 'inside',
    r'\b(?:[Aa]bove|[Bb]elow|[Bb]eside)(?: \w+){0,2} stands?\b': 'subject first',
    r'\b[Mm]ind (?:that|what)\b': 'note that; look at',
    r'\b(?:[Ww]hat|[Ii]f|[Ww]hen) one (?:really )?(?:can|could|does|has|knows|may|must|'
    r'needs|says|should|wants|would)\b': 'you, we',
    r'\bnot (?:\w+ ){1,5}any more\b': 'no longer',
}


def problems(text):
    "What in `text` is on the list, with the words around it"
    for pattern, instead in PATTERNS.items():
        for found in re.finditer(pattern, text):
            around = text[max(0, found.start()-25):found.end()+20].replace('\n', ' ')
            yield f'“…{around}…”: write {instead}'


def words_of_code(source):
    "Comments and strings of a cell, as text"
    try: tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError, IndentationError): return ''
    kinds = {tokenize.COMMENT, tokenize.STRING,
             getattr(tokenize, 'FSTRING_MIDDLE', tokenize.STRING)}
    return '\n'.join(t.string for t in tokens if t.type in kinds)


def read(path):
    "The words of a page: prose, comments, strings"
    if path.suffix == '.md': return path.read_text('utf-8')
    return '\n\n'.join(
        cell.source if cell.cell_type == 'markdown' else words_of_code(cell.source)
        for cell in nbformat.read(path, as_version=4).cells)


@pytest.mark.parametrize('path', [*PAGES, *TEXTS], ids=lambda p: p.stem)
def test_english(path):
    found = list(problems(read(path)))
    assert not found, '\n'.join(['', *found])


@pytest.mark.parametrize('bad', [
    'It ends a training when the loss rises.', 'Whoever pads, pads with grey.',
    'a name that is none', 'as we shall see', 'That is right, too.',
    'Above stand four pictures.',
    'what one would hope for', 'The scale does not matter any more.'])
def test_found(bad): assert list(problems(bad))


@pytest.mark.parametrize('good', [
    'a training run', 'each training step', 'That is right too.', 'too large, too soon',
    'when one of the two fails', 'what one step does', 'where there is none',
    'no more than two', 'the whole training set'])
def test_left_alone(good): assert not list(problems(good))


def test_code_has_words():
    words = words_of_code('x = 1  # a comment\ndef f(): "a docstring"\n')
    assert 'a comment' in words and 'a docstring' in words
