"""Entries KVM writes, of any frame on any machine: what goes in is read back, and no entry leaves the rules."""
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvm_mmu_lit.guest.addresses import EPT4, LONG4
from kvm_mmu_lit.guest.gpte import gpte_access, is_last_gpte, is_present_gpte
from kvm_mmu_lit.mmu import make_spte as M, spte as S
from kvm_mmu_lit.mmu.contexts import KvmBug
from kvm_mmu_lit.mmu.cpu_role import PageRole
from kvm_mmu_lit.mmu.root_role import svm_host, vmx_host

ENTRIES = st.integers(0, (1 << 64) - 1)


@st.composite
def machines(draw):
    "Masks of any machine, and whether its tables have A and D bits."
    bits = draw(st.integers(36, 52))
    base = S.base_masks(bits, draw(st.integers(36, 52)), draw(st.booleans()))
    kind = draw(st.sampled_from(('x86', 'encrypted', 'ept', 'ept without A/D')))
    if kind == 'x86': return base, True
    if kind == 'encrypted':
        me = draw(st.integers(36, 51))
        return S.with_me(S.svm_adjust_mmio_mask(S.base_masks(bits), me), 1 << me, 1 << me), True
    return S.ept_masks(base, kind == 'ept', draw(st.booleans())), kind == 'ept'


@st.composite
def leaves(draw, machine=machines()):
    "Arguments for a leaf no hardware would refuse."
    masks, has_ad = draw(machine)
    ad_disabled = not has_ad
    level = draw(st.integers(1, 3))
    step = 1 << 9 * (level - 1)
    pfn = draw(st.integers(0, (1 << masks.phys_bits - 13) - 1)) // step * step
    return dict(masks=masks, role=PageRole(level=level, ad_disabled=int(ad_disabled),
                                           guest_mode=draw(st.integers(0, 1))), access=draw(st.integers(4, 7)), pfn=pfn,
                prefetch=draw(st.booleans()), host_writable=draw(st.booleans()), protected=draw(st.booleans()),
                nx_huge=draw(st.booleans()), pml=draw(st.booleans()))


def make(leaf, **changed):
    "The entry, and whether it was write-protected."
    leaf = {**leaf, **changed}
    protected = leaf.pop('protected')
    return M.make_spte(protect=lambda: protected, **leaf)


@given(leaves())
def test_writable_needs_mmu_writable_needs_host_writable(leaf):
    masks, (spte, wrprot) = leaf['masks'], make(leaf)
    S.check_writable(masks, spte)
    assert S.writable_state(masks, spte) in ('000', '100', '110', '111')
    assert S.is_host_writable(masks, spte) == leaf['host_writable']
    assert wrprot == (leaf['protected'] and leaf['host_writable'] and bool(leaf['access'] & 2))
    assert not (wrprot and S.is_mmu_writable(masks, spte))


@given(leaves())
def test_the_processor_reads_what_was_granted(leaf):
    masks, (spte, wrprot) = leaf['masks'], make(leaf, prefetch=False)
    fmt, granted = EPT4 if masks.is_ept else LONG4, leaf['access']
    if wrprot or not leaf['host_writable']: granted &= ~2
    if leaf['role'].level > 1 and leaf['nx_huge']: granted &= ~1
    # Part I's reading, which knows no masks
    assert is_present_gpte(spte, fmt) and int(gpte_access(spte, fmt)) == granted
    assert is_last_gpte(spte, leaf['role'].level, fmt, True) and S.is_last(spte, leaf['role'].level)
    assert S.spte_pfn(spte & ~masks.me_mask) == leaf['pfn'] & ~(masks.me_mask >> 12)
    assert S.is_executable(masks, spte) == bool(granted & 1)


@given(leaves())
def test_an_entry_maps_something_and_is_neither_mmio_nor_removed(leaf):
    masks, (spte, _) = leaf['masks'], make(leaf)
    assert (S.is_present(spte) and spte != S.REMOVED_SPTE
            and M.decode_spte(masks, spte, leaf['role'].level)['kind'].startswith('page'))
    tracked = S.is_access_track(masks, spte)
    assert (tracked == (leaf['prefetch'] and bool(leaf['role'].ad_disabled))
            and S.is_accessed(masks, spte) == (not leaf['prefetch']))
    assert not S.is_mmio(masks, spte)


