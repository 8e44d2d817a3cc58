"""What live figures need, from npm and PyPI by package name: Pyodide, Graphviz as WebAssembly, and our own wheel.

All of it is served with the site."""
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PYODIDE, GRAPHVIZ = 'pyodide@314.0.6', '@hpcc-js/wasm-graphviz@1.29.2'
CORE = ('pyodide.mjs', 'pyodide.asm.mjs', 'pyodide.asm.wasm', 'python_stdlib.zip')
BRIDGE = '''"""Make the `graphviz` package draw with Graphviz compiled to WebAssembly, where there is no `dot` to run."""
import importlib.resources
_engine = None

async def load():
    "Load Graphviz, once, and let `graphviz` use it."
    global _engine
    from graphviz import piping
    from pyodide.code import run_js
    text = importlib.resources.files(__name__).joinpath('graphviz.mjs').read_text()
    module = await run_js("(text) => import(URL.createObjectURL(new Blob([text], {type: 'text/javascript'})))")(text)
    _engine = await module.Graphviz.load()
    piping.Pipe._pipe_lines_string = staticmethod(lambda engine, format, lines, **_: _engine.layout(''.join(lines), format, engine))
    piping.Pipe._pipe_lines = staticmethod(lambda engine, format, lines, **_: _engine.layout(''.join(lines), format, engine).encode())
'''


def npm_pack(package: str, cache: Path) -> 'Path | None':
    "The tarball of an npm package, fetched once; None where npm is missing or has no network."
    have = cache / (package.replace('/', '-').replace('@', '_') + '.tgz')
    if have.exists(): return have
    if not shutil.which('npm'): return None
    cache.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(['npm', 'pack', '--silent', package], cwd=cache, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip(): return None
    (cache / done.stdout.strip().splitlines()[-1]).rename(have)
    return have


def member(tarball: Path, name: str) -> bytes:
    with tarfile.open(tarball) as tar: return tar.extractfile(f'package/{name}').read()


def wheels(root: Path, cache: Path) -> list:
    """Our wheel, built anew from a copy (a build leaves files behind that the next one would pack), and the graphviz
    package's."""
    out, pip = cache / 'wheels', [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as copy:
        for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
            shutil.copy(root / name, copy)
        shutil.copytree(root / 'kvm_mmu_lit', Path(copy, 'kvm_mmu_lit'), ignore=shutil.ignore_patterns('__pycache__'))
        run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', str(out), copy])
    have = list(cache.glob('graphviz-*.whl'))
    if not have:
        run([*pip, 'download', '--no-deps', '--only-binary=:all:', '-c', str(root / 'constraints.txt'), '-d',
             str(cache), 'graphviz'])
    for wheel in cache.glob('graphviz-*.whl'): shutil.copy(wheel, out)
    return sorted(out.glob('*.whl'))


def run(command: list):
    "Run a command; if it fails, say what it said."
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def bridge_wheel(engine: bytes, out: Path) -> Path:
    "A wheel that holds the WebAssembly Graphviz and the few lines that plug it in."
    path, info = out / 'graphviz_wasm-1.0-py3-none-any.whl', 'graphviz_wasm-1.0.dist-info'
    files = {'graphviz_wasm/__init__.py': BRIDGE.encode(), 'graphviz_wasm/graphviz.mjs': engine,
             f'{info}/METADATA': b'Metadata-Version: 2.1\nName: graphviz-wasm\nVersion: 1.0\n',
             f'{info}/WHEEL': b'Wheel-Version: 1.0\nGenerator: kvm_mmu_lit\nRoot-Is-Purelib: true\nTag: py3-none-any\n'}
    files[f'{info}/RECORD'] = ''.join(f'{name},,\n' for name in [*files, f'{info}/RECORD']).encode()
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items(): archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path


def lock_entry(wheel: Path, depends: list) -> dict:
    "How Pyodide's lock file describes one wheel."
    name, version = wheel.name.split('-')[:2]
    return dict(name=name, version=version, file_name=wheel.name, install_dir='site',
                sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
                package_type='package', imports=[name], depends=depends, unvendored_tests=False)


def assemble(root: Path, target: Path) -> bool:
    "Put all of it under `target`; False, with a line that says why, where npm's packages cannot be had."
    cache = root / '.cache' / 'npm'
    pyodide, graphviz = npm_pack(PYODIDE, cache), npm_pack(GRAPHVIZ, cache)
    if not pyodide or not graphviz:
        print("npm's packages cannot be had here: the site is built without live figures (their stills are there)")
        return False
    home = target / 'pyodide'
    home.mkdir(parents=True)
    for name in CORE: (home / name).write_bytes(member(pyodide, name))
    found = wheels(root, cache)
    found.append(bridge_wheel(member(graphviz, 'dist/index.js'), cache / 'wheels'))
    lock = json.loads(member(pyodide, 'pyodide-lock.json'))
    lock['packages'] = {}
    for wheel in found:
        name = wheel.name.split('-')[0].replace('_', '-').lower()
        lock['packages'][name] = lock_entry(wheel, {'kvm-mmu-lit': ['graphviz', 'graphviz-wasm'],
                                                    'graphviz-wasm': ['graphviz']}.get(name, []))
        shutil.copy(wheel, home / wheel.name)
    (home / 'pyodide-lock.json').write_text(json.dumps(lock))
    return True
