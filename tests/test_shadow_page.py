"""Shadow pages: any sequence of lookups and zaps, and every address of a 2-level guest."""
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.memory import ram, write_gpa
from kvm_mmu_lit.mmu.contexts import KvmBug, Vcpu, init_mmu
from kvm_mmu_lit.mmu.cpu_role import MODES, PageRole, diff_roles, page_role
from kvm_mmu_lit.mmu.root_role import svm_host
from kvm_mmu_lit.mmu.shadow_page import (ShadowPage, Vm, add_shadow_page, child_role, draw_pages, is_obsolete_sp,
                                         page_hash, quadrant_path, request_all,
    shadow_slots, show_quadrants, to_shadow_page, why_missed)
from kvm_mmu_lit.mmu.sync import SYNC_IGNORES, find_shadow_page, get_shadow_page
from kvm_mmu_lit.mmu.zap import zap_all_fast, zap_page

ROLES = [page_role(word) for word in (0x3704, 0x3703, 0x3702, 0x3701, 0x1701, 0x2712, 0x2732, 0x2_3702, 0x1782)]
gfns, roles, addresses = st.integers(0, 3), st.sampled_from(ROLES), st.integers(0, (1 << 32) - 1)
steps = st.lists(st.one_of(st.tuples(st.just('get'), gfns, roles), st.tuples(st.just('hold'), gfns, roles),
                           st.tuples(st.just('unsync'), gfns, roles),
                           st.tuples(st.just('zap'), gfns, roles), st.tuples(st.just('zap all'))), max_size=30)


def machine(vcpus=1) -> Vm:
    vm = Vm(svm_host(npt=False), ram((0, 1 << 16)))
    for i in range(vcpus):
        vm.vcpus.append(Vcpu(vm, i))
        vm.vcpus[i].cr0, vm.vcpus[i].cr4, vm.vcpus[i].efer = MODES['PAE']
        init_mmu(vm.vcpus[i])
    return vm


def step(vm, what, *key):
    if what == 'zap all': return zap_all_fast(vm)
    sp = get_shadow_page(vm.vcpus[0], *key)
    if what == 'hold': sp.root_count += 1
    root = vm.vcpus[0].mmu.root_role.word        # Only tables of its own kind are synced by an MMU
    if what == 'unsync' and sp.role.level == 1 and not (sp.role.word ^ root) & ~SYNC_IGNORES and sp.has_gptes:
        sp.unsync = True
    if what == 'zap': zap_page(vm, sp)


@settings(max_examples=150)
@given(steps)
def test_after_any_history_a_key_finds_at_most_one_table_and_never_an_obsolete_one(history):
    vm = machine()
    for event in history:
        step(vm, *event)
        alive = [sp for sp in vm.pages.values() if not is_obsolete_sp(vm, sp)]
        keys = [(sp.gfn, sp.role) for sp in alive]
        assert len(set(keys)) == len(keys)
        listed = [sp for bucket in vm.buckets.values() for sp in bucket]
        assert sorted(sp.spt for sp in listed) == sorted(sp.spt for sp in alive) and all(sp.hashed for sp in listed)
        assert all(bucket and {sp.gfn for sp in bucket} == {gfn} for gfn, bucket in vm.buckets.items())
        assert all(sp.root_count and sp.role.invalid and not sp.hashed for sp in vm.pages.values()
                   if is_obsolete_sp(vm, sp))
        assert all(to_shadow_page(vm, sp.spt | 0x27) is sp and sp.spt == spt for spt, sp in vm.pages.items())


@settings(max_examples=100)
@given(steps, gfns, roles)
def test_why_missed_and_a_lookup_agree_after_any_history(history, gfn, role):
    vm = machine()
    for event in history: step(vm, *event)
    reasons, before = why_missed(vm, gfn, role), len(vm.pages)
    assert len(reasons) == max(1, sum(sp.gfn == gfn for sp in vm.pages.values()))
    hits = [reason for reason in reasons if reason.endswith(': found')]
    sp = find_shadow_page(vm.vcpus[0], gfn, role)
    assert len(hits) == (sp is not None) and (sp is None or (sp.gfn, sp.role) == (gfn, role))
    if sp is not None: assert get_shadow_page(vm.vcpus[0], gfn, role) is sp and not vm.vcpus[0].log[-1]['created']
    assert len(vm.pages) <= before and len(draw_pages(vm).rows) == len(vm.pages)


@given(steps, gfns, st.integers(2, 4))
def test_a_lookup_zaps_only_unsync_tables_of_its_frame(history, gfn, level):
    vm = machine()
    for event in history: step(vm, *event)
    before = {spt: (sp.gfn, sp.unsync) for spt, sp in vm.pages.items()}
    find_shadow_page(vm.vcpus[0], gfn, PageRole(level=level, access=3))
    for spt in set(before) - set(vm.pages): assert before[spt] == (gfn, True)
    for sp in vm.buckets.get(gfn, ()): assert not sp.unsync


