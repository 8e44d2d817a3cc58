"""Is everything that is generated in step with the notebooks? Exports, extracts and renders, then asks git; prints what
changed."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def state() -> str:
    "What git sees of the generated and the cleaned files."
    paths = ['nbs', 'kvm_mmu_lit', 'tests/claims', 'README.md', 'pyproject.toml']
    diff = subprocess.run(['git', 'diff', '--binary', '--', *paths], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout
    new = subprocess.run(['git', 'ls-files', '--others', '--exclude-standard', '--', *paths], cwd=ROOT,
                         capture_output=True, text=True, check=True).stdout
    return diff + new


def main():
    before, bin = state(), Path(sys.executable).parent
    for command in ([sys.executable, 'tools/export.py'], [bin / 'nbdev_clean'], [sys.executable, 'tools/claims.py'],
                    [sys.executable, 'tools/readme.py']):
        subprocess.run([str(part) for part in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    if state() != before:
        print(subprocess.run(['git', 'status', '--short'], cwd=ROOT, capture_output=True, text=True).stdout)
        sys.exit('exporting, cleaning, extracting or rendering changed the tree; commit the result')
    print('exported modules, claims, README and notebooks are in step')


if __name__ == '__main__': main()
