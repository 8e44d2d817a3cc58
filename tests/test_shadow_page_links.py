"""Links of shadow pages: whatever is linked, unlinked, let go of, synced and zapped, both sides of every account
agree."""
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.memory import ram, write_entry
from kvm_mmu_lit.mmu.contexts import Vcpu, init_mmu
from kvm_mmu_lit.mmu.cpu_role import MODES
from kvm_mmu_lit.mmu.guest_tables import read_gpte
from kvm_mmu_lit.mmu.page_fault import link
from kvm_mmu_lit.mmu.rmap import drop_spte, entry_at, host_frame, page_gfn, rmap_add, rmap_entries, sptep_of
from kvm_mmu_lit.mmu.root_role import svm_host
from kvm_mmu_lit.mmu.shadow_page import Vm, is_obsolete_sp
from kvm_mmu_lit.mmu.spte import SPTE_ADDRESS, is_last, is_present, is_writable, spte_pfn
from kvm_mmu_lit.mmu.sync import build_leaf, example_table, get_shadow_page, pte_write, sync_children, sync_page
from kvm_mmu_lit.mmu.unsync import try_to_unsync, unsync_walk
from kvm_mmu_lit.mmu.zap import change_limit, commit_zap, prepare_zap, unprotect_gfn, zap_all_fast, zap_entry, zap_page

# (level, frame); 0x12 is a table of two levels
TABLES = [(3, 0x20), (3, 0x21), (2, 0x12), (2, 0x22), (1, 0x10), (1, 0x11), (1, 0x12)]
PAIRS = [(upper, lower) for upper, (high, _) in enumerate(TABLES) for lower, (low, _) in enumerate(TABLES)
         if high == low + 1]
tables, lowest, slots, frames = (st.integers(0, len(TABLES) - 1), st.integers(4, 6), st.integers(0, 2),
                                 st.integers(0x40, 0x42))
links = st.tuples(st.just('link'), st.sampled_from(PAIRS), slots)
steps = st.lists(st.one_of(
    links, links, links, links, st.tuples(st.just('map'), lowest, slots, frames), st.tuples(st.just('let go'), lowest),
    st.tuples(st.just('let go'), lowest),
    st.tuples(st.just('hold'), tables), st.tuples(st.just('put'), tables), st.tuples(st.just('drop'), tables, slots),
    st.tuples(st.just('zap'), tables),
    st.tuples(st.just('zap frame'), tables), st.tuples(st.just('sync'), tables),
    st.tuples(st.just('limit'), st.integers(0, 9)), st.tuples(st.just('zap all'))), max_size=40)


class Tables:
    "A guest in 4-level paging whose shadow pages are driven one step at a time."

    def __init__(self):
        self.vcpu = vcpu = Vcpu(Vm(svm_host(4, npt=False), ram((0, 1 << 20))))
        self.vm = vcpu.vm
        self.vm.vcpus.append(vcpu)
        vcpu.cr0, vcpu.cr4, vcpu.efer = map(int, MODES['4-level'])
        init_mmu(vcpu)

    def get(self, n):
        level, gfn = TABLES[n]
        return get_shadow_page(self.vcpu, gfn, replace(self.vcpu.mmu.root_role, level=level))

    def step(self, what, *args):
        vm = self.vm
        if what == 'link':
            (upper, lower), slot = args
            upper, lower = self.get(upper), self.get(lower)
            if upper.hashed: link(vm, upper, slot, lower)      # Looking for the lower one may have zapped it
        elif what == 'map':
            sp, slot, gfn = self.get(args[0]), *args[1:]
            drop_spte(vm, sp, slot)
            sp.sptes[slot], _ = build_leaf(vm, sp, slot, 7, gfn, host_frame(vm, gfn)[0], False, True, True)
            rmap_add(vm, sp, slot, gfn, 7)
        elif what == 'let go': try_to_unsync(vm, TABLES[args[0]][1], True, False)
        elif what == 'hold': self.get(args[0]).root_count += 1
        elif what == 'put':
            held = [sp for sp in vm.pages.values() if sp.root_count]
            if not held: return
            sp = held[args[0] % len(held)]
            sp.root_count -= 1
            if not sp.root_count and sp.role.invalid: zap_page(vm, sp)
        elif what == 'drop':
            sp, zapped = self.get(args[0]), []
            zap_entry(vm, sp, args[1], zapped)
            commit_zap(vm, zapped)
        elif what == 'zap': zap_page(vm, self.get(args[0]))
        elif what == 'zap frame': unprotect_gfn(vm, TABLES[args[0]][1])
        elif what == 'sync': sync_children(self.vcpu, self.get(args[0]))
        elif what == 'limit':
            change_limit(vm, args[0])
            vm.n_max = None
        elif what == 'zap all': zap_all_fast(vm)


