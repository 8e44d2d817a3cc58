"""The recorded guests agree with the model on every row, and a recording with one changed value does not."""
import io
import json
import lzma
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from kvm_mmu_lit.evidence.agreement import EvidenceError
from kvm_mmu_lit.evidence.dumps import load
from kvm_mmu_lit.evidence.guests import OPTIONAL, REQUIRED, check_guest, is_guest_folder, load_guest, missing_truths
from kvm_mmu_lit.evidence.monitor import MAX_LINE, info_tlb_rows, mem_lines, paired, truth_lines, unpacked
from kvm_mmu_lit.guest.address_space import Tables
from kvm_mmu_lit.guest.verdict import GuestWalk

DATA = Path(__file__).parent / 'data'
GUESTS = sorted(path for path in (DATA / 'guests').iterdir() if path.is_dir())
SMALL = 'linux-pae-pti-user'   # The fewest rows


def verdict(folder):
    "'agrees', or what `kvm-mmu check` would report."
    try: agreements = check_guest(folder)
    except EvidenceError as why: return f"unusable: {why}"
    return next((f"differs: {a}" for a in agreements if not a.agrees), 'agrees')


def changed_copy(tmp_path, guest, name, change):
    "A copy of a guest with one file changed; xz is unpacked and packed again around `change`."
    folder = tmp_path / guest
    shutil.copytree(DATA / 'guests' / guest, folder)
    file, data = folder / name, (folder / name).read_bytes()
    if name.endswith('.xz'): file.write_bytes(lzma.compress(change(lzma.decompress(data)), preset=0))
    else: file.write_bytes(change(data))
    return folder


@pytest.mark.parametrize('folder', GUESTS, ids=lambda path: path.name)
def test_every_row_of_a_recorded_guest_agrees(folder):
    agreements = check_guest(folder)
    assert [str(a) for a in agreements if not a.agrees] == []
    assert missing_truths(folder) == []
    rows = {a.source.split('/')[1]: a.rows for a in agreements}
    meta = json.loads((folder / 'meta.json').read_text())
    checks = meta['checks']
    assert rows['tlb.txt.xz'] == rows['info-tlb.txt.xz'] == meta['mappings'] == checks['info tlb: lines']
    assert rows['gva2gpa.txt.xz'] == checks['gva2gpa: addresses']
    assert rows['probe.txt.xz PAGEMAP'] == checks['pagemap: pages agreeing']
    if meta['cpl'] == 3: assert rows['probe.txt.xz ACCESS'] == checks['accesses of the process: agreeing']
    assert rows['image.npz'] == meta['table_pages']
    if meta['paging_mode'] != '5level': assert rows['info-mem.txt.xz'] == checks['info mem: ranges']
    # and a line for each PML5 entry
    else: assert rows['info-mem-57.txt.xz'] > checks['info mem (per PML5 entry): ranges']


def test_progress_counts_up_to_all_rows():
    calls = []
    agreements = check_guest(DATA / 'guests' / SMALL, calls.append)
    assert calls == sorted(calls) and calls[-1] == sum(a.rows for a in agreements)


# One value changed, in every kind of file ------------------------------------------------------------------------------------------------

def line(number, old, new):
    "Change one line (from 0, or from the end) by replacing `old`."
    def change(data):
        lines = data.split(b'\n')[:-1]
        assert old in lines[number], lines[number]
        lines[number] = lines[number].replace(old, new, 1)
        return b'\n'.join(lines) + b'\n'
    return change


def lines(edit):
    "Change the list of lines in place."
    def change(data):
        all_lines = data.split(b'\n')[:-1]
        edit(all_lines)
        return b'\n'.join(all_lines) + b'\n'
    return change


def drop(number): return lines(lambda all_lines: all_lines.pop(number))
def twice(number): return lines(lambda all_lines: all_lines.insert(number, all_lines[number]))


def swap(number):
    def edit(all_lines): all_lines[number], all_lines[number + 1] = all_lines[number + 1], all_lines[number]
    return lines(edit)


def first(word, old, new):
    "Change the first line that starts with `word` and contains `old`."
    def edit(all_lines):
        at = next(i for i, text in enumerate(all_lines) if text.startswith(word) and old in text)
        all_lines[at] = all_lines[at].replace(old, new, 1)
    return lines(edit)


def last_digit(number):
    "Another last hex digit."
    def edit(all_lines):
        text = all_lines[number]
        all_lines[number] = text[:-1] + (b'0' if text[-1:] != b'0' else b'1')
    return lines(edit)


