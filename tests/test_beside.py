"""Recorded runs line by line beside the model's: every line, damaged lines, the terminal, and traces the model
writes."""
import json
import lzma
import random
import re
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit import cli
from kvm_mmu_lit.evidence.beside import OUTSIDE, beside, rate_of
from kvm_mmu_lit.evidence.below import RULES
from kvm_mmu_lit.evidence.ftrace import format_event, parse_line, parse_trace
from kvm_mmu_lit.evidence.matching import COMPARED
from kvm_mmu_lit.evidence.model_events import Recorder
from kvm_mmu_lit.evidence.replay import damaged, replay
from kvm_mmu_lit.evidence.scenarios import load_scenario
from kvm_mmu_lit.guest.addresses import FORMATS
from kvm_mmu_lit.guest.gpte import map_page
from kvm_mmu_lit.guest.memory import ram, write_entry
from kvm_mmu_lit.mmu.cpu_role import MODES
from kvm_mmu_lit.mmu.register_writes import invlpg, set_cr3
from kvm_mmu_lit.mmu.root_role import svm_host, vmx_host
from kvm_mmu_lit.mmu.roots import new_vcpu
from kvm_mmu_lit.mmu.shadow_page import Vm
from kvm_mmu_lit.mmu.vcpu import access

TRACES = Path(__file__).parent / 'data' / 'kvm-traces'
RUNS = sorted(path for path in TRACES.iterdir() if path.is_dir())


@lru_cache
def recorded(name): return load_scenario(TRACES / name)


@pytest.mark.parametrize('path', RUNS, ids=lambda path: path.name)
def test_every_compared_line_of_a_recorded_run_is_the_models(path, measured):
    scenario = load_scenario(path)
    run = replay(scenario)
    rate = rate_of(run)
    measured(str(rate) + ''.join(f"\n    {times} {rule}" for rule, times in sorted(run.rules.items())))
    assert [row for row in beside(run) if not row.equal] == []
    names = scenario.trace.counts()
    assert set(names) <= COMPARED | set(OUTSIDE) and set(run.rules) <= set(RULES)
    due = sum(count for name, count in names.items() if name in COMPARED - OUTSIDE.keys())
    # The emulator's answer is not compared
    emulated = sum(event.name in ('page_fault_ret', 'pte_write') for event in scenario.trace.events)
    assert due - emulated - names['load_pdptrs'] <= rate.compared <= rate.lines


@pytest.mark.parametrize('path', RUNS, ids=lambda path: path.name)
def test_every_recorded_line_is_written_as_it_was(path):
    lines = lzma.open(path / 'trace.txt.xz', 'rt').read().splitlines()
    for number, line in enumerate(lines, 1):
        event = parse_line(line, number)
        assert parse_line(format_event(event), number) == event
        assert format_event(event).rstrip() == line.rstrip()


TABLE_LINES = ('kvm_mmu_get_page', 'get_sp_ret', 'kvm_mmu_set_spte', 'kvm_mmu_unsync_page', 'kvm_mmu_sync_page',
               'kvm_mmu_prepare_zap_page', 'zap_sp', 'kvm_mmu_paging_element',
               'kvm_mmu_set_accessed_bit', 'kvm_mmu_set_dirty_bit', 'kvm_mmu_walker_error', 'walk64', 'walk64_ret',
               'g2g64_ret', 'pf64_ret', 'sync_children', 'kvm_mmu_spte_requested',
               'mark_mmio_spte', 'check_mmio_spte', 'handle_mmio_page_fault', 'flush_asid')


def differs(scenario): return any(not row.equal for row in beside(replay(scenario)))


@pytest.mark.parametrize('name', TABLE_LINES)
def test_a_line_about_tables_that_is_missing_is_noticed(name):
    run = next(run for run in ('s14_shadow_64_random', 's22_tdp_64_roles', *(path.name for path in RUNS))
               if name in recorded(run).trace.counts())
    places = [i for i, event in enumerate(recorded(run).trace.events) if event.name == name]
    assert places
    for at in random.Random(name).sample(places, min(3, len(places))):
        assert differs(damaged(recorded(run), at)), recorded(run).trace.events[at].line


@pytest.mark.parametrize('run, name, field', [
    ('s17_shadow_64_nonleaf', 'kvm_mmu_set_spte', 'spte'), ('s17_shadow_64_nonleaf', 'kvm_mmu_set_spte', 'at'),
    ('s17_shadow_64_nonleaf', 'kvm_mmu_set_spte', 'gfn'),
    ('s17_shadow_64_nonleaf', 'zap_sp', 'role'), ('s17_shadow_64_nonleaf', 'zap_sp', 'uc'),
    ('s17_shadow_64_nonleaf', 'kvm_mmu_get_page', 'created'), ('s17_shadow_64_nonleaf', 'pf64_ret', 'ret'),
    ('s17_shadow_64_nonleaf', 'pte_write', 'gpa'), ('s17_shadow_64_nonleaf', 'kvm_mmu_set_accessed_bit', 'gpa'),
    ('s22_tdp_64_roles', 'kvm_tdp_mmu_spte_changed', 'old_spte'),
    ('s22_tdp_64_roles', 'kvm_tdp_mmu_spte_changed', 'gfn'), ('s22_tdp_64_roles', 'direct_pf_ret', 'ret'),
    ('s34_nested_npt_64_la57', 'walk64', 'wmmu'), ('s34_nested_npt_64_la57', 'g2g64_ret', 'gpa'),
    ('s32_nested_npt_2level', 'kvm_mmu_walker_error', 'pferr'),
    ('s37_nested_shadow_64', 'kvm_inj_exception', 'error_code')])
