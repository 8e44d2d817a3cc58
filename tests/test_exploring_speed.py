"""Our explorer and SPIN on the same small spaces, and the tools that run SPIN."""
import pytest

from kvm_mmu_lit.evidence.cache_model import promela, small_world
from kvm_mmu_lit.evidence.exploring_speed import (beside, compile_model, read_report, search_here, spin_missing,
                                                  spin_search)
from kvm_mmu_lit.mmu.root_role import svm_host
from kvm_mmu_lit.review.designs import design
from kvm_mmu_lit.review.explore import explore
from kvm_mmu_lit.review.histories import World

needs_spin = pytest.mark.skipif(bool(spin_missing()), reason=spin_missing() or 'SPIN is here')
SMALL = [small_world(l2, pointers, vcpus) for l2, pointers, vcpus in
         [((), 1, 1), ((), 4, 1), ((), 3, 2), (('PAE',), 2, 1), (('4-level',), 2, 1), (('PAE', '4-level'), 2, 1),
          (('4-level', 'PAE'), 1, 2), (('PAE',), 1, 3)]]


@needs_spin
@pytest.mark.parametrize('world', SMALL, ids=lambda world: world.name)
def test_spin_reaches_as_many_states_by_as_many_events_in_as_many_steps(world):
    found = beside(world)
    assert (found.ours.states, found.ours.events,
            found.ours.depth) == (found.theirs.states, found.theirs.events, found.theirs.depth)
    assert found.agrees and found.ours.states > 1


@needs_spin
def test_spin_agrees_with_the_readable_search_too(tmp_path):
    world = small_world(('4-level', 'PAE'), 1, 1)
    found, theirs = explore(world, design('6.1')), spin_search(compile_model(world, tmp_path), 1000)
    assert found.complete and (found.states, found.edges, found.depth) == (theirs.states, theirs.events, theirs.depth)


def broken(change, world):
    "SPIN's view of a model with one line changed."
    text = promela(world)
    assert change[0] in text
    return text.replace(*change)


@needs_spin
@pytest.mark.parametrize('change', [
    (':: v[i].root > SHARED -> v[i].root = 0', ':: v[i].root > SHARED -> v[i].zap = 0'),     # the per-vCPU root stays
    ('v[i].root = 0; v[i].pdptrs = ptr', 'v[i].pdptrs = ptr'),                               # other PDPTEs cost nothing
    # a miss drops the newest
    ('v[i].p2 = v[i].p1; v[i].p1 = v[i].p0; v[i].p0 = v[i].root; v[i].root = 0', 'v[i].p0 = v[i].root; v[i].root = 0'),
    ('v[i].zap = 0', 'skip'),  # the request is never served
], ids=['keeps', 'pdptes', 'miss', 'request'])
def test_a_model_that_is_wrong_in_one_line_is_noticed(change, tmp_path, monkeypatch):
    world = small_world(('4-level', 'PAE'), 2, 1)
    text = broken(change, world)
    monkeypatch.setattr('kvm_mmu_lit.evidence.exploring_speed.promela', lambda world: text)
    ours = search_here(world)
    try: theirs = spin_search(compile_model(world, tmp_path), ours.states)
    except ValueError as why:
        assert "SPIN found an error" in str(why)
        return
    assert (theirs.states, theirs.events, theirs.depth) != (ours.states, ours.events, ours.depth)


@needs_spin
def test_a_model_that_is_not_promela_says_what_spin_says(tmp_path, monkeypatch):
    monkeypatch.setattr('kvm_mmu_lit.evidence.exploring_speed.promela', lambda world: 'init { do }')
    with pytest.raises(ValueError, match='spin -a model.pml: .*syntax error'): compile_model(SMALL[0], tmp_path)


def test_without_spin_nothing_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert spin_missing().startswith('no spin and no gcc')
    with pytest.raises(ValueError, match='no spin and no gcc'): compile_model(SMALL[0], tmp_path)


@pytest.mark.parametrize('world', [
    World('edited', svm_host(4, npt=False), ('4-level',), ('PAE',), vcpus=1),
    World('with NPT', svm_host(4), ('4-level',), ('PAE',), edits=False),
    World('2-level L2', svm_host(4, npt=False), ('4-level',), ('2-level',), edits=False),
    small_world(('2-level',), 1, 1)], ids=lambda world: world.name)
def test_a_world_the_model_does_not_know_is_refused(world):
    with pytest.raises(ValueError, match='no Promela for'): promela(world)


def test_a_report_is_read_in_both_forms():
    head = ('State-vector 28 byte, depth reached 14, errors: 0\n   552287 states, stored\n  5522871 transitions (= '
            'stored+matched)\n')
    for memory in ('   93.426\tmemory usage (Mbyte)\n',
                   'Stats on memory usage (in Megabytes):\n   25.2\tequivalent memory usage for states\n   '
                   '93.426\ttotal actual memory usage\n'):
        run = read_report(head + memory, 2.0)
        assert (run.states, run.events, run.depth, run.mib, run.rate) == (552287, 5522870, 14, 93.426, 552287 / 2)
