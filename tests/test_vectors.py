"""Recorded vectors that were changed, cut, mistyped or made up: a wrong value is reported, a wrong file is refused,
nothing else happens."""
import io
import json
import random
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kvm_mmu_lit.evidence.agreement import EvidenceError
from kvm_mmu_lit.evidence.vector_files import load_vectors
from kvm_mmu_lit.evidence.vectors import FORMS, check_vectors

DATA = Path(__file__).parent / 'data' / 'kernel-vectors'
FORM = {form.kind: form for form in FORMS}
COMPARED = [form.kind for form in FORMS if form.groups]

# What was recorded, as opposed to asked: the arrays, and of an array with questions in it the columns.
ANSWERS = [
    *(('walks', key, None) for key in ('ok', 'errcode', 'level', 'pte_access', 'pt_access', 'gfn', 'exit_qual',
                                       'a_after', 'd_after')),
    *(('permissions', key, None) for key in ('permissions', 'pkru_mask', 'errcode')),
    *(('permissions', 'wp_refresh', column) for column in (6, 7)),
    *(('reserved', key, None) for key in ('rsvd_mask', 'rsvd_written', 'ept_mask', 'ept_bad_mt_xwr', 'guest_mask',
                                          'sample_is_rsvd', 'ept_sample_is_rsvd', 'zero_mask', 'zero_bad_mt_xwr')),
    *(('sptes', 'gpte', column) for column in (4, 5, 6, 7)), ('sptes', 'mask_val', None), ('sptes', 'mmio', 4),
    ('sptes', 'mmio', 5),
    *(('accesses', f'{family}_result', None) for family in ('strided', 'core', 'smep_ext')),
    *(('ept_accesses', key, None) for key in ('kind', 'exit_qual', 'entries')),
    *(('roles', key, None) for key in ('cpu_role', 'shadow_root_role', 'shadow_gva_to_gpa', 'shadow_page_fault',
                                       'tdp_root_role', 'tdp_gva_to_gpa', 'tdp_page_fault', 'npt_cpu_role',
                                       'npt_root_role', 'npt_gva_to_gpa', 'npt_page_fault', 'npt_caller_real',
                                       'ept_cpu_role', 'ept_root_role', 'ept_fn', 'ept_permissions', 'ept_guest_rsvd',
                                       'ept_shadow_zero')),
    ('child_roles', 'child_role', None), *(('root_storage', 'table', column) for column in range(9, 20)),
    *(('root_storage', key, None) for key in ('root_role', 'cpu_role', 'sp_role', 'root_gfn', 'special_entry_low12')),
]
# Some values cannot be said at all
BOUNDED = {('ept_accesses', 'kind'), ('root_storage', 'table'), ('roles', 'cpu_role'), ('roles', 'npt_cpu_role'),
           ('roles', 'ept_cpu_role'), ('root_storage', 'cpu_role'), ('roles', 'npt_caller_real')}


def columns(kind):
    "Key -> `Column` of a kind of file."
    return {key: column for group in FORM[kind].groups.values() for key, column in group.items()}


def some_rows(kind, rows, seed=0):
    "A random part of a recorded file: rows of each group that belong together, as arrays that can be changed."
    rng, arrays = np.random.default_rng(seed), {}
    with np.load(DATA / f'{kind}.npz', allow_pickle=False) as npz:
        for group in FORM[kind].groups.values():
            count = max(len(npz[key]) for key, column in group.items() if not column.fixed)
            chosen = rng.permutation(count)[:rows]
            for key, column in group.items(): arrays[key] = npz[key].copy() if column.fixed else npz[key][chosen].copy()
    return arrays


def check(folder, arrays, name='some.npz'):
    np.savez(folder / name, **arrays)
    return check_vectors(folder / name)


def flip(array, rng, bit=None, column=None):
    "Flip one bit of one element."
    place = tuple(rng.randrange(n) for n in array.shape)
    if column is not None: place = place[:-1] + (column,)
    array[place] ^= array.dtype.type(1 << (rng.randrange(8 * array.dtype.itemsize) if bit is None else bit))
    return place


@pytest.mark.parametrize('kind', COMPARED)
def test_any_part_of_a_file_in_any_order_is_compared_in_full(tmp_path, kind):
    found = check(tmp_path, some_rows(kind, 60, seed=3))
    assert found and all(agreement.agrees for agreement in found), [str(agreement) for agreement in found]
    assert (sum(agreement.rows for agreement in found)
            >= min(60, max(len(array) for array in some_rows(kind, 60).values())))