def below(vm, sp) -> dict:
    "{slot: table}, from the entries alone."
    return {index: vm.pages[spte & SPTE_ADDRESS] for index, spte in sp.sptes.items() if is_present(spte)
            and not is_last(spte, sp.role.level)}


def stale_below(vm, sp) -> set:
    if sp.unsync: return {sp.spt}
    return set().union(*(stale_below(vm, child) for child in below(vm, sp).values()))


def history(events):
    machine = Tables()
    for event in events:
        machine.step(*event)
        yield machine.vm


@settings(max_examples=60)
@given(steps)
def test_parents_are_the_entries_that_lead_here_and_lists_the_leaves_that_map_there(events):
    for vm in history(events):
        links, leaves = Counter(), Counter()
        for sp in vm.pages.values():
            for index, spte in sp.sptes.items():
                if is_last(spte, sp.role.level): leaves[page_gfn(sp, index), sptep_of(sp, index)] += 1
                else: links[spte & SPTE_ADDRESS, sptep_of(sp, index)] += 1
        assert links == Counter((sp.spt, sptep) for sp in vm.pages.values() for sptep in sp.parents)
        assert leaves == Counter((gfn, sptep) for gfn in range(0x100) for sptep in rmap_entries(vm, gfn, 1))
        assert {spt for spt, _ in links} <= set(vm.pages)


@settings(max_examples=60)
@given(steps)
def test_marks_lead_to_every_stale_table_and_a_walk_finds_those_a_search_finds(events):
    for vm in history(events):
        for sp in vm.pages.values():
            assert sp.unsync_children == len(sp.unsync_slots)
            assert {index for index, child in below(vm, sp).items() if stale_below(vm, child)} <= sp.unsync_slots
            if sp.unsync: assert sp.role.level == 1 and sp.has_gptes and sp.hashed
    if not events: return
    for sp in list(vm.pages.values()):
        if sp.role.level > 1: assert {child.spt for child, _ in unsync_walk(vm, sp)} == stale_below(vm, sp)
    for sp in vm.pages.values():        # The walks have taken away every mark that led nowhere
        assert sp.unsync_slots == {index for index, child in below(vm, sp).items() if stale_below(vm, child)}


@settings(max_examples=60)
@given(steps)
def test_frames_of_tables_are_watched_and_no_frame_of_a_table_in_sync_is_writable(events):
    for vm in history(events):
        living = [sp for sp in vm.pages.values() if sp.hashed]
        assert vm.tracked == Counter(sp.gfn for sp in living if sp.role.level > 1) and vm.indirect == len(living)
        assert {gfn for _, gfn in vm.no_large} == ({0} if living else set())
        assert vm.n_used == len(vm.pages) and all(sp.root_count and sp.role.invalid for sp in vm.pages.values()
                                                  if not sp.hashed)
        assert [sp for bucket in vm.buckets.values() for sp in bucket if is_obsolete_sp(vm, sp)] == []
        writable = {page_gfn(*entry_at(vm, sptep)) for gfn in range(0x100) for sptep in rmap_entries(vm, gfn, 1)
                    if is_writable(entry_at(vm, sptep)[0].sptes[entry_at(vm, sptep)[1]])}
        assert not writable & {sp.gfn for sp in living if not sp.unsync}


