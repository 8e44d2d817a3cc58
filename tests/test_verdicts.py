"The verdicts the README quotes, held to the machine that gave them."
from pathlib import Path

import pytest

from kvm_mmu_lit.review.designs import DESIGNS, design
from kvm_mmu_lit.review.explore import explore, replay
from kvm_mmu_lit.review.frontier import explore_fast
from kvm_mmu_lit.review.histories import small_worlds, worlds
from kvm_mmu_lit.review.recorded import record_verdicts, recorded_verdicts

RECORD = Path(__file__).parent.parent / 'nbs' / 'review' / 'verdicts.json'
RECORDED = {one.design: one for one in recorded_verdicts(RECORD)}
FOUND = [(name, world, example) for name, one in RECORDED.items() for world, example in one.found]


def test_every_design_and_every_world_is_recorded():
    assert list(RECORDED) == [one.name for one in DESIGNS]
    assert all([result.world for result in one.results] == list(worlds()) for one in RECORDED.values())
    assert all(one.complete for one in RECORDED.values())


@pytest.mark.parametrize('name, world, example', FOUND, ids=lambda value: getattr(value, 'name', value))
def test_a_recorded_history_replays(name, world, example):
    last = replay(world, design(name), example.events)[-1]
    assert last[0] == example.events[-1]
    assert [one.why for one in last[2] if one.name == example.name] == [example.why]


SHORT = [(name, world, example) for name, world, example in FOUND if len(example.events) <= 3]

@pytest.mark.parametrize('name, world, example', SHORT, ids=lambda value: getattr(value, 'name', value))
def test_no_shorter_history_breaks_the_same(name, world, example):
    found = {one.name: one.events for one in explore(world, design(name), depth=len(example.events)).found}
    assert found[example.name] == example.events


@pytest.mark.parametrize('name', [name for name, one in RECORDED.items() if one.holds])
def test_a_design_that_holds_holds_in_a_fresh_search(name):
    for world in small_worlds()[1:]:  # The first has four modes for L1; it alone takes longer than the others together
        found = explore_fast(world, design(name))
        assert found.complete and not {one.name for one in found.found} - {'root cached twice'}, world.name


def test_verdicts_survive_being_written(tmp_path):
    record_verdicts(tmp_path / 'again.json', list(RECORDED.values()))
    assert (tmp_path / 'again.json').read_text() == RECORD.read_text()


@pytest.mark.parametrize('text',
                         ['', '[]', '{}', '{"format": "kvm_mmu_lit verdicts 1"}', '{"format": "other", "verdicts": []}',
                                  '{"format": "kvm_mmu_lit verdicts 1", "verdicts": [{"design": "6.1"}]}'])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    (tmp_path / 'bad.json').write_text(text)
    with pytest.raises(ValueError, match='bad.json'): recorded_verdicts(tmp_path / 'bad.json')
