"""Every numbered chapter ends with exercises of one form: task, stub, check, the stub
fails it, folded hint, folded solution that passes it; and before every figure with
sliders stands what to try. The cells themselves are run by `nbdev_test`; here we
look that they are there, in this order. The checker is fed bad pages, too. Exempt:
the appendices, numbered from 80 on (the tools of the book and the like), where there
is nothing to practise."""
import ast
import json
import re

import pytest
import torch
from conftest import ROOT

CHAPTERS = sorted((ROOT/'nbs').glob('[0-7]*.ipynb'))
GRADES = ['Warm-up', 'Build', 'Explore']
FOLDED = re.compile(
    r'<details><summary>([^<\n]+)</summary>\n\n.+?\n\n</details>\s*', re.S)
RANDOM = re.compile(r'\brandom\.|\btorch\.(rand|randn|randint|randperm)\b')


def pieces(nb):
    "The notebook as (kind, text): Markdown parted at its headings of level 2 and 3"
    for cell in nb['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            yield from (
                ('text', part.strip())
                for part in re.split(r'(?m)^(?=#{2,3} )', text)
                if part.strip()
            )
        else:
            yield 'code', text


def exercises(nb):
    "[(heading, pieces after it)] of the section Exercises"
    found, inside = [], False
    for kind, text in pieces(nb):
        if kind == 'text' and text.startswith('## '):
            inside = bool(re.match(r'## Exercises\b', text))
        elif inside and kind == 'text' and text.startswith('### '):
            heading, _, rest = text[4:].partition('\n')
            found.append((heading, [('text', rest.strip())]))
        elif inside and found:
            found[-1][1].append((kind, text))
    return found


def option(src, name):
    hit = re.search(rf'^#\|\s*{name}:\s*(.*)$', src, re.M)
    return hit and hit[1].strip().strip('"')

def tree(src):
    try: return ast.parse(src)
    except SyntaxError: return ast.Module(body=[], type_ignores=[])

def defined(src):
    return {
        n.name for n in tree(src).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    }

def calls(src, name, failing):
    """First arguments, as text, of the calls of `name` at the top of the cell, inside
    of `with expect_fail(AssertionError, '…')` or outside"""
    def walk(nodes, inside):
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
            guard = isinstance(node, ast.With) and any(
                re.match(
                    r"expect_fail\(AssertionError, ['\"].{4,}['\"]\)",
                    ast.unparse(i.context_expr))
                for i in node.items
            )
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == name
                and inside == failing
            ):
                yield ', '.join(map(ast.unparse, node.args))
            yield from walk(ast.iter_child_nodes(node), inside or guard)
    return list(walk(tree(src).body, False))

def check_problems(name, src):
    """A check speaks: each of its assertions has a message, some with the values that
    went wrong; and it draws its cases"""
    fn = next(
        n for n in tree(src).body if isinstance(n, ast.FunctionDef) and n.name == name)
    asserts = [n for n in ast.walk(fn) if isinstance(n, ast.Assert)]
    if not asserts:
        yield f'{name} asserts nothing'
    elif not all(n.msg for n in asserts):
        yield f'{name}: an assertion without a message'
    elif not any(
        isinstance(m, ast.JoinedStr) for n in asserts for m in ast.walk(n.msg)
    ):
        yield f'{name}: no message shows the values that went wrong'
    if not RANDOM.search(ast.unparse(fn)): yield f'{name} tries no random case'


