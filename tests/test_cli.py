"""The `kvm-mmu` command as a user runs it: answers, JSON, pictures, exit codes, and one-line errors."""
import contextlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from kvm_mmu_lit.cli import main
from kvm_mmu_lit.evidence.dumps import load
from kvm_mmu_lit.guest.address_space import mappings
from kvm_mmu_lit.guest.walk import Walker

DATA = Path(__file__).parent / 'data'
GUEST = DATA / 'guests' / 'linux-4level'
KERNEL_TEXT = '0xffffffff92c00000'    # where this guest's KASLR put it


def run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


@pytest.fixture(scope='module')
def pages():
    image = load(GUEST)
    return list(mappings(Walker(image.memory, image.regs)))


def test_walk_says_where_an_address_leads(capsys, pages):
    page = next(p for p in pages if p.rights & 4)
    code, out, err = run(capsys, 'walk', GUEST, hex(page.va + 5))
    assert code == 0 and err == ''
    assert f'{page.gpa + 5:#x}'[2:] in out.replace('_', '')


def test_a_refused_walk_exits_1_and_names_the_entry(capsys):
    code, out, _ = run(capsys, 'walk', GUEST, KERNEL_TEXT, '--user')
    assert code == 1
    assert '#PF' in out and 'U=0' in out


def test_json_holds_every_step(capsys, pages):
    page = next(p for p in pages if p.level == 1)
    code, out, _ = run(capsys, 'walk', GUEST, hex(page.va), '--json', '--supervisor')
    data = json.loads(out)
    assert [step['level'] for step in data['steps']] == [4, 3, 2, 1]
    assert data['steps'][-1]['entry'] == page.gpte


def test_explain_gives_the_smallest_change(capsys):
    code, out, _ = run(capsys, 'explain', GUEST, KERNEL_TEXT, '--supervisor', '--write')
    assert code == 1
    assert 'smallest change' in out


def test_map_lists_every_page_and_frames_are_found(capsys, pages):
    code, out, _ = run(capsys, 'map', GUEST, '--json')
    assert code == 0
    assert [(row['va'], row['gpa']) for row in json.loads(out)['rows']] == [(p.va, p.gpa) for p in pages]
    frame = pages[7].gpa >> 12
    _, out, _ = run(capsys, 'map', GUEST, '--frame', hex(frame), '--json')
    found = [row['va'] for row in json.loads(out)['rows']]
    assert pages[7].va in found
    assert found == [p.va for p in pages if 0 <= frame - (p.gpa >> 12) < (1 << 9 * (p.level - 1))]


def test_map_filters_by_rights(capsys, pages):
    _, out, _ = run(capsys, 'map', GUEST, '--flags', 'wx', '--json')
    assert [row['va'] for row in json.loads(out)['rows']] == [p.va for p in pages if p.rights & 3 == 3]
    _, out, _ = run(capsys, 'map', GUEST, '--flags', 'u-w', '--json')
    assert [row['va'] for row in json.loads(out)['rows']] == [p.va for p in pages if p.rights & 6 == 4]


def test_ranges_cover_what_the_pages_cover(capsys, pages):
    _, out, _ = run(capsys, 'map', GUEST, '--ranges', '--json')
    rows = json.loads(out)['rows']
    assert sum(row['end'] - row['start'] for row in rows) == sum(1 << 12 + 9 * (p.level - 1) for p in pages)
    assert all(a['end'] <= b['start'] for a, b in zip(rows, rows[1:]))


def test_a_map_over_the_limit_is_refused_before_it_is_listed(capsys, pages):
    code, out, err = run(capsys, 'map', GUEST, '--limit', 10)
    assert code == 2 and out == ''
    assert f'{len(pages):,}' in err


@pytest.mark.parametrize('argv, named', [
    (('gpte', '0x8000000000203067'), 'NX'), (('gpte', '0x83', '--mode', '2level', '--level', '2'), 'PS'),
    (('gpte', '0x7', '--mode', 'ept4'), 'X'),
    (('error-code', '0x1d'), 'RSVD'), (('cr0', '0x80010001'), 'WP'), (('cr4', '0x300020'), 'SMAP'),
    (('efer', '0xd01'), 'NX'), (('cr3', '0x1abc'), '0x1'),
    (('eptp', '0x105e'), '3'), (('pkru', '0x55555554'), 'AD1')])