@settings(max_examples=60)
@given(steps, tables)
def test_a_zap_leaves_nothing_of_the_table_until_the_commit_and_not_even_its_page_after(events, which):
    for vm in history(events): pass
    if not events or not vm.pages: return
    sp = list(vm.pages.values())[which % len(vm.pages)]
    if sp.role.invalid: return
    flushes, zapped, children = vm.flushes, [], set(below(vm, sp))
    count = prepare_zap(vm, sp, zapped)
    assert count == len(zapped) and (sp in zapped) == (not sp.root_count) and flushes == vm.flushes
    assert (not (sp.sptes or sp.parents or sp.translation or sp.unsync_children)
            and not any(sp in bucket for bucket in vm.buckets.values()))
    assert (all(one.role.invalid and one.spt in vm.pages for one in zapped)
            and len(zapped) <= 1 + 3 * max(1, len(children)))
    commit_zap(vm, list(zapped))
    assert vm.flushes == flushes + bool(zapped) and not any(one.spt in vm.pages for one in zapped)
    assert not any(sptep & SPTE_ADDRESS == sp.spt for other in vm.pages.values() for sptep in other.parents)


gptes = st.builds(lambda frame, bits, nx: frame << 12 | bits | nx << 63, frames,
                  st.sampled_from([low | a | d for low in range(8) for a in (0, 0x20) for d in (0, 0x40)]),
                  st.integers(0, 1))
first = st.lists(st.builds(lambda frame, w: frame << 12 | 0x65 | w, frames, st.sampled_from((0, 2))), min_size=1,
                 max_size=6)
edits = st.lists(st.tuples(st.integers(3, 8), gptes), max_size=8)


def meaning(vm, sp) -> dict:
    "{slot: (host frame, writable, user, executable)} of what is shadowed."
    masks = vm.masks
    return {index: (spte_pfn(spte), is_writable(spte), bool(spte & masks.user), not spte & masks.nx)
            for index, spte in sp.sptes.items()}


def wanted(vm, gpte) -> 'tuple | None':
    """What the guest's entry allows a shadow to allow, from the manual: P and A, W only with D, U, and XD for no
    execution."""
    if not gpte & 1 or not gpte & 0x20: return None
    return host_frame(vm, (gpte & SPTE_ADDRESS) >> 12)[0], gpte & 0x42 == 0x42, bool(gpte & 4), not gpte >> 63


@settings(max_examples=120)
@given(first, edits)
def test_a_store_that_is_seen_and_a_sync_of_the_same_edits_leave_what_the_guest_says(before, changes):
    (seen, by_store), (unseen, by_sync) = example_table(*before), example_table(*before)
    filled = set(by_store.sptes)
    assert not try_to_unsync(unseen.vm, 0x11, True, False) and by_sync.unsync
    for index, gpte in changes:
        for vcpu in (seen, unseen): write_entry(vcpu.vm.memory, 0x1_1000 + 8 * index, 8, gpte)
        pte_write(seen, 0x1_1000 + 8 * index, 8)
    sync_page(unseen, by_sync)
    for vcpu, sp in ((seen, by_store), (unseen, by_sync)):
        for index, shadow in meaning(vcpu.vm, sp).items():
            assert shadow == wanted(vcpu.vm, read_gpte(vcpu.vm, sp, index)), (index, changes)
    assert set(by_store.sptes) == filled - {index for index, _ in changes}
    frames_before = dict(enumerate((gpte >> 12 for gpte in before), 3))
    keeps = {index for index in filled if wanted(unseen.vm, gpte := read_gpte(unseen.vm, by_sync, index))
             and (gpte & SPTE_ADDRESS) >> 12 == frames_before[index]}
    assert set(by_sync.sptes) == keeps


@settings(max_examples=100)
@given(first, edits)
def test_a_second_sync_changes_nothing_and_asks_for_no_flush(before, changes):
    vcpu, sp = example_table(*before)
    for index, gpte in changes: write_entry(vcpu.vm.memory, 0x1_1000 + 8 * index, 8, gpte)
    sync_page(vcpu, sp)
    kept = dict(sp.sptes)
    assert sync_page(vcpu, sp) == 0 and sp.sptes == kept
