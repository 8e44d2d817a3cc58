"""Random guests in every format: every proposed change works when it is stored, and nothing smaller does."""
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.addresses import FORMATS, NONPAGING, PAE, PTE32
from kvm_mmu_lit.guest.changes import EntryChange, RegisterChange, apply_changes, merge_changes, walk_changed
from kvm_mmu_lit.guest.explain import STORIES, explain, show_story, smallest_changes, story
from kvm_mmu_lit.guest.memory import ram, write_entry
from kvm_mmu_lit.guest.permissions import FETCH, IMPLICIT, USER, WRITE
from kvm_mmu_lit.guest.registers import Cr0, Cr4, Efer, Registers, Rflags
from kvm_mmu_lit.guest.verdict import GuestWalk, PageFault
from kvm_mmu_lit.guest.walk import Walker

REGISTER_BITS = [('cr0', Cr0.WP), ('cr4', Cr4.PSE), ('cr4', Cr4.SMEP), ('cr4', Cr4.SMAP), ('cr4', Cr4.PKE),
                 ('efer', Efer.NX),
                 ('rflags', Rflags.AC), *(('pkru', 1 << bit) for bit in range(4))]


@st.composite
def questions(draw):
    "A walker whose path for address 0 has three bad bits at most, and an access."
    fmt = draw(st.sampled_from([f for f in FORMATS.values() if f is not NONPAGING]))
    size, top = fmt.entry_size, fmt.root_level
    memory = ram((0, 0x10_000))
    first = top - 1 if fmt is PAE else top
    bits = [0, 1, 2, 3, 4, 5, 8, *([6, 7] if draw(st.booleans()) else []), *([45, 46, 50, 59, 63] if size == 8 else [])]
    flips = draw(st.lists(st.tuples(st.integers(1, first), st.sampled_from(bits)), max_size=3))
    for level in range(first, 0, -1):
        value = 0x1000 * (2 + first - level) | 7
        for at, bit in flips: value ^= (at == level) << bit
        write_entry(memory, 0x1000 * (1 + first - level), size, value)
    pkru, bools = draw(st.integers(0, 15)), st.booleans()
    cr4 = (0x1020 if fmt.root_level == 5 and fmt.signed else 0x10 if fmt is PTE32 else 0x20) \
        | sum(bit for bit in (Cr4.SMEP, Cr4.SMAP, *([Cr4.PKE] if fmt.signed else [])) if draw(bools))
    efer = (0x500 if fmt.signed else 0) | (Efer.NX if draw(bools) else 0)
    regs = Registers(cr0=0x8000_0001 | (Cr0.WP if draw(bools) else 0), cr3=0 if fmt.is_ept else 0x1000, cr4=int(cr4),
                     efer=int(efer), pkru=pkru,
                     rflags=int(Rflags.AC) if draw(bools) else 0,
                     pdptrs=(draw(st.sampled_from([0x1001, 0x1000])), 0, 0, 0) if fmt is PAE else None,
                     eptp=0x1000 | top - 1 << 3 if fmt.is_ept else None, ept_execonly=draw(bools))
    access = draw(st.sampled_from([0, WRITE, FETCH, USER, USER | WRITE, USER | FETCH]
                                  + ([] if fmt.is_ept else [IMPLICIT])))
    return Walker(memory, regs, fmt), access


def cost(changes): return sum(change.cost for change in changes)


def entry_flips(verdict, walker):
    "Every flip of one bit in an entry the walk read."
    for step in verdict.steps:
        for bit in range(8 * walker.fmt.entry_size):
            gpa = step.pte_gpa(walker.fmt)
            yield EntryChange(step.level, step.index, -1 if gpa is None else gpa, step.gpte, step.gpte ^ 1 << bit)


def register_flips(walker):
    for name, bit in REGISTER_BITS:
        yield RegisterChange(name, name, int(bit), not getattr(walker.regs, name) & bit)


def arrives(walker, access, changes):
    try: verdict = walk_changed(walker, 0, access, changes)
    except ValueError: return None                       # registers no CPU can have
    return verdict.gpa if isinstance(verdict, GuestWalk) else None


@settings(max_examples=150, deadline=None)
@given(questions())
def test_every_proposed_change_works_when_it_is_stored(question):
    walker, access = question
    verdict, before = walker.walk(0, access), [bytes(s.buffer) for s in walker.memory.slots]
    found = explain(walker, 0, access)
    assert found.verdict == verdict and bool(found.changes) == isinstance(verdict, PageFault)
    for changes in found.changes:
        assert cost(changes) == cost(found.changes[0])
        assert isinstance(apply_changes(walker, 0, access, changes).walk(0, access), GuestWalk)
        assert all(str(change) in str(found) for change in changes)
    assert [bytes(s.buffer) for s in walker.memory.slots] == before


@settings(max_examples=60, deadline=None)
@given(questions())
def test_nothing_smaller_arrives_at_the_same_byte(question):
    walker, access = question
    best = smallest_changes(walker, 0, access)
    if not best or cost(best[0]) < 2: return
    goals = {arrives(walker, access, changes) for changes in best}
    flips = [*entry_flips(walker.walk(0, access), walker), *register_flips(walker)]
    for flip in flips: assert arrives(walker, access, (flip,)) not in goals, str(flip)


@settings(max_examples=150, deadline=None)
@given(questions())
def test_no_pair_is_smaller_than_a_proposed_three(question):
    walker, access = question
    best = smallest_changes(walker, 0, access)
    if not best or not 3 <= cost(best[0]) < 64: return
    goals = {arrives(walker, access, changes) for changes in best}
    low = [f for f in entry_flips(walker.walk(0, access), walker) if (f.old ^ f.new) & (0x1ff | 1 << 63)]
    flips = [*low, *register_flips(walker)]
    for i, one in enumerate(flips):
        for two in flips[:i]:
            same = (isinstance(one, EntryChange) and isinstance(two, EntryChange)
                    and (one.gpa, one.level) == (two.gpa, two.level))
            pair = ((EntryChange(one.level, one.index, one.gpa, one.old, one.new ^ two.old ^ two.new),) if same
                    else (one, two))
            assert arrives(walker, access, pair) not in goals, list(map(str, pair))


@pytest.mark.parametrize('name', STORIES)
def test_a_story_is_told_in_full(name):
    walker, va, access = story(name)
    told = show_story(name)
    text = str(told)
    assert (isinstance(told.verdict, PageFault) and told.verdict.because in text
            and text.count('smallest change') == len(told.changes) > 0)
    assert [row[0] for row in told.rows()] == [4 - i for i in range(len(told.verdict.ptes))]
    bundle = told._repr_mimebundle_()
    assert bundle['text/plain'] == text and bundle['image/svg+xml'].startswith('<svg')


def test_the_stories_tell_different_rules():
    rules = Counter(story(name)[0].walk(*story(name)[1:]).rule for name in STORIES)
    assert len(rules) == 5 and rules.most_common(1)[0][1] == 5


def test_an_unknown_story_names_the_known_ones():
    with pytest.raises(ValueError, match="no story 'x'.*PROT_NONE"): story('x')


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 63)), max_size=8))
def test_merged_changes_are_the_changes_one_after_the_other(flips):
    entries, merged = {1: 0x1001, 2: 0x2001, 3: 0x3001}, ()
    for level, bit in flips:
        new = entries[level] ^ 1 << bit
        merged = merge_changes(merged, (EntryChange(level, 0, level << 12, entries[level], new),))
        entries[level] = new
    assert {change.level: change.new for change in merged} == {level: entries[level] for level, _ in flips}
    assert all(change.old == change.level << 12 | 1 for change in merged)
