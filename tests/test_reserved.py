"""Reserved bits: any register state and any entry against the manuals' rules, stated the other way round."""
import re

from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.addresses import EPT4, EPT5
from kvm_mmu_lit.guest.registers import Cr0, Cr4, Efer, Registers
from kvm_mmu_lit.guest.reserved import (bit_runs, draw_rsvd_bits, guest_rsvd_check, is_rsvd_bits_set,
                                        reset_rsvds_bits_mask, rsvd_bits,
    shadow_zero_check, tdp_shadow_zero_check, why_reserved)

words = st.integers(0, (1 << 64) - 1)
sparse = st.lists(st.integers(0, 63), max_size=5).map(lambda bits: sum(1 << bit for bit in set(bits)))


@st.composite
def vcpus(draw):
    root, nx, pse = draw(st.sampled_from((2, 3, 4, 5))), draw(st.booleans()), draw(st.booleans())
    efer = (Efer.NX if nx else 0) | (Efer.LME | Efer.LMA if root > 3 else 0)
    cr4 = (Cr4.PSE if pse else 0) | (Cr4.PAE if root > 2 else 0) | (Cr4.LA57 if root == 5 else 0)
    ept = 0x1000 | 6 | draw(st.sampled_from((3, 4))) << 3
    return Registers(cr0=Cr0.PG | Cr0.PE, cr4=cr4, efer=efer, eptp=ept, maxphyaddr=draw(st.integers(32, 52)),
                     gbpages=draw(st.booleans()),
                     vendor=draw(st.sampled_from(('intel', 'amd'))), ept_execonly=draw(st.booleans()),
                     ept_huge_level=draw(st.integers(1, 3)))


def refused_bits(regs, gpte, level):
    "Set bits of an x86 entry that the manuals reserve: a list of rules, each (does it apply?, bits)."
    root, large, width = regs.fmt.root_level, gpte >> 7 & 1, regs.maxphyaddr
    if root == 2: rules = [(level == 2 and large and regs.cr4 & Cr4.PSE, range(17, 22))]
    elif (root, level) == (3, 3): rules = [(True, range(width, 64)), (True, (1, 2, 5, 6, 7, 8))]
    else:
        rules = [(True, range(width, 63 if root == 3 else 52)),
                 (not regs.efer & Efer.NX, [63]),
                 (large and level == 2, range(13, 21)),
                 (large and level == 3, range(13, 30)),
                 (level == 3 and not regs.gbpages, [7]),
                 (level > 3, [7]),
                 (level > 3 and regs.vendor == 'amd', [8])]
    return {bit for applies, bits in rules if applies for bit in bits if gpte >> bit & 1}


@settings(max_examples=400)
@given(vcpus(), words | sparse, st.integers(1, 5))
def test_an_x86_entry_is_refused_for_the_bits_the_manual_reserves(regs, gpte, level):
    level = min(level, regs.fmt.root_level)
    if regs.fmt.root_level == 3 and level == 3: gpte &= ~(1 << 7)        # the other row is never written
    if regs.fmt.root_level == 2: gpte &= 0xffff_ffff
    check, expected = guest_rsvd_check(regs), refused_bits(regs, gpte, level)
    assert is_rsvd_bits_set(check, gpte, level) == bool(expected)
    sentence = why_reserved(check, gpte, level)
    named = [[int(n) for n in run.split(':')] for run in re.findall(r'\d+:\d+|\d+', sentence.partition(' must')[0])]
    assert {bit for run in named for bit in range(run[-1], run[0] + 1)} == expected


def ept_refuses(regs, gpte, level):
    "The manual's list of EPT misconfigurations that a present entry can have."
    r, w, x = gpte & 1, gpte >> 1 & 1, gpte >> 2 & 1
    if w and not r or x and not r and not w and not regs.ept_execonly: return True
    if any(gpte >> bit & 1 for bit in range(regs.maxphyaddr, 52)): return True
    leaf = level == 1 or gpte >> 7 & 1 and level <= regs.ept_huge_level
    if level > 1 and gpte >> 7 & 1 and not leaf: return True
    if not leaf: return bool(gpte >> 3 & 0xf) or gpte >> 3 & 7 in (2, 3, 7)
    return gpte >> 3 & 7 in (2, 3, 7) or level > 1 and bool(gpte & (1 << 12 + 9 * (level - 1)) - (1 << 12))


@settings(max_examples=400)
@given(vcpus(), words | sparse, st.integers(0, 7), st.integers(1, 5), st.sampled_from((EPT4, EPT5)))
def test_an_ept_entry_is_refused_exactly_if_the_manual_calls_it_a_misconfiguration(regs, gpte, rights, level, fmt):
    gpte, check = gpte & ~7 | rights, guest_rsvd_check(regs, fmt)
    assert is_rsvd_bits_set(check, gpte, level) == ept_refuses(regs, gpte, level)
    assert bool(why_reserved(check, gpte, level)) == ept_refuses(regs, gpte, level)


@given(words | sparse)
def test_runs_put_together_are_the_mask(mask):
    runs = bit_runs(mask)
    assert sum(rsvd_bits(low, high) for high, low in runs) == mask
    assert all(upper[1] > lower[0] + 1 for upper, lower in zip(runs, runs[1:]))


@given(vcpus(), st.integers(1, 64))
def test_the_grid_shows_every_bit_of_every_row(regs, width):
    check = guest_rsvd_check(regs)
    grid = draw_rsvd_bits(check, 5, width)
    for name, row in zip(grid.rows, grid.cells):
        level, bit7 = int(name[6]), int(name[-1])
        mask = check.mask[bit7][level - 1]
        ends = [[int(n) for n in column.split(':')] for column in grid.columns]
        if mask is None: assert set(row) == {None}
        else: assert sum(rsvd_bits(end[-1], end[0]) for end, mark in zip(ends, row) if mark) == mask & (1 << width) - 1


@given(st.integers(32, 51), st.sampled_from((3, 4, 5)), st.booleans(), st.booleans(), st.booleans())
def test_a_wider_cpu_never_reserves_more(width, root, nx, gbpages, amd):
    narrow, wide = (reset_rsvds_bits_mask(rsvd_bits(n, 63), root, nx, gbpages, True, amd) for n in (width, width + 1))
    for before, after in zip(sum(narrow.mask, ()), sum(wide.mask, ())):
        assert (before is None) == (after is None) and (before is None or after | before == before)


@given(st.integers(32, 52), st.sampled_from((4, 5)), st.booleans(), st.booleans(), sparse, sparse)
def test_encryption_bits_are_reserved_unless_they_are_the_value(width, root, nx, gbpages, value, others):
    plain = shadow_zero_check(root, nx, width, gbpages)
    check = shadow_zero_check(root, nx, width, gbpages, value, value | others)
    tdp, tdp_plain = (tdp_shadow_zero_check(root, width, gbpages, False, me_mask=me) for me in (value | others, 0))
    for row in (0, 1):
        for i in range(root):
            assert check.mask[row][i] == plain.mask[row][i] & ~value | others & ~value or not value | others
            assert tdp.mask[row][i] == tdp_plain.mask[row][i] & ~(value | others)
        assert check.mask[row][root:] == plain.mask[row][root:]
