"""Faults, prefetching and INVLPG on random tables, held against rules written down here once more."""
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.addresses import FORMATS
from kvm_mmu_lit.guest.gpte import map_page
from kvm_mmu_lit.guest.memory import ram, write_entry
from kvm_mmu_lit.guest.registers import Cr0, Cr4
from kvm_mmu_lit.mmu.cpu_role import MODES
from kvm_mmu_lit.mmu.guest_tables import guest_tables
from kvm_mmu_lit.mmu.invlpg import example_shadow, invalidate_gva, pte_prefetch
from kvm_mmu_lit.mmu.direct_fault import direct_page_fault
from kvm_mmu_lit.mmu.fast_page_fault import fast_page_fault
from kvm_mmu_lit.mmu.page_fault import F, P, U, W, Fault, last_entry
from kvm_mmu_lit.mmu.reload import enter_guest
from kvm_mmu_lit.mmu.rmap import host_frame, rmap_entries
from kvm_mmu_lit.mmu.root_role import svm_host, vmx_host
from kvm_mmu_lit.mmu.roots import new_vcpu
from kvm_mmu_lit.mmu.shadow_fault import page_fault
from kvm_mmu_lit.mmu.shadow_page import Vm
from kvm_mmu_lit.mmu.spte import (SPTE_ADDRESS, SPTE_WRITABLE, is_access_track, is_mmu_writable, is_present,
                                  mark_access_track)
from kvm_mmu_lit.mmu.unsync import try_to_unsync
from kvm_mmu_lit.mmu.zap import zap_entry

PAGE, TABLE = 0x40_0000, 0x5000                  # The address that is used; the guest's last table in `example_shadow`
MEMORY, HOLE = 0x100, 0x5_0000                   # Frames with memory from the first on, frames without from the second
NX = 1 << 63


def may_be_made(gpte):
    "The guest's entry is present, used, and names a frame with memory."
    return gpte & 0x21 == 0x21 and (gpte & SPTE_ADDRESS) >> 12 < HOLE


def rights(gpte):
    "(write, user, execute) that a last entry gives while it is what it is; a clean one gives no write."
    return bool(gpte & 0x42 == 0x42), bool(gpte & 4), not gpte & NX


@st.composite
def gptes(draw):
    "Last entries of a guest: any flags, half of them fit to be used."
    flags = draw(st.sampled_from((0x67, 0x65, 0x27, 0x07, 0x63, 0x66, 0)) | st.integers(0, 127)) & ~0x18
    return draw(st.sampled_from((MEMORY, HOLE))) + draw(st.integers(0, 15)) << 12 | flags | NX * draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(st.lists(gptes(), min_size=8, max_size=8), st.integers(0, 7), st.sets(st.integers(0, 7)))
def test_a_prefetch_maps_the_group_up_to_the_first_that_cannot_be(entries, at, filled):
    vcpu, sp = example_shadow()
    vm = vcpu.vm
    vm.prefetch = True
    for index in (0, 1): zap_entry(vm, sp, index)
    for index, gpte in enumerate(entries): write_entry(vm.memory, TABLE + 8 * index, 8, gpte)
    for index in filled: sp.sptes[index] = 1 << 11                # Present, and not to be touched
    want = dict.fromkeys(filled, None)
    for index, gpte in enumerate(entries):
        if index == at or index in filled: continue
        if not may_be_made(gpte): break
        want[index] = rights(gpte)
    pte_prefetch(vcpu, guest_tables(vcpu, vcpu.mmu), sp, at)
    assert {index for index, spte in sp.sptes.items() if is_present(spte)} == set(want)
    for index, granted in want.items():
        spte = sp.sptes[index]
        if granted is None: assert spte == 1 << 11
        else: assert (bool(spte & 2), bool(spte & 4), not spte & NX) == granted and not spte & vm.masks.accessed


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 31), gptes(), max_size=12), st.sets(st.integers(0, 31), max_size=12),
       st.booleans())
