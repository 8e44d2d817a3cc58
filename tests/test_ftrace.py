"""Traces and scenarios: any event survives being written and read, any damaged line or file is refused or read as what
it now says."""
import json
import lzma
import re
import shutil
import time
import tracemalloc
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvm_mmu_lit.evidence import event_forms
from kvm_mmu_lit.evidence.agreement import EvidenceError
from kvm_mmu_lit.evidence.event_forms import (KINDS, KVM, KVMMMU, MARK, MARKERS, PROBES, Template, flags_text, is_known,
                                              templates)
from kvm_mmu_lit.evidence.ftrace import (MAX_TRACE_LINE, Task, TraceEvent, format_event, make_event, parse_line,
                                         parse_trace)
from kvm_mmu_lit.evidence.mmu_states import has_state
from kvm_mmu_lit.evidence.scenarios import FILES, is_scenario, load_scenario, root_history, steps_of

DATA = Path(__file__).parent / 'data' / 'kvm-traces'
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
NOTATIONS = [*KVMMMU.items(), *KVM.items(), *PROBES.items(), *((MARK, notation) for notation in MARKERS),
             (MARK, '{mark:line}')]

ascii_words = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7e), min_size=1, max_size=12)
VALUES = {   # Kind -> what it may hold
    'x': st.integers(0, (1 << 64) - 1), '#x': st.integers(0, (1 << 64) - 1), '04x': st.integers(0, (1 << 32) - 1),
    '08x': st.integers(0, (1 << 32) - 1),
    '016x': st.integers(0, (1 << 64) - 1), 'u': st.integers(0, (1 << 64) - 1),
    'd': st.integers(-(1 << 63), (1 << 63) - 1), 'ptr': st.from_regex('[0-9a-f]{16}', fullmatch=True),
    'flags': st.integers(0, (1 << 32) - 1), 'acc': st.integers(0, 7),
    'rwxu': st.from_regex('[r-][w-][x-][u-]?', fullmatch=True), 'bytes': st.binary(max_size=15),
    'word': ascii_words, 'words': st.lists(ascii_words, min_size=1, max_size=4).map(' '.join),
    'line': st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7e), max_size=40),
}


def value_of(kind):
    "Values of a kind: of the table, a yes or no, or one of a choice."
    for name, known in KINDS.items():
        if known is kind: return VALUES[name]
    if kind.read is str: return st.sampled_from([re.sub(r'\\(.)', r'\1', text) for text in kind.form.split('|')])
    return st.booleans()


@lru_cache(None)
def fields_of(notation):
    "Fields a form can say; what may be left out is there or not."
    pieces = [piece for piece in Template(notation).pieces if piece[0]]
    first = {}
    for name, kind, group in pieces: first.setdefault(name, (kind, group))
    always = {name: value_of(kind) for name, (kind, group) in first.items() if not group}
    groups = sorted({group for _, group in first.values()} - {0})
    optional = [st.one_of(st.just({}),
                          st.fixed_dictionaries({name: value_of(kind) for name, (kind, inside) in first.items()
                                                 if inside == group})) for group in groups]
    return st.tuples(st.fixed_dictionaries(always),
                     *optional).map(lambda parts: {name: value for part in parts for name, value in part.items()})


SPOTS = st.sampled_from(['kvm_mmu_load+0x77e/0x890 [kvm]', 'svm_set_efer+0x0/0x120 [kvm_amd]',
                         '__set_sregs_common.constprop.0+0x4cf/0x510 [kvm]', 'do_one+0x1'])
TASKS = st.one_of(st.none(), st.builds(Task, st.from_regex('[a-z<][a-z0-9/:<> .]{0,12}[a-z0-9>]', fullmatch=True),
                                       st.integers(0, 4194303), st.integers(0, 511),
                                       st.sampled_from(['d..1.', '....', 'dNh2.']),
                                       st.sampled_from(['', '421', '-------'])))


