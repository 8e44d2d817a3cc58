"""Roles: any registers, any word, any host."""
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
import pytest
from hypothesis import given, strategies as st

from kvm_mmu_lit.guest.registers import Cr0, Cr4, Efer
from kvm_mmu_lit.mmu.contexts import (INVALID_PAGE, MODES, WHO, Did, KvmBug, Mmu, NullDereference, Root, Vcpu,
                                      draw_contexts, forget_roles, init_mmu,
    kvm_bug_on, vcpu_at, walker_of)
from kvm_mmu_lit.mmu.cpu_role import (COSTS, EXT_FIELDS, INPUTS, ROLE_FIELDS, CpuRole, PageRole, calc_cpu_role,
                                      cpu_role, diff_roles, draw_role,
    page_role, show_flip)
from kvm_mmu_lit.mmu.root_role import (Host, all_hosts, all_mmus, has_per_vcpu_root, mmu_table, root_storage,
                                       shadow_ept_roles, shadow_npt_roles,
    shadow_root_role, show_cases, show_mmus, show_root_moves, svm_host, tdp_level, tdp_root_role, vmx_host)

flags = st.booleans()
bases = st.builds(PageRole, **{name: st.integers(0, (1 << width) - 1) for name, _, width in ROLE_FIELDS})
states = st.tuples(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 16) - 1), flags,
                   flags)


def place(name) -> int:
    "The mask of a field, of 64 bits."
    shift, layout = (0, ROLE_FIELDS) if name in COSTS else (32, EXT_FIELDS)
    low, width = next((low, width) for field, low, width in layout if field == name)
    return (1 << width) - 1 << low + shift


@given(states)
def test_only_the_listed_inputs_count(state):
    kept = [0] * 5
    for register, bit in INPUTS.values(): kept[register] |= int(state[register]) & bit
    assert calc_cpu_role(*state) == calc_cpu_role(*kept)


@given(states)
def test_the_word_is_the_manuals_sum(state):
    cr0, cr4, efer, smm, guest_mode = state
    pg, wp, pae, la57, lma, nx = (cr0 >> 31 & 1, cr0 >> 16 & 1, cr4 >> 5 & 1, cr4 >> 12 & 1, efer >> 10 & 1,
                                  efer >> 11 & 1)
    smep, smap, pke, pse = cr4 >> 20 & 1, cr4 >> 21 & 1, cr4 >> 22 & 1, cr4 >> 4 & 1
    word = 7 << 8 | guest_mode << 17 | smm << 24 | 1 << 32
    if not pg: word |= 1 << 7
    else:
        word |= ((lma and 4 + la57 or 2 + pae) | (1 - pae) << 4 | nx << 12 | wp << 13 | (smep & ~wp) << 14
                 | (smap & ~wp) << 15)
        word |= (pse << 2 | (pke & lma) << 3 | smap << 4 | smep << 5 | (la57 & lma) << 6 | lma << 7) << 32
    assert calc_cpu_role(*state).word == word


@given(bases)
def test_a_role_word_decodes_to_its_role_or_says_why_not(role):
    try: assert page_role(role.word) == role
    except ValueError as why: assert f'{role.word:#x}' in str(why)


@given(st.integers(-1, 1 << 33))
def test_a_number_is_a_role_word_or_an_error(word):
    try: assert page_role(word).word == word
    except ValueError as why: assert 'role' in str(why)


@given(states)
def test_what_possible_registers_ask_for_decodes(state):
    cr0, cr4, efer, smm, guest_mode = state
    if efer & Efer.LMA: cr0, cr4 = cr0 | Cr0.PG, cr4 | Cr4.PAE
    role = calc_cpu_role(cr0, cr4, efer, smm, guest_mode)
    assert cpu_role(role.word) == role and page_role(role.base.word) == role.base


@given(states, states)
def test_a_difference_is_named_exactly_where_the_words_differ(one, other):
    one, other = calc_cpu_role(*one), calc_cpu_role(*other)
    named = [change.field for change in diff_roles(one, other)]
    assert (one.word ^ other.word) & ~sum(map(place, named)) == 0
    assert all((one.word ^ other.word) & place(name) for name in named)
    assert [change.field for change in diff_roles(one.base, other.base)] == [name for name in named if name in COSTS]


@given(bases)
def test_a_drawing_says_every_field(role):
    text = str(draw_role(role, ('level',)))
    assert all(f'{name} = {getattr(role, name)}' in text for name, _, _ in ROLE_FIELDS)


