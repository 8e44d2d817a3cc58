"""Marks on random tables, while another CPU edits them.

The model of memory here is a dictionary of entries: edits flip bits of it, marks set bits of it, and nothing else
may happen to it.
"""
import random
import struct
from functools import lru_cache

from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.accessed_dirty import pending_updates, walk_and_mark, write_back
from kvm_mmu_lit.guest.addresses import FORMATS
from kvm_mmu_lit.guest.gpte import make_gpte
from kvm_mmu_lit.guest.memory import GuestMemory, MemSlot, read_entry, write_entry
from kvm_mmu_lit.guest.permissions import Pferr
from kvm_mmu_lit.guest.registers import Cr0, Cr4, Efer, Registers, load_pdptrs
from kvm_mmu_lit.guest.verdict import GuestWalk, PageFault
from kvm_mmu_lit.guest.walk import Walker

READ, WRITE, USER, FETCH = Pferr(0), Pferr.WRITE, Pferr.USER, Pferr.FETCH
FRAMES = range(1, 7)      # the root is frame 1; all tables lie here, and tables may be shared by levels
MODES = ('2level', 'pae', '4level', '5level', 'ept4', 'ept5')


def marks_of(fmt): return (1 << 8, 1 << 9) if fmt.is_ept else (1 << 5, 1 << 6)


def fill(rng, fmt, memory):
    "Tables that lead to each other, nearly everything allowed, some marks there already."
    a, d = marks_of(fmt)
    for gfn in FRAMES:
        def entry():
            leaf = rng.random() < 0.15 and fmt.root_level > 2
            gpa = rng.randrange(4) << 21 if leaf else rng.choice(FRAMES) << 12
            bits = (7 if rng.random() < 0.9 else 5) | a * rng.randrange(2) | d * rng.randrange(2)
            return make_gpte(fmt, gpa, 2, leaf, bits)
        some = [entry() for _ in range(5)]
        for slot in range(fmt.nr_entries):
            write_entry(memory, gfn * 4096 + slot * fmt.entry_size, fmt.entry_size, some[slot % 5])


@lru_cache(maxsize=64)
def filled(mode, seed):
    "The bytes of the tables, by frame."
    pages = {gfn: bytearray(4096) for gfn in FRAMES}
    fill(random.Random(seed), FORMATS[mode],
         GuestMemory(MemSlot(gfn, 1, memoryview(page)) for gfn, page in pages.items()))
    if mode == 'pae':
        for i in range(4): pages[1][8 * i:8 * i + 8] = (FRAMES[i] << 12 | 1).to_bytes(8, 'little')
    return {gfn: bytes(page) for gfn, page in pages.items()}


@st.composite
def walkers(draw):
    "A walker over tables of any format, some in read-only memory."
    mode, readonly = draw(st.sampled_from(MODES)), draw(st.sets(st.sampled_from(FRAMES), max_size=2))
    fmt, pages = FORMATS[mode], filled(mode, draw(st.integers(0, 15)))
    memory = GuestMemory(MemSlot(gfn, 1, memoryview(bytearray(page)), gfn in readonly) for gfn, page in pages.items())
    if fmt.is_ept:
        return Walker(memory, Registers(eptp=0x1006 | draw(st.booleans()) << 6 | fmt.root_level - 1 << 3), fmt)
    efer = (Efer.LME | Efer.LMA) * (fmt.root_level > 3) | Efer.NX * (mode != '2level')
    cr4 = (Cr4.PSE if mode == '2level' else Cr4.PAE) | Cr4.LA57 * (mode == '5level')
    regs = Registers(cr0=Cr0.PG | Cr0.PE | Cr0.WP, cr3=0x1000, cr4=cr4, efer=efer)
    return Walker(memory, load_pdptrs(memory, regs) if mode == 'pae' else regs, fmt)


def entries(walker):
    "{address: entry}, unpacked from the bytes."
    size = walker.fmt.entry_size
    return {slot.base_gfn * 4096 + size * i: entry for slot in walker.memory.slots
            for i, (entry,) in enumerate(struct.iter_unpack('<I' if size == 4 else '<Q', slot.buffer))}


def low_addresses(walker): return st.integers(0, (1 << walker.fmt.address_bits - walker.fmt.signed) - 1)


ACCESSES = st.sampled_from((READ, USER, WRITE, USER | WRITE, FETCH, USER | FETCH))


def has_ad(walker): return not walker.fmt.is_ept or bool(walker.regs.eptp & 1 << 6)