@st.composite
def events(draw):
    "Any event that a trace can hold."
    name, notation = draw(st.sampled_from(NOTATIONS))
    fields = draw(fields_of(notation))
    if name == MARK and 'mark' in fields: assume(not fields['mark'].startswith('RIG '))
    place = ''
    if name in PROBES:
        place = draw(SPOTS)
        if name.endswith('_ret'):
            place = (draw(st.sampled_from([place, "[unknown/kretprobe'd]"])) + ' <- '
                     + draw(st.sampled_from(['kvm_mmu_load', 'load_pdptrs'])))
    return make_event(name, fields, draw(st.integers(0, 10 ** 11)) / 10 ** 6, place, draw(st.integers(1, 10 ** 6)),
                      draw(TASKS))


@given(events())
@settings(max_examples=1000)
def test_any_event_is_read_as_it_was_written(event):
    line = format_event(event)
    assert parse_line(line, event.line) == event
    assert '\n' not in line and line.endswith(event.text)


@pytest.mark.parametrize('name, notation', NOTATIONS)
@given(data=st.data())
@settings(max_examples=12)
def test_every_form_says_any_of_its_fields(name, notation, data):
    fields = data.draw(fields_of(notation))
    assume(name != MARK or 'mark' not in fields or not fields['mark'].startswith('RIG '))
    assert event_forms.read_text(name, event_forms.write_text(name, fields)) == fields


@lru_cache(None)
def lines_of(name):
    return lzma.decompress((DATA / name / 'trace.txt.xz').read_bytes()).decode().splitlines()


@lru_cache(None)
def samples():
    "A line of every event that was recorded."
    found = {}
    for name in NAMES:
        for line in lines_of(name): found.setdefault(line.split(': ', 2)[1], line)
    return tuple(found.values())


@given(st.data())
@settings(max_examples=1500)
def test_a_damaged_line_is_refused_or_says_what_it_now_says(data):
    line = data.draw(st.sampled_from(samples()))
    at, letter = (data.draw(st.integers(0, len(line) - 1)),
                  data.draw(st.characters(min_codepoint=0x20, max_codepoint=0x7e)))
    damaged = data.draw(st.sampled_from([line[:at], line[:at] + line[at + 1:], line[:at] + letter + line[at:],
                                         line[:at] + letter + line[at + 1:]]))
    try: event = parse_line(damaged, 5, 'here')
    except EvidenceError as why:
        assert why.file == 'here' and why.key == 'line 5' and len(str(why)) < 400
        return
    if '.' in damaged.split(':')[0].strip() and event.task is None:
        assert (format_event(event).rstrip() == damaged.lstrip('0').rstrip()
                or float(damaged.split(':')[0]) == event.seconds)
    if event.known:
        assert (event_forms.write_text(event.name, event.fields).rstrip()
                == damaged.split(': ', 2)[2].removeprefix(f'({event.place})').rstrip())
    else: assert event.fields == {} and event.text == damaged.split(': ', 2)[2]


@given(st.text(max_size=200))
@settings(max_examples=500)
def test_any_text_is_an_event_or_an_error_of_its_own_kind(text):
    try: event = parse_line(text)
    except EvidenceError as why: assert why.key == 'line 1'
    else: assert format_event(event).rstrip() == text.rstrip() or event.task is not None or text.startswith('0')


@given(st.lists(st.one_of(st.binary(max_size=60),
                          st.sampled_from([line.encode() for line in lines_of('s01_shadow_64_cr3')[:30]])), max_size=6),
       st.booleans())
@settings(max_examples=200)
def test_a_file_of_anything_is_a_trace_or_an_error(tmp_path_factory, lines, packed):
    path = tmp_path_factory.getbasetemp() / ('any.txt.xz' if packed else 'any.txt')
    content = b'\n'.join(lines)
    path.write_bytes(lzma.compress(content, preset=0) if packed else content)
    try: trace = parse_trace(path)
    except EvidenceError as why: assert why.file == str(path) and why.rule
    else: assert len(trace.events) <= content.count(b'\n') and content.endswith(b'\n')