def exercise_problems(heading, parts):
    grade = heading.split(':')[0]
    if grade not in GRADES or not re.match(r'[^:]+: \S', heading):
        yield f'{heading!r}: begin with Warm-up:, Build: or Explore:'
    if len(parts[0][1].split()) < 12: yield f'{heading}: no task before the stub'
    codes = [(i, s) for i, (kind, s) in enumerate(parts) if kind == 'code']
    for _, s in codes:
        if re.search(r'^#\|\s*(notest|slow|cuda|net|eval:\s*false)', s, re.M):
            yield f'{heading}: a cell that is not run: {s[:40]!r}'
    stub = next(((i, s) for i, s in codes if 'your code' in s), None)
    check = next(
        ((i, n, s) for i, s in codes for n in defined(s) if n.startswith('check_')),
        None)
    if not stub or not defined(stub[1]):
        yield f'{heading}: no stub (a cell with a definition and "your code")'
        return
    if not check or check[0] <= stub[0]:
        yield f'{heading}: no check (a function check_… in a cell after the stub)'
        return
    at, name, src = check
    for problem in check_problems(name, src): yield f'{heading}: {problem}'
    stubs = ', '.join(
        n.name for n in tree(stub[1]).body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    fails = next(
        (i for i, s in codes if i >= at and stubs in calls(s, name, True)), None)
    if fails is None:
        yield (f'{heading}: no cell shows that the stub fails: '
               f'with expect_fail(AssertionError, "what is wrong"): {name}({stubs})')
        return
    hint = next(
        (
            i for i, (kind, s) in enumerate(parts)
            if kind == 'text' and (m := FOLDED.fullmatch(s)) and m[1] == 'Hint'),
        None,
    )
    if hint is None: yield f'{heading}: no folded hint'
    elif hint < fails: yield f'{heading}: the hint stands before the check'
    solutions = [
        i for i, s in codes
        if i > fails and (option(s, 'code-summary') or '').startswith('Solution')]
    if not solutions: yield f'{heading}: no solution'; return
    for i, s in codes:
        if i > fails and i not in solutions:
            yield (f'{heading}: after the check, a cell that is no folded solution: '
                   f'{s[:40]!r}')
        if i in solutions and option(s, 'code-fold') != 'true':
            yield f'{heading}: the solution is not folded (code-fold: true)'
    if hint is not None and hint > solutions[0]:
        yield f'{heading}: the hint stands after the solution'
    if not any(set(calls(parts[i][1], name, False)) - {stubs} for i in solutions):
        yield f'{heading}: no solution is given to {name}'
    for i, (kind, s) in enumerate(parts):
        asks = all(sentence.endswith('?') for sentence in re.split(r'(?<=[.?!])\s+', s))
        if kind == 'text' and i > solutions[0] and not FOLDED.fullmatch(s) and not asks:
            yield f'{heading}: an answer in view after the solution: {s[:40]!r}'


def problems(nb):
    found = exercises(nb)
    grades = [heading.split(':')[0] for heading, _ in found]
    if len(found) < 3: yield f'{len(found)} exercises, at least 3 wanted'
    if set(grades) != set(GRADES) or grades != sorted(
        grades, key=lambda g: GRADES.index(g) if g in GRADES else 9
    ):
        yield f'grades {grades}: wanted {GRADES}, in this order'
    for heading, parts in found: yield from exercise_problems(heading, parts)

def shows_sliders(src):
    return any(
        isinstance(n, (ast.Expr, ast.Assign)) and isinstance(n.value, ast.Call)
        and ast.unparse(n.value.func) == 'explore' for n in tree(src).body)

def untried(nb):
    """Figures with sliders without a hint, in the text since the figure before, what to
    do with them"""
    said = ''
    for kind, text in pieces(nb):
        if kind == 'text':
            said += text
        elif shows_sliders(text):
            if '**What to try**' not in said:
                yield f'"**What to try**: …" missing before {text[:50]!r}'
            said = ''


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_exercises(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    bad = [*problems(nb), *untried(nb)]
    assert not bad, '\n' + '\n'.join(bad)

def test_all_chapters_are_looked_at(): assert len(CHAPTERS) >= 17

def test_the_check_of_a_gradient_names_a_wrong_sign():
    nb = json.loads((ROOT/'nbs/00_mechanics.ipynb').read_text(encoding='utf-8'))
    name, space = 'check_numeric_grad', dict(torch=torch)
    src, = [text for kind, text in pieces(nb) if f'def {name}(' in text]
    exec(src.partition('\nwith expect_fail')[0], space)
    def downhill(f, p): return -torch.autograd.functional.jacobian(f, p)
    with pytest.raises(AssertionError, match='the sign is wrong'): space[name](downhill)


# ---- the checker can fail ------------------------------------------------------------

TASK = ('Write `double(x)`: a tensor of the shape of `x` with all of its numbers times '
        'two, and nothing else changed.')
STUB = 'def double(x): ...   # your code'
CHECK = '''def check_double(fn):
    x = torch.randn(random.randint(1, 9))
    got = fn(x)
    assert got is not None, 'the function returns None'
    assert torch.equal(got, 2*x), f'{x}: expected {2*x}, got {got}\''''
FAILS = "with expect_fail(AssertionError, 'returns None'): check_double(double)"
HINT = '<details><summary>Hint</summary>\n\nAdd it to itself.\n\n</details>'
SOLUTION = '''#| code-fold: true
#| code-summary: "Solution"
def double_solution(x): return x + x
for _ in range(3): check_double(double_solution)'''

def page(*grades, **other):
    """A page of exercises; `other` replaces, drops (None) or adds a piece of the last
    one"""
    cells = [('markdown', '## Exercises')]
    for grade in grades or GRADES:
        part = dict(
            head=f'### {grade}: twice\n\n{TASK}',
            stub=STUB,
            check=CHECK,
            fails=FAILS,
            hint=HINT,
            solution=SOLUTION,
        )
        if grade == (grades or GRADES)[-1]: part |= other
        cells += [
            (
                'markdown'
                if s.startswith(('#', '<', '>', 'T')) and not s.startswith('#|')
                else 'code',
                s,
            )
            for s in part.values()
            if s
        ]
    return dict(
        cells=[
            dict(cell_type=kind, source=s.splitlines(True))
            for kind, s in [*cells, ('markdown', '## Sources')]
        ]
    )

def test_good_page_passes():
    assert list(problems(page())) == []
    assert (
        list(
            problems(
                page(
                    'Warm-up', 'Build', 'Build', 'Explore',
                    after=HINT.replace('Hint', 'What it shows'))))
        == []
    )
    assert (
        list(problems(page(after='The next one?'.replace('The', 'Try: which is the'))))
        == [])

@pytest.mark.parametrize(
    'nb, problem',
    [
        (page('Warm-up', 'Explore'), '2 exercises'),
        (page('Warm-up', 'Build', 'Build'), 'grades'),
        (page('Build', 'Warm-up', 'Explore'), 'grades'),
        (page(head=f'### Bonus: twice\n\n{TASK}'), 'begin with Warm-up'),
        (page(head='### Explore: twice\n\nDouble it.'), 'no task'),
        (page(stub=None), 'no stub'),
        (page(stub='double = None   # your code'), 'no stub'),
        (page(check=None), 'no check'),
        (page(stub=CHECK + '\n\n' + STUB, check=None), 'no check'),
        (page(check='def check_double(fn): fn(torch.randn(3))'), 'asserts nothing'),
        (page(check=CHECK.split(", f'{x")[0]), 'without a message'),
        (
            page(check=CHECK.split(", f'{x")[0] + ", 'wrong'"),
            'no message shows the values'),
        (
            page(
                check=CHECK.replace(
                    'torch.randn(random.randint(1, 9))', 'torch.ones(3)')),
            'no random case',
        ),
        (page(fails=None), 'no cell shows that the stub fails'),
        (page(fails='check_double(double)'), 'no cell shows that the stub fails'),
        (
            page(fails=FAILS.replace('(double)', '(other)')),
            'no cell shows that the stub fails'),
        (
            page(fails="with expect_fail(): check_double(double)"),
            'no cell shows that the stub fails'),
        (page(hint=None), 'no folded hint'),
        (page(hint='> **Hint**\n>\n> Add it to itself.'), 'no folded hint'),
        (page(hint=HINT.replace('\n\n</details>', '')), 'no folded hint'),
        (page(hint=None, late=HINT), 'after the solution'),
        (
            page(stub=HINT, check=STUB, fails=CHECK, hint=FAILS),
            'the hint stands before the check'),
        (page(solution=None), 'no solution'),
        (page(solution=SOLUTION.replace('#| code-fold: true\n', '')), 'not folded'),
        (
            page(solution=SOLUTION.rsplit('\n', 1)[0]),
            'no solution is given to check_double'),
        (
            page(
                solution=SOLUTION.replace(
                    'check_double(double_solution)', 'check_double(double)')),
            'no solution is given to check_double',
        ),
        (
            page(
                solution=SOLUTION.replace(
                    'for _', "with expect_fail(AssertionError, 'wrong'):\n  for _")),
            'no solution is given to check_double',
        ),
        (page(solution='#| notest\n' + SOLUTION), 'not run'),
        (page(after='print(double_solution(1))'), 'no folded solution'),
        (page(after='The answer is two.'), 'an answer in view'),
    ],
)
def test_bad_page_is_found(nb, problem):
    found = list(problems(nb))
    assert any(problem in p for p in found), found

def test_untried_figure_is_found():
    cell = lambda kind, src: dict(cell_type=kind, source=[src])
    figure, hint = (
        cell('code', "def f(a): return [0, a]\nexplore(f, a=[1, 2], alt='…')"),
        cell('markdown', '**What to try**: move a.'))
    assert list(untried(dict(cells=[hint, figure, hint, figure]))) == []
    assert len(list(untried(dict(cells=[hint, figure, figure])))) == 1
    assert (
        len(
            list(
                untried(
                    dict(
                        cells=[
                            cell('markdown', 'Look:'),
                            cell('code', "fig = explore(f, a=[1])\nfig")]
                    )
                )
            )
        )
        == 1
    )
