"""Entries: whatever the word, the names cover it; whatever is mapped, a reader of raw bytes finds it."""
import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.addresses import FORMATS, PAE, PTE32, page_size
from kvm_mmu_lit.guest.gpte import (PT_USER, PT_WRITABLE, Acc, describe_gpte, draw_gpte, flags_text, gpte_access,
                                    gpte_fields, gpte_to_gfn,
    is_last_gpte, is_present_gpte, make_gpte, map_page, max_leaf_level)
from kvm_mmu_lit.guest.memory import ram, read_gpa

TABLES = [fmt for fmt in FORMATS.values() if fmt.root_level]
places = st.sampled_from([(fmt, level) for fmt in TABLES for level in range(1, fmt.root_level + 1)])
words = st.integers(0, (1 << 64) - 1)


@given(places, words, st.booleans(), st.integers(32, 52))
def test_fields_put_together_are_the_entry(place, word, pse, maxphyaddr):
    fmt, level = place
    gpte = word & (1 << 8 * fmt.entry_size) - 1
    fields = gpte_fields(fmt, level, bool(gpte >> 7 & 1), maxphyaddr, pse)
    assert sum(field.value(gpte) << field.low for field in fields) == gpte
    assert [f.low for f in fields[:-1]] == [f.high + 1 for f in fields[1:]]


@given(places, words, st.booleans(), st.integers(32, 52))
def test_the_drawing_has_every_bit_of_any_entry(place, word, pse, maxphyaddr):
    fmt, level = place
    gpte = word & (1 << 8 * fmt.entry_size) - 1
    strip = draw_gpte(hex(gpte), fmt.name, level, pse, maxphyaddr)
    assert strip == draw_gpte(gpte, fmt, level, pse, maxphyaddr)
    assert sum(field.value << field.low for field in strip.fields) == gpte
    assert sum(field.width for field in strip.fields) == strip.width == 8 * fmt.entry_size
    assert describe_gpte(gpte, fmt, level, pse) in strip.title
    assert is_present_gpte(gpte, fmt) == (not strip.title.endswith('not present'))


@given(places, words, st.booleans())
def test_flags_are_what_the_readers_see(place, word, pse):
    fmt, level = place
    gpte = word & (1 << 8 * fmt.entry_size) - 1
    flags = flags_text(gpte, level, fmt, pse).split()
    if (fmt, level) != (PAE, 3):
        rights = gpte_access(gpte, fmt)
        assert ('W' in flags) == bool(rights & Acc.WRITE)
        assert ('R' if fmt.is_ept else 'U') in flags or not rights & Acc.USER
        if is_present_gpte(gpte, fmt):
            assert bool(rights & Acc.EXEC) == ('X' in flags if fmt.is_ept else 'NX' not in flags)
    if 1 < level <= max_leaf_level(fmt): assert ('PS' in flags) == is_last_gpte(gpte, level, fmt, pse)


def reference_walk(memory, root, fmt, addr):
    "What the architecture does, from raw bytes: (gpa, entries read) or None."
    size, bits = (4, 10) if fmt.name == '2level' else (8, 9)
    table, entries = root, []
    for level in range(fmt.root_level, 0, -1):
        shift = 12 + bits * (level - 1)
        slot = addr >> shift & (3 if fmt.name == 'pae' and level == 3 else (1 << bits) - 1)
        entry = int.from_bytes(read_gpa(memory, table + size * slot, size), 'little')
        entries.append(entry)
        if not entry & (7 if fmt.is_ept else 1): return None
        address = entry & 0x000f_ffff_ffff_f000
        if level == 1 or entry & 0x80:
            if size == 4 and level == 2: address = entry & 0xffc0_0000 | (entry >> 13 & 15) << 32
            return (address & -1 << shift) + addr % (1 << shift), entries
        table = address


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TABLES), st.data())
def test_every_mapped_address_leads_where_it_was_sent(fmt, data):
    memory, tables, sent = ram((0, 0x10_0000)), list(range(2, 0x100)), {}
    for _ in range(data.draw(st.integers(1, 8))):
        level = data.draw(st.integers(1, max_leaf_level(fmt)))
        size = page_size(level, fmt)
        addr = data.draw(st.integers(0, (1 << fmt.address_bits) - 1)) & -size
        width = 32 if fmt is PTE32 and level == 1 else 36 if fmt is PTE32 else 52
        gpa = data.draw(st.integers(0, (1 << width) - 1)) & -size
        if any(addr < end and start < addr + size for start, (end, _) in sent.items()): continue
        bits = data.draw(st.sampled_from([0, PT_WRITABLE, PT_USER | PT_WRITABLE]))
        map_page(memory, 0x1000, fmt, addr, gpa, tables, bits, PT_WRITABLE, level)
        sent[addr] = addr + size, gpa
    for addr, (end, gpa) in sent.items():
        for offset in (0, end - addr - 1, data.draw(st.integers(0, end - addr - 1))):
            found, entries = reference_walk(memory, 0x1000, fmt, addr + offset)
            assert found == gpa + offset
    gaps = [a for a in data.draw(st.lists(st.integers(0, (1 << fmt.address_bits) - 1), max_size=5))
            if not any(start <= a < end for start, (end, _) in sent.items())]
    assert all(reference_walk(memory, 0x1000, fmt, a) is None for a in gaps)


@given(places, words, st.booleans())
def test_make_gpte_writes_what_is_asked_or_says_why_not(place, gpa, leaf):
    fmt, level = place
    try: gpte = make_gpte(fmt, gpa, level, leaf)
    except ValueError as error:
        assert any(word in str(error) for word in ('aligned', 'as large', 'cannot point'))
        return
    assert gpte < 1 << 8 * fmt.entry_size and is_last_gpte(gpte, level, fmt) == leaf
    assert gpte_to_gfn(gpte, level if leaf else 1, fmt) << 12 == gpa


@given(places, st.integers(0, 1 << 40), st.booleans())
def test_make_gpte_of_an_aligned_frame_is_read_back(place, gfn, leaf):
    fmt, level = place
    leaf = leaf and level <= max_leaf_level(fmt) or level == 1
    width = 52 if fmt is not PTE32 else 36 if leaf and level == 2 else 32
    gpa = (gfn << 12 & (1 << width) - 1) & -(page_size(level, fmt) if leaf else 0x1000)
    gpte = make_gpte(fmt, gpa, level, leaf)
    assert is_present_gpte(gpte, fmt) and is_last_gpte(gpte, level, fmt) == leaf
    assert gpte_to_gfn(gpte, level if leaf else 1, fmt) << 12 == gpa


def test_a_large_page_in_the_way_leaves_memory_as_it_was():
    memory = ram((0, 0x10_000))
    map_page(memory, 0x1000, PAE, 0x20_0000, 0x40_0000, [2], level=2)
    before = read_gpa(memory, 0, 0x10_000)
    with pytest.raises(ValueError, match='mapped already'): map_page(memory, 0x1000, PAE, 0x20_5000, 0x9000, [3])
    assert read_gpa(memory, 0, 0x10_000) == before