def test_decode_names_the_bits(capsys, argv, named):
    code, out, _ = run(capsys, 'decode', *argv)
    assert code == 0 and named in out
    code, out, _ = run(capsys, 'decode', *argv, '--json')
    rows = json.loads(out)
    assert sum(row['value'] << row['low'] for row in rows) == int(argv[1], 0)


@pytest.mark.parametrize('argv, kind, facts', [
    (('0x1234e67',), 'page',
     dict(pfn=0x1234, writable_state='111', writable=True, dirty=True, accessed=True, volatile=False)),
    (('0x8000000001234a25',), 'page', dict(writable_state='100', executable=False)),
    (('0x0610000001234877', '--ept'), 'page', dict(ad_enabled=False, ad_need_write_protect=True, executable=True)),
    (('0x0750000001234870', '--ept'), 'page, access-tracked',
     dict(accessed=False, writable=False, writable_state='110', volatile=True)),
    (('0x905907', '--ept', '--level', '2'), 'table', dict(pfn=0x905)),
    (('0x00080000fee0002f',), 'MMIO', dict(gen=5, gfn=0xfee00, access=6)),
    (('0xfee0002e', '--ept'), 'MMIO', dict(gen=5, gfn=0xfee00, access=0)),
    (('0x5a0', '--ept'), 'removed', {}), (('0',), 'empty', {}), (('0x1234067',), 'not present', {})])
def test_decode_says_what_an_entry_of_kvms_is(capsys, argv, kind, facts):
    code, out, _ = run(capsys, 'decode', 'spte', *argv, '--json')
    told = json.loads(out)
    assert code == 0 and told['kind'] == kind and {name: told[name] for name in facts} == facts
    assert sum(row['value'] << row['low'] for row in told['fields']) == int(argv[0], 0)
    assert sum(row['high'] - row['low'] + 1 for row in told['fields']) == 64
    code, out, _ = run(capsys, 'decode', 'spte', *argv)
    assert code == 0 and out.startswith(kind)


@pytest.mark.parametrize('argv, word', [(('0x10000000000000000',), '64 bits'), (('0x1234e67', '--level', '6'), '1..5')])
def test_decode_refuses_what_is_no_entry_of_kvms(capsys, argv, word):
    code, out, err = run(capsys, 'decode', 'spte', *argv)
    assert code == 2 and out == '' and word in err


def test_pictures_are_written_whole(capsys, tmp_path):
    for n, argv in enumerate((('walk', GUEST, KERNEL_TEXT, '--supervisor'), ('explain', GUEST, '0x10000', '--write'),
                              ('map', GUEST, '--ranges'), ('decode', 'gpte', '0x67'), ('decode', 'error-code', '7'),
                              ('decode', 'spte', '0xfee0002e', '--ept'))):
        run(capsys, *argv, '--svg', tmp_path / f'{n}.svg')
        assert (tmp_path / f'{n}.svg').read_text().lstrip().startswith('<svg')
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'{n}.svg' for n in range(6)]


def test_a_raw_dump_needs_registers_and_then_walks_alike(capsys, tmp_path):
    image = load(GUEST)
    raw = tmp_path / 'ram.raw'
    with raw.open('wb') as file:
        for slot in image.memory.slots:
            file.seek(slot.base_gfn << 12)
            file.write(slot.buffer)
    code, out, err = run(capsys, 'walk', raw, KERNEL_TEXT)
    assert code == 2 and 'cr3' in err and out == ''
    regs = [f'--{name}={getattr(image.regs, name):#x}' for name in ('cr0', 'cr3', 'cr4', 'efer', 'maxphyaddr')]
    direct = run(capsys, 'walk', GUEST, KERNEL_TEXT, '--supervisor', '--json')
    assert run(capsys, 'walk', raw, KERNEL_TEXT, '--supervisor', '--json', *regs) == direct