@pytest.mark.parametrize('wrong, said', [
    (lambda: page_role(1 << 32), '32-bit'), (lambda: page_role(-1), '32-bit'), (lambda: page_role(1 << 19), '23:19'),
    (lambda: page_role(0x2000704), 'address space 2'),
    (lambda: page_role(0x40704), 'passthrough'), (lambda: page_role(0x733), 'quadrant 1 at level 3'),
    (lambda: page_role(0x723), 'needs has_4_byte_gpte'),
    (lambda: cpu_role(1 << 64), '64 bits'), (lambda: cpu_role(1 << 40), '63:40'),
    (lambda: cpu_role(0x704), 'valid would be 1'),
    (lambda: cpu_role(1 << 32 | 0x701), 'level would be 2'),
    (lambda: diff_roles(PageRole(), CpuRole()), 'do not compare'),
    (lambda: Host(bits=16), '16 bits'), (lambda: Host(tdp='tdp'), "tdp='tdp'"),
    (lambda: Host(vendor='via'), "vendor='via'"), (lambda: Host(tdp='npt'), 'TDP of 0 levels'),
    (lambda: Host(levels=3), '3 levels on 64 bits'), (lambda: svm_host(maxphyaddr=53), '32..52'),
    (lambda: shadow_ept_roles(3, True, True), 'EPTP of 3 levels'),
    (lambda: show_root_moves('EPT'), 'shadow EPT'), (lambda: show_mmus('via'), 'vmx'),
    (lambda: show_mmus(levels=6), '6 levels'), (lambda: show_flip('6-level'), '2-level'),
    (lambda: show_flip(flip='CR8'), 'CR0.WP')])
def test_what_is_no_role_is_refused_with_the_reason(wrong, said):
    with pytest.raises(ValueError, match=said): wrong()


hosts = st.sampled_from(all_hosts())


@given(hosts, states, st.integers(32, 52), flags)
def test_a_tdp_root_depends_on_the_host_alone(host, state, width, ad):
    host = replace(host, maxphyaddr=width, ad=ad)
    if not host.has_tdp: return
    role = tdp_root_role(host, calc_cpu_role(*state))
    assert role == PageRole(tdp_level(host), direct=1, access=7, efer_nx=1, cr0_wp=1, ad_disabled=int(not ad),
                            guest_mode=state[4], smm=state[3])
    assert page_role(role.word) == role


@given(hosts, states)
def test_shadow_roots_are_roles_and_keep_what_keeps_tables_apart(host, state):
    asked = calc_cpu_role(*state)
    root = shadow_root_role(asked)
    assert {change.field for change in diff_roles(asked.base, root)} <= {'level', 'efer_nx'} and root.level >= 3
    if not host.has_tdp: return
    asked, nested = shadow_npt_roles(host, state[1], state[2], smm=state[3])
    assert ({change.field for change in diff_roles(asked.base, nested)} <= {'level', 'passthrough'}
            and nested.level == tdp_level(host))
    assert nested.cr0_wp == 0 and asked.base.level >= 2 and asked.ext.cr4_pke == 0


@pytest.mark.parametrize('m', all_mmus(reachable=False), ids=lambda m: f'{m.host}, {m.name}')
def test_a_row_of_the_table_holds_together(m):
    assert cpu_role(m.cpu_role.word) == m.cpu_role and page_role(m.root_role.word) == m.root_role
    assert m.storage == root_storage(m.cpu_role, m.root_role, m.host.uses_tdp_mmu)
    assert has_per_vcpu_root(m) == (m.case > 0) == (m.storage in ('pae_root', 'pml4_root', 'pml5_root'))


def test_hosts_differ_in_what_they_build():
    built = {host: frozenset((m.name, m.cpu_role, m.root_role, m.storage) for m in all_mmus() if m.host == host)
             for host in all_hosts()}
    assert len(built) == 14 and len({host.vendor for host in built}) == 2
    # Without TDP the vendor decides nothing; any other two machines build something different.
    alike = [one for one in built if any(built[one] == built[other] for other in built if other != one)]
    assert all(not host.has_tdp for host in alike)


@pytest.mark.parametrize('vendor, levels, tdp', [('svm', 4, True), ('svm', 5, False), ('svm', 3, True),
                                                 ('vmx', 3, True), ('vmx', 5, True), ('vmx', 4, False)])
