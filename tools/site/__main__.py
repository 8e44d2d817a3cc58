"""`python -m tools.site`: notebooks -> _site_src/ -> Sphinx -> the folder `_quarto.yml` names. Skips everything when nothing changed."""
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tools.site import live, pages

ROOT = Path(__file__).resolve().parents[2]
HERE, SOURCES = Path(__file__).parent, ROOT / '_site_src'


def fingerprint(config: dict) -> str:
    "Changes when a page, the package, or this builder does."
    digest = hashlib.sha256()
    inputs = [ROOT / '_quarto.yml', *(ROOT / 'nbs' / page for _, page, _ in pages.contents(config)),
              *sorted((ROOT / 'kvm_mmu_lit').rglob('*.py')), *sorted(p for p in HERE.rglob('*') if p.is_file() and p.suffix != '.pyc')]
    for path in inputs: digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def main():
    config = yaml.safe_load((ROOT / '_quarto.yml').read_text())
    out = ROOT / config['project']['output-dir']
    stamp, now, start = ROOT / '.cache' / 'site.sha256', fingerprint(config), time.perf_counter()
    if stamp.exists() and stamp.read_text() == now and (out / 'index.html').exists():
        print(f'skip  site: unchanged ({out.name}/)')
        return
    stamp.unlink(missing_ok=True)
    shutil.rmtree(SOURCES, ignore_errors=True)
    pages.write(config, ROOT / 'nbs', SOURCES)
    shutil.copytree(HERE / 'static', SOURCES / '_static')
    alive = live.assemble(ROOT, SOURCES / '_static' / 'live')
    (SOURCES / 'site.json').write_text(json.dumps({'title': config['website']['title'], 'live': alive}))
    shutil.copy(HERE / 'conf.py', SOURCES / 'conf.py')
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-j', '2', '-b', 'html', str(SOURCES), str(out)])
    if done.returncode: sys.exit(done.returncode)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(now)
    print(f"built {out.name}/ in {time.perf_counter() - start:.1f} s{'' if alive else ', without live figures'}")


if __name__ == '__main__': main()
