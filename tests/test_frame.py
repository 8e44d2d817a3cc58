"""The frame: which door opens which way, what an import costs, and whether everything that is made from the notebooks
is in step with them."""
import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from tools import claims, export, notebooks, readme
from tools.notebooks import NBS, ROOT, all_notebooks, source
from tools.site import pages

PACKAGE = ROOT / 'kvm_mmu_lit'
DOORS = {   # what a part may import besides the standard library and lower chapters of its own
    'draw': set(), 'guest': {'draw'}, 'mmu': {'guest', 'draw'}, 'review': {'mmu', 'guest', 'draw'},
    'evidence': {'review', 'mmu', 'guest', 'draw'},
    'lab': {'evidence', 'review', 'mmu', 'guest', 'draw'},
    'cli': {'cli_review', 'cli_run', 'lab', 'evidence', 'review', 'mmu', 'guest', 'draw'},
    # one command line in two chapters; each imports the other only when it runs
    'cli_run': {'cli', 'review', 'mmu', 'guest', 'draw'},
    'cli_review': {'cli', 'evidence', 'review', 'mmu', 'guest', 'draw'},
}
BOOK = all_notebooks()
WIDTH = 120   # the site shows so much of a line of code without scrolling: tests/test_site.py
CHAPTERS = [path for path in BOOK if path.name != 'index.ipynb']


def name(path: Path) -> str: return path.relative_to(NBS).with_suffix('').as_posix()
def read(path: Path) -> list: return json.loads(path.read_text())['cells']
def per_notebook(paths): return pytest.mark.parametrize('path', paths, ids=name)


def chapter_order() -> dict:
    "Module name -> (part, place in its part), from the notebooks."
    found = {}
    for place, path in enumerate(CHAPTERS):
        module = claims.module_of(read(path))
        if module: found[module] = (module.split('.')[1], place)
    return found


def ours(imported: set) -> set:
    "Of dotted names, those that are modules of chapters."
    return imported & set(chapter_order())


def closed_doors(module: str, imported: set) -> list:
    "Imports of a chapter that the architecture does not allow."
    order = chapter_order()
    part, place = order[module]
    return [f'{module} imports {other}' for other in sorted(imported)
            if order[other][0] not in DOORS[part] and not (order[other][0] == part and order[other][1] < place)]


# Rooms and doors

