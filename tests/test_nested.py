"""Any tables of L2 over any nested tables of L1: the machine does what two plain loops over the tables say."""
import random

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.guest.memory import read_gpa, write_gpa
from kvm_mmu_lit.mmu.cpu_role import MODES
from kvm_mmu_lit.mmu.nested import HYPERVISORS, L2_AT, L2_ROOT, NESTED, NESTED_ROOT, l1_machine, told

W, U, F = 2, 4, 16
SHAPES = {'2-level': (4, (22, 12)), 'PAE': (8, (30, 21, 12)), '4-level': (8, (39, 30, 21, 12)),
          '5-level': (8, (48, 39, 30, 21, 12)), 'nonpaging': (8, ())}
SETTINGS = [(name, l2) for name in NESTED for l2 in ('nonpaging', '2-level', 'PAE', '4-level')]


class Refused(Exception):
    "(who, what, code, address)"


def word(memory, gpa, size):
    data = read_gpa(memory, gpa, size)
    return None if data is None else int.from_bytes(data, 'little')


def ept(memory, gpa, access, levels, ad, final):
    "A walk of L1's EPT: 4 KiB pages only."
    table, rights, asks = NESTED_ROOT, 7, access if access & (W | F) and final else access | U
    asked = bool(asks & U) | (2 if asks & W else 0) | (4 if asks & F else 0)
    for shift in range(12 + 9 * (levels - 1), 11, -9):
        entry = word(memory, table + 8 * (gpa >> shift & 511), 8)
        if entry & 7 == 0:
            raise Refused('L1', 'EPT violation', asked | 0x80 | final << 8 | (rights & entry & 7) << 3, gpa)
        if entry & 3 == 2 or entry >> 50 & 3: raise Refused('L1', 'EPT misconfiguration', 0, gpa)
        rights, table = rights & entry, entry & 0xf_ffff_ffff_f000
    if asked & ~rights: raise Refused('L1', 'EPT violation', asked | 0x80 | final << 8 | (rights & 7) << 3, gpa)
    return table | gpa & 0xfff


def npt(memory, gpa, access, mode, final):
    "A walk of L1's NPT: everybody is a user, CR0.WP does not matter."
    size, shifts = SHAPES[mode]
    table, writable, user, nx = NESTED_ROOT, True, True, False
    nx_on, code = MODES[mode][2] >> 11 & 1, access | U
    high = 1 << 32 if final else 1 << 33
    fetch = F if access & F and nx_on else 0
    for n, shift in enumerate(shifts):
        bits = 3 if (mode, n) == ('PAE', 0) else 10 if size == 4 else 9
        entry = word(memory, table + size * (gpa >> shift & (1 << bits) - 1), size)
        told = code & (W | U) | fetch
        if not (entry or 0) & 1: raise Refused('L1', 'NPF', high | told, gpa)  # Where no memory is, nothing is present
        if (mode, n) != ('PAE', 0):
            bad = size == 8 and (entry >> 50 & 3 or mode == 'PAE' and entry >> 52 & 0x7ff or entry >> 63 and not nx_on)
            if bad: raise Refused('L1', 'NPF', high | told | 9, gpa)
            writable, user, nx = writable and entry >> 1 & 1, user and entry >> 2 & 1, nx or size == 8 and entry >> 63
        table = entry & (0xffff_f000 if size == 4 else 0xf_ffff_ffff_f000)
    if access & W and not writable or not user or fetch and nx: raise Refused('L1', 'NPF', high | told | 1, gpa)
    return table | gpa & 0xfff


def nested(memory, hypervisor, gpa, access, final):
    _, mode, levels, ad = HYPERVISORS[hypervisor]
    return ept(memory, gpa, access, levels, ad, final) if levels else npt(memory, gpa, access, mode, final)