def test_ept_is_walked_from_eptp(capsys, tmp_path):
    raw = tmp_path / 'ept.raw'
    tables = bytearray(6 * 4096)
    for level, frame in ((4, 1), (3, 2), (2, 3)):
        tables[frame * 4096:frame * 4096 + 8] = ((frame + 1) << 12 | 7).to_bytes(8, 'little')
    tables[4 * 4096:4 * 4096 + 8] = (5 << 12 | 0x33).to_bytes(8, 'little')
    raw.write_bytes(tables)
    code, out, _ = run(capsys, 'walk', raw, '0x123', '--ept', '--eptp=0x101e', '--json')
    assert code == 0 and json.loads(out)['gpa'] == 0x5123
    code, out, _ = run(capsys, 'walk', raw, '0x123', '--ept', '--eptp=0x101e', '--fetch', '--json')
    assert code == 1 and json.loads(out)['exit_reason'] == 48


@pytest.mark.parametrize('argv', [
    ('walk', 'nowhere', '0x1000'), ('walk', GUEST, '0x1_0000_0000_0000_0000'),
    ('walk', GUEST, '0x1000', '--cr0=0x80000000'), ('check', 'nowhere'),
    ('decode', 'gpte', '0x1', '--level', '9'), ('check', GUEST / 'README.md'),
    ('walk', GUEST, '0', '--user', '--implicit')])
