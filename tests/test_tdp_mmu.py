"""The TDP MMU: any history against a set of blocks, the events alone, and other vCPUs in the middle of every
exchange."""
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.mmu.contexts import KvmBug
from kvm_mmu_lit.mmu.cpu_role import PageRole
from kvm_mmu_lit.mmu.make_spte import make_mmio_spte, make_spte
from kvm_mmu_lit.mmu.root_role import svm_host, vmx_host
from kvm_mmu_lit.mmu.shadow_page import Vm
from kvm_mmu_lit.mmu.spte import (REMOVED_SPTE, ad_enabled, is_accessed, is_large, is_last, is_mmu_writable, is_present,
                                  is_writable, spte_pfn)
from kvm_mmu_lit.mmu.tdp_mmu import (TdpIter, remote_flush, tdp_get_root, tdp_iterate, tdp_leaf, tdp_map, tdp_put_root,
                                     tdp_roots, tdp_set_spte, tdp_set_spte_atomic)
from kvm_mmu_lit.mmu.tdp_ranges import (disallowed_hugepage_adjust, tdp_age_gfn_range, tdp_clear_dirty_pt_masked,
                                        tdp_clear_dirty_slot, tdp_invalidate_all_roots, tdp_set_spte_gfn,
                                        tdp_split_huge_pages, tdp_test_age, tdp_unmap_gfn_range, tdp_write_protect_gfn,
                                        tdp_wrprot_slot, tdp_zap_all, tdp_zap_collapsible, tdp_zap_invalidated_roots,
                                        tdp_zap_leafs, tdp_zap_root, tdp_zap_sp)

ROLE = PageRole(level=4, direct=1, access=7)
HOSTS = [svm_host(), vmx_host(), vmx_host(ad=False)]
SIZE = {level: 1 << 9 * (level - 1) for level in (1, 2, 3, 4)}
FRAMES = 2 << 18                                          # 2 GiB
gfns = st.one_of(st.sampled_from([0, 1, 511, 512, 513, 1023, 1 << 18, (1 << 18) - 1, (1 << 18) + 512]),
                 st.integers(0, FRAMES - 1))
spans = st.tuples(gfns, st.sampled_from([1, 2, 511, 512, 513, 1 << 18])).map(lambda s: (s[0], min(s[0] + s[1], FRAMES)))
levels = st.sampled_from([1, 1, 2, 2, 3])


class Lazy:
    "Enough of a memory for a slot of 2 GiB without its bytes."
    base_gfn, end_gfn = 0, FRAMES

    def slot(self, gfn): return self if gfn < FRAMES else None


def machine(host=HOSTS[0]) -> tuple:
    vm = Vm(host, Lazy())
    role = replace(ROLE, ad_disabled=int(not host.ad))
    return vm, tdp_get_root(vm, role)


def leaf_of(vm, pfn, writable=True):
    return lambda sp, old: make_spte(vm.masks, sp.role, 7, pfn & -SIZE[sp.role.level], old, host_writable=writable)


def fault(vm, root, gfn, level, offset, writable=True) -> str:
    return tdp_map(vm, root, gfn, (gfn & -SIZE[level]) + offset, level, leaf_of(vm, gfn + offset, writable))


class Blocks:
    """What should be mapped: {(level, first frame): [first host frame, writable, may become writable]}, no two of them
    overlapping."""

    def __init__(self): self.held = {}

    def over(self, start, end): return [key for key in self.held if key[1] < end and start < key[1] + SIZE[key[0]]]

    def drop(self, start, end):
        found = self.over(start, end)
        for key in found: del self.held[key]
        return bool(found)

    def map(self, gfn, level, offset, writable):
        first = gfn & -SIZE[level]
        if (level, first) not in self.held: self.drop(first, first + SIZE[level])
        self.held[level, first] = [first + offset, writable, writable]

    def split(self, start, end, target):
        for level in (3, 2):
            for key in self.over(start, end):
                if key[0] != level or level <= target: continue
                pfn, *rights = self.held.pop(key)
                for i in range(512):
                    self.held[level - 1, key[1] + i * SIZE[level - 1]] = [pfn + i * SIZE[level - 1], *rights]

    def protect(self, start, end, lowest, for_good=False):
        found = [key for key in self.over(start, end) if key[0] >= lowest]
        changed = False
        for key in found:
            pfn, writable, may = self.held[key]
            changed |= writable or (for_good and may)
            self.held[key] = [pfn, False, may and not for_good]
        return changed

    def collapse(self, start, end, host_level):
        for level in range(host_level, 1, -1):
            for first in range(start + -start % SIZE[level], end, SIZE[level]):
                for key in self.over(first, first + SIZE[level]):
                    if key[0] < level: del self.held[key]


