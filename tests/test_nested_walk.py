"""The nested walk against two reference walks from the manuals, one inside the other, over random tables in both
dimensions.

The inner reference gets its pages from a mapping that translates each frame by the outer reference:
`test_walk.reference` twice. That
one shares nothing with the package but register values.
"""
import random
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import given, settings, strategies as st
from test_walk import KINDS, READ, X86_ACCESSES, memory_of, random_pages, reference

from kvm_mmu_lit.guest.accessed_dirty import WriteBack
from kvm_mmu_lit.guest.addresses import FORMATS, canonical
from kvm_mmu_lit.guest.gpte import map_page
from kvm_mmu_lit.guest.memory import GuestMemory, MemSlot, copy_memory, ram, read_entry
from kvm_mmu_lit.guest.nested_walk import NestedFault, NestedTables, NestedWalk, NestedWalker, mark
from kvm_mmu_lit.guest.permissions import Pferr
from kvm_mmu_lit.guest.registers import Cr0, Cr4, Efer, GeneralProtection, Registers, load_pdptrs
from kvm_mmu_lit.guest.verdict import PageFault

WRITE, USER, FETCH = Pferr.WRITE, Pferr.USER, Pferr.FETCH
INNER, OUTER = ('2level', 'pae', '4level', '5level'), tuple(sorted(KINDS))
NESTED_ROOT, NESTED_FRAMES = 0x1000, range(2, 0x40)      # the guest's tables lie above them, from frame 0x101
L2_FRAMES = range(1, 8)


# -- the naive composition --------------------------------------------------------------------------------------------

class Refused(Exception):
    "The outer dimension refuses: (address within a page, what the outer reference said)."


def as_physical(addr, mode):
    "The reference walks linear addresses; a physical one has no sign. None when it is too wide."
    width = FORMATS[mode].address_bits
    return None if addr >> width else canonical(addr, FORMATS[mode])


def outer_walk(pages, regs, mode, gpa, access):
    addr = as_physical(gpa, mode)
    if addr is None: return 'fault', None
    return reference(pages, regs, mode, addr, access)


class Translated:
    "The guest's pages by L2 frame, through the outer reference."
    def __init__(self, pages, regs, mode, access):
        self.pages, self.regs, self.mode, self.access, self.count = pages, regs, mode, access, 0

    def frame(self, gfn):
        found = outer_walk(self.pages, self.regs, self.mode, gfn << 12, self.access)
        if found[0] != 'ok': raise Refused(gfn, found)
        return found[1] >> 12

    def __contains__(self, gfn): return self.frame(gfn) in self.pages

    def __getitem__(self, gfn): self.count += 1; return self.pages[self.frame(gfn)]


def naive(pages, regs, mode, nested_regs, nested_mode, gva, access):
    """What both dimensions say: ('ok', L2 gpa, gpa, tables read), the inner fault, or ('nested', tables read before,
    frame, outer fault)."""
    ept = nested_mode.startswith('ept')
    tables = Translated(pages, nested_regs, nested_mode, USER | (0 if ept and not nested_regs.eptp & 64 else WRITE))
    try: inner = reference(tables, regs, mode, gva, access)
    except Refused as refused: return 'nested', tables.count, refused.args[0], refused.args[1]
    if inner[0] != 'ok': return inner
    asked = access & (WRITE | FETCH)
    page = outer_walk(pages, nested_regs, nested_mode, inner[1], asked if ept and asked else asked | USER)
    if page[0] != 'ok': return 'nested', 'final', inner[1] >> 12, page
    return 'ok', inner[1], page[1], tables.count


def in_those_words(verdict):
    "The walker's verdict as the naive composition gives it."
    if isinstance(verdict, GeneralProtection): return ('gp',)
    if isinstance(verdict, PageFault):
        return 'fault', int(verdict.error_code), verdict.level, verdict.exit_qualification
    if isinstance(verdict, NestedWalk): return 'ok', verdict.l2_gpa, verdict.gpa, len(verdict.steps) - 1
    return 'nested', 'final' if verdict.final else None, verdict.l2_gpa >> 12, nested_words(verdict)


def nested_words(fault):
    inner = fault.fault
    return ('fault',
            None) if not inner.ptes and inner.rule.name == 'NOT_PRESENT' and inner.gva >> inner.fmt.address_bits else \
           ('fault', int(inner.error_code), inner.level, inner.exit_qualification)


# -- random worlds ----------------------------------------------------------------------------------------------------