def test_errors_are_one_line_and_exit_2(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ''
    assert err.startswith('kvm-mmu: ') and err.count('\n') == 1


def test_check_agrees_and_notices_one_changed_byte(capsys, tmp_path):
    guest = tmp_path / 'linux-pae'
    shutil.copytree(DATA / 'guests' / 'linux-pae', guest)
    code, out, _ = run(capsys, 'check', guest)
    assert code == 0 and ' 0 differ' in out
    meta = json.loads((guest / 'meta.json').read_text())
    meta['maxphyaddr'] -= 8
    (guest / 'meta.json').write_text(json.dumps(meta))
    code, out, _ = run(capsys, 'check', guest, '--json')
    assert code in (1, 2)


def test_check_names_the_recorded_files_that_are_not_there(capsys, tmp_path):
    guest = Path(shutil.copytree(DATA / 'guests' / 'linux-pae', tmp_path / 'linux-pae'))
    (guest / 'info-registers.txt').unlink()
    code, out, _ = run(capsys, 'check', guest)
    assert code == 0 and 'linux-pae/info-registers.txt: not there, so not compared' in out.splitlines()


def test_the_installed_command_runs():
    script = Path(sys.executable).parent / 'kvm-mmu'
    done = subprocess.run([script, 'decode', 'error-code', '3'], capture_output=True, text=True)
    assert done.returncode == 0 and 'a write' in done.stdout


def test_a_closed_pipe_is_no_error():
    script = Path(sys.executable).parent / 'kvm-mmu'
    done = subprocess.run(f'{script} map {GUEST} | head -n 1', shell=True, capture_output=True, text=True)
    assert done.stderr == '' and done.stdout.count('\n') == 1


def test_what_cannot_be_used_does_not_hide_what_differs(capsys, tmp_path):
    for name in ('linux-2level', 'linux-pae', 'linux-pae-pti-user'):
        shutil.copytree(DATA / 'guests' / name, tmp_path / name)
    (tmp_path / 'linux-pae' / 'tlb.txt.xz').write_bytes(b'not xz')
    code, out, err = run(capsys, 'check', tmp_path)
    assert code == 2 and 'linux-pae/tlb.txt.xz' in err and err.count('\n') == 1
    assert 'linux-2level/' in out and 'linux-pae-pti-user/' in out and ', 0 differ' in out
    meta = json.loads((tmp_path / 'linux-2level' / 'meta.json').read_text())
    (tmp_path / 'linux-2level' / 'meta.json').write_text(json.dumps({**meta, 'mappings': meta['mappings'] + 1}))
    code, out, err = run(capsys, 'check', tmp_path, '--json')
    data = json.loads(out)
    assert code == 1 and data['differ'] >= 1 and len(data['unusable']) == 1


# Roles, roots, designs, traces

RUN = DATA / 'kvm-traces' / 's31_nested_npt_pae'


def test_a_role_word_is_taken_apart(capsys):
    code, out, err = run(capsys, 'role', '0x61705', '--json')
    fields = json.loads(out)['fields']
    assert (code == 0 and err == '' and (fields['level'], fields['passthrough'], fields['guest_mode'], fields['access'])
            == (5, 1, 1, 7))


def test_registers_give_the_role_they_ask_for_and_the_roots_of_every_host(capsys):
    code, out, _ = run(capsys, 'role', '--cr0', '0x80010001', '--cr4', '0x20', '--efer', '0xd00', '--json')
    told = json.loads(out)
    assert code == 0 and told['word'] & 0xffff_ffff == 0x3704
    assert (told['root_roles']['svm-64'], told['root_roles']['svm-64-shadow'],
            told['root_roles']['svm-32']) == (0x3784, 0x3704, None)


def test_a_difference_of_roles_names_the_fields(capsys):
    code, out, _ = run(capsys, 'role', '0x21704', '--diff', '0x61705', '--json')
    assert code == 0 and json.loads(out)['changes'] == [['level', 4, 5], ['passthrough', 0, 1]]


@pytest.mark.parametrize('argv, why', [(['0x80000'], '23:19'), (['0x6'], 'level 6'), ([], 'give a role word'),
                                       (['0x3704', '--cr0', '1'], 'give a role word'),
                                       (['--cr0', '0x80000000'], 'CR0.PE'),
                                       (['--cr0', '0x80000001', '--efer', '0x500'], 'CR4.PAE')])
def test_a_role_that_cannot_be_is_refused(capsys, argv, why):
    code, out, err = run(capsys, 'role', *argv)
    assert code == 2 and out == '' and why in err and err.count('\n') == 1


def test_case_5_on_the_command_line(capsys):
    code, out, _ = run(capsys, 'roots', '--host', 'svm-64', '--guest', 'pae', '--nested', 'npt', '--json')
    told = json.loads(out)
    assert code == 0 and (told['storage'], told['case'], told['root_role'],
                          told['mmu']) == ('pml4_root', 5, 0x21704, 'guest_mmu')
    assert [name for name, says in told['tests'].items() if not says] == ['reviewer']


@pytest.mark.parametrize('argv, why', [(['--host', 'vmx-32', '--guest', '5level'], 'no 64-bit guest'),
                                       (['--host', 'svm-64-shadow', '--nested', 'npt'], 'needs NPT'),
                                       (['--host', 'vmx-64', '--nested', 'npt'], 'needs NPT'),
                                       (['--guest', '5level'], 'LA57')])
def test_a_root_nobody_gets_is_refused(capsys, argv, why):
    code, out, err = run(capsys, 'roots', *argv)
    assert code == 2 and out == '' and why in err


def test_every_mmu_is_listed(capsys):
    from kvm_mmu_lit.mmu.root_role import all_mmus
    code, out, _ = run(capsys, 'roots', '--list', '--json')
    assert code == 0 and len(json.loads(out)) == len(all_mmus())


def test_a_review_tells_the_shortest_history_and_its_file_replays(capsys, tmp_path):
    code, out, _ = run(capsys, 'review', '--design', 'reviewer', '--world', 'NPT, 4-level host', '--depth', '4',
                       '--json', '--svg', tmp_path / 'r.svg')
    told, = json.loads(out)
    crash = next(one for one in told['found'] if one['breaks'] == 'null dereference')
    assert (code == 0 and not told['holds'] and not told['complete']
            and (tmp_path / 'r.svg').read_text().startswith('<svg'))
    history = {name: crash[name] for name in ('format', 'world', 'design', 'breaks', 'events')}
    (tmp_path / 'crash.json').write_text(json.dumps(history))
    assert run(capsys, 'review', '--replay', tmp_path / 'crash.json')[0] == 0
    (tmp_path / 'crash.json').write_text(json.dumps({**history, 'design': '6.1'}))
    assert run(capsys, 'review', '--replay', tmp_path / 'crash.json')[0] == 1


def test_a_review_keeps_its_histories_and_each_replays(capsys, tmp_path):
    code, out, _ = run(capsys, 'review', '--design', 'reviewer', '--world', 'NPT, 4-level host', '--depth', '4',
                       '--save', tmp_path / 'kept')
    kept = sorted((tmp_path / 'kept').iterdir())
    assert code == 0 and kept and all(f'wrote {path}' in out for path in kept)
    assert [run(capsys, 'review', '--replay', path)[0] for path in kept] == [0] * len(kept)


@pytest.mark.parametrize('text, why',
                         [('', 'no JSON'), ('{}', 'format'),
                          ('{"format": "kvm_mmu_lit history 1", "world": "nowhere", "design": "6.1", "events": []}',
                           'nowhere'),
                                       ('{"format": "kvm_mmu_lit history 1", "world": "NPT, 4-level host", "design": '
                                        '"6.1", "events": ["vmexit"]}', 'event 1')])
def test_a_history_that_cannot_be_is_refused(capsys, tmp_path, text, why):
    (tmp_path / 'h.json').write_text(text)
    code, out, err = run(capsys, 'review', '--replay', tmp_path / 'h.json')
    assert code == 2 and out == '' and why in err


def test_a_design_nobody_proposed_is_refused(capsys):
    code, _, err = run(capsys, 'review', '--design', 'hope')
    assert code == 2 and 'hope' in err and 'role bit' in err


def test_a_trace_spells_its_roles(capsys):
    code, out, _ = run(capsys, 'trace', RUN, '--events', 'get_sp_ret', '--limit', '3')
    assert code == 0 and '[role 0x' in out and 'level' in out and 'none unknown' in out and 'prev 0' in out


def test_a_trace_keeps_what_it_does_not_know(capsys, tmp_path):
    (tmp_path / 't.txt').write_text('1.000000: kvm_brand_new: x=1\n2.000000: kvm_mmu_walker_error: pferr 5 P|U\n')
    code, out, _ = run(capsys, 'trace', tmp_path / 't.txt', '--json')
    assert code == 0 and json.loads(out)['unknown'] == {'kvm_brand_new': 1} and json.loads(out)['events'] == 2


def test_a_malformed_trace_names_file_and_line(capsys, tmp_path):
    (tmp_path / 't.txt').write_text('1.000000: kvm_mmu_walker_error: pferr 5 P|U\n2.000000: kvm_mmu_walker_error: '
                                    'pferr\n')
    code, out, err = run(capsys, 'trace', tmp_path / 't.txt')
    assert code == 2 and out == '' and 't.txt' in err and 'line 2' in err


def test_registers_compare_with_a_page_role_by_their_base(capsys):
    code, out, _ = run(capsys, 'role', '--cr0', '0x80010001', '--cr4', '0x20', '--efer', '0xd00', '--diff', '0x3703',
                       '--json')
    assert code == 0 and json.loads(out)['changes'] == [['level', 4, 3]]


def test_a_trace_alone_shows_its_roots_and_says_what_was_lost(capsys, tmp_path):
    lines = lzma.decompress((RUN / 'trace.txt.xz').read_bytes()).decode().splitlines()
    (tmp_path / 't.txt').write_text('\n'.join(['# tracer: nop', *lines[:5], 'CPU:0 [LOST 12 EVENTS]', *lines[5:]])
                                    + '\n')
    code, out, _ = run(capsys, 'trace', tmp_path / 't.txt', '--json', '--limit', '3')
    alone, folder = json.loads(out), json.loads(run(capsys, 'trace', RUN, '--json', '--limit', '3')[1])
    assert code == 0 and alone['lost'] == 12 and alone['counts'] == folder['counts'] and len(alone['shown']) == 3
    _, out, _ = run(capsys, 'trace', tmp_path / 't.txt', '--limit', '0', '--mmu', 'guest_mmu')
    assert 'prev 2' in out and '0x10b000 @ 0x799e000' in out and '12 lost' in out


@pytest.mark.parametrize('argv, why', [(['--events', 'kvm_nothing'], 'kvm_nothing'), (['--limit', '-1'], '0 or more')])
def test_a_filter_that_cannot_be_is_refused(capsys, argv, why):
    code, out, err = run(capsys, 'trace', RUN, *argv)
    assert code == 2 and out == '' and why in err


def test_a_long_trace_takes_no_more_memory_than_a_short_one(tmp_path):
    line, peaks = '1.000000: kvm_mmu_walker_error: pferr 5 P|U\n', []
    for count in (2_000, 40_000):
        (tmp_path / 't.txt').write_text(line * count)
        tracemalloc.start()
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(['trace', str(tmp_path / 't.txt'), '--limit', '5']) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20)


def test_a_recorded_run_is_checked(capsys):
    code, out, _ = run(capsys, 'check', RUN, '--json')
    told = json.loads(out)
    assert code == 0 and told['differ'] == 0 and told['rows'] > 1000