def test_a_changed_field_of_a_table_line_is_noticed(run, name, field):
    scenario = recorded(run)
    places = [i for i, event in enumerate(scenario.trace.events) if event.name == name and field in event.fields
              and not event.fields.get('reinjected')
              and not (name == 'kvm_inj_exception' and event['exception'] != '#PF')]
    for at in random.Random(field).sample(places, min(4, len(places))):
        value = scenario.trace.events[at][field]
        if field == 'wmmu':
            value = (scenario.layout.vcpu
                     + scenario.layout.offsets['root_mmu' if scenario.layout.mmu_name(value) != 'root_mmu'
                                               else 'guest_mmu'])
        else: value = not value if isinstance(value, bool) else value ^ (8 if field in ('gpa', 'at') else 2)
        assert differs(damaged(scenario, at, **{field: value})), scenario.trace.events[at].line


def test_a_rule_stands_beside_the_line_it_was_used_for():
    run = replay(recorded('s17_shadow_64_nonleaf'))
    rows = beside(run)
    marked = [row for row in rows if 'dirty bit of hardware' in row.rules]
    assert len(marked) == run.rules['dirty bit of hardware'] and all(row.event == 'page_fault' for row in marked)
    assert {rule for row in rows for rule in row.rules} == set(run.rules)


# The terminal

def test_a_replay_says_its_rate_and_its_rules(capsys):
    assert cli.main(['trace', str(TRACES / 's04_shadow_2level_cr3'), '--replay']) == 0
    out = capsys.readouterr().out
    assert (re.search(r's04_shadow_2level_cr3: ([\d,]+) of \1 compared lines equal \(100\.00%\)', out)
            and 'host frame:' in out)


def test_lines_can_be_laid_side_by_side(capsys, tmp_path):
    assert (cli.main(['trace', str(TRACES / 's03_shadow_nonpaging'), '--beside', '7', '--svg', str(tmp_path / 'x.svg')])
            == 0)
    out = capsys.readouterr().out
    assert out.count('free_roots') >= 2 and 'recorded' in out and 'model' in out
    assert (tmp_path / 'x.svg').read_text().startswith('<svg')


def test_a_replay_for_machines(capsys):
    assert cli.main(['trace', str(TRACES / 's03_shadow_nonpaging'), '--replay', '--json']) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said['rate'] == 1.0 and said['equal'] == said['compared'] > 300 and said['differ'] == []
            and sum(said['rules'].values()) == said['lent'])


def test_a_differing_line_is_an_exit_code(tmp_path, capsys):
    folder = Path(shutil.copytree(TRACES / 's03_shadow_nonpaging', tmp_path / 'run'))
    lines = lzma.open(folder / 'trace.txt.xz', 'rt').read().splitlines()
    at = next(i for i, line in enumerate(lines) if ': kvm_mmu_set_spte: ' in line)
    lines[at] = lines[at].replace('(rwx', '(r-x')
    with lzma.open(folder / 'trace.txt.xz', 'wt', preset=0) as file: file.write('\n'.join(lines) + '\n')
    assert cli.main(['trace', str(folder), '--replay']) == 1
    assert '1 lines differ' in capsys.readouterr().out


def test_a_trace_alone_cannot_be_replayed(tmp_path, capsys):
    path = tmp_path / 'trace.txt'
    path.write_text('1.000000: kvm_mmu_paging_element: pte 1 level 1\n')
    assert cli.main(['trace', str(path), '--replay']) == 2
    assert 'scenario.json' in capsys.readouterr().err


# What the model writes

def guest(mode, host):
    memory = ram((0, 1 << 22))
    for n in range(4):
        map_page(memory, 0x1000, FORMATS[{'4-level': '4level', '2-level': '2level'}[mode]], 0x40_0000 + (n << 12),
                 0x10_0000 + (n << 12), list(range(2, 9)), 0x7, 0x7)
    return new_vcpu(Vm(host, memory), cr3=0x1000, **dict(zip(('cr0', 'cr4', 'efer'), MODES[mode])))


DEEDS = st.one_of(st.tuples(st.just('access'), st.integers(0, 5), st.sampled_from([0, 2, 4, 6, 16])),
                  st.tuples(st.just('invlpg'), st.integers(0, 5), st.just(0)),
                  st.tuples(st.just('cr3'), st.just(0), st.just(0)),
                  st.tuples(st.just('store'), st.integers(0, 3), st.integers(0, 7)))


@pytest.mark.parametrize('mode', ['4-level', '2-level'])
@pytest.mark.parametrize('host', [svm_host(4, npt=False), svm_host(4, npt=True), vmx_host(),
                                  svm_host(4, npt=True, tdp_mmu=False)],
                         ids=['shadow', 'npt', 'ept', 'npt without TDP MMU'])
@given(deeds=st.lists(DEEDS, min_size=1, max_size=12))
@settings(max_examples=12, deadline=None)
def test_whatever_the_model_does_is_a_trace(tmp_path_factory, mode, host, deeds):
    vcpu = guest(mode, host)
    recorder, size = Recorder(vcpu.vm), 8 if mode == '4-level' else 4
    for what, n, value in deeds:
        if what == 'access': access(vcpu, 0x40_0000 + (n << 12) + 8 * value, value)
        elif what == 'invlpg': invlpg(vcpu, 0x40_0000 + (n << 12))
        elif what == 'cr3': set_cr3(vcpu, 0x1000)
        else: write_entry(vcpu.vm.memory, 0x3000 + n * size, size, (0x10_0000 + (n << 12)) | value)
    path = tmp_path_factory.getbasetemp() / 'model.txt'
    assert recorder.write(path) == len(recorder.events)
    if recorder.events: assert list(parse_trace(path).events) == recorder.events