@lru_cache(maxsize=256)
def nested_pages(mode, seed, spoiled):
    "Nested tables that map the guest's frames to others, with a few bits flipped; as pages by frame."
    rng, fmt, ept = random.Random((mode, seed, spoiled).__repr__()), FORMATS[mode], mode.startswith('ept')
    memory, free = ram((NESTED_ROOT, 0x3_f000)), list(NESTED_FRAMES)
    upper, targets = 6 | rng.randrange(2) << 5 * (not ept) & 0x20, rng.sample(range(0x101, 0x110), len(L2_FRAMES))
    for gfn, target in zip(L2_FRAMES, targets):
        leaf = rng.choice((6, 6, 6, 6, 4, 2, 0)) if rng.random() < 0.4 else 6
        map_page(memory, NESTED_ROOT, fmt, gfn << 12, target << 12, free, leaf, upper)
    large = 1 << (22 if mode == '2level' else 21)
    for n in range(1, 8):
        map_page(memory, NESTED_ROOT, fmt, n * large, rng.randrange(1, 32) * large, free, rng.choice((6, 6, 4, 2)),
                 upper, 2)
    pages = {slot.base_gfn + n: bytearray(slot.page(slot.base_gfn + n)) for slot in memory.slots
             for n in range(slot.npages)}
    used = [(gfn, at) for gfn, page in pages.items() for at in range(0, 4096, KINDS[mode][1])
            if any(page[at:at + KINDS[mode][1]])]
    for _ in range(spoiled):
        gfn, at = rng.choice(used)
        pages[gfn][at + rng.randrange(KINDS[mode][1])] ^= 1 << rng.randrange(8)
    return pages, dict(zip(L2_FRAMES, targets))


def world(rng, mode, nested):
    "(pages of the outer memory, the guest's registers, the nested ones)"
    outer, targets = nested_pages(nested, rng.randrange(8), rng.choice((0, 0, 1, 3)))
    guest = random_pages(mode, rng.randrange(16))
    pages = {**outer, **{targets[gfn]: page for gfn, page in guest.items() if rng.random() < 0.97}}
    regs = registers(rng, mode)
    if mode == 'pae': regs = load_pdptrs(memory_of(guest), regs)
    return pages, regs, registers(rng, nested)


def registers(rng, mode):
    def flag(bit): return rng.randrange(2) * bit
    common = dict(maxphyaddr=rng.choice((36, 40, 46, 52)), vendor=rng.choice(('intel', 'amd')), rflags=flag(1 << 18),
                  pkru=rng.randrange(256))
    if mode.startswith('ept'):
        return Registers(eptp=0x1006 | KINDS[mode][0] - 1 << 3 | flag(64), ept_execonly=bool(flag(1)),
                         ept_huge_level=rng.randrange(1, 4), **common)
    cr4 = Cr4.PSE if mode == '2level' else Cr4.PAE | Cr4.LA57 * (mode == '5level') | flag(Cr4.PKE)
    efer = (Efer.LME | Efer.LMA) * (mode in ('4level', '5level')) | flag(Efer.NX) * (mode != '2level')
    return Registers(cr0=Cr0.PG | Cr0.PE | flag(Cr0.WP), cr3=0x1000, cr4=cr4 | flag(Cr4.SMEP) | flag(Cr4.SMAP),
                     efer=efer, **common)


def outer_memory(pages):
    return GuestMemory(MemSlot(gfn, 1, memoryview(bytearray(page))) for gfn, page in sorted(pages.items()))


def without_keys(pages, regs, nested):
    "Nested registers as the reference takes them, or None where a spoiled PDPTE refuses to be loaded."
    if nested == 'pae': regs = load_pdptrs(outer_memory(pages), regs)
    return replace(regs, cr4=regs.cr4 & ~Cr4.PKE) if isinstance(regs, Registers) else None


def compare(rng, mode, nested, seen, walks=6):
    pages, regs, nested_regs = world(rng, mode, nested)
    reference_regs = without_keys(pages, nested_regs, nested)
    if reference_regs is None: return
    nested_regs = replace(reference_regs, cr4=nested_regs.cr4)    # the walker itself must leave keys aside
    walker = NestedWalker(outer_memory(pages), regs, nested_regs)
    for _ in range(walks):
        gva, access = canonical(rng.getrandbits(FORMATS[mode].address_bits), FORMATS[mode]), rng.choice(X86_ACCESSES)
        verdict, told = walker.walk(gva, access), naive(pages, regs, mode, reference_regs, nested, gva, access)
        mine = in_those_words(verdict)
        if told[0] == 'nested' and told[1] != 'final':
            assert verdict.level == walker.inner.levels[told[1]][5]
            told = 'nested', None, *told[2:]
        assert mine == told, (mode, nested, hex(gva), access)
        seen[type(verdict).__name__ + (f' {verdict.final}' if isinstance(verdict, NestedFault) else '')] += 1


# -- the properties ---------------------------------------------------------------------------------------------------

@settings(max_examples=120)
@given(st.sampled_from(INNER), st.sampled_from(OUTER), st.integers(0, 1 << 32))
def test_a_nested_walk_is_two_reference_walks(mode, nested, seed):
    compare(random.Random(seed), mode, nested, Counter())


