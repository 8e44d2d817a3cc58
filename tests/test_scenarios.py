"""The scenarios that come with the project: each plays to its end, no invariant breaks, and a second play says the
same."""
from pathlib import Path

import pytest

from kvm_mmu_lit.mmu.play import answer_text, play, read_scenario
from kvm_mmu_lit.review.tables import broken_tables

FOLDER = Path(__file__).parent / 'data' / 'scenarios'
FILES = sorted(FOLDER.glob('*.json'))
ENDS = {'bad-pointer': ['done, 1 exit', '#PF at 0x8000000000, code 0x0, 1 exit', 'done'],
        'migration': ['frames 0x1, 0x3, 0x4, 0x5, 0x100', 'done'],
        'nested-npt': ['#PF at 0x7ff000, code 0x0', 'True', 'done'],
        'unsync-life': ['done, 1 exit', 'done', 'done', 'done, 1 exit', 'done', 'done, 1 exit'],
        'wp0': ['done, 1 exit', '#PF at 0x400000, code 0x7, 1 exit']}


def told(path):
    "What `kvm-mmu run` says of each event, every invariant checked after it."
    scenario = read_scenario(path)
    steps = list(play(scenario, broken_tables))
    assert len(steps) == len(scenario.events) and not any(step.broken for step in steps)
    return [(answer_text(step.answer), tuple(step.did)) for step in steps]


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_it_plays_to_its_end_twice_alike(path):
    first = told(path)
    assert first == told(path)
    ends = ENDS.get(path.stem, ['done'])
    assert [answer for answer, _ in first][-len(ends):] == ends


def test_the_list_of_scenarios_names_every_file():
    text = (FOLDER / 'README.md').read_text()
    assert FILES and all(f'`{path.name}`' in text for path in FILES) and text.count('.json`') == len(FILES)
