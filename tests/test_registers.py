"""Loading CR3 and the PDPTE registers, against the rules written out."""
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from kvm_mmu_lit.guest.memory import ram, read_gpa, write_entry
from kvm_mmu_lit.guest.registers import (Cr0, Cr4, Efer, GeneralProtection, Registers, decode_register, load_cr3,
                                         load_pdptrs, register_fields)

PAE = Registers(cr0=Cr0.PG | Cr0.PE, cr4=Cr4.PAE, maxphyaddr=36)
ENTRY = st.integers(0, 2**64 - 1) | st.integers(0, 2**36 - 1).map(lambda n: n & ~0x1e6 | 1)


@given(st.lists(ENTRY, min_size=4, max_size=4), st.integers(0, 127))
def test_pdptes_are_loaded_or_refused_as_the_manual_says(entries, place):
    memory, cr3 = ram((0x1000, 0x1000)), 0x1000 + 32 * place
    for slot, entry in enumerate(entries): write_entry(memory, cr3 + 8 * slot, 8, entry)
    refused = any(entry & 1 and any(entry >> bit & 1 for bit in (1, 2, 5, 6, 7, 8, *range(36, 64)))
                  for entry in entries)
    loaded = load_pdptrs(memory, replace(PAE, cr3=cr3))
    if refused: assert isinstance(loaded, GeneralProtection) and 'PDPTE' in loaded.because
    else: assert loaded.pdptrs == tuple(entries)


@given(st.integers(0, 2**64 - 1), st.integers(32, 52), st.booleans())
def test_mov_to_cr3_in_long_mode(value, width, pcide):
    regs = Registers(cr0=Cr0.PG | Cr0.PE, cr4=Cr4.PAE | Cr4.PCIDE * pcide, efer=Efer.LME | Efer.LMA, maxphyaddr=width)
    stored = value % (1 << 63) if pcide else value
    after = load_cr3(ram((0, 0x1000)), regs, value)
    if stored >> width: assert isinstance(after, GeneralProtection)
    else: assert after.cr3 == stored


@given(st.integers(0, 2**32 - 1))
def test_a_load_reads_four_entries_and_changes_no_byte(cr3):
    memory = ram((0, 0x4000))
    before = read_gpa(memory, 0, 0x4000)
    after = load_cr3(memory, PAE, cr3)
    assert read_gpa(memory, 0, 0x4000) == before
    assert isinstance(after, GeneralProtection) == ((cr3 & ~0x1f) >= 0x4000)


@pytest.mark.parametrize('name', ['cr0', 'cr3', 'cr4', 'efer', 'eptp', 'pkru', 'rflags'])
@given(data=st.data())
def test_decoding_loses_no_bit(name, data):
    width, _ = register_fields(name)
    value = data.draw(st.integers(0, (1 << width) - 1))
    assert sum(held << low for _, low, _, held, _ in decode_register(name, value)) == value


@pytest.mark.parametrize('field, value', [('cr0', 1 << 32), ('cr4', -1), ('pkru', 1 << 32), ('cpl', 4),
                                          ('maxphyaddr', 53), ('maxphyaddr', 1 << 70), ('maxphyaddr', 31),
                                          ('vendor', 'via'), ('ept_huge_level', 0), ('pdptrs', (1, 2, 3))])
def test_a_value_no_register_holds_is_named(field, value):
    with pytest.raises(ValueError, match=field): Registers(**{field: value})
