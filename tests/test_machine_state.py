"""A machine that was written down goes on as the one that was not: after random stories, on every kind of host, through
JSON."""
import json
import random
from dataclasses import fields

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.mmu.contexts import Mmu, Vcpu
from kvm_mmu_lit.mmu.machine import check_event
from kvm_mmu_lit.mmu.machine_state import copy_machine, differences, freeze, thaw
from kvm_mmu_lit.mmu.shadow_page import ShadowPage, Vm
from kvm_mmu_lit.review.stories import next_event
from kvm_mmu_lit.review.theorem import Story
from kvm_mmu_lit.review.worlds import Setting, all_settings

KINDS = all_settings()
SOME = (Setting('shadow', '4-level', vcpus=2), Setting('shadow, VMX', '2-level', 'PAE'),
        Setting('NPT', 'PAE', '4-level', True, 2),
        Setting('EPT', '4-level', '5-level', True, 2, 4), Setting('EPT without A/D', '4-level', vcpus=2),
        Setting('NPT, shadow MMU', '4-level', '2-level', True))
stories = st.sampled_from(KINDS), st.integers(0, 1 << 30), st.integers(0, 60)

# What a machine has besides its state: how it is watched, what is found anew, and what is empty between two events.
NOT_STATE = {Vm: dict(policy=None, vcpus=(), masks=None, invalidating=None, watch=None, interleave=None),
             Vcpu: dict(vm=None, log=(), watch=None, injected=None, npf_info=None, readers=()),
             ShadowPage: dict(owner=None, slots=()), Mmu: {}}


def told(setting, seed, steps):
    "A random story after so many events, and the die that goes on."
    story, rng = Story(setting, seed), random.Random(f'{seed} {setting}')
    for _ in range(steps): happen(story, next_event(story, rng))
    return story, rng


def happen(story, event):
    "Without the theorem's checks, which have tests of their own; the story keeps in mind what was edited."
    answer = story.machine.happen(event)
    if event['do'] in ('write', 'store'):
        story.hot = story.world.led_by.get(event.get('gpa', event.get('at')), story.hot)
    return answer


def watched(machine):
    "Everything KVM does from here on, as text."
    seen = []
    machine.vm.watch = lambda did: seen.append(('vm', did.what,
                                                [(name, value) for name, value in did.facts
                                                 if isinstance(value, (int, str, bool))]))
    for vcpu in machine.vcpus:
        vcpu.watch = lambda did, n=vcpu.index: seen.append((n, did.what,
                                                            [(name, value) for name, value in did.facts
                                                             if isinstance(value, (int, str, bool))]))
    return seen


def go_on(setting, seed, steps, after=12):
    "The same events to the machine and to what JSON made of it: same answers, same deeds, same state, every time."
    story, rng = told(setting, seed, steps)
    one, other = story.machine, thaw(json.loads(json.dumps(freeze(story.machine))))
    seen, also = watched(one), watched(other)
    for _ in range(after):
        event = next_event(story, rng)
        check_event(one, event)
        assert other.happen(event) == happen(story, event), event
        assert also == seen and freeze(other) == freeze(one), event


@settings(max_examples=22, deadline=None)
@given(*stories)
def test_a_thawed_machine_goes_on_exactly_as_the_original(setting, seed, steps): go_on(setting, seed, steps)


@pytest.mark.parametrize('setting', SOME, ids=str)
def test_so_it_does_in_each_kind_of_setting(setting): go_on(setting, 7, 60)


@settings(max_examples=25, deadline=None)
@given(*stories)
def test_freezing_is_all_there_is(setting, seed, steps):
    machine = told(setting, seed, steps)[0].machine
    state = freeze(machine)
    text = json.dumps(state)
    assert json.loads(text) == state == freeze(thaw(state)) == freeze(copy_machine(machine))
    assert json.dumps(freeze(thaw(json.loads(text)))) == text


