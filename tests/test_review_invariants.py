"""The invariants of the review: random histories of the designs that hold, random roles, and a root cache written again
from its description."""
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvm_mmu_lit.mmu.cpu_role import ROLE_FIELDS, PageRole, page_role
from kvm_mmu_lit.mmu.root_cache import new_pgd, pointer
from kvm_mmu_lit.mmu.root_role import all_mmus, svm_host
from kvm_mmu_lit.mmu.roots import alloc_roots, vcpu_for
from kvm_mmu_lit.review.designs import DESIGNS, STORIES, design, machine, step_of, tell
from kvm_mmu_lit.review.invariants import INVARIANTS, broken_in, entries_of, in_scope
from kvm_mmu_lit.review.predicates import (PREDICATES, all_pairings, has_no_shadow_page, mistaken, paired, predicate,
                                           using_local_root_page)

L2 = [f'{mode} {letter}' for mode in ('nonpaging', '2-level', 'PAE', '4-level') for letter in 'AXY']


@st.composite
def stories(draw):
    "Words that can follow each other: L2 is left before it is entered again."
    words, inside = [], False
    for _ in range(draw(st.integers(1, 12))):
        word = draw(st.sampled_from(['back', 'X', 'Y', 'A'] if inside else L2 + ['A', 'B', 'edit A', 'edit X']))
        inside = inside and word != 'back' or word in L2
        words.append(word)
    return words


@settings(max_examples=120, deadline=None)
@given(stories(), st.sampled_from(['6.1', 'role bit']), st.sampled_from(['4-level', 'PAE', '2-level']))
def test_no_random_story_breaks_an_invariant(words, name, l1):
    vcpu = machine(design(name), l1)
    for word in words:
        step_of(word)(vcpu)
        if not word.startswith('edit') and not any(w.startswith('edit') for w in words):
            assert broken_in(vcpu) == (), word
        else: assert not set(broken_in(vcpu)) - {'outdated PDPTEs'}, word   # An edit is the guest's to load again


@settings(max_examples=60, deadline=None)
@given(stories())
def test_the_two_forms_of_the_patch_do_the_same(words):
    one, other = (tell(design(name), ', '.join(words)) for name in ('patch 2', 'patch 3'))
    assert one == other


@given(st.integers(0, (1 << 32) - 1))
def test_a_word_is_a_role_exactly_if_the_checks_of_roles_hold(word):
    role = PageRole(**{name: word >> low & (1 << width) - 1 for name, low, width in ROLE_FIELDS})
    assume(role.level <= 5 and role.smm <= 1)
    try: ok = page_role(role.word) == role
    except ValueError: ok = False
    assert ok == (not any(one.check(role) for one in in_scope('role')))


@settings(max_examples=100, deadline=None)
@given(st.text('ABCDEF', min_size=1, max_size=20))
def test_the_root_cache_is_a_list_of_the_four_last_pointers(loads):
    case = next(m for m in all_mmus() if m.name == 'shadow, 4-level guest' and m.host == svm_host(4, npt=False))
    vcpu = vcpu_for(case, pgd=pointer('A'))
    alloc_roots(vcpu)
    held = ['A']
    for letter in loads:
        before = entries_of(vcpu.mmu)
        hit = new_pgd(vcpu, pointer(letter))
        assert hit == (letter in held)
        assert not [one.name for one in in_scope('switch') if one.check(before, entries_of(vcpu.mmu), hit)]
        vcpu.cr3 = pointer(letter)
        if not hit: alloc_roots(vcpu)
        held = [letter, *(other for other in held if other != letter)][:4]
        assert [entry[0] for entry in entries_of(vcpu.mmu) if entry] == [pointer(other) for other in held]


def test_numbers_of_the_list():
    assert {one.number for one in INVARIANTS} == set(range(30))
    assert {one.scope for one in INVARIANTS} == {'role', 'case', 'child', 'root', 'mmu', 'vm', 'switch', 'entry',
                                                 'event'}


def test_what_a_search_asks_stays_in_its_order():
    assert [one.name for scope in ('entry', 'mmu', 'vm') for one in in_scope(scope)] == [
        'wrong root', 'outdated PDPTEs', 'per-vCPU root cached', 'cached root gone', 'root cached twice',
        'pae_root filled without a root', 'upper page leads astray', 'references miscounted']
    assert [one.number for one in in_scope('switch')] == [15, 15, 16, 17, 18]


@pytest.mark.parametrize('name', STORIES)
def test_a_story_ends_early_only_with_what_breaks_kvm(name):
    words, l1, host = STORIES[name]
    for one in DESIGNS:
        steps = tell(one, words, l1, host)
        stopped = steps[-1].note.startswith(('KvmBug', 'NullDereference'))
        assert stopped or len(steps) == len(words.split(','))


def test_every_pairing_is_judged_as_the_storage_says():
    for old, new in all_pairings():
        ask = paired(old, new)
        for one in PREDICATES:
            assert (bool(mistaken(one, ask))
                    == (one.test(ask) != (old.storage in ('pae_root', 'pml4_root', 'pml5_root'))))
        same_kind = ((new.storage in ('pae_root', 'pml4_root', 'pml5_root'))
                     == (old.storage in ('pae_root', 'pml4_root', 'pml5_root')))
        assert (has_no_shadow_page(ask) == using_local_root_page(ask)) == same_kind


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match='no test is called'): predicate('nobody')
    with pytest.raises(ValueError, match='no design is called'): design('nobody')
    with pytest.raises(ValueError, match='a story has'): step_of('sideways X')