@given(st.integers(0, (1 << 52) - 1))
def test_the_hash_is_the_top_of_the_product(gfn):
    assert page_hash(gfn) == gfn * 0x61C8864680B583EB % 2 ** 64 // 2 ** 52 < 4096


@given(addresses)
def test_an_address_uses_the_slots_that_shadow_its_entries(gva):
    path = quadrant_path(gva)
    assert ((path.directory, path.pd_slot) in shadow_slots(2, path.pde)
            and shadow_slots(1, path.pte) == ((path.half, path.pt_slot),))
    assert ((path.pde << 22 | path.pte << 12) == (path.directory << 30 | path.pd_slot << 21 | path.pt_slot << 12) == gva
            & ~0xfff)
    directory = page_role(0x3712 | path.directory << 5)
    assert child_role(directory, path.pd_slot, False, 7).quadrant == path.half
    taken = {(box.title, slot.index) for box in show_quadrants(gva).boxes for slot in box.rows if slot.state == 'taken'}
    assert taken == {('guest page directory', path.pde), ('guest page table', path.pte), ('pae_root', path.directory),
                     (f'level 2, quadrant {path.directory}', path.pd_slot),
                     (f'level 1, quadrant {path.half}', path.pt_slot)}


@given(st.sampled_from((1, 2)), st.integers(0, 1023), st.integers(0, 3))
def test_the_slots_of_an_entry_are_those_the_bytes_say(level, index, byte):
    # As one computes them from where the write lands: twice the offset, and twice again for a directory.
    at = (index * 4 + byte) * 2
    if level == 2: at = (at & ~7) * 2
    assert shadow_slots(level, index) == tuple((at >> 12, (at & 0xfff) // 8 + i) for i in range(level))


@given(st.sampled_from([role for role in ROLES if role.level > 1]), st.integers(0, 511), st.booleans(),
       st.integers(0, 7))
def test_a_child_inherits_all_but_five_fields(parent, index, direct, access):
    child = child_role(parent, index, direct, access)
    assert ({change.field for change in diff_roles(parent, child)}
            <= {'level', 'access', 'direct', 'passthrough', 'quadrant'})
    assert page_role(child.word) == child and (child.access, child.direct) == (access, direct)


def test_pages_made_for_one_vcpu_and_tdp_roots_are_no_lookups_business():
    vm = machine(2)
    own = add_shadow_page(vm, ShadowPage(1, ROLES[0], vm.alloc_page(), hashed=False, owner=(0, 'root_mmu')))
    tdp = add_shadow_page(vm, ShadowPage(1, ROLES[0], vm.alloc_page(), tdp=True, hashed=False))
    assert find_shadow_page(vm.vcpus[0], 1, ROLES[0]) is None and not vm.buckets and set(vm.pages) == {own.spt, tdp.spt}
    assert (['one vCPU alone' in line for line in why_missed(vm, 1, ROLES[0])] == [True, False]
            and 'TDP MMU' in why_missed(vm, 1, ROLES[0])[1])
    tdp.root_count = 1
    zap_all_fast(vm)
    assert (is_obsolete_sp(vm, tdp) and tdp.spt in vm.pages
            and all(vcpu.requests == {'MMU_FREE_OBSOLETE_ROOTS'} for vcpu in vm.vcpus))
    request_all(vm, 'MMU_SYNC')
    assert all('MMU_SYNC' in vcpu.requests for vcpu in vm.vcpus)


def test_direct_and_passthrough_tables_have_no_guest_entries():
    assert ([ShadowPage(1, page_role(word), 0x1000).has_gptes for word in (0x3704, 0x1782, 0x6_1705)]
            == [True, False, False])


def test_memory_says_what_is_visible_and_which_pdptes_are_there():
    vm = machine()
    write_gpa(vm.memory, 0x2020, b''.join(value.to_bytes(8, 'little') for value in (0x3001, 0x4001, 0, 1 << 51)))
    assert (vm.read_pdptes(0x2020) == vm.read_pdptes(0x203f) == (0x3001, 0x4001, 0, 1 << 51)
            and vm.read_pdptes(1 << 16) is None)
    assert vm.is_visible(0xf) and not vm.is_visible(0x10)


@pytest.mark.parametrize('wrong, error, said', [
    (lambda: quadrant_path(1 << 32), ValueError, '32-bit'), (lambda: quadrant_path('here'), ValueError, 'not a number'),
    (lambda: shadow_slots(3, 0), ValueError, 'levels 1 and 2'),
    (lambda: shadow_slots(2, 1024), ValueError, 'entry 1024'),
    (lambda: child_role(ROLES[0], -1, False, 7), ValueError, 'slot -1'),
    (lambda: child_role(ROLES[0], 0, False, 8), ValueError, 'access 8'),
    (lambda: child_role(replace(ROLES[0], invalid=1), 0, False, 7), KvmBug, 'zapped'),
    (lambda: child_role(ROLES[3], 0, False, 7), KvmBug, 'no children')])
def test_what_cannot_be_is_refused_with_the_reason(wrong, error, said):
    with pytest.raises(error, match=said): wrong()
