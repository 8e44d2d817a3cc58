"Whatever the host does, the guest's accesses go where they must, and the log forgets none of its writes."
import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.addresses import FORMATS
from kvm_mmu_lit.guest.gpte import map_page
from kvm_mmu_lit.guest.memory import ram, read_gpa, write_entry
from kvm_mmu_lit.mmu.cpu_role import MODES
from kvm_mmu_lit.mmu.hardware import WRITE, Reached
from kvm_mmu_lit.mmu.host_events import (
    add_slot, age, change_pte, delete_slot, entries_of, get_dirty_log, protect_range, set_limit, set_nx_huge_pages,
    split_huge_pages, start_dirty_log, stop_dirty_log, test_age as is_young, unmap_range)
from kvm_mmu_lit.mmu.nested_switch import L2State, enter_l2, eptp_of
from kvm_mmu_lit.mmu.reload import enter_guest
from kvm_mmu_lit.mmu.rmap import host_frame
from kvm_mmu_lit.mmu.root_role import svm_host, vmx_host
from kvm_mmu_lit.mmu.roots import new_vcpu
from kvm_mmu_lit.mmu.shadow_fault import page_fault
from kvm_mmu_lit.mmu.shadow_page import Vm
from kvm_mmu_lit.mmu.spte import is_last, is_mmio, is_present, is_writable, spte_pfn
from kvm_mmu_lit.mmu.tlb import Tlb, processor_access
from kvm_mmu_lit.mmu.vcpu import access

PAGE, FRAME, PAGES, SECOND = 0x40_0000, 0x200, 6, 0x500
HOSTS = {'shadow': svm_host(4, npt=False), 'npt': svm_host(4), 'ept': vmx_host(), 'old mmu': vmx_host(tdp_mmu=False),
         'ept without a/d': vmx_host(ad=False), 'old mmu without a/d': vmx_host(ad=False, tdp_mmu=False)}


def guest(host, host_level=1):
    memory, (cr0, cr4, efer) = ram((0, 1 << 22)), map(int, MODES['4-level'])
    tables = list(range(2, 30))
    for i in range(PAGES):
        map_page(memory, 0x1000, FORMATS['4level'], PAGE + 0x1000 * i, FRAME + i << 12, tables, 0x67, 0x27)
    vm = Vm(host, memory, prefetch=False, host_levels={0: host_level})
    for _ in range(2):
        vcpu = new_vcpu(vm, cr0=cr0, cr3=0x1000, cr4=cr4, efer=efer)
        vcpu.tlb = Tlb()
    return vm


def use(vcpu, i, kind):
    for _ in range(9):
        enter_guest(vcpu)
        found = processor_access(vcpu, PAGE + 0x1000 * i, kind)
        if isinstance(found, Reached): return found.hpa >> 12
        page_fault(vcpu, found.addr, found.error_code)
    raise AssertionError(f"page {i} is never reached: {found}")


def writable_leaves(vm, start, end):
    "Every leaf of every table that lets the guest write these frames, found without the lists."
    frames = {host_frame(vm, gfn)[0] for gfn in range(start, end) if vm.memory.slot(gfn)}
    found = []
    for sp in vm.pages.values():
        for spte in sp.sptes.values():
            if (not is_present(spte) or is_mmio(vm.masks, spte) or not is_last(spte, sp.role.level)
                    or not is_writable(spte)):
                continue
            first, size = spte_pfn(spte), 1 << 9 * (sp.role.level - 1)
            if any(first & -size <= pfn < (first & -size) + size for pfn in frames): found.append((sp, spte))
    return found


pages = st.integers(0, PAGES - 1)
acts = st.one_of(
    st.tuples(st.just('write'), st.integers(0, 1), pages, st.integers(0, 255)),
    st.tuples(st.just('write'), st.integers(0, 1), pages, st.integers(0, 255)),
    st.tuples(st.just('read'), st.integers(0, 1), pages),
    st.tuples(st.just('age'), pages), st.tuples(st.just('move'), pages, st.integers(1, 3)),
    st.tuples(st.just('merge'), pages),
    st.just(('get',)), st.just(('nx',)), st.just(('split',)), st.just(('restart',)), st.just(('limit',)))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(HOSTS)), st.integers(1, 2), st.lists(acts, max_size=30), st.booleans())
