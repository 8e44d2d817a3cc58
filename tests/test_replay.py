"""Recorded runs against the model: every run there is, damaged copies, and folders that cannot be used."""
import json
import lzma
import random
import re
import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from kvm_mmu_lit import cli
from kvm_mmu_lit.evidence.agreement import EvidenceError
from kvm_mmu_lit.evidence.check import check_path
from kvm_mmu_lit.evidence.compared import ASPECTS
from kvm_mmu_lit.evidence.mmu_states import has_state
from kvm_mmu_lit.evidence.replay import check_scenario, damaged, replay
from kvm_mmu_lit.evidence.scenarios import load_scenario

TRACES = Path(__file__).parent / 'data' / 'kvm-traces'
RUNS = sorted(path for path in TRACES.iterdir() if path.is_dir())
STATE = ('calls', 'roles', 'roots', 'entries', 'requests', 'registers')


@pytest.mark.parametrize('path', RUNS, ids=lambda path: path.name)
def test_a_recorded_run_agrees(path):
    *compared, last = check_scenario(path)
    found = {agreement.source.rpartition('/')[2]: agreement for agreement in compared}
    print(*found.values(), last, sep='\n')
    assert set(STATE) <= set(found) <= set(ASPECTS)
    for agreement in compared: assert agreement.agrees, str(agreement)
    states = sum(' Rd0=' in line for line in lzma.open(path / 'trace.txt.xz', 'rt'))
    assert all(found[aspect].rows == states for aspect in STATE[1:])
    assert not last.rows and last.skipped.startswith('not compared, but taken from the record')


def test_there_are_as_many_runs_as_were_recorded():
    assert len(RUNS) >= 43


def copy(path: Path, home: Path, change) -> Path:
    "A copy of a scenario with its trace's lines changed; the announced number of lines is kept true."
    folder = Path(shutil.copytree(path, home / path.name))
    lines = change(lzma.open(path / 'trace.txt.xz', 'rt').read().splitlines())
    with lzma.open(folder / 'trace.txt.xz', 'wt', preset=0) as file: file.write('\n'.join(lines) + '\n')
    meta = json.loads((folder / 'scenario.json').read_text())
    (folder / 'scenario.json').write_text(json.dumps({**meta, 'trace_lines': len(lines)}))
    return folder


def flip(name: str, bit: int, seed: int, where: str = ' Rd0='):
    "Flip a bit of a field in one line."
    def change(lines):
        at = random.Random(seed).choice([i for i, line in enumerate(lines) if where in line and f' {name}=0x' in line])
        value = int(re.search(rf' {name}=(0x[0-9a-f]+)', lines[at])[1], 16)
        lines[at] = re.sub(rf' {name}=0x[0-9a-f]+', f' {name}={value ^ 1 << bit:#x}', lines[at], count=1)
        return lines
    return change


def differ(folder: Path) -> list:
    return [agreement for agreement in check_scenario(folder) if agreement.differ]


@lru_cache
def recorded(name: str): return load_scenario(TRACES / name)


def any_event(name: str, test, seed: int) -> int:
    "The place of one event at random."
    return random.Random(seed).choice([i for i, event in enumerate(recorded(name).trace.events) if test(event)])


def parts(scenario) -> set:
    "In which parts a replay differs."
    return {row.aspect for row in replay(scenario).rows if row.recorded != row.model}


FLIPS = [('Rr', 0, 'roles'), ('Rc', 13, 'roles'), ('Gr', 17, 'roles'), ('Nc', 32, 'roles'), ('R0h', 12, 'roots'),
         ('R2h', 13, 'roots'), ('Gh', 14, 'roots'), ('G1h', 15, 'roots'), ('Rd1', 12, 'entries'),
         ('req', 11, 'requests'), ('req', 13, 'requests'), ('req', 35, 'requests'), ('req', 39, 'requests'),
         ('cr4', 4, 'registers'), ('efer', 11, 'registers'), ('hf', 5, 'registers'), ('hf', 6, 'registers')]


@pytest.mark.parametrize('run', ['s04_shadow_2level_cr3', 's21_tdp_modes_la57', 's32_nested_npt_2level',
                                 's39_nested_shadow_pae_l1', 's50_shadow_64_pcid'])
def test_a_flipped_bit_is_noticed_where_it_is(run):
    for name, bit, aspect in FLIPS:
        at = any_event(run, has_state, bit)
        assert aspect in parts(damaged(recorded(run), at,
                                       **{name: recorded(run).trace.events[at][name] ^ 1 << bit})), (name, bit)


@pytest.mark.parametrize('name, run', [('Ra2', 's05_shadow_pae_cr3'), ('Ra0', 's03_shadow_nonpaging'),
                                       ('Ga1', 's32_nested_npt_2level')])
def test_a_changed_word_of_pae_root_is_noticed(name, run):
    at = any_event(run, lambda event: name in event.fields, 3)
    assert parts(damaged(recorded(run), at, **{name: recorded(run).trace.events[at][name] ^ 1 << 12})) == {'entries'}


