"""Make the mistakes of chapter "Would a mistake be seen?" one by one: `python tools/mutants.py [--seconds N] [--jobs J] [NAME ...]`.

Prints what kills each, notes it in nbs/review/mutants.json, and fails when one lives that should not.
"""
import argparse
import json
import sys
from pathlib import Path

from kvm_mmu_lit.review.mutants import MUTANTS, alive, run_mutants, score

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / 'nbs' / 'review' / 'mutants.json'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help="only these mutants")
    parser.add_argument('--seconds', type=float, default=20, help="of random stories for each, 20 unless told")
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--seed', type=int, default=1)
    asked = parser.parse_args()
    unknown = set(asked.names) - {mutant.name for mutant in MUTANTS}
    if unknown: parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    def tell(record): print(f"{record['seconds']:6.1f} s  {record['name']}: {record['story'] or record['test'] or 'lives' + ('' if not record['lives'] else ', as it may')}", flush=True)
    records = run_mutants(ROOT / 'kvm_mmu_lit', ROOT / 'tests', tuple(asked.names), asked.seed, asked.seconds, asked.jobs, tell)
    print(score(records))
    known = {record['name']: record for record in json.loads(RECORDS.read_text())} if RECORDS.exists() else {}
    known.update({record['name']: {key: value for key, value in record.items() if key != 'seconds'} for record in records})
    RECORDS.write_text(json.dumps([known[mutant.name] for mutant in MUTANTS if mutant.name in known], indent=1) + '\n')
    return bool(alive(records))


if __name__ == '__main__': sys.exit(main())