@given(error_code=st.integers(0, (1 << 32) - 1))
def test_flags_name_the_bits_they_have(error_code):
    named = {'P': 1, 'W': 2, 'U': 4, 'RSVD': 8, 'F': 16}
    parts = flags_text(error_code).split('|') if error_code else []
    assert sum(named.get(part) or int(part, 16) for part in parts) == error_code
    assert [part for part in parts if part in named] == [part for part in named if named[part] & error_code]


def test_a_line_that_never_ends_takes_little_memory(tmp_path):
    path = tmp_path / 'bomb.txt.xz'
    path.write_bytes(lzma.compress(b'1' * (80 << 20), preset=0))
    tracemalloc.start()
    try:
        with pytest.raises(EvidenceError, match=f'line 1: is longer than {MAX_TRACE_LINE} bytes'): parse_trace(path)
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally: tracemalloc.stop()


@pytest.mark.parametrize('fields', [{}, {'pte': 1}, {'pte': -1, 'level': 1}, {'pte': 1, 'level': 1, 'gpa': 0},
                                    {'pte': 'x', 'level': 1}, {'pte': 1 << 64, 'level': 1}, {'pte': 1.0, 'level': 1}])
def test_an_event_no_line_can_say_is_not_made(fields):
    with pytest.raises(ValueError): make_event('kvm_mmu_paging_element', fields)
    with pytest.raises(ValueError, match='no event'): make_event('kvm_no_such_event', fields)


def test_a_probe_needs_a_place():
    with pytest.raises(ValueError, match='expected a place'): make_event('sync_roots', {})
    with pytest.raises(ValueError, match='expected a place'):
        make_event('alloc_root_ret', {'hpa': 4096}, place='mmu_alloc_root+0x0/0x100 [kvm]')
    assert make_event('sync_roots', {}, place='kvm_mmu_sync_roots+0x0/0x120 [kvm]').function == 'kvm_mmu_sync_roots'


def test_a_blank_an_editor_cut_off_does_not_matter():
    whole, cut = ('1.000000: kvm_mmu_pagetable_walk: addr 8000 pferr 0 ',
                  '1.000000: kvm_mmu_pagetable_walk: addr 8000 pferr 0')
    assert parse_line(whole) == parse_line(cut)


# The recordings, against simpler ways of reading them

def test_every_recorded_trace_is_read_at_speed(measured):
    start, lines = time.perf_counter(), 0
    for name in NAMES:
        trace = parse_trace(DATA / name / 'trace.txt.xz')
        assert trace.counts() == Counter(line.split(': ', 2)[1] for line in lines_of(name)) and not trace.unknown
        assert [event.line for event in trace.events] == list(range(1, len(trace.events) + 1))
        lines += len(trace.events)
    took = time.perf_counter() - start
    measured(f"{lines:,} recorded trace lines read in {took:.1f} s: {lines / took:,.0f} a second")
    assert lines == 204_391 and took < 60


def test_a_recording_has_every_probe_but_one():
    "free_guest_mode_roots needs a nested hypervisor that fails; no run has one."
    recorded = {line.split(': ', 2)[1] for name in NAMES for line in lines_of(name)}
    assert set(PROBES) - recorded == {'free_guest_mode_roots'}
    assert {name for name in recorded if not is_known(name)} == set() and all(templates(name) for name in recorded)


