"""Permissions: any register state, page, key and access against the manual's paragraphs."""
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.addresses import EPT4, LONG4, PAE
from kvm_mmu_lit.guest.gpte import Acc
from kvm_mmu_lit.guest.permissions import (FETCH, IMPLICIT, READ, USER, WRITE, Pferr, access_text, check_access,
                                           draw_pkru, permission_bitmask,
    permission_fault, permission_index, pkey_refuses, pkru_mask, refresh_cr0_wp, refusals, show_permission_bitmask,
                                           show_refusals)
from kvm_mmu_lit.guest.registers import Cr0, Cr4, Efer, Registers, Rflags

flags, rights = st.booleans(), st.integers(0, 7).map(Acc)
accesses = st.sampled_from([who | what for who in (READ, USER, IMPLICIT) for what in (READ, WRITE, FETCH)])


@st.composite
def vcpus(draw):
    root = draw(st.sampled_from((2, 3, 4, 5)))
    cr4 = (Cr4.PAE if root > 2 else 0) | (Cr4.LA57 if root == 5 else 0)
    for bit in (Cr4.PSE, Cr4.PGE, Cr4.SMEP, Cr4.SMAP, Cr4.PKE): cr4 |= bit if draw(flags) else 0
    cr0 = Cr0.PG | Cr0.PE | (Cr0.WP if draw(flags) else 0)
    efer = (Efer.LME | Efer.LMA if root > 3 else 0) | (Efer.NX if draw(flags) else 0)
    return Registers(cr0=cr0, cr4=cr4, efer=efer, rflags=Rflags.AC if draw(flags) else 0,
                     pkru=draw(st.integers(0, (1 << 32) - 1)), eptp=0x101e)


def manual(regs, page, access, pkey):
    "(allowed?, does a key refuse?) as the manual says it: first who asks, then for what, then which page."
    user_page, writable, marked_x = page & 4, page & 2, page & 1
    wp, ac = regs.cr0 >> 16 & 1, regs.rflags >> 18 & 1
    smep, smap, pke = regs.cr4 >> 20 & 1, regs.cr4 >> 21 & 1, regs.cr4 >> 22 & 1
    runs = marked_x or not regs.efer >> 11 & 1
    user, implicit = access & USER, access & IMPLICIT
    if access & FETCH: return bool(user_page and runs if user else runs and not (smep and user_page)), False
    ad, wd = regs.pkru >> 2 * pkey & 1, regs.pkru >> 2 * pkey + 1 & 1
    keyed = pke and user_page and regs.efer >> 10 & 1 and (ad or access & WRITE and wd and (user or wp))
    if user: allowed = user_page and (writable or not access & WRITE)
    elif user_page and smap and (implicit or not ac): allowed = False
    else: allowed = not access & WRITE or writable or not wp
    return bool(allowed and not keyed), bool(keyed)


@settings(max_examples=600)
@given(vcpus(), rights, accesses, st.integers(0, 15))
def test_the_check_says_what_the_manual_says(regs, page, access, pkey):
    allowed, keyed = manual(regs, page, access, pkey)
    fault = permission_fault(regs, page, access, pkey)
    assert fault == (0 if allowed else Pferr.PRESENT | (Pferr.PK if keyed else 0))
    assert bool(refusals(regs, page, access) or pkey_refuses(regs, page, pkey, access)) == (not allowed)


@settings(max_examples=300)
@given(vcpus(), rights, st.integers(0, 7))
def test_ept_rights_are_asked_for_and_granted_one_by_one(regs, page, asked):
    access = (USER if asked & 4 else 0) | (WRITE if asked & 2 else 0) | (FETCH if asked & 1 else 0)
    granted = asked & ~page == 0
    assert (permission_fault(regs, page, access, 15, is_ept=True) == 0) == granted
    assert (refusals(regs, page, access, is_ept=True) == ()) == granted


@given(vcpus(), flags)
def test_bytes_and_mask_depend_on_nothing_but_their_bits(regs, is_ept):
    other = replace(regs, pkru=~regs.pkru & 0xffff_ffff, rflags=regs.rflags ^ Rflags.AC, cr4=regs.cr4 ^ Cr4.PGE,
                    maxphyaddr=36)
    assert permission_bitmask(regs, is_ept) == permission_bitmask(other, is_ept)
    assert pkru_mask(regs, is_ept) == pkru_mask(other, is_ept)
    assert len(permission_bitmask(regs, is_ept)) == 16 and pkru_mask(regs, is_ept) >> 32 == 0


@given(vcpus(), accesses)
def test_every_access_has_a_byte_and_pages_with_more_rights_refuse_users_less(regs, access):
    index = permission_index(regs, access)
    assert 0 <= index < 16
    if access & USER:
        byte = permission_bitmask(regs)[index]
        assert all(not byte >> more & 1 for less in range(8) for more in range(8) if less & more == less
                   and not byte >> less & 1)


@given(vcpus(), vcpus(), rights, accesses)
def test_after_the_refresh_only_other_bits_can_be_stale(cached, real, page, access):
    real_wp = bool(real.cr0 & Cr0.WP)
    fresh = refresh_cr0_wp(cached, real_wp, tdp_enabled=True)
    assert fresh == replace(cached, cr0=cached.cr0 & ~Cr0.WP | (Cr0.WP if real_wp else 0))
    assert permission_fault(fresh, page, access) == permission_fault(replace(cached, cr0=real.cr0), page, access)


@given(st.integers(0, (1 << 64) - 1))
def test_only_questions_are_accepted(access):
    question = WRITE | USER | FETCH | IMPLICIT
    if access & ~question:
        with pytest.raises(ValueError, match='describe an access'): check_access(access, LONG4)
    for fmt in (LONG4, PAE, EPT4):
        asked = access & question
        if asked & USER and asked & IMPLICIT and not fmt.is_ept:
            with pytest.raises(ValueError, match='supervisor access'): check_access(asked, fmt)
        else: assert check_access(asked, fmt) == asked and access_text(asked, fmt)


@given(st.tuples(flags, flags, flags, flags), flags)
def test_both_grids_show_the_same_refusals(state, ac):
    plain, sixteen = show_refusals(*state, ac=ac), show_permission_bitmask(*state)
    asked = [who | what for who in (USER, READ, IMPLICIT) for what in (READ, WRITE, FETCH)
             if who | what != IMPLICIT | FETCH]
    for row, access in zip(plain.cells, asked):
        excused = Pferr.RSVD if ac and not access & IMPLICIT else 0
        assert row == sixteen.cells[(access & (WRITE | USER | FETCH) | excused) >> 1]


@given(st.integers(0, (1 << 32) - 1))
def test_pkru_is_drawn_whole(pkru):
    assert sum(field.value << field.low for field in draw_pkru(hex(pkru)).fields) == pkru