@given(leaves(), st.sampled_from(('NPT', 'EPT', 'shadow')))
def test_no_entry_has_a_bit_kvm_never_sets(leaf, kind):
    host, masks, root = {
        'NPT': (svm_host(me_value=1 << 45), S.masks_of(svm_host(me_value=1 << 45)), 'TDP'),
        'EPT': (vmx_host(), S.ept_masks(), 'TDP'), 'shadow': (svm_host(npt=False), S.base_masks(), 'shadow')}[kind]
    role = PageRole(level=4, direct=int(root == 'TDP'), efer_nx=1)
    check = M.reset_shadow_zero_check(host, role, root)
    here = PageRole(level=leaf['role'].level, guest_mode=leaf['role'].guest_mode)
    spte, _ = make(leaf, masks=masks, role=here, pfn=leaf['pfn'] & (1 << 32) - 1)
    assert not M.is_rsvd_spte(check, spte, here.level)
    # one bit more than a frame can have
    for bit in range(46, 52): assert M.is_rsvd_spte(check, spte | 1 << bit, here.level)


@given(leaves())
def test_a_second_make_over_a_writable_entry_asks_nobody(leaf):
    def never(): raise AssertionError("asked")
    leaf = {**leaf, 'access': leaf['access'] | 2, 'host_writable': True}
    first, _ = make(leaf, prefetch=False, protected=False)
    assert S.is_writable(first)
    arguments = {name: value for name, value in leaf.items() if name not in ('protected', 'prefetch')}
    again, wrprot = M.make_spte(**arguments, old_spte=first, protect=never)
    assert not wrprot and again | leaf['masks'].dirty == first | leaf['masks'].dirty and S.is_writable(again)


@given(leaves())
def test_tracking_takes_every_right_and_restoring_gives_all_but_write_back(leaf):
    masks, (spte, _) = leaf['masks'], make(leaf, prefetch=False)
    tracked = S.mark_access_track(masks, spte)
    assert S.mark_access_track(masks, tracked) == tracked and not S.is_accessed(masks, tracked)
    if S.ad_enabled(spte): assert tracked == spte & ~masks.accessed
    else:
        assert tracked & 7 == 0 and S.restore_access_track(masks, tracked) == spte & ~2
        assert S.writable_state(masks, tracked)[:2] == S.writable_state(masks, spte)[:2]


@given(leaves(), st.integers(0, (1 << 24) - 1))
def test_another_page_behind_the_frame_is_read_only_and_unused(leaf, pfn):
    masks, (spte, _) = leaf['masks'], make(leaf)
    changed = M.changed_pfn_spte(masks, spte, pfn)
    assert (S.spte_pfn(changed) == pfn and S.writable_state(masks, changed) == '000'
            and not S.is_accessed(masks, changed) and S.is_present(changed))


@given(leaves(), st.integers(0, 511), st.booleans())
def test_a_piece_of_a_large_page_maps_its_frame_and_grants_no_more(leaf, index, nx_huge):
    leaf['role'] = PageRole(level=2, ad_disabled=leaf['role'].ad_disabled)
    leaf['pfn'] &= ~511
    assume(not leaf['masks'].me_value)
    masks, (huge, _) = leaf['masks'], make(leaf)
    piece = M.split_spte(masks, huge, PageRole(level=1, access=7), index, nx_huge)
    assert (S.spte_pfn(piece) == leaf['pfn'] + index and not S.is_large(piece)
            and S.writable_state(masks, piece) == S.writable_state(masks, huge))
    if not nx_huge: assert piece ^ huge == S.SPTE_LARGE | index << 12
    else:
        assert (S.is_access_track(masks, piece) == S.is_access_track(masks, huge)
                and (S.is_access_track(masks, piece) or S.is_executable(masks, piece)))