@pytest.mark.parametrize('name', ['s01_shadow_64_cr3', 's32_nested_npt_2level', 's45_shadow_smm', 's50_shadow_64_pcid'])
def test_the_history_of_roots_is_what_the_text_says(name):
    run = load_scenario(DATA / name)
    offsets, vcpu = run.meta['struct_offsets'], int(run.meta['addresses']['vcpu'], 16)
    said, asked = [], None
    for number, line in enumerate(lines_of(name), 1):
        if ' free_roots: ' in line: asked = int(re.search(r'fmmu=(\S+)', line)[1], 16)
        if not re.search(r' (new_pgd|load|free_roots)_ret: ', line): continue
        pointer = asked if ' free_roots_ret: ' in line else int(re.search(r' mmu=(\S+)', line)[1], 16)
        letter = {vcpu + offsets['root_mmu']: 'R', vcpu + offsets['guest_mmu']: 'G'}[pointer]
        said.append((number, *(int(re.search(rf' {letter}{i}{what}=(\S+)', line)[1], 16) for i in ('', 0, 1, 2)
                               for what in 'ph')))
    read = [(change.event.line, *(number for root in (change.state.root, *change.state.prev_roots) for number in root))
            for change in root_history(run)]
    assert read == said and len(said) > 40


def test_snapshots_keep_every_number_of_the_text():
    run = load_scenario(DATA / 's33_nested_npt_pae_la57')
    base = run.layout.page_offset_base
    for event in run.trace.events:
        if not has_state(event): continue
        now, f = run.snapshot(event), event.fields
        for letter, mmu in (('R', now.root_mmu), ('G', now.guest_mmu)):
            assert (mmu.cpu_role, mmu.root_role) == (f[f'{letter}c'], f[f'{letter}r'])
            assert ([page and page + base for page in (mmu.pae_root, mmu.pml4_root, mmu.pml5_root)]
                    == [f[f'{letter}{i}'] or None for i in 'a45'])
            assert mmu.pae_words is None or list(mmu.pae_words) == [f[f'{letter}a{i}'] for i in range(4)]
        assert (now.cr0, now.cr3, now.cr4, now.efer, now.hflags, now.requests,
                now.nested_cpu_role) == tuple(f[name] for name in ('cr0', 'cr3', 'cr4', 'efer', 'hf', 'req', 'Nc'))
        assert list(now.pdptrs) == [f[f'Rd{i}'] for i in range(4)]


# Folders that are not what they should be

@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DATA / 's46_tdp_smm', tmp_path / 'run'))


def rewrite(folder, **values):
    meta = {**json.loads((folder / 'scenario.json').read_text()), **values}
    (folder / 'scenario.json').write_text(json.dumps(meta))


KEYS = ['scenario', 'description', 'npt', 'tdp_mmu', 'host_paging', 'memslots', 'initial_msrs', 'initial_sregs',
        'page_tables', 'vmcbs', 'steps', 'guest_cpuid', 'addresses', 'struct_offsets', 'trace_lines']


@pytest.mark.parametrize('key', KEYS)
def test_a_key_of_another_type_is_named(folder, key):
    for wrong in (None, 1.5, {'a': [1]} if key not in ('initial_msrs', 'initial_sregs', 'addresses', 'struct_offsets')
                  else [1], True):
        rewrite(folder, **{key: wrong})
        with pytest.raises(EvidenceError) as refused: load_scenario(folder)
        assert refused.value.file.endswith('scenario.json') and refused.value.key == key
    meta = json.loads((folder / 'scenario.json').read_text())
    del meta[key]
    (folder / 'scenario.json').write_text(json.dumps(meta))
    with pytest.raises(EvidenceError, match=f'{key}: is missing'): load_scenario(folder)


@pytest.mark.parametrize('key, inside', [('memslots', [7]), ('memslots', [{}]), ('memslots', []),
                                         ('page_tables', [{'name': 'x', 'format': 'PAE', 'root': '0x1000',
                                                           'tables': [3]}]), ('steps', ['read']),
                                         ('steps', [{'id': 0, 'op': 'read', 'cpu': 'text', 'bits': 8}]),
                                         ('guest_cpuid', [5]), ('addresses', {'vcpu': '0x1'}),
                                         ('struct_offsets', {'root_mmu': '8'}),
                                         ('initial_sregs', {'cr0': '0x1'}), ('initial_msrs', {'x': '0x1'}),
                                         ('initial_msrs', {'0x1': []}), ('vmcbs', ['x']), ('vmcbs', [{'vmcb': 0}]),
                                         ('steps', [{'id': 0, 'op': 'read', 'cpu': 'text', 'bits': 64, 'va': {}}]),
                                         ('steps', [{'id': 0, 'op': 'read', 'cpu': 'text', 'bits': 64, 'va': [1]}]),
                                         ('npt', 2), ('trace_lines', -1), ('trace_lines', 787)])