def tree(vm, root) -> dict:
    """The leaves, by walking the dictionaries and not the iterator; and every table must be reached once, by the entry
    it names."""
    leaves, tables = {}, {root.spt}
    todo = [root]
    while todo:
        sp = todo.pop()
        for index, spte in sp.sptes.items():
            level, gfn = sp.role.level, sp.gfn + index * SIZE[sp.role.level]
            if not is_present(spte): continue
            if is_last(spte, level):
                assert is_large(spte) == (level > 1) and level < 4 and spte_pfn(spte) % SIZE[level] == 0
                leaves[level, gfn] = [spte_pfn(spte), is_writable(spte), is_mmu_writable(vm.masks, spte)]
                continue
            child = vm.pages[spte & 0xf_ffff_ffff_f000]
            assert (child.ptep == sp.spt + 8 * index and child.gfn == gfn
                    and child.role == replace(sp.role, level=level - 1))
            assert child.spt not in tables and child.tdp and not child.hashed and not child.root_count
            tables.add(child.spt)
            todo.append(child)
    assert tables == set(vm.pages)
    return leaves


steps = st.lists(st.one_of(
    st.tuples(st.just('map'), gfns, levels, st.booleans()), st.tuples(st.just('map'), gfns, levels, st.booleans()),
    st.tuples(st.just('zap'), spans), st.tuples(st.just('unmap'), spans), st.tuples(st.just('move')),
    st.tuples(st.just('split'), spans, st.sampled_from([1, 2]), st.booleans()),
    st.tuples(st.just('wrprot'), spans, levels),
    st.tuples(st.just('protect'), gfns, levels), st.tuples(st.just('collapse'), spans, st.sampled_from([1, 2, 3])),
    st.tuples(st.just('age'), spans), st.tuples(st.just('clean'), spans), st.tuples(st.just('invalidate')),
    st.tuples(st.just('readonly'), gfns)), max_size=12)


class Run:
    def __init__(self, host):
        self.vm, self.root = machine(host)
        self.blocks, self.offset, self.seen = Blocks(), 1 << 20, {}
        self.vm.watch = self.watch

    def watch(self, did):
        "Rebuild the tree from the events alone; a split tells the large page, and its 512 parts follow from it."
        if did.what == 'kvm_mmu_split_huge_page':
            level, size = did['level'] - 1, SIZE[did['level'] - 1]
            for i in range(512):
                spte = did['spte'] + i * size * 4096
                self.seen[level, did['gfn'] + i * size] = spte if level > 1 else spte & ~(1 << 7)
        if did.what != 'kvm_tdp_mmu_spte_changed': return
        facts = dict(did.facts)
        key = facts['level'], facts['gfn']
        assert self.seen.get(key, 0) in (facts['old_spte'],
                                         REMOVED_SPTE), "an event does not start where the one before it ended"
        self.seen[key] = facts['new_spte']

    def step(self, what, *args):
        vm, blocks = self.vm, self.blocks
        if what == 'map':
            gfn, level, writable = args
            key = level, gfn & -SIZE[level]
            held = blocks.held.get(key)
            if held and held[0] != key[1] + self.offset:
                tdp_unmap_gfn_range(vm, *self.span(key)), blocks.drop(*self.span(key))
            assert fault(vm, self.root, gfn, level, self.offset, writable) in ('FIXED', 'SPURIOUS')
            blocks.map(gfn, level, self.offset, writable)
        elif what == 'zap': assert tdp_zap_leafs(vm, *args[0]) == blocks.drop(*args[0])
        elif what == 'unmap': assert tdp_unmap_gfn_range(vm, *args[0]) == blocks.drop(*args[0])
        elif what == 'move': self.offset += 1 << 20
        elif what == 'split':
            tdp_split_huge_pages(vm, *args[0], args[1], args[2])
            blocks.split(*args[0], args[1])
        elif what == 'wrprot': assert tdp_wrprot_slot(vm, *args[0], args[1]) == blocks.protect(*args[0], args[1])
        elif what == 'protect':
            assert tdp_write_protect_gfn(vm, *args) == blocks.protect(args[0], args[0] + 1, args[1], True)
        elif what == 'collapse':
            vm.host_levels[0] = args[1]
            tdp_zap_collapsible(vm, *args[0])
            blocks.collapse(*args[0], args[1])
        elif what == 'age':
            young = tdp_test_age(vm, *args[0])
            assert young == tdp_age_gfn_range(vm, *args[0]) and not tdp_test_age(vm, *args[0])
            if not vm.host.ad: blocks.protect(*args[0], 1)         # Every right is taken away, W with them
        elif what == 'clean':
            changed = tdp_clear_dirty_slot(vm, *args[0])
            if not vm.host.ad: assert changed == blocks.protect(*args[0], 1)
        elif what == 'readonly':
            gfn, = args
            held = blocks.held.pop((1, gfn), None)
            assert tdp_set_spte_gfn(vm, gfn, 0x777, False) == (held is not None)
            if held: blocks.held[1, gfn] = [0x777, False, False]
        elif what == 'invalidate':
            old = self.root
            tdp_invalidate_all_roots(vm)
            self.root = tdp_get_root(vm, replace(old.role, invalid=0))
            assert self.root is not old and old.spt in vm.pages
            tdp_zap_invalidated_roots(vm)
            assert old.spt in vm.pages and not any(map(is_present, old.sptes.values()))
            tdp_put_root(vm, old)
            blocks.held.clear()

    def span(self, key): return key[1], key[1] + SIZE[key[0]]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(HOSTS), steps)