TEXT = {
    'tlb.txt.xz': [drop(0), drop(-1), drop(100), twice(5), swap(7), line(3, b' 4K ', b' 2M '), line(0, b'DA', b'-A'),
                   line(50, b'U', b'-'), line(9, b'0 ', b'1 '), lambda data: b'', lambda data: data[:-9],
                   lambda data: data + b'zz\n'],
    'info-tlb.txt.xz': [drop(0), drop(-1), twice(-1), swap(20), line(0, b'W', b'-'), line(-1, b'W', b'-'),
                        line(-1, b': 8', b': 0'), lambda data: b''],
    'info-mem.txt.xz': [drop(0), drop(-1), twice(3), swap(3), line(0, b'urw', b'ur-'), line(2, b'000-', b'001-'),
                        line(4, b' 0000', b' 0001'), lambda data: b''],
    'gva2gpa.txt.xz': [drop(0), drop(-1), twice(3), swap(4), last_digit(0),
                       first(b'0', b'unmapped', b'0000000000001000'), lambda data: b'', line(0, b'0000', b'1000')],
    'probe.txt.xz': [first(b'PAGEMAP', b'present', b'none'), first(b'PAGEMAP', b'none 0', b'none 5'),
                     first(b'PAGEMAP', b'none 0', b'present 77'), first(b'ACCESS', b'r!x', b'rwx'),
                     first(b'ACCESS', b'rwx', b'r!x'),
                     first(b'ACCESS', b'!!!', b'r!!'), first(b'CPUID', b'36', b'37'), first(b'UNAME', b'6.1', b'6.2'),
                     first(b'REGION', b'anon-rw', b'anon rw'), first(b'REGION', b' 40000 rw-', b' 40000 r--'),
                     first(b'MAPS', b'rw-p', b'r--p'), first(b'MAPS', b'-0804', b'-0704'), twice(-1),
                     first(b'ACCESS', b'ACCESS', b'ACESS'), drop(-1), lambda data: b''],
    'info-registers.txt': [first(b'CR0', b'CR0=8', b'CR0=9'), first(b'CR0', b' CR3=0', b' CR3=1'),
                           first(b'CR0', b'ef0', b'ef1'), first(b'EFER', b'8', b'9'), first(b'EIP', b'CPL=3', b'CPL=0'),
                           first(b'EIP', b'EFL=00000', b'EFL=00008'),
                           first(b'EIP', b'EIP=0', b'EIP=f'), first(b'CS', b'=0073', b'=0070'),
                           first(b'GDT', b'ff', b'ef'), first(b'IDT', b'ff', b'ef'), lambda data: b'',
                           lambda data: b'CPU#0\n'],
}


@pytest.mark.parametrize('name', TEXT)
def test_a_changed_truth_file_is_noticed(tmp_path, name):
    for i, change in enumerate(TEXT[name]):
        said = verdict(changed_copy(tmp_path / str(i), SMALL, name, change))
        assert (name in said and not said.startswith('agrees') or 'checks' in said
                or 'meta.json' in said), f"change {i} of {name}: {said}"


FIVE = [drop(0), drop(-1), first(b'pml5e 511', b'67', b'65'), first(b'pml5e', b'pml5e 0', b'pml5e 2'), twice(5),
        line(3, b'u', b'-'), lines(lambda all_lines: all_lines.insert(0, all_lines.pop(1)))]


def test_a_changed_five_level_range_is_noticed(tmp_path):
    for i, change in enumerate(FIVE):
        said = verdict(changed_copy(tmp_path / str(i), 'linux-5level', 'info-mem-57.txt.xz', change))
        assert 'info-mem-57' in said, f"change {i}: {said}"


def repacked(edit):
    "Change the arrays of image.npz and pack them again."
    def change(data):
        arrays = np.load(io.BytesIO(data), allow_pickle=False)
        gfn, pages = edit(arrays['gfn'].copy(), arrays['pages'].copy())
        out = io.BytesIO()
        np.savez_compressed(out, gfn=gfn, pages=pages)
        return out.getvalue()
    return change


def entry_bit(bit, present_leaf=True):
    "Flip a bit of the first present entry of the last recorded table that has one."
    def edit(gfn, pages):
        for page in pages[::-1]:
            words = page.view('<u8')
            used = np.flatnonzero(words & np.uint64(1))
            if len(used) > 2 and (words[used] & np.uint64(1 << 5)).all():
                words[used[1]] ^= np.uint64(1 << bit)
                return gfn, pages
        raise AssertionError('no table to change')
    return repacked(edit)