def test_after_invlpg_an_entry_says_what_the_guests_says_and_others_are_untouched(edits, addresses, stale):
    vcpu, sp = example_shadow()
    vm = vcpu.vm
    if stale: try_to_unsync(vm, TABLE >> 12, True, False)
    for index, gpte in edits.items(): write_entry(vm.memory, TABLE + 8 * index, 8, gpte)
    before = dict(sp.sptes)
    for index in addresses: invalidate_gva(vcpu, vcpu.mmu, PAGE + (index << 12))
    for index in range(32):
        spte, gpte = sp.sptes.get(index, 0), edits.get(index)
        if not stale or index not in addresses: assert spte == before.get(index, 0)
        elif gpte is None: assert is_present(spte) == (index in before)
        else:
            assert is_present(spte) == may_be_made(gpte)
            if is_present(spte):
                gfn = (gpte & SPTE_ADDRESS) >> 12
                assert spte & SPTE_ADDRESS == host_frame(vm, gfn)[0] << 12 and rmap_entries(vm, gfn, 1)
                assert (bool(spte & 2), bool(spte & 4), not spte & NX) == rights(gpte)
    assert bool(sp.unsync) == stale


HOSTS = (svm_host(4), svm_host(4, tdp_mmu=False), vmx_host(4, 4), vmx_host(4, 4, ad=False))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(HOSTS), st.sampled_from(('111', '110', '100', '000')), st.booleans(),
       st.sampled_from((U, U | W, U | F, W, F, 0)), st.booleans())
def test_a_fast_fault_gives_back_what_was_put_aside_and_nothing_else(host, state, tracked, asked, present):
    vm = Vm(host, ram((0, 1 << 22)), prefetch=False)
    vcpu = new_vcpu(vm, **dict(zip(('cr0', 'cr4', 'efer'), map(int, MODES['4-level']))))
    enter_guest(vcpu)
    direct_page_fault(vcpu, Fault(0x10_0000, U | W, is_tdp=True))
    sp, index, spte = last_entry(vcpu, 0x10_0000)
    for digit, bit in zip(state, (vm.masks.host_writable, vm.masks.mmu_writable, SPTE_WRITABLE)):
        if digit == '0': spte &= ~bit
    old = sp.sptes[index] = mark_access_track(vm.masks, spte) if tracked else spte
    answer = fast_page_fault(vcpu, Fault(0x10_0000, asked | P * present, is_tdp=True))
    new = sp.sptes[index]
    assert (answer == 'FIXED') == (new != old) and new & SPTE_ADDRESS == old & SPTE_ADDRESS
    gained = new & ~old & 7
    assert not gained & SPTE_WRITABLE or asked & W and is_mmu_writable(vm.masks, old)
    assert not gained & 5 or is_access_track(vm.masks, old)
    if answer != 'INVALID' and asked & W: assert new & SPTE_WRITABLE


@settings(max_examples=120, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=4, max_size=4), st.booleans(), st.booleans(),
       st.lists(st.sampled_from((0, W, F, U, U | W, U | F)), min_size=1, max_size=5))
def test_an_access_goes_through_after_one_fault_exactly_if_the_guest_allows_it(levels, wp, smep, accesses):
    memory, (cr0, cr4, efer) = ram((0, 1 << 22)), map(int, MODES['4-level'])
    map_page(memory, 0x1000, FORMATS['4level'], PAGE, 0x10_0000, [2, 3, 5], 7, 7)
    for bits, gpa, to in zip(levels, (0x1000, 0x2000, 0x3010, 0x5000), (0x2000, 0x3000, 0x5000, 0x10_0000)):
        write_entry(memory, gpa, 8, to | bits & 7 | NX * (bits >> 3))
    cr0, cr4 = cr0 & ~int(Cr0.WP) | int(Cr0.WP) * wp, cr4 | int(Cr4.SMEP) * smep
    vcpu = new_vcpu(Vm(svm_host(4, npt=False), memory, prefetch=False), cr0=cr0, cr3=0x1000, cr4=cr4, efer=efer)
    enter_guest(vcpu)
    together = levels[0] & levels[1] & levels[2] & levels[3]
    exists, write, user, no_exec = together & 1, together & 2, together & 4, any(bits & 8 for bits in levels)
    for code in accesses:
        allowed = (exists and (user or not code & U)
                   and (not code & F or not no_exec and not (smep and user and not code & U)))
        allowed = allowed and (not code & W or write or not wp and not code & U)
        vcpu.injected, old = None, last_entry(vcpu, PAGE)[2]
        page_fault(vcpu, PAGE, code | P * is_present(old))
        spte = last_entry(vcpu, PAGE)[2]
        assert (vcpu.injected is None) == bool(allowed)
        if allowed:
            assert (is_present(spte) and (not code & W or spte & 2) and (not code & U or spte & 4)
                    and (not code & F or not spte & NX))
        if is_present(spte): assert not spte & 6 == 6 or write and user  # The user never writes what the guest refuses