def test_after_any_history_the_tree_maps_what_a_set_of_blocks_says(host, history):
    run = Run(host)
    for event in history:
        run.step(*event)
        assert tree(run.vm, run.root) == run.blocks.held
    for (level, gfn), (pfn, _, _) in list(run.blocks.held.items())[:20]:
        sp, index, spte, found = tdp_leaf(run.vm, run.root, gfn + SIZE[level] - 1)
        assert (found, spte_pfn(spte)) == (level, pfn) and sp.sptes[index] == spte
    present = {key: spte for key, spte in run.seen.items() if is_present(spte)}
    entries = {(it.level, it.gfn): it.old_spte for it in tdp_iterate(run.vm, run.root, 0, FRAMES)
               if is_present(it.old_spte)}
    assert present == entries


@settings(max_examples=60, deadline=None)
@given(steps, spans, st.sampled_from([1, 2, 3]))
def test_the_iterator_meets_each_entry_over_a_range_once_parents_first(history, span, lowest):
    run = Run(HOSTS[0])
    for event in history[:5]: run.step(*event)
    def expected(sp):
        for index in range(512):
            gfn = sp.gfn + index * SIZE[sp.role.level]
            if gfn + SIZE[sp.role.level] <= span[0] or gfn >= span[1]: continue
            spte = sp.sptes.get(index, 0)
            yield sp.role.level, gfn, spte
            if is_present(spte) and not is_last(spte, sp.role.level) and sp.role.level > lowest:
                yield from expected(run.vm.pages[spte & 0xf_ffff_ffff_f000])
    assert ([(it.level, it.gfn, it.old_spte) for it in tdp_iterate(run.vm, run.root, *span, lowest)]
            == list(expected(run.root)))


others = st.one_of(st.tuples(st.just('map'), st.sampled_from([0, 1, 511, 512]), st.sampled_from([1, 2])),
                   st.just(('wrprot',)), st.just(('split',)),
                   st.just(('collapse',)), st.just(('clean',)), st.just(('zap roots',)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 512]), st.sampled_from([1, 2])), max_size=3),
       st.sampled_from([0, 1, 512]), st.sampled_from([1, 2]),
       st.dictionaries(st.integers(0, 5), others, max_size=3))
