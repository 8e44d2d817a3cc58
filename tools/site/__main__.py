"""`python -m tools.site`: the site that `_quarto.yml` describes, from the committed outputs.

Skips everything when nothing changed."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tools.site import dark, live, pages, reference

ROOT = Path(__file__).resolve().parents[2]
HERE, WORK = Path(__file__).parent, ROOT / '.cache' / 'site'


def fingerprint(config: dict) -> str:
    "Changes when a page, the package, or this builder does."
    digest = hashlib.sha256()
    inputs = [ROOT / '_quarto.yml', ROOT / 'settings.ini', ROOT / 'constraints.txt',
              *(ROOT / 'nbs' / page for _, page, _ in pages.contents(config)),
              *sorted((ROOT / 'kvm_mmu_lit').rglob('*.py')),
              *sorted(p for p in HERE.rglob('*') if p.is_file() and p.suffix != '.pyc')]
    for path in inputs: digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def build(config: dict, out: Path) -> bool:
    "Sources, then Sphinx, then the finished folder at once in its place. Are the live figures in it?"
    sources, made = WORK / 'sources', WORK / 'html'
    for folder in (sources, made): shutil.rmtree(folder, ignore_errors=True)
    pages.write(config, ROOT / 'nbs', sources, reference.write)
    shutil.copytree(HERE / 'static', sources / '_static')
    (sources / '_static' / 'dark.css').write_text(dark.sheet())
    alive = live.assemble(ROOT, sources / '_static' / 'live')
    (sources / 'site.json').write_text(json.dumps({'website': config['website'], 'live': alive}))
    shutil.copy(HERE / 'conf.py', sources / 'conf.py')
    done = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-j', str(os.cpu_count() or 1),
                           '-b', 'html',
                           '-d', str(WORK / 'doctrees'), str(sources), str(made)])
    if done.returncode: sys.exit('the site has faults: see the lines above')
    shutil.rmtree(out, ignore_errors=True)
    made.rename(out)
    return alive


def main():
    config = yaml.safe_load((ROOT / '_quarto.yml').read_text())
    missing = [name for _, name, _ in pages.contents(config) if not (ROOT / 'nbs' / name).exists()]
    if missing: sys.exit(f"_quarto.yml names {', '.join(missing)}: no such notebook in nbs/")
    out, stamp, start = ROOT / config['project']['output-dir'], WORK / 'built.sha256', time.perf_counter()
    now = fingerprint(config)
    if stamp.exists() and stamp.read_text() == now and (out / 'index.html').exists():
        print(f'skip  site: unchanged ({out.name}/)')
        return
    WORK.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    alive = build(config, out)
    stamp.write_text(now)
    print(f"built {out.name}/ in {time.perf_counter() - start:.1f} s{'' if alive else ', without live figures'}")


if __name__ == '__main__': main()