@settings(max_examples=80, deadline=None)
@given(walkers(), st.data())
def test_marks_change_their_bits_and_nothing_else(walker, data):
    verdict = walker.walk(data.draw(low_addresses(walker)), data.draw(ACCESSES))
    if isinstance(verdict, PageFault): return
    before = entries(walker)
    result, after = write_back(walker.memory, verdict), entries(walker)
    a, d = marks_of(walker.fmt)
    for gpa, old in before.items(): assert after[gpa] & ~(a | d) == old & ~(a | d) and after[gpa] & old == old
    assert {gpa for gpa in before if before[gpa] != after[gpa]} == {update.gpa for update in result.done}
    assert not any(walker.memory.slot(update.gpa >> 12).readonly for update in result.done)
    assert all(walker.memory.slot(update.gpa >> 12).readonly for update in result.skipped)
    if not has_ad(walker): assert result.done == result.skipped == () and result.lost is None
    if result.lost is None:
        for step in verdict.steps:                          # A on the way, D in the leaf of a write, and no other mark
            gpa = step.pte_gpa(walker.fmt)
            if gpa is None or not has_ad(walker) or walker.memory.slot(gpa >> 12).readonly: continue
            before[gpa] |= a | (d if step.level == verdict.level and verdict.access & WRITE else 0)
        assert after == before


@settings(max_examples=80, deadline=None)
@given(walkers(), st.data())
def test_marking_twice_is_marking_once(walker, data):
    addr, access = data.draw(low_addresses(walker)), data.draw(ACCESSES)
    first, _ = walk_and_mark(walker, addr, access)
    marked = entries(walker)
    second, history = walk_and_mark(walker, addr, access)
    assert entries(walker) == marked and type(first) is type(second)
    for result in history: assert result.done == () and result.lost is None
    if isinstance(second, GuestWalk):
        assert second.gpa == first.gpa
        for update in pending_updates(second): assert walker.memory.slot(update.gpa >> 12).readonly


@settings(max_examples=150, deadline=None)
@given(walkers(), st.data())
def test_whatever_another_cpu_does_in_between_the_walk_ends_marked_or_refused(walker, data):
    addr, access = data.draw(low_addresses(walker)), data.draw(ACCESSES)
    edits = data.draw(st.lists(st.tuples(st.integers(0, 4), st.sampled_from((1, 2, 4, 1 << 11))), max_size=6))
    expected, size, (a, d) = entries(walker), walker.fmt.entry_size, marks_of(walker.fmt)

    def interfere(walk):
        if not edits: return
        level, flip = edits.pop()
        steps = [step for step in walk.steps if step.table is not None]
        gpa = steps[level % len(steps)].pte_gpa(walker.fmt)
        if walker.memory.slot(gpa >> 12).readonly: return
        write_entry(walker.memory, gpa, size, read_entry(walker.memory, gpa, size) ^ flip)
        expected[gpa] ^= flip

    verdict, history = walk_and_mark(walker, addr, access, interfere)
    for result in history:
        for update in result.done: expected[update.gpa] |= update.old ^ update.new
    assert entries(walker) == expected                      # every edit survives, every mark is accounted for
    assert all(result.lost for result in history[:-1])
    if isinstance(verdict, PageFault):
        assert verdict == walker.walk(addr, access)         # refused by the tables as they are now
        assert not history or history[-1].lost
    elif has_ad(walker):
        assert history[-1].lost is None
        for step in verdict.steps:
            if step.table is None: continue
            gpa = step.pte_gpa(walker.fmt)
            wanted = a | (d if step.level == verdict.level and access & WRITE else 0)
            assert walker.memory.slot(gpa >> 12).readonly or expected[gpa] & wanted == wanted


@settings(max_examples=80, deadline=None)
@given(walkers(), st.data())
def test_a_refused_walk_leaves_no_trace(walker, data):
    before, addr, access = entries(walker), data.draw(low_addresses(walker)), data.draw(ACCESSES)
    verdict, history = walk_and_mark(walker, addr, access)
    if isinstance(verdict, PageFault): assert history == () and entries(walker) == before
    else: assert history


@settings(max_examples=80, deadline=None)
@given(walkers(), st.data())
def test_write_is_granted_on_a_read_only_if_the_leaf_is_dirty(walker, data):
    verdict = walker.walk(data.draw(low_addresses(walker)), data.draw(st.sampled_from((READ, USER, FETCH))))
    if isinstance(verdict, PageFault): return
    writable = all(gpte & 2 for gpte in (verdict.ptes[1:] if walker.fmt.name == 'pae' else verdict.ptes))
    dirty = bool(verdict.ptes[-1] & marks_of(walker.fmt)[1])
    assert bool(verdict.rights & 2) == (writable and (dirty or not has_ad(walker)))
