"""Stories about tables that went out of sync while nothing led to them: whoever is led there again must not see what
they held."""
from kvm_mmu_lit.guest.addresses import LONG4
from kvm_mmu_lit.guest.gpte import map_page
from kvm_mmu_lit.guest.memory import ram
from kvm_mmu_lit.guest.permissions import Pferr
from kvm_mmu_lit.mmu.machine import new_machine
from kvm_mmu_lit.mmu.root_role import svm_host
from kvm_mmu_lit.review.tables import broken_tables

PAGE, NEIGHBOUR, WINDOW = 0x400000, 0x401000, 0x80_0000_0000
ROOT, OTHERS, PDPT, PT = 0x1000, (0x10_000, 0x11_000, 0x12_000, 0x13_000, 0x14_000), 0x3000, 0x5000


def machine(prefetch=False):
    """Six address spaces: in the first two pages, in all of them a window on frames 0 to 15.

    What maps the pages is PDPT 3, PD 4, PT 5."""
    memory = ram((0, 0x400000))
    for root in (ROOT, *OTHERS):
        frames = ([PDPT >> 12, 4, PT >> 12, 6, 7, 8] if root == ROOT
                  else list(range((root >> 12) * 4, (root >> 12) * 4 + 3)))
        if root == ROOT:
            for gva, gpa in ((PAGE, 0x100_000), (NEIGHBOUR, 0x101_000)):
                map_page(memory, root, LONG4, gva, gpa, frames, 7, 7)
        for frame in range(16): map_page(memory, root, LONG4, WINDOW + (frame << 12), frame << 12, frames, 7, 7)
    one = new_machine(svm_host(4, npt=False), memory, prefetch=prefetch)
    act(one, 'set_cr3', value=ROOT)
    return one


def act(one, do, **more):
    "An event on the only vCPU; every invariant holds after it."
    answer = one.happen(dict(do=do, vcpu=0, **more))
    assert not broken_tables(one.vm)
    return answer


def store(one, gpa, value): assert act(one, 'write', at=WINDOW + gpa, value=value).what == 'done'


def reads(one, gva): return act(one, 'read', at=gva).gpa


def test_a_table_linked_again_does_not_show_what_it_held_when_the_link_was_cut():
    one = machine()
    assert (reads(one, PAGE), reads(one, NEIGHBOUR)) == (0x100_000, 0x101_000)
    store(one, PT, 0x102_007)              # The table goes out of sync,
    store(one, PDPT, 0)                    # nothing leads to it,
    act(one, 'set_cr3', value=ROOT)        # the guest flushes,
    store(one, PT + 8, 0x103_007)          # edits it once more
    store(one, PDPT, 0x4007)               # and links it again; nothing has to be flushed for that
    assert (reads(one, PAGE), reads(one, NEIGHBOUR)) == (0x102_000, 0x103_000)


def test_a_root_found_again_does_not_show_what_its_tables_held_when_it_was_left():
    one = machine()
    assert (reads(one, PAGE), reads(one, NEIGHBOUR)) == (0x100_000, 0x101_000)
    for root in OTHERS:                    # The last of them pushes the first root out of the cache
        act(one, 'set_cr3', value=root)
        reads(one, WINDOW)
    store(one, PT, 0x102_007)
    store(one, PT + 8, 0x103_007)
    act(one, 'set_cr3', value=ROOT)
    assert (reads(one, PAGE), reads(one, NEIGHBOUR)) == (0x102_000, 0x103_000)


def test_the_address_that_faulted_answers_from_the_guest_s_tables_after_the_fault():
    "The processor forgets an address whose access it refused, so the guest need not flush before it tries again."
    one = machine()
    store(one, PT, 0x100_005)              # The page is read-only,
    assert reads(one, PAGE) == 0x100_000
    store(one, PT, 0x102_005)              # then another one, read-only as well
    assert act(one, 'write', at=PAGE, value=1).fault.error_code & int(Pferr.PRESENT)
    assert reads(one, PAGE) == 0x102_000
