"""Roots and the root cache under random histories: reference counts and the invariants of a sane MMU, after every step,
on every kind of host."""
from dataclasses import replace

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvm_mmu_lit.guest.registers import CR3_NOFLUSH, CR3_PCID_MASK, Cr0, Cr4, Efer
from kvm_mmu_lit.mmu.contexts import INVALID_PAGE
from kvm_mmu_lit.mmu.nested_switch import (HOSTS, enter_l2, eptp_of, eptp_switch, invept, invvpid, l2_state, leave_l2,
                                           lettered_memory)
from kvm_mmu_lit.mmu.register_writes import (invpcid, load_pdptrs, set_cr0, set_cr3, set_cr4, set_efer, set_sregs,
                                             smm_changed)
from kvm_mmu_lit.mmu.reload import enter_guest, reset_context, unload
from kvm_mmu_lit.mmu.root_cache import pointer
from kvm_mmu_lit.mmu.root_role import MODES, PT64_ROOT_4LEVEL, root_storage, svm_host, vmx_host
from kvm_mmu_lit.mmu.roots import guest_pgd, new_vcpu, per_vcpu_pages, walk_start
from kvm_mmu_lit.mmu.free_roots import is_obsolete_root
from kvm_mmu_lit.mmu.shadow_page import Vm, to_shadow_page
from kvm_mmu_lit.mmu.zap import zap_all_fast

HOST_LIST = [*HOSTS.values(), svm_host(3, npt=False), svm_host(4), vmx_host(3, 4), svm_host(4, tdp_mmu=False)]
FLIPS = [('cr0', bit) for bit in (Cr0.PG, Cr0.WP, Cr0.CD)] + [('efer', bit) for bit in (Efer.NX, Efer.LME, Efer.SVME)]
FLIPS += [('cr4', bit) for bit in (Cr4.PSE, Cr4.PAE, Cr4.PGE, Cr4.LA57, Cr4.PCIDE, Cr4.SMEP, Cr4.SMAP, Cr4.PKE)]
WRITES = {'cr0': set_cr0, 'cr4': set_cr4, 'efer': set_efer}
SPECIAL = ('pae_root', 'pml4_root', 'pml5_root')


def places(mmu) -> list: return [mmu.root, *mmu.prev_roots]
def modes_of(host) -> list:
    return [mode for mode in MODES if not (host.bits == 32 and mode[0] in '45')
            and not (mode == '5-level' and host.levels < 5)]


def after_search(before: list, special: bool, hit: bool, found: int) -> list:
    """Which page is where after a search, by the rules of the cache: `before` and the answer are pages of root and
    prev_roots."""
    root, *prev = before
    if special or root == INVALID_PAGE:
        if not hit: return [INVALID_PAGE, *prev]
        rest = [page for i, page in enumerate(prev) if i != prev.index(found)]
        return [found, *rest, INVALID_PAGE]
    if not hit: return [INVALID_PAGE, *before[:3]]
    at = before.index(found)
    return [found, *before[:at], *before[at + 1:]]


