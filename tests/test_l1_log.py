"L1 logs what its L2 dirties: KVM sets the D bits in L1's EPT, so KVM writes L1's log, and a full one is an exit."
import random

import pytest

from kvm_mmu_lit.guest.addresses import FORMATS
from kvm_mmu_lit.guest.gpte import map_page
from kvm_mmu_lit.guest.memory import ram, read_gpa
from kvm_mmu_lit.mmu.cpu_role import MODES
from kvm_mmu_lit.mmu.invlpg import Injected
from kvm_mmu_lit.mmu.machine import new_machine
from kvm_mmu_lit.mmu.nested_switch import eptp_of
from kvm_mmu_lit.mmu.root_role import svm_host, vmx_host
from kvm_mmu_lit.review.tables import broken_tables

LOG, EPT, PAGES = 0x38_0000, 0x20_000, range(0x100, 0x108)
CR0, CR4, EFER = map(int, MODES['nonpaging'])


def machine(ad=True):
    "L1 in 4-level paging; its EPT maps eight pages for an L2 that does not page, all clean."
    memory = ram((0, 1 << 22))
    for gfn in PAGES: map_page(memory, EPT, FORMATS['ept4'], gfn << 12, gfn << 12, list(range(0x21, 0x30)), 0x6, 0x6)
    return new_machine(vmx_host(4, 4), memory), eptp_of(EPT, ad=ad)


def enter(it, eptp, **log):
    assert it.happen(dict(do='enter_l2', vcpu=0, cr0=CR0, cr3=0, cr4=CR4, efer=EFER, nested_pgd=eptp, **log))
def write(it, gfn): return it.happen(dict(do='write', vcpu=0, at=gfn << 12, value=gfn))
def slots(it):
    return [int.from_bytes(read_gpa(it.vm.memory, LOG + 8 * slot, 8), 'little') >> 12
            for slot in range(511, it.vcpus[0].pml_index, -1)]


def test_each_page_that_gets_dirty_is_logged_once():
    it, eptp = machine()
    enter(it, eptp, pml=LOG)
    for gfn in (0x103, 0x100, 0x103, 0x107):
        assert it.happen(dict(do='read', vcpu=0, at=gfn << 12)).what == 'done'
        assert write(it, gfn).what == 'done'
    assert slots(it) == [0x103, 0x100, 0x107]
    it.happen(dict(do='leave_l2', vcpu=0))
    assert it.vcpus[0].pml_address is None and it.vcpus[0].pml_index == 508


def test_a_full_log_is_an_exit_and_the_write_goes_through_when_l1_has_emptied_it():
    it, eptp = machine()
    enter(it, eptp, pml=LOG, pml_index=0)
    assert write(it, 0x100).what == 'done'
    told = write(it, 0x101)
    assert (told.what, told.fault) == ('exit to L1', Injected('L1', 'log full', 0, 0)) and not it.vcpus[0].guest_mode
    assert int.from_bytes(read_gpa(it.vm.memory, 0x101 << 12, 8), 'little') == 0, "the write has not happened"
    assert it.vcpus[0].pml_index == 0xffff
    enter(it, eptp, pml=LOG)
    assert write(it, 0x101).what == 'done' and slots(it) == [0x101]


@pytest.mark.parametrize('seed', range(12))
def test_an_l1_that_migrates_its_l2_loses_no_page(seed):
    rng, (it, eptp) = random.Random(seed), machine()
    told, wrote = set(), set()
    enter(it, eptp, pml=LOG, pml_index=(index := rng.randrange(0, 4)))

    def collect(index):
        told.update(int.from_bytes(read_gpa(it.vm.memory, LOG + 8 * slot, 8), 'little') >> 12
                    for slot in range(index, it.vcpus[0].pml_index if it.vcpus[0].pml_index < 512 else -1, -1))

    for _ in range(60):
        gfn = rng.choice(PAGES)
        answer = write(it, gfn)
        if answer.what == 'exit to L1':
            collect(index)
            enter(it, eptp, pml=LOG, pml_index=(index := rng.randrange(0, 4)))
            assert write(it, gfn).what == 'done'
        wrote.add(gfn)
        if rng.random() < .2: it.happen(dict(do='unmap', start=gfn, end=gfn + 1))
        assert broken_tables(it.vm) == []
    collect(index)
    assert told == wrote


def test_without_a_d_bits_there_is_nothing_to_log_and_no_vmcb_has_a_log():
    it, eptp = machine(ad=False)
    enter(it, eptp, pml=LOG)
    assert write(it, 0x100).what == 'done' and slots(it) == []
    with pytest.raises(ValueError, match='a VMCB has no log'):
        new_machine(svm_host(4)).happen(dict(do='enter_l2', vcpu=0, cr0=CR0, cr3=0, cr4=CR4, efer=EFER, nested_pgd=EPT,
                                             pml=LOG))