@pytest.mark.parametrize('kind', COMPARED)
def test_a_file_with_one_group_alone_is_compared(tmp_path, kind):
    arrays = some_rows(kind, 20)
    for group in FORM[kind].groups.values():
        found = check(tmp_path, {key: arrays[key] for key in group}, f'{kind}.npz')
        assert any(agreement.agrees for agreement in found) and not any(agreement.differ for agreement in found)


@pytest.mark.parametrize('kind, key, column', ANSWERS)
def test_a_flipped_bit_of_an_answer_is_reported(tmp_path, kind, key, column):
    rng, original = random.Random(f'{kind} {key} {column}'), some_rows(kind, 25, seed=1)
    if kind == 'permissions': original = some_rows(kind, 1, seed=1)
    for _ in range(4 if kind in ('permissions', 'roles', 'child_roles', 'root_storage') else 10):
        arrays = {name: array.copy() for name, array in original.items()}
        place = flip(arrays[key], rng, bit=rng.randrange(2) if (kind, key) == ('ept_accesses', 'kind') else None,
                     column=column)
        try: found = check(tmp_path, arrays)
        # a kind there is not, a level above five
        except EvidenceError as why: assert (kind, key) in BOUNDED and why.key == key, (place, why)
        else:
            assert sum(agreement.differ for agreement in found) >= 1, (place, arrays[key][place])
            assert any(agreement.shown for agreement in found)


@pytest.mark.parametrize('bit', range(16))
@pytest.mark.parametrize('family', ['strided', 'core', 'smep_ext'])
def test_every_bit_of_an_access_result_counts(tmp_path, family, bit):
    arrays = some_rows('accesses', 30, seed=bit)
    result = arrays[f'{family}_result']
    result ^= np.uint16(1 << bit)
    found = [agreement for agreement in check(tmp_path, arrays) if family in agreement.source
             and '4level' in agreement.source]
    assert [agreement.differ for agreement in found] == [30]


def test_every_step_of_a_root_switch_counts_up_to_a_null_dereference(tmp_path):
    rng, original = random.Random(7), some_rows('pgd_switches', 12, seed=2)
    for _ in range(12):
        arrays = {key: array.copy() for key, array in original.items()}
        run, test = rng.randrange(12), rng.randrange(3)
        dead = arrays['result'][run, test, :, 1]
        last = int(np.argmax(dead)) if dead.any() else len(dead) - 1
        step, column = rng.randrange(last + 1), rng.choice((1,) if dead.any() and last == 0 else (0, 1, 2, 4, 5))
        if step == last and dead.any(): column = 1        # All that is known of such a step
        arrays['result'][run, test, step, column] ^= 1
        found, = check(tmp_path, arrays)
        assert (found.differ >= 1 and f'run {run}, ' in found.shown[0].row
                and f'step {step}' in found.shown[0].row), (run, test, step, column)


def test_what_comes_after_a_null_dereference_is_not_believed(tmp_path):
    arrays = some_rows('pgd_switches', 108)
    run, test, step = (int(n) for n in np.argwhere(arrays['result'][:, :, :-1, 1])[0])
    before = [agreement.rows for agreement in check(tmp_path, arrays)]
    arrays['result'][run, test, step + 1:] ^= 1
    found, = check(tmp_path, arrays)
    assert found.agrees and [found.rows] == before


def test_the_remark_on_a_place_of_a_root_is_bounded_and_not_compared(tmp_path):
    arrays = some_rows('root_storage', 53)
    arrays['table'][:, 20] ^= 3
    found, = check(tmp_path, arrays)
    assert found.agrees and found.rows == 53
    arrays['table'][5, 20] = 4
    with pytest.raises(EvidenceError) as why: check(tmp_path, arrays)
    assert why.value.key == 'table' and 'must be 0x0..0x3' in why.value.rule


def test_a_question_no_table_has_an_answer_to_is_the_files_fault(tmp_path):
    arrays = some_rows('child_roles', 5)
    arrays['parent_role'][3] |= np.uint32(1 << 11)
    with pytest.raises(EvidenceError, match='row 3: a child for the zapped table'): check(tmp_path, arrays)
    arrays = some_rows('root_storage', 5)
    arrays['table'][2, 7] = 1
    with pytest.raises(EvidenceError, match='row 2: '): check(tmp_path, arrays)


