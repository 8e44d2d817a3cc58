"""Random tables of every format: the list, the count, the ranges and the sharing against single walks."""
from dataclasses import replace
from itertools import islice, product

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.address_space import (Mapping, Range, Tables, addresses_of, count_mappings, draw_ranges, having,
                                             mappings,
    ranges, why_unmapped)
from kvm_mmu_lit.guest.addresses import FORMATS, LONG4, NONPAGING, PAE, join_address
from kvm_mmu_lit.guest.gpte import ACC_ALL, Acc
from kvm_mmu_lit.guest.memory import ram, write_entry
from kvm_mmu_lit.guest.permissions import FETCH, USER, WRITE
from kvm_mmu_lit.guest.registers import Registers
from kvm_mmu_lit.guest.sharing import (draw_sharing, espfix_guest, hostile_guest, recursive_tables, self_map_guest,
                                       table_uses)
from kvm_mmu_lit.guest.verdict import GuestWalk, PageFault, Rule
from kvm_mmu_lit.guest.walk import Walker

SLOTS = (0, 1, 511)             # Slots that may hold something; slot 2 never does
FRAMES = range(1, 7)            # Frames that are tables; 7 and 8 are pages, 9 is a hole

entry_bits = st.sampled_from([0, 1, 2, 3, 5, 6, 7, 8, 51, 52, 59, 62, 63])


@st.composite
def walkers(draw, formats=tuple(f for f in FORMATS.values() if f is not NONPAGING)):
    """A walker over a few tables whose entries point anywhere, with flags that are mostly present and sometimes
    reserved."""
    fmt = draw(st.sampled_from(formats))
    size = fmt.entry_size
    memory = ram((0x1000, 0x8000))
    entries = st.builds(lambda frame, low, extra, present: 0 if not present
                        else (frame << 12 | low | sum({1 << b for b in extra})) & (1 << 8 * size) - 1,
                        st.integers(1, 9), st.sampled_from([1, 3, 5, 7, 7, 7, 0x81, 0x87]),
                        st.lists(entry_bits, max_size=2), st.booleans())
    for table in FRAMES:
        for slot, value in zip(SLOTS, draw(st.tuples(*[entries] * len(SLOTS)))):
            write_entry(memory, (table << 12) + slot * size, size, value)
    pdptrs = tuple(draw(st.sampled_from([0, 0x1001, 0x2001, 0x3001])) for _ in range(4)) if fmt is PAE else None
    regs = Registers(cr0=0x8001_0001, cr3=0 if fmt.is_ept else 0x1000, efer=0xd00 if fmt.signed else 0x800,
                     pdptrs=pdptrs,
                     cr4=0x1020 if fmt.root_level == 5 and fmt.signed else 0x20 if fmt is PAE or fmt.signed
                     else draw(st.sampled_from([0, 0x10])),
                     eptp=0x1000 | fmt.root_level - 1 << 3 if fmt.is_ept else None,
                     vendor=draw(st.sampled_from(['intel', 'amd'])))
    return Walker(memory, regs, fmt)


def all_addresses(walker):
    "An address for every combination of slots, an empty one among them."
    fmt = walker.fmt
    for combination in product((*SLOTS, 2), repeat=fmt.root_level):
        if fmt is PAE and combination[0] == 511: combination = (3, *combination[1:])
        yield join_address(dict(zip(range(fmt.root_level, 0, -1), combination)), fmt)


def by_walking(walker):
    found = {}
    for va in all_addresses(walker):
        verdict = walker.walk(va)
        if isinstance(verdict, GuestWalk): found[va & -verdict.size] = verdict.gpa & -verdict.size, verdict.level
    return found


@settings(max_examples=60, deadline=None)
@given(walkers())
def test_the_list_is_what_walks_find_in_order(walker):
    pages = list(mappings(walker))
    assert {m.va: (m.gpa, m.level) for m in pages} == by_walking(walker)
    assert all(a.va + a.size(walker.fmt) <= b.va for a, b in zip(pages, pages[1:]))
    assert count_mappings(Tables(walker)) == len(pages)


@settings(max_examples=60, deadline=None)
@given(walkers())
def test_rights_are_what_walks_allow(walker):
    asks = [(USER, Acc.USER), (WRITE, Acc.WRITE), (USER | WRITE, Acc.USER | Acc.WRITE), (FETCH, Acc.EXEC)]
    for m in islice(mappings(walker), 64):
        for access, needs in asks:
            assert isinstance(walker.walk(m.va, access), GuestWalk) == (m.rights & needs == needs), (m, access)


@settings(max_examples=40, deadline=None)
@given(walkers(), st.integers(0, 12))
def test_addresses_of_a_frame_are_those_whose_page_contains_it(walker, gfn):
    wanted = [m.va + (gfn << 12) - m.gpa for m in mappings(walker) if m.gpa <= gfn << 12 < m.gpa + m.size(walker.fmt)]
    tables = Tables(walker)
    assert list(addresses_of(tables, gfn)) == wanted and count_mappings(tables, gfn) == len(wanted)


@settings(max_examples=40, deadline=None)
@given(walkers())
def test_what_is_refused_or_missing_is_what_walks_stop_at(walker):
    tables = Tables(walker)
    sentences = why_unmapped(tables)
    stops = {Rule.RESERVED: set(), Rule.HOLE: set()}
    for va in all_addresses(walker):
        verdict = walker.walk(va)
        if not isinstance(verdict, PageFault) or verdict.rule is Rule.NOT_PRESENT: continue
        steps = verdict.steps
        if verdict.rule is Rule.RESERVED:
            stops[verdict.rule].add((steps[-1].table >> 12, verdict.level, steps[-1].index))
        else: stops[verdict.rule].add(((steps[-1].gpte & (1 << 52) - 4096) >> 12, verdict.level))
    assert stops[Rule.RESERVED] == {(gfn, level, slot) for (gfn, level), bad in tables.refused.items()
                                    for slot, _ in bad}
    assert stops[Rule.HOLE] == tables.missing
    assert len(sentences) == len(stops[Rule.RESERVED]) + len(stops[Rule.HOLE])


