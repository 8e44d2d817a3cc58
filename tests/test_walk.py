"""The walk against a reference written from the manuals, over random tables and register states.

The reference shares nothing with the package but register values: it reads bytes, spells out the rules level by
level, and decides nothing beforehand.
"""
import random
from collections import Counter
from functools import lru_cache

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.addresses import FORMATS, PAE, canonical
from kvm_mmu_lit.guest.memory import GuestMemory, MemSlot
from kvm_mmu_lit.guest.permissions import Pferr
from kvm_mmu_lit.guest.registers import Cr0, Cr4, Efer, GeneralProtection, Registers, load_pdptrs
from kvm_mmu_lit.guest.verdict import GuestWalk, PageFault
from kvm_mmu_lit.guest.walk import Walker, walk

FRAMES = range(1, 8)          # where tables may lie; the root is frame 1
HOLE = 0x1_0000               # a frame no slot has
# levels, bytes of an entry
KINDS = {'2level': (2, 4), 'pae': (3, 8), '4level': (4, 8), '5level': (5, 8), 'ept4': (4, 8), 'ept5': (5, 8)}


def bit(value, n): return value >> n & 1


def bits(value, high, low): return value >> low & (1 << high - low + 1) - 1


# -- the reference ----------------------------------------------------------------------------------------------------

def shift_of(mode, level): return 12 + (10 if mode == '2level' else 9) * (level - 1)


def is_leaf(mode, regs, level, entry):
    if level == 1: return True
    if level > 3 or mode in ('2level', 'pae') and level == 3: return False
    return bool(bit(entry, 7) and (mode != '2level' or regs.cr4 & Cr4.PSE))


def has_reserved(mode, regs, level, entry):
    "Tables of the manuals: which bits of a present entry must be 0?"
    if mode == '2level':                       # only a 4 MiB page has reserved bits: 21:17
        return is_leaf(mode, regs, level, entry) and level == 2 and bits(entry, 21, 17) != 0
    if regs.maxphyaddr < 52 and bits(entry, 51, regs.maxphyaddr): return True
    leaf = is_leaf(mode, regs, level, entry)
    if mode.startswith('ept'):
        if leaf and level > 1 and bits(entry, shift_of(mode, level) - 1, 12): return True
        if leaf and level > regs.ept_huge_level: return True
        if not leaf and (bits(entry, 6, 3) or bit(entry, 7)): return True
        if leaf and bits(entry, 5, 3) in (2, 3, 7): return True
        return bit(entry, 1) and not bit(entry, 0) or bits(entry, 2, 0) == 4 and not regs.ept_execonly
    if bit(entry, 63) and not regs.efer & Efer.NX: return True
    if mode == 'pae' and bits(entry, 62, 52): return True
    if leaf and level > 1 and bits(entry, shift_of(mode, level) - 1, 13): return True
    if leaf and level == 3 and not regs.gbpages: return True
    return level > 3 and (bit(entry, 7) or bit(entry, 8) and regs.vendor == 'amd')


def granted(mode, entries):
    "What every entry grants, as (read or user, write, execute)."
    if mode.startswith('ept'): return tuple(all(bit(e, n) for e in entries) for n in (0, 1, 2))
    return (all(bit(e, 2) for e in entries), all(bit(e, 1) for e in entries), not any(bit(e, 63) for e in entries))


def refused_right(mode, regs, rights, access):
    "Section by section of the manuals' chapter on access rights."
    user_page, writable, executable = rights
    read_or_user, write, fetch = access & Pferr.USER, access & Pferr.WRITE, access & Pferr.FETCH
    if mode.startswith('ept'):
        return read_or_user and not user_page or write and not writable or fetch and not executable
    if read_or_user: return not user_page or write and not writable or fetch and not executable
    if fetch: return not executable or regs.cr4 & Cr4.SMEP and user_page
    if user_page and regs.cr4 & Cr4.SMAP and not (bit(regs.rflags, 18) and not access & Pferr.IMPLICIT): return True
    return write and not writable and regs.cr0 & Cr0.WP


def refused_by_key(mode, regs, rights, leaf, access):
    if mode not in ('4level', '5level') or not regs.cr4 & Cr4.PKE or access & Pferr.FETCH or not rights[0]: return False
    key = bits(leaf, 62, 59)
    if bit(regs.pkru, 2 * key): return True
    return bit(regs.pkru, 2 * key + 1) and access & Pferr.WRITE and (access & Pferr.USER or regs.cr0 & Cr0.WP)