def test_a_copy_made_from_the_log_equals_the_memory(name, host_level, story, early):
    vm = guest(HOSTS[name], host_level)
    for i in range(PAGES): use(vm.vcpus[0], i, WRITE)
    if early: age(vm, 0, 0x400)
    start_dirty_log(vm, 0)
    copy = bytearray(read_gpa(vm.memory, 0, 1 << 22))

    def fetch():
        for gfn in get_dirty_log(vm, 0): copy[gfn << 12:gfn + 1 << 12] = read_gpa(vm.memory, gfn << 12, 4096)

    for what, *args in story:
        if what in ('read', 'write'):
            assert (use(vm.vcpus[args[0]], args[1], WRITE if what == 'write' else 0)
                    == host_frame(vm, FRAME + args[1])[0])
            if what == 'write': vm.memory.slot(0).page(FRAME + args[1])[7] = args[2]
        elif what == 'age': age(vm, FRAME + args[0], FRAME + args[0] + 2)
        elif what == 'move': unmap_range(vm, FRAME + args[0], FRAME + args[0] + args[1])
        elif what == 'merge': change_pte(vm, FRAME + args[0])
        elif what == 'get': fetch()
        elif what == 'nx': set_nx_huge_pages(vm, not vm.nx_huge_pages)
        elif what == 'split': split_huge_pages(vm, 0)
        elif what == 'limit': set_limit(vm, 64)
        else:      # The log ends and begins; what was written between is not told, so all is copied anew
            stop_dirty_log(vm, 0)
            start_dirty_log(vm, 0)
            copy[:] = read_gpa(vm.memory, 0, 1 << 22)
    fetch()
    assert copy == read_gpa(vm.memory, 0, 1 << 22)
    assert not get_dirty_log(vm, 0) and not writable_leaves(vm, 0, 0x400)


@pytest.mark.parametrize('name', sorted(HOSTS))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_processor_reaches_a_frame_the_host_took(name, data):
    vm = guest(HOSTS[name], data.draw(st.integers(1, 2)))
    for vcpu in vm.vcpus:
        for i in range(PAGES): use(vcpu, i, data.draw(st.sampled_from((0, WRITE))))
    start = data.draw(pages)
    end = data.draw(st.integers(start + 1, PAGES))
    seq, old = vm.mmu_seq, [host_frame(vm, FRAME + i)[0] for i in range(PAGES)]
    unmap_range(vm, FRAME + start, FRAME + end)
    assert vm.mmu_seq > seq and vm.invalidating is None
    new = [host_frame(vm, FRAME + i)[0] for i in range(PAGES)]
    assert [i for i in range(PAGES) if old[i] != new[i]] == list(range(start, end)) and len(set(new)) == PAGES
    for vcpu in vm.vcpus:
        assert [use(vcpu, i, 0) for i in range(PAGES)] == new


@pytest.mark.parametrize('name', sorted(HOSTS))
def test_a_young_page_is_one_used_since_it_was_aged(name):
    vm = guest(HOSTS[name])
    use(vm.vcpus[0], 1, 0)
    young = [is_young(vm, FRAME + i, FRAME + i + 1) for i in range(PAGES)]
    assert young == [False, True] + [False] * (PAGES - 2)
    assert (age(vm, FRAME, FRAME + PAGES) and not is_young(vm, FRAME, FRAME + PAGES)
            and not age(vm, FRAME, FRAME + PAGES))


@pytest.mark.parametrize('name', sorted(HOSTS))
def test_protecting_a_range_leaves_its_neighbours_writable(name):
    vm = guest(HOSTS[name])
    for i in range(PAGES): use(vm.vcpus[0], i, WRITE)
    protect_range(vm, FRAME + 1, FRAME + 3)
    assert not writable_leaves(vm, FRAME + 1, FRAME + 3)
    assert writable_leaves(vm, FRAME, FRAME + 1) and writable_leaves(vm, FRAME + 3, FRAME + 4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0x400, 0x440), st.integers(1, 8)), max_size=12))
def test_slots_come_and_go_like_disjoint_ranges(wanted):
    vm, held = guest(HOSTS['ept']), {}
    for base, npages in wanted:
        clash = [b for b, n in held.items() if base < b + n and b < base + npages]
        before = vm.generation
        if clash:
            with pytest.raises(ValueError, match='overlaps'): add_slot(vm, base << 12, npages << 12)
            assert vm.generation == before
            delete_slot(vm, clash[0])
            del held[clash[0]]
        else:
            add_slot(vm, base << 12, npages << 12)
            held[base] = npages
        assert vm.generation == before + 1
    assert {(s.base_gfn, s.npages) for s in vm.memory.slots} == {(0, 1024), *held.items()}
    assert all((vm.memory.words(8)[gfn] is not None) == any(b <= gfn < b + n for b, n in held.items())
               for gfn in range(0x400, 0x450))


def test_the_lists_are_read_the_same_way_whichever_is_shorter():
    vm = guest(HOSTS['shadow'])
    for i in range(PAGES): use(vm.vcpus[0], i, 0)
    wide = [(sp.spt, index) for sp, index in entries_of(vm, FRAME, 1 << 40)]
    narrow = [(sp.spt, index) for i in range(PAGES) for sp, index in entries_of(vm, FRAME + i, FRAME + i + 1)]
    assert len(narrow) == PAGES and wide == narrow