PAGES = [entry_bit(bit) for bit in (0, 1, 2, 3, 4, 5, 6, 8, 12, 20, 33, 51, 63)] + [
    repacked(lambda gfn, pages: (gfn[1:], pages[1:])), repacked(lambda gfn, pages: (gfn[:-1], pages[:-1])),
    repacked(lambda gfn, pages: (gfn + np.uint64(1), pages)),
    repacked(lambda gfn, pages: (np.append(gfn, gfn[-1] + np.uint64(1)), np.append(pages, pages[:1], axis=0))),
    repacked(lambda gfn, pages: (gfn, pages[::-1])), repacked(lambda gfn, pages: (gfn[::-1], pages)),
    lambda data: data[:-100], lambda data: data[:2000] + b'\xff' + data[2001:]]


def test_a_changed_table_is_noticed(tmp_path):
    for i, change in enumerate(PAGES):
        said = verdict(changed_copy(tmp_path / str(i), SMALL, 'image.npz', change))
        assert said != 'agrees', f"change {i} of image.npz"


def edited(*path, value):
    "Set one value of meta.json; a function is given the old one."
    def change(data):
        meta = json.loads(data)
        at = meta
        for key in path[:-1]: at = at[key]
        at[path[-1]] = value(at[path[-1]]) if callable(value) else value
        return json.dumps(meta).encode()
    return change


def more(number): return number + 1


META = [edited('cr0', value=0x80040033), edited('cr0', value=0x11), edited('cr3', value=lambda cr3: cr3 ^ 0x20),
        edited('cr3', value=lambda cr3: cr3 + 4096), edited('cr4', value=lambda cr4: cr4 ^ (1 << 20)),
        edited('cr4', value=lambda cr4: cr4 ^ (1 << 5)), edited('efer', value=0), edited('hex', 'cr4', value='0x0'),
        edited('maxphyaddr', value=37), edited('maxphyaddr', value=20), edited('cpl', value=0),
        edited('pkru', value='0x1'),
        edited('paging_mode', value='4level'), edited('format', value=2), edited('stopped_in', value='kernel mode'),
        edited('table_pages', value=more), edited('table_pages_by_level', '1', value=more),
        edited('mappings', value=more),
        edited('mappings_by_size', '2M', value=more), edited('pdptes', value=lambda pdptes: pdptes[:3]),
        edited('pdptes', value=lambda pdptes: ['0x1', *pdptes[1:]]), edited('ram_segments', value=[['0x0', '0x1000']]),
        edited('ram_segments', value=7),
        edited('guest_memory', value='257M'), edited('guest_memory', value=None),
        edited('kernel_command_line', value='quiet'), edited('kernel_package', value='linux-image-6.2'),
        edited('accelerator', value='kvm'),
        edited('checks', 'info tlb: lines', value=more), edited('checks', 'info mem: ranges', value=more),
        edited('checks', 'gva2gpa: of these unmapped', value=more), edited('checks', 'all good', value=False),
        edited('checks', 'problems', value=['one']),
        edited('checks', value=[]), edited('cpu_flags', value=[]), edited('cpu_flags', value='nx'),
        edited('linear_address_bits_cpuid', value=48), edited('cr0', value='0x80050033'), edited('cr0', value=True),
        edited('cr4', value=None), lambda data: b'[]', lambda data: data[:-2]]


def test_a_changed_description_is_noticed(tmp_path):
    for i, change in enumerate(META):
        said = verdict(changed_copy(tmp_path / str(i), SMALL, 'meta.json', change))
        assert said != 'agrees', f"change {i} of meta.json"


# Files that are not there, or are not what they say --------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', REQUIRED)
def test_a_guest_without_a_required_file_is_unusable(tmp_path, name):
    folder = changed_copy(tmp_path, SMALL, name, lambda data: data)
    (folder / name).unlink()
    assert verdict(folder).startswith('unusable') and name in verdict(folder) and is_guest_folder(folder)


@pytest.mark.parametrize('name', [name for name in OPTIONAL if name != 'info-mem-57.txt.xz'])
def test_a_missing_truth_file_is_named_and_contradicts_what_was_recorded(tmp_path, name):
    folder = changed_copy(tmp_path, SMALL, name, lambda data: data)
    (folder / name).unlink()
    assert [missing for missing in missing_truths(folder) if missing == name] == [name]
    if name != 'info-registers.txt': assert 'nothing to compare' in verdict(folder)   # nothing counted the registers


def test_a_small_file_that_unpacks_to_very_much_is_refused_early(tmp_path):
    bomb = tmp_path / 'tlb.txt.xz'
    packer, piece = lzma.LZMACompressor(preset=0), b'\n' * (1 << 20)
    bomb.write_bytes(b''.join([*(packer.compress(piece) for _ in range(80)), packer.flush()]))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(EvidenceError, match='unpacks to more than 67,108,864 bytes'):
        for _ in unpacked(bomb): pass