def test_a_wrong_pkru_index_is_reported(tmp_path):
    arrays = some_rows('permissions', 1)
    arrays['pkru'][2, 1] ^= np.uint32(2 << 2 * int(arrays['pkeys'][2]))
    assert any(agreement.differ and 'PKRU' in agreement.source for agreement in check(tmp_path, arrays))


@pytest.mark.parametrize('kind', COMPARED)
def test_a_changed_question_gives_an_answer_or_an_error_and_nothing_else(tmp_path, kind):
    rng, original = random.Random(kind), some_rows(kind, 4 if kind != 'permissions' else 1, seed=5)
    questions = [key for key, column in columns(kind).items() if original[key].dtype.kind == 'u']
    outcomes = set()
    for _ in range(50 if kind != 'permissions' else 10):
        arrays = {key: array.copy() for key, array in original.items()}
        for _ in range(rng.choice((1, 1, 3))): flip(arrays[rng.choice(questions)], rng)
        try: outcomes.add(any(agreement.differ for agreement in check(tmp_path, arrays)))
        except EvidenceError as why:
            assert why.file.endswith('some.npz') and why.key and why.rule
            outcomes.add('error')
    assert outcomes & {True, 'error'}


def npy(header, data=b''):
    "An array file with a header of our own."
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + data


def raw(folder, members, name='ept_accesses.npz', **options):
    "An archive with members as they are."
    with zipfile.ZipFile(folder / name, 'w', **options) as archive:
        for member, data in members: archive.writestr(member, data)
    return folder / name


def refused(path, *words):
    with pytest.raises(EvidenceError) as why: check_vectors(path)
    assert why.value.file == str(path) and why.value.rule
    for word in words: assert word in str(why.value), str(why.value)


def peak(run):
    "Bytes a call holds at most, beyond what was held before."
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


def plain(descr='|u1', shape=(3,), fortran=False): return {'descr': descr, 'fortran_order': fortran, 'shape': shape}


@pytest.mark.parametrize('kind', COMPARED)
def test_each_missing_array_is_named(tmp_path, kind):
    arrays = some_rows(kind, 3)
    for key in arrays:
        group = next(group for group in FORM[kind].groups.values() if key in group)
        if len(group) == 1: continue
        np.savez(tmp_path / f'{kind}.npz', **{name: array for name, array in arrays.items() if name != key})
        refused(tmp_path / f'{kind}.npz', f'{key} missing')


@pytest.mark.parametrize('kind', COMPARED)
def test_each_array_of_a_wrong_type_shape_or_length_is_named(tmp_path, kind):
    arrays, path = some_rows(kind, 3), tmp_path / f'{kind}.npz'
    for key, array in arrays.items():
        group = next(group for group in FORM[kind].groups.values() if key in group)
        changes = [(array.astype(object), 'type'), (array[..., None], 'shape'),
                   (array.astype(np.float64) if array.dtype.kind == 'u' else array.astype('S8'), 'type')]
        if array.dtype.kind == 'u':
            changes.append((array.astype(array.dtype.newbyteorder('>')) if array.dtype.itemsize > 1
                            else array.astype(np.int8), 'type'))
            changes.append((array.astype(np.uint16 if array.dtype.itemsize != 2 else np.uint8), 'type'))
        if array.ndim > 1 and array.size > max(array.shape): changes.append((np.asfortranarray(array), ''))
        beside = [other for other, column in group.items() if other != key and not column.fixed]
        if (columns(kind)[key].fixed or beside) and array.dtype.kind == 'u':
            changes.append((array[:-1], '' if columns(kind)[key].fixed else 'rows'))
        for changed, word in changes:
            np.savez(path, **{**arrays, key: changed})
            refused(path, key, word)


@pytest.mark.parametrize('kind', COMPARED)
def test_a_file_cut_off_or_with_a_flipped_byte_is_refused_or_unharmed(tmp_path, kind):
    rng = random.Random(kind)
    np.savez_compressed(tmp_path / 'whole.npz', **some_rows(kind, 3 if kind != 'permissions' else 1))
    whole, path = (tmp_path / 'whole.npz').read_bytes(), tmp_path / f'{kind}.npz'
    for size in sorted(rng.sample(range(len(whole)), 25)) + [len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path)
    errors = 0
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try: found = check_vectors(path)
        except EvidenceError as why: errors += why.file == str(path)
        # a byte that carries nothing: a date, a padding
        else: assert found and not any(agreement.differ for agreement in found)
    assert errors > 20