def test_the_table_of_a_machine_has_its_rows(vendor, levels, tdp):
    host = svm_host(levels, tdp) if vendor == 'svm' else vmx_host(levels, max(levels, 4) * tdp)
    rows = show_mmus(vendor, levels, tdp, unreachable=True).rows
    mine = [m for m in all_mmus(reachable=False) if m.host == host]
    assert [(row[1], row[5]) for row in rows] == [(m.name, f'{m.root_role.word:#x}') for m in mine]
    assert [row[-1] for row in rows] == [m.unreachable or m.case or '' for m in mine]
    assert [row[0] for row in mmu_table(mine).rows] == [str(host)] * len(mine)


def test_the_maps_count_the_cases():
    counts = [sum(row.count(case) for nested in (False, True) for row in show_cases(nested).cells)
              for case in range(1, 6)]
    assert counts == [6, 12, 3, 2, 4]
    assert show_root_moves('shadow EPT').cells == ((False,) * 11,)


steps = st.lists(st.tuples(st.sampled_from(('cr0', 'cr4', 'efer', 'smm')), st.integers(0, 31)), max_size=8)


@given(hosts, steps)
def test_whatever_the_registers_did_the_roles_are_those_of_now_and_the_roots_stay(host, flips):
    vcpu = vcpu_at(host, 'nonpaging')
    vcpu.root_mmu.root, vcpu.root_mmu.prev_roots[1] = Root(0x3000, 0x10_0000), Root(0x4000, 0x20_0000)
    for name, bit in flips:
        setattr(vcpu, name, not vcpu.smm if name == 'smm' else getattr(vcpu, name) ^ 1 << bit)
        before, words = deepcopy(vcpu.root_mmu), (vcpu.root_mmu.cpu_role, vcpu.root_mmu.root_role)
        changed = init_mmu(vcpu)
        mmu = vcpu.root_mmu
        assert mmu.cpu_role == calc_cpu_role(vcpu.cr0, vcpu.cr4, vcpu.efer, vcpu.smm)
        assert mmu.root_role == (tdp_root_role(host, mmu.cpu_role) if host.has_tdp else shadow_root_role(mmu.cpu_role))
        assert changed == (words != (mmu.cpu_role, mmu.root_role)) and not init_mmu(vcpu)
        assert (mmu.root, mmu.prev_roots) == (before.root, before.prev_roots)
        assert mmu.walker == walker_of(mmu.cpu_role) and mmu.fault == ('tdp' if host.has_tdp else mmu.walker)
    assert [done.what for done in vcpu.log] == ['init_mmu', 'init_mmu_ret'] * (1 + 2 * len(flips))


@given(hosts, st.sampled_from(list(MODES)), st.sampled_from(list(MODES)), st.sampled_from(WHO))
def test_a_situation_is_drawn_as_it_is_or_refused(host, l1, l2, who):
    try: vcpu = vcpu_at(host, l1, l2, who)
    except ValueError: return
    picture = draw_contexts(vcpu)
    assert ({(edge.start, edge.end) for edge in picture.edges if edge.kind == 'taken'}
            == {('mmu', vcpu.mmu.name), ('walk_mmu', vcpu.walk_mmu.name)})
    assert picture.caption.startswith(who) and f'{vcpu.mmu.root_role.word:#x}' in picture.dot()
    words = [mmu.cpu_role for mmu in (vcpu.root_mmu, vcpu.guest_mmu, vcpu.nested_mmu)]
    forget_roles(vcpu)
    for mmu, role in zip((vcpu.root_mmu, vcpu.guest_mmu, vcpu.nested_mmu), words):
        assert not mmu.root_role.word and mmu.cpu_role.base == role.base and not mmu.cpu_role.ext.valid


def test_what_happened_is_written_and_watched():
    seen, vcpu = [], Vcpu(SimpleNamespace(host=svm_host()))
    vcpu.watch = lambda done: seen.append((done.what, vcpu.root_mmu.cpu_role.word))
    init_mmu(vcpu)
    assert seen == [('init_mmu', 0), ('init_mmu_ret', 0x1_0000_0780)]
    done = Did('new_pgd', (('pgd', 0x3000), ('hit', True), ('fmmu', 'root_mmu')))
    assert str(done) == 'new_pgd(pgd=0x3000, hit=True, fmmu=root_mmu)' and done['pgd'] == 0x3000
    vcpu.request('MMU_SYNC')
    assert (vcpu.requests == {'MMU_SYNC'} and not Root().valid and Root(0, 0x1000).valid
            and Mmu('root_mmu').root == Root(0, INVALID_PAGE))


def test_a_broken_invariant_is_a_bug_of_kvms():
    kvm_bug_on(False, 'nothing')
    with pytest.raises(KvmBug, match='leak'): kvm_bug_on(True, 'a leak')
    assert issubclass(NullDereference, KvmBug)