@given(machines(), st.integers(0, (1 << 52) - 1))
def test_an_entry_for_a_table_restricts_nothing(machine, child):
    masks, has_ad = machine
    child &= (1 << masks.phys_bits) - 1                 # a table of KVM's lies in the memory the machine has
    spte = M.make_nonleaf_spte(masks, child & S.SPTE_ADDRESS, not has_ad)
    assert (int(gpte_access(spte, EPT4 if masks.is_ept else LONG4)) == 7
            and M.decode_spte(masks, spte, 2)['kind'] == 'table')
    assert S.spte_pfn(spte) << 12 == child & S.SPTE_ADDRESS | masks.me_value and S.ad_enabled(spte) == has_ad


@given(machines(), st.integers(0, (1 << 64) - 1), st.integers(0, 7), st.data())
def test_an_mmio_entry_gives_back_what_went_in(machine, gen, access, data):
    masks, _ = machine
    if not masks.mmio_value:
        with pytest.raises(KvmBug, match='caching is off'): M.make_mmio_spte(masks, gen, 0, access)
        return
    room = (masks.lower_gfn | masks.nonpresent_or_rsvd) >> 12
    gfn = data.draw(st.integers(0, (1 << min(room.bit_length(), masks.phys_bits - 12)) - 1))
    spte = M.make_mmio_spte(masks, gen, gfn, access)
    assert 0 <= spte < 1 << 64 and S.is_mmio(masks, spte) and not S.is_present(spte) and spte not in (0, S.REMOVED_SPTE)
    assert (M.mmio_gen(spte), M.mmio_gfn(masks, spte),
            M.mmio_access(masks, spte)) == (gen & 0x7ffff, gfn, access & masks.mmio_access)
    assert spte & masks.nonpresent_or_rsvd == masks.nonpresent_or_rsvd
    told = M.decode_spte(masks, spte)
    assert (told['kind'], told['gen'], told['gfn']) == ('MMIO', gen & 0x7ffff, gfn)


@given(machines(), ENTRIES, st.integers(1, 5))
def test_any_number_has_a_name_for_every_bit_and_a_kind(machine, spte, level):
    masks, _ = machine
    fields = S.spte_fields(masks, spte)
    assert (sum(field.value(spte) << field.low for field in fields) == spte
            and sum(f.high - f.low + 1 for f in fields) == 64)
    told = M.decode_spte(masks, spte, level)
    assert (told['kind'] == 'MMIO') == S.is_mmio(masks, spte)
    assert ((told['kind'] in ('table', 'page', 'page, access-tracked'))
            == (S.is_present(spte) and not S.is_mmio(masks, spte)))
    assert len(S.draw_spte(spte, masks=masks).fields) == len(fields)


@given(ENTRIES, st.booleans())
def test_the_state_check_refuses_exactly_the_four_impossible_states(spte, ept):
    masks = S.ept_masks() if ept else S.base_masks()
    host, mmu, write = (spte >> bit & 1 for bit in ((57, 58, 1) if ept else (9, 10, 1)))
    if write <= mmu <= host: S.check_writable(masks, spte)
    else:
        with pytest.raises(KvmBug): S.check_writable(masks, spte)


@pytest.mark.parametrize('facts, device', [
    (dict(), False), (dict(reserved=True), True), (dict(reserved=True, zero=True), False),
    (dict(reserved=True, uncached=False), False),
    (dict(has_page=False), True), (dict(has_page=False, ram=True), False),
    (dict(has_page=False, reserved=True, ram=True), False)])
def test_a_devices_frame_is_guessed_from_the_memory_map(facts, device): assert M.is_mmio_pfn(**facts) is device


def test_a_devices_frame_is_not_encrypted():
    masks, role = S.with_me(S.base_masks(), 1 << 45, 1 << 45), PageRole(level=1)
    memory, device = (M.make_spte(masks, role, 7, 0x1234, mmio_pfn=mmio)[0] for mmio in (False, True))
    assert memory ^ device == 1 << 45


@pytest.mark.parametrize('wrong, word', [(lambda: M.decode_spte(S.base_masks(), -1), '64 bits'),
                                         (lambda: M.decode_spte(S.base_masks(), 0, 0), '1..5'),
                                         (lambda: S.draw_spte(1 << 64), '64 bits'),
                                         (lambda: M.reset_shadow_zero_check(svm_host(), PageRole(level=4), 'plum'),
                                          'plum')])
def test_a_wrong_question_is_the_callers_mistake(wrong, word):
    with pytest.raises(ValueError, match=word): wrong()