@pytest.mark.parametrize('header', [plain(shape=(1 << 60,)), plain(shape=(1 << 64, 1 << 64)), plain(shape=(-1,)),
                                    plain(shape=(True,)), plain(shape=()), plain(shape=[3]), plain(shape=(3.0,)),
                                    plain('<u8'), plain('|O'), plain('|V1'), plain([('a', '|u1')]), plain(None),
                                    plain('|u1', fortran=True), plain('|u1', fortran=0)], ids=str)
def test_a_lying_header_is_refused_before_memory_is_taken(tmp_path, header):
    path = raw(tmp_path,
               [(f'{key}.npy', npy(header, b'abc') if key == 'ad_enabled' else b'') for key in columns('ept_accesses')])
    assert peak(lambda: refused(path, 'ad_enabled')) < 4 << 20


def test_a_test_without_a_name_is_an_error(tmp_path):
    arrays = some_rows('ept_accesses', 5)
    arrays['test_names'] = arrays['test_names'][:int(arrays['test'].max())]
    np.savez(tmp_path / 'ept_accesses.npz', **arrays)
    refused(tmp_path / 'ept_accesses.npz', 'has no name')


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self): return (Path.touch, (tmp_path / 'opened',))
    arrays = some_rows('walks', 3)
    np.savez(tmp_path / 'walks.npz', **{**arrays, 'gfn': np.array([Bomb()] * 3, dtype=object)})
    refused(tmp_path / 'walks.npz', 'gfn', "'|O'")
    assert not (tmp_path / 'opened').exists()


def test_a_member_that_unpacks_to_more_than_it_says_costs_no_memory(tmp_path):
    header = npy(plain('|u1', (3,)))
    members = [(f'{key}.npy', header + bytes(1 << 25) if key == 'ad_enabled' else b'')
               for key in columns('ept_accesses')]
    path = raw(tmp_path, members, compression=zipfile.ZIP_DEFLATED)
    assert peak(lambda: refused(path, 'ad_enabled')) < 4 << 20


@pytest.mark.parametrize('members, word', [
    ([('gpte.npy', b'')], 'gpte'),
    ([('gpte.npy', b'\x93NUMPY\x01\x00\xff\xff')], 'gpte'),
    ([('gpte.npy', npy(plain())), ('gpte.npy', npy(plain()))], 'each once'),
    ([('gpte.txt', b'1 2 3')], 'must be arrays'),
    ([(f'{i}.npy', b'') for i in range(100)], 'members'),
    ([('plum.npy', npy(plain()))], 'plum'),
    ([], ''),
], ids=lambda value: value if isinstance(value, str) else '')
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_an_archive_of_something_else_is_refused(tmp_path, members, word):
    refused(raw(tmp_path, members, name='sptes.npz'), word)


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / 'text.npz').write_text('not a zip file')
    (tmp_path / 'empty.npz').write_bytes(b'')
    (tmp_path / 'zeros.npz').write_bytes(bytes(100_000))
    (tmp_path / 'folder.npz').mkdir()
    with open(tmp_path / 'sparse.npz', 'wb') as file: file.truncate(1 << 40)
    for name in ('text.npz', 'empty.npz', 'zeros.npz', 'sparse.npz', 'nothing.npz', 'folder.npz'):
        refused(tmp_path / name)
    (tmp_path / 'inside').mkdir()
    refused(tmp_path / 'inside', 'no .npz file')
    shutil.copy(tmp_path / 'text.npz', tmp_path / 'inside')
    with pytest.raises(EvidenceError, match='inside.text.npz'): check_vectors(tmp_path / 'inside')


@pytest.mark.parametrize('kind', COMPARED)
def test_no_rows_are_no_agreement(tmp_path, kind):
    np.savez(tmp_path / f'{kind}.npz',
             **{key: array if columns(kind)[key].fixed else array[:0] for key, array in some_rows(kind, 1).items()})
    if kind == 'permissions':          # its index of PKRU values is there without a row
        assert [agreement.rows for agreement in check_vectors(tmp_path / f'{kind}.npz')] == [0, 16, 0, 0]
    # nor are its machines rows
    elif kind == 'sptes': assert [agreement.rows for agreement in check_vectors(tmp_path / f'{kind}.npz')] == [0, 40, 0]
    else: refused(tmp_path / f'{kind}.npz', 'no rows')


