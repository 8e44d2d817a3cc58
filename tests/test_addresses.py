"""Addresses of every format, cut and joined."""
import pytest
from hypothesis import given, strategies as st

from kvm_mmu_lit.guest.addresses import (FORMATS, PAGE_SIZE, canonical, check_address, is_canonical, join_address,
                                         page_size, pt_index, split_address)

PAGED = [fmt for fmt in FORMATS.values() if fmt.root_level]


@pytest.mark.parametrize('fmt', PAGED, ids=str)
@given(st.integers(0, 2**64 - 1))
def test_splitting_and_joining_are_inverse(fmt, number):
    address = canonical(number, fmt)
    assert join_address(split_address(address, fmt), fmt) == address


@pytest.mark.parametrize('fmt', PAGED, ids=str)
@given(st.integers(0, 2**64 - 1))
def test_slots_are_digits(fmt, number):
    "An address is a number in mixed radix: each slot is the remainder of what the levels below leave."
    rest = canonical(number, fmt) % (1 << fmt.address_bits) // PAGE_SIZE
    for level in range(1, fmt.root_level + 1):
        assert pt_index(canonical(number, fmt), level, fmt) == rest % fmt.nr_entries
        rest //= fmt.nr_entries
    assert rest == 0


@pytest.mark.parametrize('fmt', PAGED, ids=str)
@given(st.integers(0, 2**64 - 1))
def test_canonical_is_sign_extension(fmt, number):
    low = number % (1 << fmt.address_bits)
    signed = low - (1 << fmt.address_bits) if fmt.signed and low >> (fmt.address_bits - 1) else low
    assert canonical(number, fmt) == signed % (1 << 64)
    assert is_canonical(canonical(number, fmt), fmt)


@pytest.mark.parametrize('fmt', PAGED, ids=str)
@pytest.mark.parametrize('level', [-1, 0, 6])
def test_a_level_that_is_not_there_is_named(fmt, level):
    with pytest.raises(ValueError, match=f'no level {level} in {fmt.name} paging'): page_size(level, fmt)


@pytest.mark.parametrize('fmt', PAGED, ids=str)
def test_numbers_that_no_register_holds_are_refused(fmt):
    width = 64 if fmt.signed else fmt.address_bits
    assert check_address((1 << width) - 1, fmt) == (1 << width) - 1
    for number in (-1, 1 << width):
        with pytest.raises(ValueError, match=f'does not fit {width} bits'): check_address(number, fmt)