def two_dimensions(memory, hypervisor, l2, gva, access):
    "Both walks, from the manuals: each entry of L2's is looked up in L1's tables, and so is the page."
    size, shifts = SHAPES[l2]
    _, _, levels, ad = HYPERVISORS[hypervisor]
    reads = U | (W if not levels or ad else 0)
    table, writable, user, nx, marks = L2_ROOT, True, True, False, []
    fetch = access & F if MODES[l2][2] >> 11 & 1 else 0
    for n, shift in enumerate(shifts):
        top = (l2, n) == ('PAE', 0)
        at = table + size * (gva >> shift & (1 << (2 if top else 10 if size == 4 else 9)) - 1)
        real = L2_AT + at if top else nested(memory, hypervisor, at, reads, False)  # PDPTEs: L1 maps that page as it is
        entry = word(memory, real, size)
        code = access & (W | U) | fetch
        if not entry & 1: raise Refused('L2', '#PF', code, gva)
        if not top:
            if size == 8 and (entry >> 50 & 3 or l2 == 'PAE' and entry >> 52 & 0x7ff):
                raise Refused('L2', '#PF', code | 9, gva)
            writable, user, nx = writable and entry >> 1 & 1, user and entry >> 2 & 1, nx or size == 8 and entry >> 63
            if not entry & 0x20 or access & W and shift == 12 and not entry & 0x40: marks.append(at)
        table = entry & (0xffff_f000 if size == 4 else 0xf_ffff_ffff_f000)
    if shifts and (access & W and not writable or access & U and not user or fetch and nx):
        raise Refused('L2', '#PF', code | 1, gva)
    for at in marks: nested(memory, hypervisor, at, reads | W, False)          # A and D: a write to the entry
    gpa = table | gva & 0xfff if shifts else gva
    return nested(memory, hypervisor, gpa, access & (W | F) if access & (W | F) else U, True)


def randomly(rng, hypervisor, l2):
    "A machine whose tables, of both kinds, were spoiled here and there; the top ones of L2 are left."
    machine, start = l1_machine(hypervisor, l2)
    memory, levels = machine.vm.memory, HYPERVISORS[hypervisor][2]
    own, below = SHAPES[l2][0], 8 if levels else SHAPES[HYPERVISORS[hypervisor][1]][0]
    def entries(first, end, size):
        found = [at for at in range(first, end, size) if word(memory, at, size)]
        return [at for at in found if not (l2 == 'PAE' and L2_AT + L2_ROOT <= at < L2_AT + L2_ROOT + 32)]
    spoil = []
    if SHAPES[l2][1]:
        spoil += rng.sample(of := entries(L2_AT + L2_ROOT, L2_AT + 0x5000, own), min(len(of), rng.randrange(3)))
    spoil += rng.sample(of := entries(NESTED_ROOT, NESTED_ROOT + 0x1000, below) + entries(0x20_1000, 0x20_a000, below),
                        min(len(of), rng.randrange(6)))
    for at in spoil:
        size = own if at < NESTED_ROOT or at >= L2_AT else below
        bits = ([1, 2, 4] + ([1 << 63] if size == 8 and not (levels and at < L2_AT) else [])
                + ([1 << 50] if size == 8 else []))
        # One that leads out of memory kills L2: see the chapter
        if HYPERVISORS[hypervisor][1] == 'PAE' and NESTED_ROOT <= at < NESTED_ROOT + 32: bits = [1, 2, 4]
        entry = word(memory, at, size) ^ rng.choice(bits)
        write_gpa(memory, at, entry.to_bytes(size, 'little'))
    return machine, start, spoil


def compare(rng, hypervisor, l2):
    machine, start, spoil = randomly(rng, hypervisor, l2)
    machine.happen(start)
    vcpu = machine.vcpus[0]
    # PDPTEs are registers, whatever L1 maps; the entry may have met a spoiled table of L1's.
    if l2 == 'PAE': vcpu.nested_mmu.pdptrs = [word(machine.vm.memory, L2_AT + L2_ROOT + 8 * i, 8) for i in range(4)]
    told_of = set()
    for _ in range(4):
        gva = (0x40_0000 if SHAPES[l2][1] else 0x2_0000) + rng.choice((0, 8, 0x1000))
        access = rng.choice((0, W, F, U, U | W, U | F))
        try: want = 'nobody', 'done', 0, two_dimensions(machine.vm.memory, hypervisor, l2, gva, access)
        except Refused as refused: want = refused.args
        heard = told(vcpu, gva, access)
        assert (heard.to, heard.what, heard.code, heard.addr) == want, (hypervisor, l2, hex(gva), access, spoil)
        told_of.add(heard.to)
        if heard.to == 'L1': break
    return told_of


@pytest.mark.parametrize('hypervisor,l2', SETTINGS, ids=lambda one: one)
def test_the_machine_is_two_walks(hypervisor, l2):
    seen = set()
    for seed in range(12): seen |= compare(random.Random(f"{hypervisor} {l2} {seed}"), hypervisor, l2)
    assert {'nobody', 'L1'} <= seen


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(SETTINGS))
def test_any_tables(rng, setting):
    assert compare(rng, *setting)