@pytest.mark.parametrize('module', chapter_order())
def test_a_module_says_each_name_once(module):
    tree = ast.parse(ROOT.joinpath(*module.split('.')).with_suffix('.py').read_text())
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize('module', chapter_order())
def test_a_module_uses_what_it_imports(module):
    tree = ast.parse(ROOT.joinpath(*module.split('.')).with_suffix('.py').read_text())
    bound = {(alias.asname or alias.name).split('.')[0] for node in tree.body
             if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    types = [getattr(node, field, None) for node in ast.walk(tree) for field in ('annotation', 'returns')]
    quoted = {word for one in types if one is not None for part in ast.walk(one) if isinstance(part, ast.Constant)
              for word in re.findall(r'\w+', str(part.value))}
    assert bound - names - quoted == set()


def test_every_module_belongs_to_a_chapter():
    found = {'.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in export.modules()
             if path.name not in ('__init__.py', '_modidx.py')}
    assert found == set(chapter_order())


def test_every_part_of_the_book_has_doors():
    assert {part for part, _ in chapter_order().values()} <= set(DOORS)


@pytest.mark.parametrize('module', chapter_order())
def test_a_module_imports_only_through_the_doors(module):
    path = ROOT.joinpath(*module.split('.')).with_suffix('.py')
    assert closed_doors(module, ours(notebooks.absolute_imports(path)) - {module}) == []


# A case study has none: nothing imports it, and it may look everywhere
MODULES = [path for path in CHAPTERS if claims.module_of(json.loads(path.read_text())['cells'])]


def test_only_case_studies_have_no_module():
    assert {path.parent.name for path in set(CHAPTERS) - set(MODULES)} <= {'review'}


@per_notebook(MODULES)
def test_a_chapter_needs_no_later_chapter(path):
    code = '\n'.join(source(cell) for cell in read(path) if cell['cell_type'] == 'code')
    module = claims.module_of(read(path))
    assert closed_doors(module, ours(notebooks.imported_modules(code)) - {module}) == []


# Imports

NEW_MODULES = """
import sys
before = set(sys.modules)
import importlib
for name in sys.argv[1:]: importlib.import_module(name)
print(*sorted(set(sys.modules) - before))
"""


def new_modules(*names: str) -> set:
    "Top-level names of the modules that importing `names` brings; fails if that prints anything."
    done = subprocess.run([sys.executable, '-W', 'error', '-c', NEW_MODULES, *names], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert done.stdout.count('\n') == 1, f'the import prints {done.stdout.splitlines()[:-1]}'
    return {name.partition('.')[0] for name in done.stdout.split()}


def test_import_is_silent_and_loads_only_the_standard_library():
    assert new_modules('kvm_mmu_lit') - sys.stdlib_module_names == {'kvm_mmu_lit'}


@pytest.mark.parametrize('module',
                         [module for module, (part, _) in chapter_order().items() if part in ('draw', 'guest')])
def test_guest_and_draw_load_no_third_party_module(module):
    assert new_modules(module) - sys.stdlib_module_names == {'kvm_mmu_lit'}


def test_what_an_import_costs(measured):
    def once(code):
        start = time.perf_counter()
        subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)
        return time.perf_counter() - start
    statements = ('pass', 'import kvm_mmu_lit', 'import kvm_mmu_lit.guest.walk')
    times = [[once(code) for code in statements] for _ in range(7)]
    bare, package, walk = (min(column) * 1000 for column in zip(*times))
    assert bare > 0
    measured(f'import kvm_mmu_lit: {package - bare:.1f} ms over bare Python ({bare:.1f} ms); kvm_mmu_lit.guest.walk: '
             f'{walk - bare:.1f} ms; least of {len(times)}')


# One description each

def test_one_version():
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini')
    namespace = {}
    exec((PACKAGE / '__init__.py').read_text(), namespace)
    assert namespace['__version__'] == config['DEFAULT']['version']


def test_the_site_lists_every_notebook_once_in_reading_order():
    listed = [page for _, page, _ in pages.contents(yaml.safe_load((ROOT / '_quarto.yml').read_text()))]
    assert listed[0] == 'index.ipynb' and len(set(listed)) == len(listed)
    assert set(listed) == {path.relative_to(NBS).as_posix() for path in BOOK}
    for part in {Path(page).parent for page in listed}:
        inside = [page for page in listed if Path(page).parent == part and page != 'index.ipynb']
        assert inside == sorted(inside)


def test_a_part_stands_together_on_the_site():
    parts = [part for part, _, _ in pages.contents(yaml.safe_load((ROOT / '_quarto.yml').read_text()))]
    assert len([part for part, before in zip(parts, [object(), *parts]) if part != before]) == len(set(parts))


@pytest.mark.parametrize('target', ['book', 'test', 'lab', 'site', 'serve', 'bench', 'env', 'export', 'execute',
                                    'claims', 'readme', 'sync', 'check', 'clean'])
def test_make_knows(target):
    done = subprocess.run(['make', '-n', target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def shell(line: str) -> subprocess.CompletedProcess:
    "Run a line as a reader would, with this environment's programs."
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(['sh', '-c', line], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'PATH': path})


def test_make_book_ends_with_a_real_guest():
    recipe = subprocess.run(['make', '-n', 'book'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    said = ''
    for line in recipe.splitlines():
        if 'kvm-mmu ' not in line: continue
        done = shell(line.replace('.venv/bin/', ''))
        assert done.returncode == 0, f'{line}\n{done.stdout}{done.stderr}'
        said += done.stdout
    assert ' allowed' in said and 'smallest change: ' in said and ' ranges' in said


@pytest.mark.parametrize('line', re.findall(r'^kvm-mmu [^#\n]+', (ROOT / 'README.md').read_text(), re.M))
def test_a_command_of_the_readme_runs(line):
    done = shell(line)
    assert (done.returncode in ((0,) if ' check ' in line else (0, 1)) and done.stdout
            and not done.stderr.startswith('Traceback')), done.stdout + done.stderr
    assert 'not present' not in done.stdout, 'the example asks for an address this guest does not map'


# In step with the notebooks

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The tree without what git ignores, to export and to clean in."
    tree = tmp_path_factory.mktemp('tree')
    for folder in ('nbs', 'kvm_mmu_lit', 'tools'):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    for file in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md', '_quarto.yml'):
        shutil.copy(ROOT / file, tree)
    return tree


def differences(tree: Path, folder: str, suffix: str) -> list:
    "Files of a folder that are not byte for byte the same in the copy."
    def found(root):
        return {path.relative_to(root): path.read_bytes() for path in (root / folder).rglob('*' + suffix)
                if not re.search(r'/[._]{1,2}(ipynb|pycache)', str(path))}
    here, there = found(ROOT), found(tree)
    return sorted(str(path) for path in here.keys() | there.keys() if here.get(path) != there.get(path))


def run_in(tree: Path, *command):
    done = subprocess.run([str(part) for part in command], cwd=tree, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(tree)})
    assert done.returncode == 0, done.stdout + done.stderr


def test_exporting_changes_no_module(copy):
    run_in(copy, sys.executable, 'tools/export.py')
    assert differences(copy, 'kvm_mmu_lit', '.py') == []


def test_cleaning_changes_no_notebook(copy):
    run_in(copy, Path(sys.executable).parent / 'nbdev_clean')
    assert differences(copy, 'nbs', '.ipynb') == []


@pytest.mark.parametrize('tool', [claims, readme], ids=lambda tool: tool.__name__)
def test_what_is_extracted_is_in_step(tool):
    done = subprocess.run([sys.executable, tool.__file__, '--check'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_claim_is_noticed(tmp_path):
    tree = tmp_path / 'tree'
    for folder in ('nbs', 'tools', 'tests/claims'):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    stale = sorted((tree / 'tests' / 'claims').glob('test_*.py'))[0]
    stale.write_text(stale.read_text().replace('assert', 'assert not', 1))
    done = subprocess.run([sys.executable, 'tools/claims.py', '--check'], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 1 and stale.name in done.stderr


# What a notebook looks like

MACHINE = re.compile(r'(?<![\w.])/(?:home|root|work|tmp|Users|mnt|opt|var)/\w|pypi\.org|pythonhosted|npmjs|index-url')


@per_notebook(BOOK)
def test_a_notebook_is_clean(path):
    cells = read(path)
    ids = [cell['id'] for cell in cells]
    assert len(set(ids)) == len(ids)
    for cell in cells:
        assert cell.get('execution_count') is None, cell['id']
        assert not set(cell['metadata']) - {'tags'}, cell['id']
        assert not MACHINE.search(source(cell)), f'cell {cell["id"]} names a machine: {MACHINE.search(source(cell))[0]}'
        text = json.dumps(cell.get('outputs', []))
        assert not MACHINE.search(text), f'an output of cell {cell["id"]} names a machine: {MACHINE.search(text)[0]}'


@per_notebook(BOOK)
def test_no_output_is_an_error(path):
    for cell in read(path):
        assert all(out['output_type'] != 'error' for out in cell.get('outputs', [])), cell['id']
        assert notebooks.fault(cell.get('outputs', []), None) == '', cell['id']


@per_notebook(BOOK)
def test_a_directive_stands_in_code_only(path):
    assert ([cell['id'] for cell in read(path) if cell['cell_type'] == 'markdown' and source(cell).startswith('#|')]
            == [])


@per_notebook(BOOK)
def test_a_line_of_code_fits_the_page(path):
    for cell in read(path):
        lines = [line for line in source(cell).splitlines() if not line.startswith('#|')]
        assert cell['cell_type'] != 'code' or max(map(len, lines), default=0) <= WIDTH, cell['id']


@per_notebook(BOOK)
def test_a_chapter_shows_a_picture(path):
    bundles = [out.get('data', {}) for cell in read(path) for out in cell.get('outputs', [])]
    assert any('image/svg+xml' in bundle or '<svg' in ''.join(bundle.get('text/html', '')) for bundle in bundles)


@per_notebook([path for path in CHAPTERS if path not in MODULES])
def test_a_case_study_opens_with_its_question_and_the_answer_in_brief(path):
    title, answer = read(path)[:2]
    assert re.fullmatch(r'# .+\n\n> .+\?\s*', source(title))
    assert answer['cell_type'] == 'markdown' and len(source(answer)) > 80


@per_notebook(MODULES)
def test_a_chapter_opens_with_its_question_and_the_answer_in_brief(path):
    first, title = read(path)[:2]
    assert re.fullmatch(r'#\| *default_exp +[\w.]+', source(first).strip()), 'the first cell says which module this is'
    assert (title['cell_type'] == 'markdown'
            and re.fullmatch(r'# .+\n\n> .+\?\s*', source(title))), 'then comes "# Title", and "> A question?"'
    module = notebooks.module_file(claims.module_of([first]))
    question, _, answer = ast.get_docstring(ast.parse(module.read_text())).partition('\n\n')
    assert question == source(title).partition('> ')[2].strip()
    assert len(answer) > 80, 'the cell under the title answers in a few sentences'


@per_notebook([path for path in CHAPTERS if path.parent.name in ('guest', 'mmu', 'review', 'evidence')])
def test_a_chapter_claims_something(path):
    sentences = [claims.directive(cell, 'claim') for cell in read(path)]
    assert [sentence for sentence in sentences if sentence]


@pytest.mark.parametrize('path', sorted(claims.CLAIMS.glob('*.py')), ids=lambda path: path.stem)
def test_a_claims_module_asserts(path):
    tests = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
             and node.name.startswith('test_')]
    assert tests
    for test in tests: assert any(isinstance(node, (ast.Assert, ast.With)) for node in ast.walk(test)), test.name


# The runner

@pytest.fixture
def book(tmp_path):
    "A book of no chapters, with the tools."
    shutil.copytree(ROOT / 'tools', tmp_path / 'tools', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'kvm_mmu_lit').mkdir()
    (tmp_path / 'kvm_mmu_lit' / 'one.py').write_text('ONE = 1\n')
    return tmp_path


def execute(book: Path, *arguments) -> tuple:
    done = subprocess.run([sys.executable, 'tools/notebooks.py', *arguments], cwd=book, capture_output=True, text=True)
    assert done.stderr == ''
    return done.returncode, done.stdout


def written(cells: list, path: Path) -> Path:
    "A notebook of code cells, each with an old output."
    old = {'output_type': 'stream', 'name': 'stdout', 'text': ['old\n']}
    nb = {'cells': [{'cell_type': 'code', 'id': f'cell{i}', 'metadata': {}, 'execution_count': None, 'outputs': [old],
                     'source': text.splitlines(True)}
                    for i, text in enumerate(cells)],
          'metadata': {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}},
          'nbformat': 4, 'nbformat_minor': 5}
    path.write_text(json.dumps(nb))
    return path


@pytest.mark.parametrize('cells, said', [
    (['x = 1', 'x / 0'], r'cell cell1: ZeroDivisionError: division by zero'),
    (['x = )'], r'cell cell0: SyntaxError'),
    (['class Bad:\n    def _repr_mimebundle_(self, include=None, exclude=None): raise ValueError("no picture")',
      'Bad()'],
     r'cell cell1: an object cannot be shown[\s\S]*no picture'),
    (['object()'], r"cell cell0: an output holds an object's address"),
    (['import os; os._exit(3)'], r'ended with 3'),
], ids=['an error', 'a syntax error', 'a picture that cannot be drawn', 'an address', 'a process that dies'])
def test_a_cell_that_fails_is_named(book, cells, said):
    bad = written(cells, book / 'nbs' / 'bad.ipynb')
    before = bad.read_bytes()
    code, printed = execute(book)
    assert code == 1 and re.search(said, printed), printed
    assert 'nbs/bad.ipynb' in printed and bad.read_bytes() == before


def test_a_notebook_runs_again_only_when_it_or_what_it_imports_changes(book):
    path = written(['from kvm_mmu_lit.one import ONE', 'print(ONE)', 'x = 2'], book / 'nbs' / 'good.ipynb')
    assert execute(book, '--check') == (1, 'DIFF  nbs/good.ipynb: running it changes it; run `make execute`\n')
    assert execute(book)[1].startswith('wrote nbs/good.ipynb')
    outputs = [[''.join(out['text']) for out in cell['outputs']] for cell in read(path)]
    assert outputs == [[], ['1\n'], []], 'a cell that prints nothing loses what it printed before'
    before = path.read_bytes()
    assert execute(book) == (0, 'skip  nbs/good.ipynb: unchanged\n')
    assert execute(book, '--all')[1].startswith('same  nbs/good.ipynb') and path.read_bytes() == before
    (book / 'kvm_mmu_lit' / 'one.py').write_text('ONE = 11\n')
    assert execute(book)[1].startswith('wrote nbs/good.ipynb') and b'11' in path.read_bytes()


# The package

def run(*command, cwd) -> str:
    "What a command prints, away from this tree and from what PYTHONPATH adds."
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that no earlier build is packed with it."
    tree, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for file in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / file, tree)
    shutil.copytree(PACKAGE, tree / 'kvm_mmu_lit', ignore=shutil.ignore_patterns('__pycache__'))
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--disable-pip-version-check', '--no-deps', '--no-build-isolation',
        '-w', out, tree, cwd=out)
    return next(out.glob('*.whl'))


@pytest.fixture(scope='module')
def clean_python(wheel, tmp_path_factory):
    "The Python of a new environment that holds the wheel and nothing else."
    home = tmp_path_factory.mktemp('clean')
    venv.create(home, with_pip=False)
    python = home / 'bin' / 'python'
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '-q', '--disable-pip-version-check', '--no-deps',
        '--no-index', wheel, cwd=home)
    return python


def test_the_wheel_holds_every_module_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith('.py')}
        entry_points = next(archive.read(name).decode() for name in archive.namelist()
                            if name.endswith('entry_points.txt'))
    assert packed == {path.relative_to(ROOT).as_posix() for path in export.modules()}
    assert 'kvm-mmu = kvm_mmu_lit.cli:main' in entry_points


def test_the_core_works_without_any_dependency(clean_python, tmp_path):
    modules = [module for module, (part, _) in chapter_order().items() if part in ('draw', 'guest')]
    run(clean_python, '-c', '; '.join(f'import {module}' for module in ('kvm_mmu_lit', *modules)), cwd=tmp_path)


def test_the_installed_command_walks_a_guest(clean_python, tmp_path):
    # Its dependencies come from this environment, through a path file: what is tested is our wheel, not the registry's.
    site = next(clean_python.parent.parent.glob('lib/python*/site-packages'))
    (site / 'dependencies.pth').write_text(str(Path(pytest.__file__).parent.parent) + '\n')
    command, image = clean_python.parent / 'kvm-mmu', ROOT / 'tests' / 'data' / 'guests' / 'linux-4level'
    assert 'walk' in run(command, '--help', cwd=tmp_path)
    where = run(clean_python, '-c', 'import kvm_mmu_lit; print(kvm_mmu_lit.__file__)', cwd=tmp_path)
    assert str(site) in where
    assert '0xffff_ffff_92c0_0000 -> 0x8e0_0000' in run(command, 'walk', image, '0xffffffff92c00000', '--supervisor',
                                                        cwd=tmp_path)
