"""Both explorers, and the histories they find: the same states, the same counterexamples, from the same files."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.mmu.root_role import svm_host, vmx_host
from kvm_mmu_lit.review.designs import DESIGNS, design
from kvm_mmu_lit.review.explore import Counterexample, explore, replay
from kvm_mmu_lit.review.frontier import explore_fast
from kvm_mmu_lit.review.histories import Impossible, World, events_of, happen, small_worlds, start
from kvm_mmu_lit.review.states import freeze, thaw
from kvm_mmu_lit.review.verdicts import counterexample_json, history_of, verdict, write_histories

ROOT = Path(__file__).resolve().parent.parent
HISTORIES = ROOT / 'nbs' / 'review' / 'histories'
TINY = World('tiny', svm_host(4, npt=False), ('4-level',), ('PAE',), pointers=1)
WHOLE = (TINY,
         World('flat', svm_host(4, npt=False), ('PAE', '2-level'), edits=False),
         World('NPT', svm_host(5), ('PAE',), ('4-level',), nested_paging=True, pointers=2),
         World('EPT', vmx_host(4, 4), ('4-level', 'PAE'), ('4-level',), nested_paging=True, pointers=2),
         World('two', svm_host(4, npt=False), ('4-level',), ('PAE',), pointers=1, vcpus=2, edits=False))


@pytest.mark.parametrize('world', small_worlds(), ids=lambda world: world.name)
def test_both_searches_find_the_same_in_every_small_world(world):
    "States, edges, sizes of every step, completeness, and every counterexample, to its last event and word."
    for policy in DESIGNS: assert explore(world, policy, depth=3) == explore_fast(world, policy, depth=3), policy.name


@pytest.mark.parametrize('world', WHOLE, ids=lambda world: world.name)
def test_both_searches_find_the_same_to_the_end(world):
    for policy in DESIGNS:
        depth = None if policy.name in ('6.1', 'patch 2', 'reviewer') else 5
        slow = explore(world, policy, depth)
        assert slow == explore_fast(world, policy, depth) and slow.complete == (depth is None), policy.name


def test_a_limit_is_kept_by_both():
    for search in (explore, explore_fast):
        found = search(TINY, design('6.1'), limit=20)
        assert not found.complete and 20 <= found.states < 96


def test_a_search_does_not_depend_on_the_order_of_hashes():
    code = ("from kvm_mmu_lit.review.frontier import explore_fast; from kvm_mmu_lit.review.explore import explore\n"
            "from kvm_mmu_lit.review.designs import design; from kvm_mmu_lit.review.histories import small_worlds\n"
            "print([search(small_worlds()[2], design('series'), depth=4) for search in (explore, explore_fast)])")
    said = {subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, 'PYTHONHASHSEED': seed},
                           capture_output=True, text=True, check=True).stdout
            for seed in ('1', '2')}
    assert len(said) == 1 and 'shared root freed as one-off' in said.pop()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(small_worlds()), st.sampled_from(DESIGNS), st.lists(st.integers(0, 99), max_size=12))
def test_freezing_and_thawing_loses_nothing(world, policy, choices):
    "After any history the machine, thawed from its state, does the same at every event."
    vm = start(world, policy)
    for choice in choices:
        event = events_of(world)[choice % len(events_of(world))]
        twin = thaw(freeze(vm, world), world, policy)
        assert freeze(twin, world) == freeze(vm, world)
        try: broken = happen(vm, world, event)
        except Impossible as why:
            with pytest.raises(Impossible) as again: happen(twin, world, event)
            assert str(again.value) == str(why)
            continue
        assert [one.name for one in happen(twin, world, event)] == [one.name for one in broken]
        if any(one.stops for one in broken): break
        assert freeze(twin, world) == freeze(vm, world)


names = st.text(max_size=8)
values = st.one_of(st.none(), st.booleans(), st.integers(), names, st.lists(names, max_size=3),
                   st.dictionaries(names, st.integers(), max_size=3))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(['format', 'world', 'design', 'breaks', 'events']), values)
def test_a_damaged_history_is_read_or_refused_by_name(key, value):
    good = json.loads(counterexample_json(TINY, design('series'), Counterexample('wrong root', '', ('zap',))))
    try: world, policy, breaks, events = history_of(json.dumps({**good, key: value}), 'it.json')
    except ValueError as why: assert 'it.json' in str(why) or 'is called' in str(why)
    else: assert (breaks if key == 'breaks' else list(events)) == value


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(json.loads(counterexample_json(TINY, DESIGNS[0], Counterexample('x', '', ())))['world'])),
       values)
def test_a_damaged_world_is_read_or_refused_by_name(field, value):
    good = json.loads(counterexample_json(TINY, design('series'), Counterexample('wrong root', '', ('zap',))))
    text = json.dumps({**good, 'world': {**good['world'], field: value}})
    try: world = history_of(text, 'it.json')[0]
    except ValueError as why: assert str(why).startswith('it.json: world: ')
    else:
        assert (getattr(world, field) in (value, tuple(value) if isinstance(value, list) else value)
                or (field, value) == ('host', {}))


@pytest.mark.parametrize('path', sorted(HISTORIES.glob('*.json')), ids=lambda path: path.stem)
def test_a_kept_history_breaks_what_it_says(path):
    world, policy, breaks, events = history_of(path.read_text(), path.name)
    steps = replay(world, policy, events)
    assert len(steps) == len(events) and breaks in [one.name for one in steps[-1][2]]
    assert not any(broken for _, _, broken in replay(world, design('6.1'), events))


def test_the_kept_histories_are_those_a_search_finds(tmp_path):
    failing = [design(name) for name in ('patch 2', 'patch 3', 'reviewer', 'series')]
    names = write_histories(tmp_path, [verdict(policy, small_worlds(), explore_fast) for policy in failing])
    assert sorted(names) == [path.name for path in sorted(HISTORIES.glob('*.json'))]
    for name in names: assert (tmp_path / name).read_text() == (HISTORIES / name).read_text(), name


def test_the_other_designs_leave_no_history(tmp_path):
    over = [one for one in small_worlds()
            if one.name in ('shadow paging, 4-level VMX host', 'NPT, 4-level host', 'two vCPUs, shadow paging')]
    assert write_histories(tmp_path,
                           [verdict(design(name), over, explore_fast) for name in ('before', '6.1', 'role bit')]) == []