def test_a_fault_interrupted_at_any_exchange_retries_or_succeeds_and_leaves_a_tree(before, gfn, level, meanwhile):
    vm, root = machine()
    vm.host_levels[0] = 2
    for at, size in before: fault(vm, root, at, size, 1 << 20)
    count, busy = 0, False

    def interleave(name):
        nonlocal count, busy
        if busy: return
        busy, (what, *args) = True, meanwhile.get(count, ('nothing',))
        count += 1
        if what == 'map': fault(vm, root, *args, 1 << 20)
        if what == 'wrprot': tdp_wrprot_slot(vm, 0, 1024)
        if what == 'split': tdp_split_huge_pages(vm, 0, 1024)
        if what == 'collapse': tdp_zap_collapsible(vm, 0, 1024)
        if what == 'clean': tdp_clear_dirty_slot(vm, 0, 1024)
        if what == 'zap roots': tdp_zap_root(vm, root)
        busy = False
    vm.interleave = interleave
    tries = 1
    while (result := fault(vm, root, gfn, level, 1 << 20)) == 'RETRY':
        tree(vm, root)
        tries += 1
    assert result in ('FIXED', 'SPURIOUS') and tries <= 1 + len(meanwhile)
    assert tree(vm, root)[level, gfn & -SIZE[level]][0] == (gfn & -SIZE[level]) + (1 << 20)


def test_two_vcpus_fault_on_the_same_frame_and_one_table_is_built():
    vm, root = machine()
    inner = []

    def interleave(name):
        vm.interleave = None
        inner.append(fault(vm, root, 5, 1, 0x1000))
    vm.interleave = interleave
    assert fault(vm, root, 5, 1, 0x1000) == 'RETRY' and inner == ['FIXED']
    assert list(tree(vm, root)) == [(1, 5)] and len(vm.pages) == 4


def test_a_frozen_entry_makes_a_fault_retry_and_no_table_is_left_behind():
    vm, root = machine()
    fault(vm, root, 5, 1, 0x1000)
    sp, index, _, _ = tdp_leaf(vm, root, 5)
    sp.sptes[index] = REMOVED_SPTE
    assert fault(vm, root, 5, 1, 0x1000) == 'RETRY' and sp.sptes[index] == REMOVED_SPTE
    root.sptes[3] = REMOVED_SPTE
    tables = set(vm.pages)
    assert fault(vm, root, 3 << 27, 1, 0x1000) == 'RETRY' and set(vm.pages) == tables
    with pytest.raises(KvmBug, match="being taken away"): tdp_set_spte_atomic(vm, sp, index, REMOVED_SPTE, 0)


def test_mmio_is_remembered_and_emulated_and_a_protected_frame_is_emulated_only_for_writes():
    vm, root = machine()
    mmio, events = make_mmio_spte(vm.masks, 0, 7, 7), []
    vm.watch = lambda did: events.append(did.what)
    assert tdp_map(vm, root, 7, None, 1, None, mmio) == 'EMULATE' and tdp_leaf(vm, root, 7)[2] == mmio
    assert events[-1] == 'mark_mmio_spte' and 'kvm_mmu_set_spte' not in events
    assert tdp_map(vm, root, 7, None, 1, None, mmio) == 'EMULATE'
    for gfn, write, expected in ((8, True, 'EMULATE'), (9, False, 'FIXED')):
        make = lambda sp, old: make_spte(vm.masks, sp.role, 7, 0x1000 + gfn, old, protect=lambda: True)
        assert (tdp_map(vm, root, gfn, 0x1000 + gfn, 1, make, is_write=write) == expected
                and not is_writable(tdp_leaf(vm, root, gfn)[2]))


def test_a_large_page_over_a_table_flushes_and_a_table_under_a_large_page_flushes_too():
    vm, root = machine()
    fault(vm, root, 5, 1, 1 << 20)
    assert vm.flushes == 0 and fault(vm, root, 5, 2, 1 << 20) == 'FIXED' and vm.flushes == 1
    assert fault(vm, root, 5, 1, 1 << 20) == 'FIXED' and vm.flushes == 2 and list(tree(vm, root)) == [(1, 5)]


def test_the_dirty_log_notes_writable_pages_and_the_clearing_does_not_note_them_again():
    vm, root = machine(HOSTS[2])
    vm.logged.add(0)
    fault(vm, root, 5, 1, 0x1000)
    assert not vm.dirty  # A fault's own log entry is made where the entry is built
    sp, index, spte, _ = tdp_leaf(vm, root, 5)
    tdp_clear_dirty_pt_masked(vm, 0, 1 << 5, False)
    assert not is_writable(sp.sptes[index]) and not vm.dirty
    tdp_clear_dirty_pt_masked(vm, 0, 1 << 4, True)
    tdp_set_spte(vm, sp, index, spte)
    assert vm.dirty == {5}
    vm.dirty.clear()
    # Still writable: told once
    tdp_set_spte(vm, sp, index, spte & ~vm.masks.host_writable | vm.masks.host_writable | 1 << 59)
    assert not vm.dirty