class Machine(RuleBasedStateMachine):
    "Two vCPUs of one VM: guests, hypervisors, userspace and KVM act in any order."

    @initialize(host=st.sampled_from(HOST_LIST), data=st.data())
    def start(self, host, data):
        self.vm = Vm(host, lettered_memory())
        self.roles, self.searches = {}, 0
        for _ in range(2):
            cr0, cr4, efer = MODES[data.draw(st.sampled_from(modes_of(host)))]
            vcpu = new_vcpu(self.vm, cr0=int(cr0 | Cr0.ET), cr3=pointer('A'), cr4=cr4, efer=efer)
            if host.levels < 5: vcpu.cr4_missing = int(Cr4.LA57)
            if vcpu.is_pae_paging: load_pdptrs(vcpu, vcpu.cr3)
            vcpu.watch = self.watch(vcpu)

    def watch(self, vcpu):
        "Hold every search of the cache to its rules."
        def see(did):
            if did.what == 'new_pgd':
                self.before = [root.hpa for root in places(vcpu.mmu)], bool(per_vcpu_pages(vcpu.mmu))
                self.held = {sp.spt: sp.root_count for sp in self.vm.pages.values()}
            if did.what == 'new_pgd_ret':
                now = [root.hpa for root in places(vcpu.mmu)]
                assert now == after_search(*self.before, did['hit'], now[0])
                dropped = sum(self.held.values()) - sum(sp.root_count for sp in self.vm.pages.values())
                before, special = self.before
                if not special:
                    assert dropped == (not did['hit'] and before[0] != INVALID_PAGE and before[3] != INVALID_PAGE)
                if did['hit']: assert not to_shadow_page(self.vm, now[0]).role.invalid
                self.searches += 1
        return see

    @rule(who=st.integers(0, 1))
    def enter(self, who):
        vcpu = self.vm.vcpus[who]
        assert enter_guest(vcpu) and vcpu.mmu.root.valid and not vcpu.requests
        assert vcpu.mmu.root.pgd == (0 if vcpu.mmu.root_role.direct else guest_pgd(vcpu))
        for mmu in (vcpu.root_mmu, vcpu.guest_mmu):
            assert not any(is_obsolete_root(self.vm, prev) for prev in mmu.prev_roots)
        if not per_vcpu_pages(vcpu.mmu): assert not is_obsolete_root(self.vm, vcpu.mmu.root)
        for addr in range(0, 1 << 32, 1 << 30):
            level, table = walk_start(self.vm, vcpu.mmu, addr)
            if level: assert to_shadow_page(self.vm, table).role.level == level

    @rule(who=st.integers(0, 1), letter=st.sampled_from('ABCDE'), pcid=st.integers(0, 2), keep=st.booleans())
    def load_cr3(self, who, letter, pcid, keep):
        vcpu = self.vm.vcpus[who]
        # KVM sees this write only when it emulates it, and then asks the wrong MMU: nbs/mmu/25_nested_switch.ipynb has the story
        if vcpu.is_nested: return
        pcide = bool(vcpu.cr4 & Cr4.PCIDE)
        value = pointer(letter) | (pcid | (CR3_NOFLUSH if keep else 0) if pcide else 0)
        same, before = value & ~CR3_NOFLUSH == vcpu.cr3, self.searches
        assert set_cr3(vcpu, value) is None
        assert self.searches == before + (not same)                                                        # 28
        if pcide and not keep and not vcpu.host.has_tdp:                                                   # 29
            assert not any(prev.valid and prev.pgd & CR3_PCID_MASK == pcid for prev in vcpu.mmu.prev_roots)

    @rule(who=st.integers(0, 1), flip=st.sampled_from(FLIPS))
    def write_register(self, who, flip):
        vcpu, (name, bit) = self.vm.vcpus[who], flip
        if bit == Efer.LME and vcpu.host.bits == 32: return
        # VM entry ties these to L1's
        if vcpu.guest_mode and vcpu.host.vendor == 'vmx' and bit in (Efer.LME, Cr0.PG): return
        WRITES[name](vcpu, getattr(vcpu, name) ^ bit)

    @rule(who=st.integers(0, 1), data=st.data())
    def userspace_sets_a_mode(self, who, data):
        vcpu = self.vm.vcpus[who]
        if vcpu.guest_mode: return
        cr0, cr4, efer = MODES[data.draw(st.sampled_from(modes_of(vcpu.host)))]
        set_sregs(vcpu, int(cr0 | Cr0.ET), pointer(data.draw(st.sampled_from('AB'))), cr4, efer)

    @rule(who=st.integers(0, 1), data=st.data(), cr3=st.sampled_from('AXY'), nested=st.sampled_from(['', 'N', 'M']),
          ad=st.booleans())
    def into_l2(self, who, data, cr3, nested, ad):
        vcpu = self.vm.vcpus[who]
        if vcpu.guest_mode or vcpu.smm: return
        vmx, modes = vcpu.host.vendor == 'vmx', modes_of(vcpu.host)
        if vmx and not vcpu.cr0 & Cr0.PG: return
        if vmx and not vcpu.efer & Efer.LMA: modes = [mode for mode in modes if mode[0] not in '45']
        pgd = (eptp_of(pointer(nested), 4, ad) if vmx else pointer(nested)) if nested else None
        entered = enter_l2(vcpu, l2_state(data.draw(st.sampled_from(modes)), pointer(cr3), pgd))
        assert entered == (vcpu.host.has_tdp or not nested)
        assert vcpu.mmu_is == ('guest_mmu' if nested and entered else 'root_mmu')

    @rule(who=st.integers(0, 1))
    def back_to_l1(self, who):
        vcpu = self.vm.vcpus[who]
        if not vcpu.guest_mode: return
        kept = [root.hpa for root in places(vcpu.guest_mmu)]
        assert leave_l2(vcpu) and vcpu.mmu is vcpu.root_mmu is vcpu.walk_mmu
        assert [root.hpa for root in places(vcpu.guest_mmu)] == kept

    @rule(who=st.integers(0, 1), letter=st.sampled_from('NM'), which=st.sampled_from(['one', 'all', 'vpid', 'switch']))
    def invalidate_nested(self, who, letter, which):
        vcpu = self.vm.vcpus[who]
        if vcpu.host.vendor != 'vmx': return
        if which == 'switch' and vcpu.is_nested: eptp_switch(vcpu, eptp_of(pointer(letter)))
        if vcpu.guest_mode: return
        if which == 'vpid': invvpid(vcpu)
        if which in ('one', 'all'): invept(vcpu, eptp_of(pointer(letter)) if which == 'one' else None)

    @rule(who=st.integers(0, 1), kind=st.integers(0, 3), pcid=st.integers(0, 2))
    def invalidate_pcids(self, who, kind, pcid):
        vcpu = self.vm.vcpus[who]
        refused = invpcid(vcpu, kind, pcid, 0x1000)
        assert bool(refused) == (kind < 2 and pcid > 0 and not vcpu.cr4 & Cr4.PCIDE)

    @rule(letter=st.sampled_from('ABXNM'), slot=st.integers(0, 3),
          word=st.sampled_from([0, 0x4_0001, 0x4_1001, 0x4_2000]))
    def edit_pdpte(self, letter, slot, word):
        self.vm.memory.words(8)[pointer(letter) >> 12][slot] = word

    @rule(who=st.integers(0, 1), letter=st.sampled_from('ABCD'))
    def fall_behind(self, who, letter):
        "The guest writes to its tables: a root has unsync children now."
        for root in places(self.vm.vcpus[who].root_mmu):
            sp = root.valid and to_shadow_page(self.vm, root.hpa)
            if sp and not sp.role.direct and root.pgd & ~CR3_PCID_MASK == pointer(letter): sp.unsync_children += 1

    @rule()
    def zap_all(self):
        zap_all_fast(self.vm)

    @rule(who=st.integers(0, 1), entering=st.booleans())
    def system_management(self, who, entering):
        vcpu = self.vm.vcpus[who]
        if vcpu.guest_mode or vcpu.smm == entering: return
        smm_changed(vcpu, entering)
        self.check_unloaded(vcpu)

    @rule(who=st.integers(0, 1), reset=st.booleans())
    def drop_everything(self, who, reset):
        (reset_context if reset else unload)(self.vm.vcpus[who])
        self.check_unloaded(self.vm.vcpus[who])

    def check_unloaded(self, vcpu):                                                                        # 21
        for mmu in (vcpu.root_mmu, vcpu.guest_mmu):
            assert not any(root.valid for root in places(mmu)) and mmu.pae_words == [0] * 4

    def mmus(self): return [(vcpu, mmu) for vcpu in self.vm.vcpus for mmu in (vcpu.root_mmu, vcpu.guest_mmu)]

    @precondition(lambda self: hasattr(self, 'vm'))
    @invariant()
    def references_are_counted(self):                                                                      # 14, 24
        held = {}
        for _, mmu in self.mmus():
            for hpa in [root.hpa for root in places(mmu) if root.valid] + [word for word in mmu.pae_words if word]:
                sp = to_shadow_page(self.vm, hpa)
                if sp: held[sp.spt] = held.get(sp.spt, 0) + 1
        assert held == {sp.spt: sp.root_count for sp in self.vm.pages.values() if sp.root_count}
        assert all(sp.root_count for sp in self.vm.pages.values() if sp.role.invalid)       # nobody waits for nothing

    @precondition(lambda self: hasattr(self, 'vm'))
    @invariant()
    def previous_roots_are_shadow_pages_of_a_lasting_role(self):                                           # 11, 13, 19
        for _, mmu in self.mmus():
            for root in places(mmu):
                sp = root.valid and to_shadow_page(self.vm, root.hpa)
                if root is not mmu.root and root.valid: assert sp
                if not sp: continue
                role = replace(sp.role, invalid=0)
                assert (self.roles.setdefault(sp.spt, role) == role and role.level >= PT64_ROOT_4LEVEL
                        and root.pgd != INVALID_PAGE)

    @precondition(lambda self: hasattr(self, 'vm'))
    @invariant()
    def no_root_stands_in_two_places(self):                                                                # 12
        for _, mmu in self.mmus():
            seen = []
            for root in places(mmu):
                sp = root.valid and to_shadow_page(self.vm, root.hpa)
                if sp and not sp.role.invalid: seen.append((0 if sp.role.direct else root.pgd, sp.role))
            assert len(seen) == len(set(seen))

    @precondition(lambda self: hasattr(self, 'vm'))
    @invariant()
    def the_loaded_root_is_of_the_kind_the_role_wants(self):                                               # 11, 22, 23
        for vcpu, mmu in self.mmus():
            pages = per_vcpu_pages(mmu)
            if not pages: assert mmu.pae_words == [0] * 4
            if not mmu.root.valid: continue
            storage = root_storage(mmu.cpu_role, mmu.root_role, vcpu.host.uses_tdp_mmu)
            assert [name for name, _, _ in pages][:1] == ([storage] if storage in SPECIAL else [])
            if not pages: assert replace(to_shadow_page(self.vm, mmu.root.hpa).role, invalid=0) == mmu.root_role
            for (_, _, words), (_, below, _) in zip(pages, pages[1:]):
                assert [word & ~0xfff for word in words] == [below]
            if pages and (mmu.root_role.direct or mmu.cpu_role.base.level == 2): assert all(mmu.pae_words)
            elif pages and mmu is vcpu.root_mmu:
                assert [word > 0 for word in mmu.pae_words] == [bool(pdpte & 1) for pdpte in mmu.pdptrs]


TestRoots = Machine.TestCase
TestRoots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None,
                              suppress_health_check=list(HealthCheck))