@pytest.mark.parametrize('kind, key, part',
                         [('reserved', 'sample_in', 'x86 entries'), ('sptes', 'gpte', 'guest entries'),
                          ('sptes', 'mask_val', 'masks'), ('sptes', 'mmio', 'MMIO entries'),
                          ('permissions', 'errcode', 'answers'), ('permissions', 'wp_refresh', 'CR0.WP again')])
def test_every_row_and_every_cell_is_counted(kind, key, part):
    vectors = load_vectors(DATA / f'{kind}.npz', FORMS)
    array = next(arrays[key] for arrays in vectors.groups.values() if key in arrays)
    found = {agreement.source: agreement for agreement in check_vectors(DATA / f'{kind}.npz')}
    assert found[f'{kind}.npz, {part}'].rows == (array.size if key == 'errcode' else len(array))


def constants(folder, change=lambda table: None, name='table.json'):
    "The recorded table of constants, changed."
    table = json.loads((DATA / 'spte_layout.json').read_text())
    change(table)
    (folder / name).write_text(json.dumps(table))
    return folder / name


SECTIONS = ('role_field_masks', 'ext_role_field_masks', 'sizeof', 'constants', 'anonymous_enums')


@pytest.mark.parametrize('section', SECTIONS)
def test_every_constant_counts(tmp_path, section):
    recorded = json.loads((DATA / 'spte_layout.json').read_text())[section]
    for name, value in recorded.items():
        def change(table): table[section][name] = hex((int(value, 16) if isinstance(value, str) else value) ^ 1)
        found, = check_vectors(constants(tmp_path, change))
        assert found.differ == 1 and found.shown[0].row == f'{section}: {name}'
        def drop(table): del table[section][name]
        refused(constants(tmp_path, drop), section, f'missing: {name}')


@pytest.mark.parametrize('change, words', [
    (lambda table: table['constants'].update(REMOVED_SPTE='1440'), ['constants', 'REMOVED_SPTE', 'hex text']),
    (lambda table: table['constants'].update(REMOVED_SPTE='0xplum'), ['constants']),
    (lambda table: table['constants'].update(REMOVED_SPTE=None), ['REMOVED_SPTE']),
    (lambda table: table['constants'].update(REMOVED_SPTE=True), ['REMOVED_SPTE']),
    (lambda table: table['constants'].update(PLUM='0x1'), ['unknown: PLUM']),
    (lambda table: table.update(plums={}), ['no table of constants']),
    (lambda table: table.pop('sizeof'), ['no table of constants']),
    (lambda table: table.update(sizeof=4), ['sizeof', 'must be names and numbers']),
    (lambda table: table['mask_names'].pop(), ['mask_names', 'missing: 18'])])
def test_a_table_that_is_none_is_refused(tmp_path, change, words): refused(constants(tmp_path, change), *words)


def test_what_is_no_json_is_refused(tmp_path):
    whole = (DATA / 'spte_layout.json').read_bytes()
    for n, data in enumerate((b'', b'[]', b'{', b'\xff\xfe', b'[' * 100_000, whole[:-5],
                              whole.replace(b'"note"', b'"sizeof"', 1), b' ' * (1 << 21))):
        (tmp_path / f'{n}.json').write_bytes(data)
        refused(tmp_path / f'{n}.json')
    (tmp_path / 'folder.json').mkdir()
    refused(tmp_path / 'folder.json')


def test_a_machine_that_is_not_listed_is_the_files_fault(tmp_path):
    arrays = some_rows('sptes', 5)
    arrays['mmio'][3, 0] = len(arrays['mask_in'])
    with pytest.raises(EvidenceError, match='row 3: machine 40: mask_in has rows 0..39'): check(tmp_path, arrays)


def test_progress_rises_to_the_number_of_rows(tmp_path):
    told = []
    for name in ('reserved.npz', 'sptes.npz', 'spte_layout.json'): shutil.copy(DATA / name, tmp_path)
    found = check_vectors(tmp_path, told.append)
    assert told == sorted(told) and told[-1] == sum(agreement.rows for agreement in found)