@settings(max_examples=40, deadline=None)
@given(walkers())
def test_uses_count_the_paths_that_can_be_followed(walker):
    tables, paths, pointers = Tables(walker), {}, {}
    todo = [(table, level) for _, table, level in tables.roots()]
    while todo:                                        # follows every path, shared or not
        table, level = todo.pop()
        paths[table, level] = paths.get((table, level), 0) + 1
        todo += [(e.target, level - 1) for e in tables.entries(table, level) if not e.leaf]
    for table, level in [*paths]:
        for e in tables.entries(table, level):
            if not e.leaf: pointers[e.target, level - 1] = pointers.get((e.target, level - 1), 0) + 1
    for _, table, level in tables.roots(): pointers[table, level] = pointers.get((table, level), 0) + 1
    uses = table_uses(tables)
    assert {(use.table, use.level): use.paths for use in uses} == paths
    assert {(use.table, use.level): use.entries for use in uses} == pointers
    levels = {}
    for use in uses: levels.setdefault(use.table, set()).add(use.level)
    assert recursive_tables(uses) == sorted(t for t, at in levels.items() if len(at) > 1)


@settings(max_examples=25, deadline=None)
@given(walkers(), st.integers(1, 8))
def test_a_picture_of_sharing_keeps_its_size_and_its_arrows(walker, limit):
    tables = Tables(walker)
    picture, tables_there = draw_sharing(tables, limit), {use.table for use in table_uses(tables)}
    assert len(picture.nodes) <= 1 + limit + walker.fmt.root_level
    assert sum('more' not in n.label for n in picture.nodes) == 1 + min(limit, len(tables_there))
    pairs = {(t, e.target) for t, level in {(u.table, u.level) for u in table_uses(tables)}
             for e in tables.entries(t, level) if not e.leaf}
    if len(tables_there) <= limit:
        assert ({(e.start, e.end) for e in picture.edges if e.start != 'root'}
                == {(f"{a:#x}", f"{b:#x}") for a, b in pairs})


pages = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 7)), max_size=30, unique_by=lambda page: page[0])


@given(pages, st.integers(0, 7))
def test_ranges_are_runs_of_equal_rights(found, mask):
    listed = [Mapping(slot << 12, 0, 1, Acc(rights), 0) for slot, rights in sorted(found)]
    merged = list(ranges(listed, LONG4, Acc(mask)))
    unmerged = {(va, r.rights) for r in merged for va in range(r.start, r.end, 4096)}
    assert unmerged == {(m.va, m.rights & mask) for m in listed}
    assert all(a.end < b.start or a.end == b.start and a.rights != b.rights for a, b in zip(merged, merged[1:]))
    assert sum(r.pages for r in merged) == len(listed)


@given(pages, st.integers(0, 7), st.integers(0, 7))
def test_having_keeps_order_and_asks_for_all(found, wanted, unwanted):
    listed = [Mapping(slot << 12, 0, 1, Acc(rights), 0) for slot, rights in sorted(found)]
    assert list(having(listed, Acc(wanted), Acc(unwanted))) == [
        m for m in listed if all(m.rights & 1 << i for i in range(3) if wanted >> i & 1)
        and not any(m.rights & 1 << i for i in range(3) if unwanted >> i & 1)]


@given(pages, st.integers(1, 10))
def test_a_picture_of_ranges_covers_them_with_few_bars(found, limit):
    merged = list(ranges([Mapping(slot << 13, 0, 1, Acc(rights), 0) for slot, rights in sorted(found)], LONG4))
    bars = draw_ranges(merged, limit=limit).ranges
    assert len(bars) == min(limit, len(merged))
    assert all(sum(b.start <= r.start and r.end <= b.end for b in bars) == 1 for r in merged)


def test_the_last_range_may_end_with_the_address_space():
    top = Mapping((1 << 64) - 4096, 0, 1, ACC_ALL, 0)
    assert list(ranges([top], LONG4)) == [Range((1 << 64) - 4096, 1 << 64, ACC_ALL, 1)]


@pytest.mark.parametrize('slot', [0, 1, 255, 256, 511])
def test_a_self_map_counts_as_walks_do(slot):
    walker = self_map_guest(slot, 0)
    assert [m.va for m in mappings(walker)] == [join_address(dict.fromkeys((4, 3, 2, 1), slot), LONG4)]


def test_sharing_costs_no_more_than_the_tables():
    "Decoding is counted, not timed: one look at each table and level."
    for walker, looks in ((espfix_guest(), 4), (hostile_guest(), 4)):
        tables = Tables(walker)
        count_mappings(tables), table_uses(tables), list(islice(addresses_of(tables, 5), 10)), draw_sharing(tables)
        assert tables.decoded == looks


def test_a_change_of_registers_changes_what_is_reserved():
    "The same tables: without EFER.NX every entry with bit 63 is refused, and is reported."
    walker = espfix_guest()
    without = Tables(Walker(walker.memory, replace(walker.regs, efer=0x500)))
    assert count_mappings(without) == 0 and len(why_unmapped(without)) == 32
    assert all('bit 63 must be 0' in sentence for sentence in why_unmapped(without))