@pytest.mark.parametrize('nested', OUTER)
@pytest.mark.parametrize('mode', INNER)
def test_many_nested_walks_agree_and_reach_every_outcome(mode, nested):
    rng, seen = random.Random(f'{mode} {nested}'), Counter()
    for _ in range(40): compare(rng, mode, nested, seen, walks=12)
    assert {'NestedWalk', 'PageFault', 'NestedFault True', 'NestedFault False'} <= set(seen), seen


@settings(max_examples=60)
@given(st.sampled_from(OUTER), st.integers(0, 1 << 32))
def test_without_paging_the_nested_tables_are_all_there_is(nested, seed):
    rng = random.Random(seed)
    pages, _, nested_regs = world(rng, '4level', nested)
    nested_regs = without_keys(pages, nested_regs, nested)
    if nested_regs is None: return
    walker = NestedWalker(outer_memory(pages), Registers(), nested_regs)
    for _ in range(6):
        gva, access = (rng.choice((rng.choice(L2_FRAMES) << 12, rng.getrandbits(32))) | rng.getrandbits(12),
                       rng.choice((READ, WRITE, FETCH, USER | WRITE)))
        asked = access & (WRITE | FETCH)
        told = outer_walk(pages, nested_regs, nested, gva, asked if nested.startswith('ept') and asked
                          else asked | USER)
        verdict = walker.walk(gva, access)
        if told[0] == 'ok': assert (verdict.l2_gpa, verdict.gpa, len(verdict.steps)) == (gva, told[1], 1)
        else: assert verdict.final and nested_words(verdict) == told


@settings(max_examples=50)
@given(st.sampled_from(INNER), st.sampled_from(OUTER), st.integers(0, 1 << 32))
def test_marks_change_A_and_D_alone_and_are_made_once(mode, nested, seed):
    rng = random.Random(seed)
    pages, regs, nested_regs = world(rng, mode, nested)
    nested_regs = without_keys(pages, nested_regs, nested)
    if nested_regs is None: return
    memory = outer_memory(pages)
    walker = NestedWalker(memory, regs, nested_regs)
    for _ in range(8):
        gva, access = canonical(rng.getrandbits(FORMATS[mode].address_bits), FORMATS[mode]), rng.choice(X86_ACCESSES)
        found = walker.walk(gva, access)
        if not isinstance(found, NestedWalk): continue
        before = copy_memory(memory)
        result = mark(memory, found)
        if isinstance(result, WriteBack):
            assert result.lost is None
            for update in result.done:
                assert (read_entry(before, update.gpa, update.size) == update.old
                        and (update.old ^ update.new) & ~0x360 == 0)
            again = walker.walk(gva, access)
            assert again.gpa == found.gpa and mark(memory, again).done == ()
            entries = {read.address for read in found.reads}
            assert {update.gpa for update in result.done} <= entries
        else: assert not walker.nested.have_ad and result.access == WRITE | USER and changed(before, memory) == []
        if isinstance(result, WriteBack):
            assert set(changed(before, memory)) == {update.gpa & ~7 for update in result.done}


def changed(before, after):
    "Addresses of 8-byte words that differ."
    return [old.base_gfn << 12 | at for old, new in zip(before.slots, after.slots)
            if old.buffer != new.buffer for at in range(0, 4096, 8)
            if bytes(old.buffer[at:at + 8]) != bytes(new.buffer[at:at + 8])]


@settings(max_examples=60)
@given(st.sampled_from(INNER), st.sampled_from(OUTER), st.integers(0, 1 << 32))
def test_every_counted_read_is_where_it_says(mode, nested, seed):
    rng = random.Random(seed)
    pages, regs, nested_regs = world(rng, mode, nested)
    nested_regs = without_keys(pages, nested_regs, nested)
    if nested_regs is None: return
    walker = NestedWalker(outer_memory(pages), regs, nested_regs)
    for _ in range(8):
        found = walker.walk(canonical(rng.getrandbits(FORMATS[mode].address_bits), FORMATS[mode]),
                            rng.choice(X86_ACCESSES))
        if not isinstance(found, NestedWalk): continue
        sizes = dict(guest=KINDS[mode][1], nested=KINDS[nested][1])
        for read in found.reads: assert read_entry(walker.memory, read.address, sizes[read.dimension]) == read.entry
        own = [read.entry for read in found.reads if read.dimension == 'guest']
        assert own == list(found.inner.ptes)[mode == 'pae':]


def test_an_address_too_wide_for_the_tables_is_told_apart_from_an_unmapped_one():
    for nested in OUTER:
        rng = random.Random(nested)
        pages, _ = nested_pages(nested, 1, 0)
        regs = without_keys(pages, registers(rng, nested), nested)
        tables = NestedTables(outer_memory(pages), regs)
        top = 1 << FORMATS[nested].address_bits
        unmapped, wide = tables.walk(top - 0x1000, USER), tables.walk(top, USER)
        assert outer_walk(pages, regs, nested, top - 0x1000, USER)[:2] == ('fault', int(unmapped.error_code))
        assert (unmapped.ptes and not wide.ptes and 'wider than' in wide.because
                and wide.error_code == unmapped.error_code == USER)
