"""L1 gives L2 two EPTPs with one top table; a fault on one of them makes the other forget the address too."""
import pytest

from kvm_mmu_lit.guest.memory import write_gpa
from kvm_mmu_lit.mmu.cpu_role import MODES
from kvm_mmu_lit.mmu.invlpg import invalidate_same_ept
from kvm_mmu_lit.mmu.nested_switch import L2State, enter_l2, eptp_of, eptp_switch
from kvm_mmu_lit.mmu.page_fault import shadow_walk
from kvm_mmu_lit.mmu.root_role import vmx_host
from kvm_mmu_lit.mmu.roots import new_vcpu, small_memory
from kvm_mmu_lit.mmu.shadow_page import Vm
from kvm_mmu_lit.mmu.spte import is_present
from kvm_mmu_lit.mmu.unsync import try_to_unsync
from kvm_mmu_lit.mmu.vcpu import access

TOP, LEAVES, PAGE = 0x40000, 0x43000, 0x5000      # L1's EPT; the address that L2 reads


def entry(memory, table, index, value): write_gpa(memory, table + 8 * index, value.to_bytes(8, 'little'))


@pytest.fixture
def vcpu():
    "L2 has read one page on an EPTP, and again on another with the same top table."
    vm = Vm(vmx_host(4, 4), small_memory())
    for table in (TOP, TOP + 0x1000, TOP + 0x2000): entry(vm.memory, table, 0, table + 0x1000 | 7)
    entry(vm.memory, LEAVES, PAGE >> 12, 0x8000 | 6 << 3 | 7)
    one = new_vcpu(vm, **dict(zip(('cr0', 'cr4', 'efer'), MODES['nonpaging'])))
    assert enter_l2(one, L2State(0, 0, 0, 0, nested_pgd=eptp_of(TOP, ad=False)))
    for eptp in (eptp_of(TOP, ad=False), eptp_of(TOP)):
        eptp_switch(one, eptp)
        assert access(one, PAGE, 0).what == 'done'
    return one


def reach(vcpu, root):
    "Is the page mapped below this root?"
    *_, (level, sp, index) = shadow_walk(vcpu.vm, vcpu.mmu, PAGE, root)
    return level == 1 and is_present(sp.sptes.get(index, 0))


def other_root(vcpu):
    found, = [one.hpa for one in vcpu.mmu.prev_roots if one.valid and one.pgd >> 12 == TOP >> 12]
    return found


def test_both_roots_map_the_page(vcpu):
    assert reach(vcpu, vcpu.mmu.root.hpa) and reach(vcpu, other_root(vcpu))


def test_a_violation_on_one_eptp_makes_the_other_forget(vcpu):
    assert not try_to_unsync(vcpu.vm, LEAVES >> 12, True, False)
    entry(vcpu.vm.memory, LEAVES, PAGE >> 12, 0)
    other = other_root(vcpu)
    invalidate_same_ept(vcpu, PAGE)
    assert not reach(vcpu, other)


def test_another_table_is_another_address_space(vcpu):
    other = other_root(vcpu)
    assert not try_to_unsync(vcpu.vm, LEAVES >> 12, True, False)
    entry(vcpu.vm.memory, LEAVES, PAGE >> 12, 0)
    vcpu.nested_pgd = eptp_of(TOP + 0x4000)
    invalidate_same_ept(vcpu, PAGE)
    assert reach(vcpu, other)
