"""Make the mistakes of chapter "Would a mistake be seen?" one by one: `python tools/mutants.py [--steps N] [--jobs
J] [--again] [NAME ...]`.

Prints what kills each and the mutation score, notes both in nbs/review/mutants.json, and fails when one lives that
should not. What an interrupted run has found is kept in .cache/mutants.json and used again while no code changes.
"""
import argparse
import json
import sys
import time
from pathlib import Path

from kvm_mmu_lit.review.mutants import (MUTANTS, NOTHING, STEPS, alive, fingerprint, killed_by, run_mutants, score,
                                        survivors)

ROOT = Path(__file__).resolve().parent.parent
RECORDS, KEPT = ROOT / 'nbs' / 'review' / 'mutants.json', ROOT / '.cache' / 'mutants.json'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help="only these mutants")
    parser.add_argument('--steps', type=int, default=STEPS, help=f"of random stories for each, {STEPS} unless told")
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--again', action='store_true', help="forget what an interrupted run has found")
    asked = parser.parse_args()
    unknown = set(asked.names) - {mutant.name for mutant in MUTANTS}
    if unknown: parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    of, started = fingerprint(ROOT / 'kvm_mmu_lit', asked.steps, asked.seed), time.monotonic()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() and not asked.again else {}
    found = kept['records'] if kept.get('of') == of else {}

    def tell(record):
        killer = record['story'] or record['test'] or ('lives, and may: ' + record['lives'] if record['lives']
                                                       else 'LIVES')
        print(f"{time.monotonic() - started:6.0f} s  {record['name']}: {killer}", flush=True)
        found[record['name']] = record
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(dict(of=of, records=found)))

    wanted = [mutant for mutant in MUTANTS if not asked.names or mutant.name in asked.names]
    known = [mutant for mutant in wanted if mutant.name in found and not asked.names]
    if known: print(f"{len(known)} mutants are known from a run before, of the same code", flush=True)
    if len(known) < len(wanted):
        healthy = killed_by(NOTHING, ROOT / 'kvm_mmu_lit', asked.seed, asked.steps)
        if not survivors([healthy]):
            sys.exit(f"the book fails without any mistake: {healthy['story'] or healthy['test']}")
        print(f"{time.monotonic() - started:6.0f} s  no mistake: nothing fails", flush=True)
    run_mutants(ROOT / 'kvm_mmu_lit', tuple(mutant for mutant in wanted if mutant not in known), asked.seed,
                asked.steps, asked.jobs, tell)
    old = {record['name']: record for record in json.loads(RECORDS.read_text())} if RECORDS.exists() else {}
    records = [found.get(mutant.name) or old.get(mutant.name) for mutant in MUTANTS]
    records = [record for record in records if record]
    RECORDS.write_text(json.dumps(records, indent=1) + '\n')
    print(score(records))
    return bool(alive(records))


if __name__ == '__main__': sys.exit(main())