@pytest.mark.parametrize('data, rule', [(b'', 'middle of the xz'), (b'plain text' * 9, 'cannot be read'),
                                        (lzma.compress(b'x' * (MAX_LINE + 1)), 'longer than'),
                                        (lzma.compress(b'a\n') + b'more', 'after the end'),
                                        (lzma.compress(b'a\n' * 70_000) + bytes(1 << 16), 'after the end'),
                                        (lzma.compress(b'a\n')[:-4], 'middle of the xz')],
                         ids=['empty', 'text', 'long line', 'more', 'much more', 'cut'])
def test_a_truth_file_that_is_no_xz_says_so(tmp_path, data, rule):
    (tmp_path / 'a.xz').write_bytes(data)
    with pytest.raises(EvidenceError, match=rule): list(truth_lines(tmp_path / 'a.xz'))


def test_a_map_without_end_is_refused_before_it_is_listed(tmp_path):
    "Every entry of the root points at the root again: 512 ** 4 pages, from one table."
    folder = changed_copy(tmp_path, 'linux-4level', 'image.npz', repacked(lambda gfn, pages: (gfn[:1], pages[:1])))
    meta = json.loads((folder / 'meta.json').read_text())
    root = meta['cr3'] >> 12
    np.savez_compressed(folder / 'image.npz', gfn=np.array([root], '<u8'),
                        pages=np.full(512, root << 12 | 0x67, '<u8').view('u1').reshape(1, 4096))
    with pytest.raises(EvidenceError, match='map 68,719,476,736 pages; at most 16,777,216'): load_guest(folder)


def test_a_damaged_guest_is_compared_or_unusable(tmp_path):
    "Whatever stands in a truth file or in meta.json: agreements or an `EvidenceError`, never another exception."
    rng, folder = random.Random('guest'), tmp_path / SMALL
    shutil.copytree(DATA / 'guests' / SMALL, folder)
    odd = [None, True, -1, 0, 1.5, 1 << 70, '', '0x', 'x' * 50, [], [[]], [['0x0']], {}, {'1': None}]
    for name in sorted(path.name for path in folder.iterdir() if path.suffix in ('.xz', '.txt', '.json')):
        original = (folder / name).read_bytes()
        packed = name.endswith('.xz')
        for _ in range(14 if name == 'meta.json' else 5):
            if name == 'meta.json':
                meta = json.loads(original)
                meta[rng.choice(sorted(meta))] = rng.choice(odd)
                data = json.dumps(meta).encode()
            else:
                data = bytearray(lzma.decompress(original) if packed else original)
                for _ in range(rng.choice((1, 3))): data[rng.randrange(len(data))] = rng.choice(b'0f \n-x\xff')
                data = lzma.compress(bytes(data), preset=0) if packed else bytes(data)
            (folder / name).write_bytes(data)
            assert isinstance(verdict(folder), str)
        (folder / name).write_bytes(original)


def test_paired_reports_what_only_one_side_has():
    rows = list(paired([(1, 10, 'a'), (2, 30, 'c'), (3, 20, 'late')], [(10, 'a'), (20, 'b'), (30, 'C')]))
    assert [row[1:] for row in rows] == [('a', 'a'), ('no such line', 'b'), ('c', 'C'), ('late', 'nothing there')]
    assert list(paired([], [(1, 'x')])) == [('after the last line', 'no such line', 'x')]


# The cores QEMU wrote --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('paging', ['', '-paging'])
@pytest.mark.parametrize('name', ['long', 'pae'])
def test_a_core_gives_the_map_the_monitor_saw(tmp_path, name, paging):
    core = tmp_path / 'core'
    core.write_bytes(lzma.open(DATA / f'cores/{name}{paging}.elf.xz').read())
    image = load(core, accelerator='tcg')
    tables = Tables(image.walker())
    truth = DATA / f'cores/{name}-info-tlb.txt'
    assert [row for row in info_tlb_rows(truth, tables) if row[1] != row[2]] == []
    assert [text for _, text in mem_lines(tables)] == (DATA / f'cores/{name}-info-mem.txt').read_text().split('\n')[:-1]
    for text in (DATA / f'cores/{name}-gva2gpa.txt').read_text().split('\n')[:-1]:
        va, answer = text.split(' ', 1)
        found = image.walker().walk(int(va, 16) & (1 << 64 if name == 'long' else 1 << 32) - 1)
        assert answer == (f"gpa: {found.gpa:#x}".replace('0x0', '0') if isinstance(found, GuestWalk)
                          else 'Unmapped'), text