def test_what_is_wrong_inside_a_key_is_named(folder, key, inside):
    rewrite(folder, **{key: inside})
    with pytest.raises(EvidenceError) as refused: load_scenario(folder)
    assert key in str(refused.value) or 'announces' in str(refused.value)


def test_json_that_is_deep_double_or_long_is_refused(folder):
    for text in ('[' * 100_000, '{"npt": 1, "npt": 0}', '[]', '"' + 'x' * (2 << 20) + '"',
                 '\udcff'.encode('utf-8', 'surrogatepass').decode('latin-1')):
        (folder / 'scenario.json').write_text(text)
        with pytest.raises(EvidenceError): load_scenario(folder)


@pytest.mark.parametrize('name', FILES)
@given(seed=st.integers(0, 10 ** 9), cut=st.booleans())
@settings(max_examples=25)
def test_a_damaged_file_is_refused_or_still_a_run(tmp_path_factory, name, seed, cut):
    folder = tmp_path_factory.getbasetemp() / f'damaged-{name}'
    if not folder.exists(): shutil.copytree(DATA / 's46_tdp_smm', folder)
    whole = (DATA / 's46_tdp_smm' / name).read_bytes()
    at = seed % len(whole)
    (folder / name).write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 1 << seed % 8]) + whole[at + 1:])
    try: run = load_scenario(folder)
    except EvidenceError as why: assert why.file.startswith(str(folder))
    else: assert not cut and len(run.trace.events) == 788
    finally: (folder / name).write_bytes(whole)


def test_an_archive_with_other_arrays_is_refused(folder):
    import numpy as np
    with np.load(folder / 'mem.npz', allow_pickle=False) as npz: arrays = dict(npz)
    for change in ({'gfn': arrays['gfn'][::-1]}, {'gfn': arrays['gfn'][:-1]}, {'gfn': arrays['gfn'].astype(np.int64)},
                   {'page': arrays['page'][:, :4095]}, {'extra': arrays['gfn']},
                   {'page': np.array([{}], dtype=object)}, {'final_gfn': arrays['final_gfn'] + np.uint64(1 << 12)}):
        np.savez(folder / 'mem.npz', **{**arrays, **change})
        with pytest.raises(EvidenceError, match='mem.npz'): load_scenario(folder)


def test_a_step_nobody_announced_is_named(folder):
    lines = lines_of('s46_tdp_smm')
    at = next(n for n, line in enumerate(lines) if 'RIG STEP 3 ' in line)
    changed = [*lines[:at], lines[at].replace('RIG STEP 3 ', 'RIG STEP 3000 '), *lines[at + 1:]]
    (folder / 'trace.txt.xz').write_bytes(lzma.compress('\n'.join([*changed, '']).encode(), preset=0))
    run = load_scenario(folder)
    with pytest.raises(EvidenceError, match=f'line {at + 1}: step 3000: scenario.json has {len(run.steps)}'):
        list(steps_of(run))


def test_a_folder_is_a_scenario_by_its_files(folder, tmp_path):
    assert (is_scenario(folder) and not is_scenario(tmp_path) and not is_scenario(folder / 'scenario.json')
            and not is_scenario(tmp_path / 'nowhere'))
    (folder / 'mem.npz').unlink()
    assert is_scenario(folder)
    with pytest.raises(EvidenceError, match='mem.npz: is missing'): load_scenario(folder)


def test_events_are_light():
    run = parse_trace(DATA / 's09_walker_64' / 'trace.txt.xz')
    assert not hasattr(run.events[0], '__dict__') and isinstance(run.events[0], TraceEvent)
