"""Play random stories over every setting: `python tools/theorem.py --steps N --seed S [--jobs J]`.

Prints how many steps were played, how fast, and what broke, cut down to the events it needs.
"""
import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed

from kvm_mmu_lit.review.stories import shortened, tell
from kvm_mmu_lit.review.worlds import all_settings

LENGTH = 250       # Steps of a story


def play(setting, seed, length):
    "One story, told to the process that asked."
    return tell(setting, seed, length)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--steps', type=int, default=100_000)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--seconds', type=float, default=1e9, help="stop after that, however many steps there were")
    asked = parser.parse_args()
    settings, started, steps, counts, broken = all_settings(), time.monotonic(), 0, Counter(), []
    stories = max(1, -(-asked.steps // LENGTH))
    with ProcessPoolExecutor(asked.jobs) as pool:
        for done in range(0, stories, 64 * asked.jobs):
            todo = [pool.submit(play, settings[n % len(settings)], asked.seed + n // len(settings), LENGTH)
                    for n in range(done, min(stories, done + 64 * asked.jobs))]
            for ended in (future.result() for future in as_completed(todo)):
                steps, counts = steps + ended.steps, counts + ended.counts
                if ended.broken: broken.append(ended)
            print(f"{steps:,} steps, {len(broken)} violations, {time.monotonic() - started:.0f} s", file=sys.stderr,
                  flush=True)
            if time.monotonic() - started > asked.seconds: break
    for ended in broken[:5]:
        print(f"{ended.setting}, seed {ended.seed}, step {ended.steps}: {ended.broken}")
        for event in shortened(ended): print(f"    {json.dumps(event)}")
    seconds = time.monotonic() - started
    print(', '.join(f"{count} {name}" for name, count in counts.most_common()))
    print(f"{steps:,} steps in {stories:,} stories over {min(stories, len(settings))} settings, seed {asked.seed}: "
          f"{len(broken)} violations, {steps / seconds:.0f} steps/s in {asked.jobs} processes")
    return bool(broken)


if __name__ == '__main__': sys.exit(main())