def reference(pages, regs, mode, addr, access):
    """('ok', byte's address, level, user, write, execute) or ('fault', error code, level, qualification) or ('gp',)."""
    levels, size = KINDS[mode]
    width = {'4level': 48, '5level': 57}.get(mode)
    if width and bits(addr, 63, width - 1) not in (0, (1 << 65 - width) - 1): return ('gp',)
    told = int(access) & 6
    if access & Pferr.FETCH and (regs.efer & Efer.NX or regs.cr4 & Cr4.SMEP): told |= 16
    read, asked = [], (access & Pferr.USER and 1) | (access & Pferr.WRITE and 2) | (access & Pferr.FETCH and 4)

    def fault(level, code):
        have = sum(all(bit(e, n) for e in read) << n for n in range(3))
        return 'fault', code | told, level, 0 if code & 8 or not mode.startswith('ept') else int(asked) | have << 3

    table = 0x1000
    for level in range(levels, 0, -1):
        index = addr >> shift_of(mode, level) & (4096 // size - 1)
        if mode == 'pae' and level == 3:
            entry = regs.pdptrs[bits(addr, 31, 30)]
            if not bit(entry, 0): return fault(3, 0)
            table = bits(entry, 51, 12) << 12
            continue
        if table >> 12 not in pages: return fault(level, 0)
        entry = int.from_bytes(pages[table >> 12][size * index:size * index + size], 'little')
        read.append(entry)
        if not bits(entry, 2 if mode.startswith('ept') else 0, 0): return fault(level, 0)
        if has_reserved(mode, regs, level, entry): return fault(level, 1 | 8)
        if is_leaf(mode, regs, level, entry): break
        table = bits(entry, 51 if size == 8 else 31, 12) << 12
    rights = granted(mode, read)
    if refused_by_key(mode, regs, rights, entry, access): return fault(level, 1 | 32)
    if refused_right(mode, regs, rights, access): return fault(level, 1)
    low = shift_of(mode, level)
    page = bits(entry, 51 if size == 8 else 31, low) << low
    if mode == '2level' and level == 2: page |= bits(entry, 16, 13) << 32
    has_dirty = not mode.startswith('ept') or bit(regs.eptp, 6)
    clean = has_dirty and not bit(entry, 9 if mode.startswith('ept') else 6) and not access & Pferr.WRITE
    return 'ok', page | bits(addr, low - 1, 0), level, rights[0], rights[1] and not clean, rights[2]


# -- random guests ----------------------------------------------------------------------------------------------------

def random_entry(rng, mode):
    "An entry that is mostly lawful and mostly leads to a table."
    def chance(percent): return rng.randrange(100) < percent
    ept, large = mode.startswith('ept'), chance(20)
    if ept:
        value = (chance(95) | chance(90) << 1 | chance(90) << 2
                 | (rng.choice((0, 6, 6, rng.randrange(8))) << 3 if large or chance(20) else 0))
    else: value = chance(95) | chance(80) << 1 | chance(80) << 2 | rng.randrange(4) << 3
    value |= ((rng.randrange(16) << 8 if ept or chance(30) else rng.randrange(8) << 9) | large << 7 | rng.randrange(2)
              << 5 * (not ept) & 0x20)
    if not ept: value |= rng.randrange(2) << 6
    frame = rng.choice(FRAMES) if chance(96) else HOLE
    if large and chance(85): frame = rng.randrange(1, 4) << 18 >> 9 * rng.randrange(2)
    value |= frame << 12 | (chance(5) << rng.randrange(12, 32 if mode == '2level' else 64))
    if mode in ('4level', '5level') and chance(40): value |= rng.randrange(4) << 59
    if mode in ('pae', '4level', '5level'): value |= chance(12) << 63
    return value & (1 << 8 * KINDS[mode][1]) - 1


@lru_cache(maxsize=16)
def random_pages(mode, seed):
    "Table pages by frame: eleven random entries each, over and over, so that neighbouring slots differ."
    rng, size = random.Random(seed), KINDS[mode][1]
    def page(): return b''.join(random_entry(rng, mode).to_bytes(size, 'little') for _ in range(11))
    pages = {gfn: (page() * (4096 // size // 11 + 1))[:4096] for gfn in FRAMES}
    if mode == 'pae':                              # four lawful PDPTEs at the start of the root
        root = b''.join((rng.choice(FRAMES) << 12 | (rng.random() < 0.9)).to_bytes(8, 'little') for _ in range(4))
        pages[1] = root + pages[1][32:]
    return pages


def memory_of(pages, readonly=()):
    return GuestMemory(MemSlot(gfn, 1, memoryview(bytearray(page)), gfn in readonly)
                       for gfn, page in sorted(pages.items()))


flag = st.booleans()
MODES = st.sampled_from(sorted(KINDS))


@st.composite
def guests(draw):
    "(mode, pages, registers)"
    mode, seed = draw(MODES), draw(st.integers(0, 400))
    pages = random_pages(mode, seed)
    common = dict(maxphyaddr=draw(st.sampled_from((36, 40, 46, 52))), vendor=draw(st.sampled_from(('intel', 'amd'))),
                  gbpages=draw(flag),
                  rflags=draw(flag) << 18, pkru=draw(st.integers(0, 255)))
    if mode.startswith('ept'):
        return mode, pages, Registers(eptp=0x1006 | KINDS[mode][0] - 1 << 3 | draw(flag) << 6, ept_execonly=draw(flag),
                                      ept_huge_level=draw(st.integers(1, 3)), **common)
    long_mode = mode in ('4level', '5level')
    cr4 = draw(flag) * Cr4.PSE | Cr4.PAE * (mode != '2level') | Cr4.LA57 * (mode == '5level') | draw(flag) * Cr4.PKE
    cr4 |= draw(flag) * Cr4.SMEP | draw(flag) * Cr4.SMAP
    efer = (Efer.LME | Efer.LMA) * long_mode | draw(flag) * Efer.NX * (mode != '2level')
    regs = Registers(cr0=Cr0.PG | Cr0.PE | draw(flag) * Cr0.WP, cr3=0x1000, cr4=cr4, efer=efer, **common)
    return mode, pages, load_pdptrs(memory_of(pages), regs) if mode == 'pae' else regs


READ, WRITE, USER, FETCH, IMPLICIT = Pferr(0), Pferr.WRITE, Pferr.USER, Pferr.FETCH, Pferr.IMPLICIT
X86_ACCESSES = (READ, WRITE, FETCH, USER, USER | WRITE, USER | FETCH, IMPLICIT, IMPLICIT | WRITE)
EPT_ACCESSES = (USER, WRITE, FETCH, USER | WRITE, USER | FETCH, USER | WRITE | FETCH)


def accesses(mode): return st.sampled_from(EPT_ACCESSES if mode.startswith('ept') else X86_ACCESSES)


def addresses(mode):
    return st.integers(0, (1 << FORMATS[mode].address_bits) - 1).map(lambda addr: canonical(addr, FORMATS[mode]))


def as_tuple(verdict):
    "A verdict in the reference's words."
    if isinstance(verdict, GeneralProtection): return ('gp',)
    if isinstance(verdict, PageFault):
        return 'fault', int(verdict.error_code), verdict.level, verdict.exit_qualification
    rights = verdict.rights
    return 'ok', verdict.gpa, verdict.level, bool(rights & 4), bool(rights & 2), bool(rights & 1)


# -- the properties ---------------------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(guests(), st.data())
def test_walk_agrees_with_the_manuals(guest, data):
    mode, pages, regs = guest
    walker = Walker(memory_of(pages), regs, FORMATS[mode])
    for _ in range(5):
        addr, access = data.draw(addresses(mode)), data.draw(accesses(mode))
        assert as_tuple(walker.walk(addr, access)) == reference(pages, regs, mode, addr, access), (hex(addr), access)


@pytest.mark.parametrize('mode', sorted(KINDS))
def test_many_walks_agree_with_the_manuals_and_reach_every_outcome(mode):
    rng, seen = random.Random(mode), Counter()
    for seed in range(60):
        pages = random_pages(mode, seed)
        wide = dict(maxphyaddr=40, pkru=0xe4, rflags=rng.randrange(2) << 18, vendor=rng.choice(('intel', 'amd')),
                    gbpages=bool(rng.randrange(2)))
        if mode.startswith('ept'):
            regs = Registers(eptp=0x1046 | KINDS[mode][0] - 1 << 3, ept_execonly=bool(rng.randrange(2)),
                             ept_huge_level=rng.randrange(1, 4), **wide)
        else:
            cr4 = (Cr4.PSE if mode == '2level' else Cr4.PAE) | Cr4.LA57 * (mode == '5level') | Cr4.PKE
            efer = (Efer.LME | Efer.LMA) * (mode in ('4level', '5level')) | Efer.NX * (mode != '2level')
            smxp = rng.randrange(2) * Cr4.SMEP | rng.randrange(2) * Cr4.SMAP
            regs = Registers(cr0=Cr0.PG | Cr0.PE | rng.randrange(2) * Cr0.WP, cr3=0x1000, cr4=cr4 | smxp, efer=efer,
                             **wide)
            if mode == 'pae': regs = load_pdptrs(memory_of(pages), regs)
        walker = Walker(memory_of(pages), regs, FORMATS[mode])
        for _ in range(50):
            addr = canonical(rng.getrandbits(FORMATS[mode].address_bits), FORMATS[mode])
            access = rng.choice(EPT_ACCESSES if mode.startswith('ept') else X86_ACCESSES)
            verdict = walker.walk(addr, access)
            assert as_tuple(verdict) == reference(pages, regs, mode, addr, access), (seed, hex(addr), access)
            seen[verdict.rule.name if isinstance(verdict, PageFault) else f'level {verdict.level}'] += 1
    wanted = {'HOLE', 'NOT_PRESENT', 'RESERVED', 'PERMISSION', 'level 1', 'level 2'}
    if mode in ('4level', '5level'): wanted |= {'PKEY', 'level 3'}
    assert wanted <= set(seen), seen


@settings(max_examples=50, deadline=None)
@given(guests(), st.data())
def test_an_address_with_mixed_upper_bits_is_a_gp_or_the_callers_mistake(guest, data):
    mode, pages, regs = guest
    fmt, walker = FORMATS[mode], Walker(memory_of(pages), regs, FORMATS[mode])
    low, turned = (data.draw(st.integers(0, (1 << fmt.address_bits) - 1)),
                   data.draw(st.integers(1, (1 << 64 - fmt.address_bits) - 1)))
    addr = canonical(low, fmt) ^ turned << fmt.address_bits
    if fmt.signed: assert as_tuple(walker.walk(addr)) == ('gp',) == reference(pages, regs, mode, addr, READ)
    else:
        with pytest.raises(ValueError): walker.walk(addr)


@settings(max_examples=40, deadline=None)
@given(guests(), st.data())
def test_a_walk_never_writes(guest, data):
    mode, pages, regs = guest
    memory = memory_of(pages, readonly=FRAMES)
    walker = Walker(memory, regs, FORMATS[mode])
    for _ in range(10): walker.walk(data.draw(addresses(mode)), data.draw(accesses(mode)))
    assert {slot.base_gfn: bytes(slot.buffer) for slot in memory.slots} == pages


@settings(max_examples=50, deadline=None)
@given(guests(), st.data())
def test_the_entries_of_a_verdict_are_those_in_memory(guest, data):
    mode, pages, regs = guest
    fmt = FORMATS[mode]
    verdict = walk(memory_of(pages), regs, data.draw(addresses(mode)), data.draw(accesses(mode)), fmt)
    for step in verdict.steps:
        if step.table is None: assert fmt is PAE and step.gpte == regs.pdptrs[step.index]
        else:
            at = step.pte_gpa(fmt)
            assert int.from_bytes(pages[at >> 12][at % 4096:at % 4096 + fmt.entry_size], 'little') == step.gpte
    assert isinstance(verdict, GuestWalk) or verdict.because


@settings(max_examples=50, deadline=None)
@given(guests(), st.data())
def test_one_walker_for_many_addresses_says_what_a_new_one_says(guest, data):
    mode, pages, regs = guest
    memory = memory_of(pages)
    walker = Walker(memory, regs, FORMATS[mode])
    asked = data.draw(st.lists(st.tuples(addresses(mode), accesses(mode)), min_size=2, max_size=6))
    assert [walker.walk(*each) for each in asked] == [walk(memory, regs, *each, FORMATS[mode]) for each in asked]