@pytest.mark.parametrize('run', ['s06_shadow_modes', 's14_shadow_64_random'])
def test_a_dropped_line_is_noticed(run):
    for name in ('new_pgd', 'new_pgd_ret', 'free_roots', 'init_mmu_ret', 'load', 'alloc_root_ret', 'get_sp_ret',
                 'sync_roots', 'load_mmu_pgd', 'post_set_cr4', 'invalidate_pcid', 'vmentry'):
        assert parts(damaged(recorded(run), any_event(run, lambda event: event.name == name, 7))), name


@pytest.mark.parametrize('name', ['free_roots', 'new_pgd', 'init_npt', 'set_efer', 'tdp_root_ret', 'nested_vmexit'])
def test_a_line_that_comes_twice_is_noticed(name):
    run = recorded('s31_nested_npt_pae')
    at, events = any_event(run.name, lambda event: event.name == name, 11), run.trace.events
    assert parts(replace(run, trace=replace(run.trace, events=events[:at + 1] + events[at:])))


@pytest.mark.parametrize('name, field', [('free_roots', 'roots'), ('get_sp_ret', 'gfn'), ('get_sp_ret', 'role'),
                                         ('alloc_root_ret', 'hpa'), ('new_pgd', 'pgd'), ('load_mmu_pgd', 'level'),
                                         ('init_npt', 'ncr3')])
def test_a_changed_argument_is_noticed(name, field):
    run = 's32_nested_npt_2level'
    at = any_event(run, lambda event: event.name == name, 5)
    assert parts(damaged(recorded(run), at, **{field: recorded(run).trace.events[at][field] ^ 1}))


def test_timer_ticks_change_nothing(tmp_path):
    "Extra interrupts come at random places: an exit, an entry, and the state as it was."
    def tick(lines):
        dice, out = random.Random(2), []
        for i, line in enumerate(lines):
            out.append(line)
            if ': kvm_entry: ' in line and ': vmentry: ' in lines[i - 1] and dice.random() < 0.05:
                exit = (f"{line.split(':')[0]}: kvm_exit: vcpu 0 reason interrupt rip 0x8000 info1 0x{0:016x} info2 "
                        f"0x{0:016x} intr_info 0x{0:08x} error_code 0x{0:08x}")
                out += [exit, lines[i - 1], line]
        assert len(out) > len(lines)
        return out
    for run in ('s33_nested_npt_pae_la57', 's44_nested_shadow_mixed_random'):
        assert not differ(copy(TRACES / run, tmp_path, tick))


def test_an_unknown_event_is_kept_and_counted(tmp_path):
    folder = copy(TRACES / 's03_shadow_nonpaging', tmp_path,
                  lambda lines: lines[:100] + ['1.000000: kvm_new_thing: with 3 words'] + lines[100:])
    assert not differ(folder) and 'unknown event kvm_new_thing 1' in str(check_scenario(folder)[-1])


def test_a_trace_that_stops_early_is_compared_as_far_as_it_goes(tmp_path):
    "Cut at a marker: nothing is under way there."
    def cut(lines): return lines[:next(i for i, line in enumerate(lines) if i > 700 and 'RIG STEP' in line)]
    folder = copy(TRACES / 's30_nested_npt_64', tmp_path, cut)
    assert not differ(folder) and 500 < sum(agreement.rows for agreement in check_scenario(folder)) < 2000


def test_a_pointer_to_no_mmu_is_an_error_with_its_line(tmp_path):
    folder = copy(TRACES / 's03_shadow_nonpaging', tmp_path, flip('fmmu', 20, seed=1, where=': free_roots: '))
    with pytest.raises(EvidenceError, match=r'line \d+.*is no MMU of this vCPU'): check_scenario(folder)


def test_a_cpuid_without_address_width_is_an_error(tmp_path):
    folder = copy(TRACES / 's03_shadow_nonpaging', tmp_path, list)
    meta = json.loads((folder / 'scenario.json').read_text())
    (folder
     / 'scenario.json').write_text(json.dumps({**meta,
                                               'guest_cpuid': [line for line in meta['guest_cpuid']
                                                               if not line.startswith('80000008')]}))
    with pytest.raises(EvidenceError, match='MAXPHYADDR is unknown'): check_scenario(folder)


def test_other_hosts_than_the_recorded_one_differ(tmp_path):
    "The same trace under another machine's description is another machine's trace."
    for key, value in (('host_paging', '5-level'), ('npt', 0)):
        folder = copy(TRACES / 's31_nested_npt_pae', tmp_path / key, list)
        meta = json.loads((folder / 'scenario.json').read_text())
        (folder / 'scenario.json').write_text(json.dumps({**meta, key: value}))
        assert differ(folder)


def test_a_run_is_read_like_any_other_evidence(capsys):
    run = TRACES / 's03_shadow_nonpaging'
    assert check_path(run) == check_scenario(run)
    assert cli.main(['check', str(run)]) == 0
    assert '0 differ' in capsys.readouterr().out


def test_a_differing_run_is_an_exit_code(tmp_path, capsys):
    folder = copy(TRACES / 's03_shadow_nonpaging', tmp_path, flip('Rr', 3, seed=2))
    assert cli.main(['check', str(folder)]) == 1
    assert 'rows differ' in capsys.readouterr().out


def test_progress_is_told(capsys):
    told = []
    replay(load_scenario(TRACES / 's06_shadow_modes'), told.append)
    assert told == sorted(told) and len(told) >= 3