@settings(max_examples=20, deadline=None)
@given(*stories)
def test_no_field_is_forgotten(setting, seed, steps):
    "Field by field, not by what `freeze` looks at: a new field has to be frozen, or named above."
    machine = told(setting, seed, steps)[0].machine
    other = copy_machine(machine)

    def same(kind, a, b):
        for one in fields(kind):
            if one.name in NOT_STATE[kind]: continue
            left, right = getattr(a, one.name), getattr(b, one.name)
            if one.name == 'pages':
                assert list(left) == list(right)
                for spt in left: same(ShadowPage, left[spt], right[spt])
            elif one.name == 'buckets':
                assert ([(gfn, [sp.spt for sp in pages]) for gfn, pages in left.items()]
                        == [(gfn, [sp.spt for sp in pages]) for gfn, pages in right.items()])
            elif one.name == 'tdp_roots': assert [sp.spt for sp in left] == [sp.spt for sp in right]
            elif one.name == 'memory':
                assert ([(s.base_gfn, s.npages, s.readonly) for s in left.slots]
                        == [(s.base_gfn, s.npages, s.readonly) for s in right.slots])
            elif isinstance(left, Mmu): same(Mmu, left, right)
            elif one.name == 'moved':
                assert (dict(left), left.gfns, left.newest,
                        left.within) == (dict(right), right.gfns, right.newest, right.within)
            elif one.name == 'tlb':
                assert (list(left.entries.items()), left.limit,
                        left.where) == (list(right.entries.items()), right.limit, right.where)
            else: assert left == right, one.name

    same(Vm, machine.vm, other.vm)
    for vcpu, copy in zip(machine.vcpus, other.vcpus, strict=True):
        same(Vcpu, vcpu, copy)
        assert copy.vm is other.vm and (vcpu.injected, vcpu.npf_info) == (None, None)
    assert machine.vm.invalidating is None and machine.vm.interleave is None


@settings(max_examples=15, deadline=None)
@given(*stories)
def test_a_copy_and_its_original_do_not_touch_each_other(setting, seed, steps):
    story, rng = told(setting, seed, steps)
    copy = copy_machine(story.machine)
    before = freeze(copy)
    for _ in range(8): story.machine.happen(next_event(story, rng))
    assert freeze(copy) == before
    after = freeze(story.machine)
    for page in copy.vm.pages.values(): page.sptes.clear(), page.parents.clear()
    for slot in copy.vm.memory.slots: slot.page(slot.base_gfn)[:] = bytes([0xaa]) * 4096
    for vcpu in copy.vcpus: vcpu.tlb.entries.clear(), vcpu.requests.add('TRIPLE_FAULT')
    assert freeze(story.machine) == after


def leaves(value, path=()):
    "Every place of a state that holds no further places."
    if isinstance(value, (dict, list)) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else: yield path


def put(state, path, value):
    "The state with another value at one place."
    again = json.loads(json.dumps(state))
    part = again
    for key in path[:-1]: part = part[key]
    part[path[-1]] = value
    return again


STATE = freeze(told(SOME[2], 3, 25)[0].machine)
PLACES = list(leaves(STATE))
JUNK = st.one_of(st.none(), st.booleans(), st.integers(-2, 1 << 70), st.floats(allow_nan=False), st.text(max_size=3),
                 st.just([]), st.just({}), st.just([[1, 2]]))


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(PLACES), JUNK)
def test_a_state_with_one_wrong_value_is_refused_or_is_another_state(path, junk):
    "Nothing in between: what is thawed is what was written, and every refusal is a `ValueError` with a place."
    state = put(STATE, path, junk)
    before = json.dumps(state)
    try: machine = thaw(state)
    except ValueError as why: assert str(why)
    else: assert freeze(machine) == state
    assert json.dumps(state) == before


@settings(max_examples=60, deadline=None)
@given(st.recursive(JUNK, lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from([*STATE, 'colour']), inner, max_size=4), max_leaves=8))
def test_junk_is_no_state(value):
    with pytest.raises(ValueError): thaw(value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_state_without_a_part_is_refused(data):
    path = data.draw(st.sampled_from([path for path in PLACES if isinstance(path[-1], str) and not path[-1].isdigit()]))
    state = json.loads(json.dumps(STATE))
    part = state
    for key in path[:-1]: part = part[key]
    del part[path[-1]]
    with pytest.raises(ValueError, match=path[-1]): thaw(state)


@settings(max_examples=20, deadline=None)
@given(*stories)
def test_the_differences_of_two_states_are_all_there(setting, seed, steps):
    "Every part that changed is named, no other, and nothing where nothing changed."
    story, rng = told(setting, seed, steps)
    before = freeze(story.machine)
    assert list(differences(before, before)) == []
    for _ in range(3): happen(story, next_event(story, rng))
    after = freeze(story.machine)
    found = list(differences(before, after))
    assert bool(found) == (before != after) and all(old != new for _, old, new in found)
    named = {where.split('.')[0].split('[')[0].split(',')[0] for where, _, _ in found}
    assert named == {name for name in before if before[name] != after[name]}