def test_masks_clear_exactly_the_frames_named():
    vm, root = machine()
    for gfn in range(100): fault(vm, root, gfn, 1, 0x1000)
    mask = 0x8000_0000_0000_0a05
    tdp_clear_dirty_pt_masked(vm, 32, mask, False)
    clean = {gfn for gfn in range(100) if not tdp_leaf(vm, root, gfn)[2] & vm.masks.dirty}
    assert (clean == {32 + i for i in range(64) if mask >> i & 1}
            and all(is_writable(tdp_leaf(vm, root, gfn)[2]) for gfn in range(100)))
    tdp_clear_dirty_pt_masked(vm, 0, 1 << 9, True)
    assert [gfn for gfn in range(100) if not is_writable(tdp_leaf(vm, root, gfn)[2])] == [9]


def test_a_leaf_never_moves_in_place():
    vm, root = machine()
    fault(vm, root, 5, 1, 0x1000)
    sp, index, spte, _ = tdp_leaf(vm, root, 5)
    with pytest.raises(KvmBug, match="^57: frame 0x5 goes from host frame 0x1005 to 0x2005"):
        tdp_set_spte(vm, sp, index, spte + (0x1000 << 12))


def test_a_table_gives_way_to_a_page_or_to_nothing_and_never_to_another_table():
    vm, root = machine()
    fault(vm, root, 5, 1, 0x1000)
    with pytest.raises(KvmBug, match="gives way to another one"): tdp_set_spte(vm, root, 0, root.sptes[0] + 0x10_0000)


def test_a_table_made_for_execution_alone_is_marked_from_the_level_the_page_would_have_had():
    vm, root = machine()
    tdp_map(vm, root, 5, 0x1005, 1, leaf_of(vm, 0x1005), nx_huge_disallowed=True, req_level=2)
    assert {sp.role.level: sp.nx_huge for sp in vm.pages.values()} == {4: False, 3: False, 2: False, 1: True}
    fault(vm, root, 0x205, 1, 0x1000)
    assert not tdp_leaf(vm, root, 0x205)[0].nx_huge


@pytest.mark.parametrize('host', HOSTS)
def test_an_entry_that_leads_to_a_table_says_whether_there_are_a_and_d_bits(host):
    vm, root = machine(host)
    fault(vm, root, 5, 1, 0x1000)
    assert ad_enabled(root.sptes[0]) == host.ad == bool(root.sptes[0] & vm.masks.accessed)


def test_a_leaf_may_not_be_writable_without_the_leave_to_be():
    vm, root = machine()
    fault(vm, root, 5, 1, 0x1000, writable=False)
    sp, index, spte, _ = tdp_leaf(vm, root, 5)
    with pytest.raises(KvmBug, match="writable and not MMU-writable"): tdp_set_spte(vm, sp, index, spte | 2)


def test_a_table_that_begins_before_the_slot_stays():
    vm, root = machine()
    vm.host_levels[0] = 2
    fault(vm, root, 0x205, 1, 1 << 20)
    tdp_zap_collapsible(vm, 0x201, 0x400)
    assert list(tree(vm, root)) == [(1, 0x205)]
    tdp_zap_collapsible(vm, 0x200, 0x400)
    assert not tree(vm, root)


def test_roots_are_found_by_role_and_freed_by_the_last_reference_of_an_invalid_one():
    vm, root = machine()
    smm = tdp_get_root(vm, replace(ROLE, smm=1))
    assert tdp_get_root(vm, ROLE) is root and root.root_count == 2 and tdp_roots(vm) == [smm, root]
    tdp_put_root(vm, root), tdp_put_root(vm, root)
    assert root.spt in vm.pages and tdp_get_root(vm, ROLE) is root        # The MMU's own reference keeps it
    fault(vm, root, 5, 1, 0x1000)
    tdp_invalidate_all_roots(vm)
    assert tdp_roots(vm, valid_only=True) == [] and root.scheduled and smm.scheduled
    tdp_put_root(vm, smm)
    assert smm.spt in vm.pages  # Scheduled: the MMU's reference is not given up yet
    tdp_zap_invalidated_roots(vm)
    assert smm.spt not in vm.pages and set(vm.pages) == {root.spt} and not root.scheduled
    tdp_put_root(vm, root)
    assert not vm.pages
    with pytest.raises(KvmBug, match="nobody held it"): tdp_put_root(vm, root)