def levels(vm, gfn):
    "Sizes of the leaves that map a frame, whichever MMU made them."
    return {sp.role.level for sp in vm.pages.values() for spte in sp.sptes.values()
            if is_present(spte) and not is_mmio(vm.masks, spte) and is_last(spte, sp.role.level)
            and spte_pfn(spte) >> 9 * (sp.role.level - 1) == host_frame(vm, gfn)[0] >> 9 * (sp.role.level - 1)}


@pytest.mark.parametrize('name', sorted(set(HOSTS) - {'shadow'}))
def test_large_pages_return_when_the_log_ends(name):
    vm = guest(HOSTS[name], host_level=2)
    start_dirty_log(vm, 0)
    use(vm.vcpus[0], 0, WRITE)
    assert levels(vm, FRAME) == {1}
    stop_dirty_log(vm, 0)
    assert not levels(vm, FRAME)
    use(vm.vcpus[0], 0, WRITE)
    assert levels(vm, FRAME) == {2}


@pytest.mark.parametrize('name', sorted(HOSTS))
@pytest.mark.parametrize('kind', (0, WRITE))
def test_a_page_merged_out_of_a_large_one_is_reached_in_its_new_place(name, kind):
    vm = guest(HOSTS[name], host_level=2)
    vcpu = vm.vcpus[0]
    old = [use(vcpu, i, kind) for i in range(PAGES)]
    change_pte(vm, FRAME + 2)
    merged = host_frame(vm, FRAME + 2)[0]
    assert merged not in old and [use(vcpu, i, 0) for i in range(PAGES)] == [*old[:2], merged, *old[3:]]
    assert not writable_leaves(vm, FRAME + 2, FRAME + 3)


EPT, LARGE = 0x40000, 0x200000


def l2_guest(n_max=None):
    "L2 without paging; L1's EPT maps two large pages of L2 to one large page of L1's memory."
    vm = Vm(vmx_host(), ram((0, 1 << 22)), host_levels={0: 2}, prefetch=False, n_max=n_max)
    for table in (EPT, EPT + 0x1000): write_entry(vm.memory, table, 8, table + 0x1000 | 7)
    for index in (1, 2): write_entry(vm.memory, EPT + 0x2000 + 8 * index, 8, LARGE | 6 << 3 | 0x87)
    vcpu = new_vcpu(vm, **dict(zip(('cr0', 'cr4', 'efer'), MODES['nonpaging'])))
    assert enter_l2(vcpu, L2State(0, 0, 0, 0, nested_pgd=eptp_of(EPT, ad=False)))
    for page in (1, 2): assert access(vcpu, page * LARGE, WRITE, 7).what == 'done'
    assert [sp.role.level for sp, _ in entries_of(vm, 0x200, 0x400)] == [2, 2]
    return vcpu


def test_large_pages_of_l2_are_split_through_one_direct_table():
    vcpu = l2_guest()
    vm, where = vcpu.vm, [page * LARGE + offset for page in (1, 2) for offset in (0, 0x1008, 0x1f_f000)]
    before = [processor_access(vcpu, at, WRITE, mark=False).hpa for at in where]
    split_huge_pages(vm, 0)
    leaves = list(entries_of(vm, 0x200, 0x400))
    assert len(leaves) == 512 and {index for _, index in leaves} == set(range(512))
    child, = {sp.spt: sp for sp, _ in leaves}.values()
    assert (child.role.level, child.role.direct, child.role.guest_mode, child.gfn,
            len(child.parents)) == (1, 1, 1, 0x200, 2)
    assert [processor_access(vcpu, at, WRITE, mark=False).hpa for at in where] == before


def test_the_log_counts_writes_of_l2_in_small_pages_after_a_split():
    vcpu = l2_guest()
    vm = vcpu.vm
    split_huge_pages(vm, 0)
    start_dirty_log(vm, 0)
    assert not [gfn for gfn in get_dirty_log(vm, 0) if gfn >= 0x200]
    assert (access(vcpu, LARGE + 0x3000, WRITE, 9).what == 'done' and access(vcpu, 2 * LARGE + 0x5000, WRITE, 9).what
            == 'done')
    assert access(vcpu, LARGE + 0x4000, 0).what == 'done'
    assert {gfn for gfn in get_dirty_log(vm, 0) if gfn >= 0x200} == {0x203, 0x205}
    stop_dirty_log(vm, 0)
    assert access(vcpu, LARGE, WRITE, 9).what == 'done'
    assert 2 in {sp.role.level for sp, _ in entries_of(vm, 0x200, 0x400)}


def test_without_room_for_tables_nothing_of_l2_is_split():
    vcpu, told = l2_guest(), []
    vm = vcpu.vm
    vm.n_max, vm.watch = vm.n_used + 5, lambda did: told.append(did)
    split_huge_pages(vm, 0)
    assert [sp.role.level for sp, _ in entries_of(vm, 0x200, 0x400)] == [2, 2]
    assert -28 in [did['errno'] for did in told if did.what == 'kvm_mmu_split_huge_page']