def test_an_invalid_root_that_still_maps_something_is_not_freed():
    vm, root = machine()
    fault(vm, root, 5, 1, 0x1000)
    root.role = replace(root.role, invalid=1)
    with pytest.raises(KvmBug, match="57: root .* still maps something"): tdp_put_root(vm, root)


def test_zapping_a_table_or_everything_leaves_nothing_behind():
    vm, root = machine()
    for gfn in (0, 600, 1 << 18): fault(vm, root, gfn, 1, 1 << 20)
    sp = tdp_leaf(vm, root, 600)[0]
    assert tdp_zap_sp(vm, sp) and list(tree(vm, root)) == [(1, 1 << 18), (1, 0)]
    with pytest.raises(KvmBug, match="is a root"): tdp_zap_sp(vm, root)
    tdp_zap_all(vm)
    assert tree(vm, root) == {} and set(vm.pages) == {root.spt}


def test_a_shared_removal_marks_every_entry_an_exclusive_one_only_what_maps_something():
    for shared in (True, False):
        vm, root = machine()
        fault(vm, root, 5, 1, 0x1000)
        sp, events = tdp_leaf(vm, root, 5)[0], []
        vm.watch = lambda did: events.append(did)
        tdp_zap_root(vm, root, shared)
        assert (set(vm.pages) == {root.spt}
                and [set(sp.sptes.values()), len(sp.sptes)] == [{REMOVED_SPTE}, 512 if shared else 1])
        changes = [did for did in events if did.what == 'kvm_tdp_mmu_spte_changed']
        assert len(changes) == (1 + 512 + 512 + 1 + 512 if shared else 1 + 1 + 1 + 1)
        assert [did.what for did in events].count('kvm_mmu_prepare_zap_page') == 3 and not vm.flushes


def test_a_walk_that_yielded_starts_over_and_still_reaches_the_rest():
    vm, root = machine()
    for gfn in (0, 600, 1 << 18): fault(vm, root, gfn, 1, 1 << 20)
    it, met = TdpIter(vm, root, 1, 0), []
    while it.valid and it.gfn < FRAMES:
        if is_present(it.old_spte) and is_last(it.old_spte, it.level):
            met.append(it.gfn)
            if it.gfn == 600:
                tdp_zap_sp(vm, it.sp)
                it.yielded = True
        it.next()
    assert met == [0, 600, 1 << 18]


@given(st.integers(0, FRAMES - 1), levels, levels, st.sampled_from(['absent', 'table', 'large']))
def test_a_large_page_gives_way_to_a_table_by_exactly_one_level(gfn, level, goal, what):
    vm, root = machine()
    spte = {'absent': 0, 'table': 0x1000 | 1 << 11, 'large': 0x4000_0000 | 1 << 11 | 1 << 7}[what]
    pfn, offset = (gfn & -SIZE[goal]) + (1 << 20), 1 << 20
    got = disallowed_hugepage_adjust(spte, level, goal, gfn, pfn)
    if what == 'table' and level == goal > 1: assert got == ((gfn & -SIZE[goal - 1]) + offset, goal - 1)
    else: assert got == (pfn, goal)


def test_a_remote_flush_asks_every_vcpu():
    class One:
        def __init__(self): self.requests = []

        def request(self, name): self.requests.append(name)
    vm, _ = machine()
    vm.vcpus = [One(), One()]
    remote_flush(vm)
    assert [vcpu.requests for vcpu in vm.vcpus] == [['TLB_FLUSH'], ['TLB_FLUSH']] and vm.flushes == 1


def test_aging_without_accessed_bits_puts_the_rights_aside_and_reports_the_write():
    vm, root = machine(HOSTS[2])
    fault(vm, root, 5, 1, 0x1000)
    told = []
    vm.watch = lambda did: told.append((did.what, dict(did.facts).get('pfn')))
    assert tdp_age_gfn_range(vm, 5, 6)
    spte = tdp_leaf(vm, root, 5)[2]
    assert not is_accessed(vm.masks, spte) and is_present(spte) and not spte & 7 and spte_pfn(spte) == 0x1005
    assert ('kvm_set_pfn_dirty', 0x1005) in told and not any(what == 'kvm_set_pfn_accessed' for what, _ in told)
