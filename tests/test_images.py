"""Every kind of image loads to the same guest, and no file makes a loader do anything but load it or refuse it."""
import io
import json
import lzma
import random
import resource
import shutil
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from kvm_mmu_lit.evidence.dumps import elf_notes, load, load_elf, load_raw, merge_segments
from kvm_mmu_lit.evidence.images import (MAX_IMAGE_BYTES, Image, ImageError, frame_runs, load_image, pdptes_from_memory,
                                         with_registers)
from kvm_mmu_lit.guest.address_space import mappings
from kvm_mmu_lit.guest.memory import read_gpa
from kvm_mmu_lit.guest.verdict import PageFault, Rule

DATA = Path(__file__).parent / 'data'
GUEST = DATA / 'guests/linux-4level'
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Writing images of other kinds -----------------------------------------------------------------------------------------------------------

def raw_dump(image, path):
    "The image's frames one after the other, and the range table that puts them back."
    ranges, at = [], 0
    with path.open('wb') as file:
        for slot in image.memory.slots:
            file.write(slot.buffer)
            ranges.append((slot.base_gfn << 12, slot.npages << 12, at))
            at += slot.npages << 12
    return ranges


def elf_core(image, path, machine=62, elf64=True, note=True, segments=None):
    "An ELF core laid out as QEMU writes it: header, program headers, notes, memory."
    regs = image.regs
    content = (struct.pack('<II', 1, 440) + bytes(16 * 8) + struct.pack('<QQ', 0, regs.rflags)
               + struct.pack('<IIIIQ', 0x30 | regs.cpl, 0, 0, 0, 0) + bytes(9 * 24))
    content += struct.pack('<5Q', regs.cr0, 0, 0, regs.cr3, regs.cr4) + bytes(8)
    notes = b''.join(struct.pack('<III', 5, len(body), kind) + name.ljust(8, b'\0') + body
                     for name, kind, body in ((b'CORE', 1, bytes(336)), (b'QEMU', 0, content))) if note else b''
    memory = [(slot.base_gfn << 12, slot.buffer) for slot in image.memory.slots] if segments is None else segments
    head, step = (64, 56) if elf64 else (52, 32)
    at = head + step * (len(memory) + bool(notes))
    headers, body = [], notes
    def program_header(kind, gpa, size, offset):
        return (struct.pack('<IIQQQQQQ', kind, 0, offset, 0, gpa, size, size, 0) if elf64
                else struct.pack('<IIIIIIII', kind, offset, 0, gpa, size, size, 0, 0))
    if notes: headers.append(program_header(4, 0, len(notes), at))
    for gpa, data in memory:
        headers.append(program_header(1, gpa, len(data), at + len(body)))
        body += bytes(data)
    ident = b'\x7fELF' + bytes([2 if elf64 else 1, 1, 1]) + bytes(9)
    header = ident + (struct.pack('<HHIQQQIHHHHHH', 4, machine, 1, 0, head, 0, 0, head, step, len(headers), 0, 0, 0)
                      if elf64 else
                      struct.pack('<HHIIIIIHHHHHH', 4, machine, 1, 0, head, 0, 0, head, step, len(headers), 0, 0, 0))
    path.write_bytes(header + b''.join(headers) + body)
    return path


def whole_map(image): return list(mappings(image.walker()))


@pytest.mark.parametrize('name', sorted(path.name for path in (DATA / 'guests').iterdir() if path.is_dir()))
def test_compact_raw_and_elf_give_the_same_guest(tmp_path, name):
    image = load(DATA / 'guests' / name)
    told = dict(pkru=image.regs.pkru, maxphyaddr=image.regs.maxphyaddr, vendor=image.regs.vendor, accelerator='tcg')
    wide = name.startswith('linux-4') or name.startswith('linux-5')
    ranges = raw_dump(image, tmp_path / 'ram')
    raw = load(tmp_path / 'ram', ranges, cr0=image.regs.cr0, cr3=image.regs.cr3, cr4=image.regs.cr4,
               efer=image.regs.efer, cpl=image.regs.cpl, rflags=image.regs.rflags, **told)
    core = load(elf_core(image, tmp_path / 'core', 62 if wide else 3, elf64=wide or name == 'linux-pae-nx'), **told)
    assert whole_map(image) == whole_map(raw) == whole_map(core)
    assert raw.regs == image.regs
    assert (core.regs.fmt, core.regs.cr3, core.regs.cpl,
            core.regs.rflags) == (image.regs.fmt, image.regs.cr3, image.regs.cpl, image.regs.rflags)


def test_a_dump_is_mapped_and_not_read(tmp_path):
    "A sparse file of 8 GiB opens at once and costs no memory; the last page is there."
    path = tmp_path / 'ram'
    with path.open('wb') as file:
        file.seek((8 << 30) - 4096)
        file.write(b'\x5a' * 4096)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    image = load(path)
    assert read_gpa(image.memory, (8 << 30) - 1, 1) == b'\x5a'
    assert time.monotonic() - start < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_without_registers_the_memory_is_there_and_a_walk_asks_for_them(tmp_path):
    image = load(elf_core(load(GUEST), tmp_path / 'core', note=False))
    assert image.regs is None and image.memory.slots
    with pytest.raises(ValueError, match='no registers: give at least cr0= and cr3='): image.walker()
    with pytest.raises(ValueError, match='no registers: give at least cr0= and cr3='): with_registers(image, cr3=0x1000)
    with pytest.raises(ValueError, match="no registers \\['cr9'\\]"): with_registers(image, cr9=0)
    with pytest.raises(ValueError, match='EFER.LMA=1 needs'): with_registers(image, cr0=0x11, cr3=0, efer=0x500)


def test_a_root_outside_memory_is_a_hole_for_the_walk_and_an_error_where_it_must_be_read():
    outside = load(GUEST, cr3=0x7_0000_0000).walker().walk(0)
    assert isinstance(outside, PageFault) and outside.rule is Rule.HOLE
    with pytest.raises(ImageError, match='PDPTEs at 0x70000000 lie in no memory slot'):
        load(DATA / 'guests/linux-pae', cr3=0x7000_0000)


def test_overrides_reload_the_pdptes():
    pae = load(DATA / 'guests/linux-pae')
    assert load(pae.path, cr3=pae.regs.cr3).regs == pae.regs == pdptes_from_memory(pae.memory, pae.regs)
    assert load(pae.path, cr3=pae.regs.cr3 + 32).regs.pdptrs != pae.regs.pdptrs
    assert load(pae.path, pdptrs=(1, 0, 0, 0)).regs.pdptrs == (1, 0, 0, 0)
    with pytest.raises(ImageError, match="#GP.*accelerator='tcg'"): load(pae.path, accelerator='kvm', cr3=pae.regs.cr3)


def test_segments_overlap_only_where_they_read_the_same_bytes():
    assert (merge_segments('x', [(0x3000, 0x1000, 0x13000), (0, 0x2000, 0x10000), (0x1000, 0x3000, 0x11000)])
            == [(0, 0x4000, 0x10000)])
    assert merge_segments('x', [(0, 0x1000, 0), (0x1000, 0x1000, 0x9000)]) == [(0, 0x1000, 0), (0x1000, 0x1000, 0x9000)]
    with pytest.raises(ImageError, match='different bytes'): merge_segments('x', [(0, 0x2000, 0), (0x1000, 0x1000, 0)])


# Bad input: each with the rule it breaks -------------------------------------------------------------------------------------------------

def npz(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def npy(header, data=b'', magic=b'\x93NUMPY\1\0'):
    return magic + struct.pack('<H', len(header)) + header.encode() + data


def members(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items(): archive.writestr(name.replace('_', '.'), data)
    return out.getvalue()


GFN, PAGES = np.array([1, 2], '<u8'), np.zeros((2, 4096), 'u1')
GOOD_GFN, GOOD_PAGES = npy("{'descr': '<u8', 'fortran_order': False, 'shape': (1,)}",
                           bytes(8)), npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 4096)}", bytes(4096))
BAD_NPZ = {
    'empty': (b'', 'is empty'), 'no zip': (b'PK\3\4' + bytes(99), 'no zip file'),
    'cut': (npz(gfn=GFN, pages=PAGES)[:-30], 'no zip file'),
    'one member': (npz(gfn=GFN), '1 members'), 'three members': (npz(gfn=GFN, pages=PAGES, more=GFN), '3 members'),
    'other names': (npz(gfn=GFN, page=PAGES), "'page.npy'"),
    'not rising': (npz(gfn=GFN[::-1].copy(), pages=PAGES), 'frames must rise'),
    'twice': (npz(gfn=np.array([5, 5], '<u8'), pages=PAGES), 'frames must rise'),
    'too high': (npz(gfn=np.array([1, 1 << 40], '<u8'), pages=PAGES), 'below 1 << 40'),
    'signed': (npz(gfn=GFN.astype('<i8'), pages=PAGES), "must be '<u8'"),
    'big-endian': (npz(gfn=GFN.astype('>u8'), pages=PAGES), "must be '<u8'"),
    'float': (npz(gfn=GFN.astype('f8'), pages=PAGES), "must be '<u8'"),
    'pickle': (npz(gfn=np.array([print, 1], object), pages=PAGES), "must be '<u8'"),
    'flat pages': (npz(gfn=GFN, pages=PAGES.reshape(-1)), 'of shape'),
    'half pages': (npz(gfn=GFN, pages=PAGES[:, :2048].copy()), 'of shape'),
    'columns first': (npz(gfn=GFN, pages=np.asfortranarray(PAGES)), 'rows first'),
    'no rows': (npz(gfn=GFN[:0], pages=PAGES[:0]), 'at least one row'),
    'fewer pages': (npz(gfn=GFN, pages=PAGES[:1]), '1 pages for the 2 frames'),
    'no array': (members(gfn_npy=b'hello, world', pages_npy=GOOD_PAGES), 'magic bytes'),
    'huge shape': (members(gfn_npy=npy("{'descr': '<u8', 'fortran_order': False, 'shape': (1 << 60,)}"),
                           pages_npy=GOOD_PAGES), 'no description'),
    'lying shape': (members(gfn_npy=npy("{'descr': '<u8', 'fortran_order': False, 'shape': (1152921504606846976,)}"),
                            pages_npy=GOOD_PAGES), 'the size the shape asks for'),
    'negative shape': (members(gfn_npy=npy("{'descr': '<u8', 'fortran_order': False, 'shape': (-1,)}"),
                               pages_npy=GOOD_PAGES), 'the size the shape asks for'),
    'boolean shape': (members(gfn_npy=npy("{'descr': '<u8', 'fortran_order': False, 'shape': (True,)}", bytes(8)),
                              pages_npy=GOOD_PAGES), 'the size the shape asks for'),
    'code in the header': (members(gfn_npy=npy("__import__('os').abort()"), pages_npy=GOOD_PAGES), 'no description'),
    'deep header': (members(gfn_npy=npy('(' * 3000), pages_npy=GOOD_PAGES), 'no description'),
    'long header': (members(gfn_npy=b'\x93NUMPY\2\0' + struct.pack('<I', 1 << 31), pages_npy=GOOD_PAGES),
                    'at most 4096'),
    'version 9': (members(gfn_npy=b'\x93NUMPY\x09\0' + bytes(9), pages_npy=GOOD_PAGES), 'version 9'),
    'wrong type in shape': (members(gfn_npy=npy("{'descr': '<u8', 'fortran_order': False, 'shape': (1.5,)}"),
                                    pages_npy=GOOD_PAGES), 'shape'),
    'bomb': (members(gfn_npy=GOOD_GFN, pages_npy=GOOD_PAGES + bytes(32 << 20)), 'the size the shape asks for'),
}


@pytest.mark.parametrize('case', BAD_NPZ)
def test_a_bad_npz_names_its_rule(tmp_path, case):
    data, rule = BAD_NPZ[case]
    (tmp_path / 'image.npz').write_bytes(data)
    with pytest.raises(ImageError) as caught: load_image(tmp_path / 'image.npz')
    assert rule in str(caught.value) and 'image.npz' in str(caught.value)


def test_a_zip_that_announces_less_than_it_holds_is_refused(tmp_path):
    "The directory says 4 KiB; the packed data holds 32 MiB. No more than announced is taken."
    data = bytearray(members(gfn_npy=GOOD_GFN, pages_npy=GOOD_PAGES + bytes(32 << 20)))
    at = data.rfind(b'PK\1\2')
    struct.pack_into('<I', data, at + 24, len(GOOD_PAGES))
    (tmp_path / 'image.npz').write_bytes(data)
    with pytest.raises(ImageError, match='pages.npy'): load_image(tmp_path / 'image.npz')


def test_an_image_over_the_limit_is_refused_unread(tmp_path):
    with (tmp_path / 'image.npz').open('wb') as file: file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(ImageError, match='1,073,741,825 bytes; at most 1,073,741,824'):
        load_image(tmp_path / 'image.npz')


META = json.loads((GUEST / 'meta.json').read_text())
BAD_META = {
    'list': ('[]', 'a JSON list'), 'null': ('null', 'a JSON NoneType'), 'number': ('7', 'a JSON int'),
    'cut': (json.dumps(META)[:-1], 'no JSON'), 'deep': ('[' * 100_000, 'no JSON'),
    'not text': (b'\xff\xfe{}\xff', 'no JSON'),
    'twice': ('{"cr0": 1, "cr0": 2}', "['cr0'] are there twice"),
    'no cr3': (json.dumps({k: v for k, v in META.items() if k != 'cr3'}), 'cr3: is missing'),
    'text': (json.dumps({**META, 'cr4': '0x10'}), 'cr4: is'),
    'true': (json.dumps({**META, 'cr0': True}), 'a bool; a int is needed'),
    'float': (json.dumps({**META, 'efer': 1.0}), 'a float'),
    'negative': (json.dumps({**META, 'cr3': -4096}), 'does not fit'), 'huge': ('{"cr0": 1' + '0' * 9999 + '}', ''),
    'pkru number': (json.dumps({**META, 'pkru': 5}), 'pkru'),
    'pkru text': (json.dumps({**META, 'pkru': '0xzz'}), 'pkru'),
    'maxphyaddr': (json.dumps({**META, 'maxphyaddr': 64}), '32..52'),
    'huge maxphyaddr': (json.dumps({**META, 'maxphyaddr': 1 << 70}), '32..52'),
    'impossible': (json.dumps({**META, 'cr0': 0x8000_0000}), 'CR0.PG=1 needs'),
    'no paging in long mode': (json.dumps({**META, 'cr0': 0x11}), 'EFER.LMA=1 needs CR0.PG=1'),
    'cpl': (json.dumps({**META, 'cpl': 4}), 'cpl'), 'vendor': (json.dumps({**META, 'cpu_vendor': 5}), 'cpu_vendor'),
    'flags': (json.dumps({**META, 'cpu_flags': {}}), 'cpu_flags'),
    'empty': ('', 'is empty'), 'big': (' ' * (1 << 20) + '{}', 'at most 1,048,576'),
}


@pytest.mark.parametrize('case', BAD_META)
def test_a_bad_description_names_its_rule(tmp_path, case):
    text, rule = BAD_META[case]
    shutil.copy(GUEST / 'image.npz', tmp_path)
    (tmp_path / 'meta.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ImageError) as caught: load(tmp_path)
    assert rule in str(caught.value) and 'meta.json' in str(caught.value)


def test_a_bad_raw_dump_names_its_rule(tmp_path):
    path = tmp_path / 'ram'
    path.write_bytes(bytes(3 * 4096))
    for ranges, rule in (([(0, 4096, 2 * 4096 + 1)], 'must lie in the file'), ([(0, 0, 0)], 'whole 4096-byte pages'),
                         ([(0, 100, 0)], 'whole 4096-byte pages'), ([(5, 4096, 0)], 'whole 4096-byte pages'),
                         ([(-4096, 4096, 0)], '52 bits'),
                         ([(1 << 52, 4096, 0)], '52 bits'), ([(0, 4096, -4096)], 'must lie in the file'),
                         ([(0, 1 << 60, 0)], '52 bits'), ([(0, 8192, 0), (4096, 4096, 0)], 'overlaps'),
                         ([], 'no memory at all')):
        with pytest.raises(ImageError, match=rule): load_raw(path, ranges)
    path.write_bytes(bytes(4097))
    with pytest.raises(ImageError, match='4,097 bytes, which is not whole'): load(path)
    path.write_bytes(b'')
    with pytest.raises(ImageError, match='is empty'): load(path)
    path.write_bytes(b'KDUMP   ' + bytes(4088))
    with pytest.raises(ImageError, match='compressed kdump'): load(path)
    with pytest.raises(ImageError, match='cannot be opened'): load(tmp_path / 'nothing')
    with pytest.raises(ImageError, match='image.npz: cannot be opened'): load(tmp_path)


def test_a_bad_core_names_its_rule(tmp_path):
    image, path = load(GUEST), tmp_path / 'core'
    good = elf_core(image, path).read_bytes()
    page = bytes(4096)
    def refuse(rule, data=None):
        if data is not None: path.write_bytes(data)
        with pytest.raises(ImageError, match=rule): load_elf(path)
    refuse('ELF header', good[:40])
    refuse('program headers', good[:200])
    refuse('are not in the file', good[:-1])
    refuse('a core \\(ET_CORE\\)', good[:16] + b'\2' + good[17:])
    refuse('of an x86 machine', good[:18] + b'\x28' + good[19:])
    refuse('program headers', good[:56] + b'\0\0' + good[58:])
    refuse('program headers', good[:56] + b'\xf0\xff' + good[58:])
    refuse('version 1 has at least 432', good.replace(struct.pack('<II', 1, 440), struct.pack('<II', 2, 440), 1))
    elf_core(image, path, machine=3)   # long mode's registers, and a header that says i386
    assert load_elf(path, accelerator='tcg').regs.fmt.name == 'pae'
    elf_core(load(DATA / 'guests/linux-2level'), path)
    refuse('not long mode, which the header says')
    elf_core(image, path, segments=[(0, page), (0, page)])
    refuse('different bytes')
    elf_core(image, path, segments=[(0, page[:100])])
    refuse('whole 4096-byte pages')
    elf_core(image, path, segments=[(0, b'')])
    refuse('no memory at all')
    elf_core(image, path, segments=[(1 << 52, page)])
    refuse('52 bits')
    with pytest.raises(ValueError, match='no vCPU 1'): load_elf(elf_core(image, path), cpu=1)


# Fuzzing: an Image or an ImageError, nothing else ----------------------------------------------------------------------------------------

def only_an_image_or_its_error(path, **registers):
    "Load; whatever the bytes are, the answer is an `Image` or a `ValueError` that names the file."
    try: image = load(path, **registers)
    except ImageError as why: assert str(path.name) in why.file or path.name in str(why)
    except ValueError as why: assert 'registers' in str(why)
    else:
        assert isinstance(image, Image) and image.memory.slots
        if image.regs is not None:
            for va in (0, 0x7fff_ffff_f000, 0xffff_ffff_ffff_f000):
                image.walker().walk(va & (1 << (64 if image.regs.fmt.signed else 32)) - 1)


def damaged(data, rng):
    "A real file with a cut, a few flipped bytes, a piece moved, or interesting numbers written over."
    data = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0: return bytes(data[:rng.randrange(len(data))])
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 256)),
                         len(data) - 1 - rng.randrange(min(len(data), 200))))
        if kind == 1: data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at + 8] = rng.choice((0, 1, 0xffff_ffff, 1 << 31, 1 << 63, (1 << 64) - 1, 4096,
                                          len(data))).to_bytes(8, 'little')
        else: data[at:at] = data[:rng.randrange(64)]
    return bytes(data)


def seeds(tmp_path):
    "One small real file of each kind."
    image = load(GUEST)
    return {'image.npz': (DATA / 'guests/linux-pae-pti-user/image.npz').read_bytes(),
            'core64': elf_core(image, tmp_path / 'c', segments=[(0x2990000, bytes(8192))]).read_bytes(),
            'core32': elf_core(load(DATA / 'guests/linux-2level'), tmp_path / 'c', machine=3, elf64=False,
                               segments=[(0, bytes(8192))]).read_bytes(), 'ram': bytes(8192)}


@pytest.mark.parametrize('name', ['image.npz', 'core64', 'core32', 'ram'])
def test_a_damaged_file_is_loaded_or_refused(tmp_path, name):
    seed, rng, start = seeds(tmp_path)[name], random.Random(f"damage {name}"), time.monotonic()
    for _ in range(400):
        (tmp_path / name).write_bytes(damaged(seed, rng))
        only_an_image_or_its_error(tmp_path / name)
        if time.monotonic() - start > 3: break   # enough for a slow machine


def test_a_damaged_real_core_is_loaded_or_refused(tmp_path):
    seed, rng = lzma.open(DATA / 'cores/long.elf.xz').read(), random.Random('core')
    for _ in range(40):
        (tmp_path / 'core').write_bytes(damaged(seed[:5000], rng) + seed[5000:])
        only_an_image_or_its_error(tmp_path / 'core')


@FUZZ
@given(data=st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(lambda tail: b'PK\3\4' + tail),
                      st.binary(max_size=200).map(lambda tail: b'\x7fELF' + tail),
                      st.binary(max_size=64).map(lambda tail: b'\x7fELF\2\1\1' + bytes(9) + tail)))
def test_any_bytes_are_loaded_or_refused(tmp_path, data):
    (tmp_path / 'any').write_bytes(data)
    only_an_image_or_its_error(tmp_path / 'any')


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)


@FUZZ
@given(key=st.sampled_from(['cr0', 'cr3', 'cr4', 'efer', 'maxphyaddr', 'cpl', 'pkru', 'cpu_vendor', 'cpu_flags',
                            'accelerator']), value=JSON | st.integers(0, 1 << 64) | st.integers(0, 64))
def test_any_description_is_loaded_or_refused(tmp_path, key, value):
    if not (tmp_path / 'image.npz').exists(): shutil.copy(DATA / 'guests/linux-pae-pti-user/image.npz', tmp_path)
    meta = json.loads((DATA / 'guests/linux-pae-pti-user/meta.json').read_text())
    (tmp_path / 'meta.json').write_text(json.dumps({**meta, key: value}))
    only_an_image_or_its_error(tmp_path)


@FUZZ
@given(notes=st.binary(max_size=200) | st.tuples(st.integers(0, 1 << 32 - 1), st.integers(0, 1 << 32 - 1),
                                                 st.binary(max_size=40)).map(lambda t: struct.pack('<III', t[0] & 0xffff_ffff, t[1] & 0xffff_ffff, 0) + t[2]))
def test_any_notes_are_split_or_left(notes):
    assert sum(len(content) for _, content in elf_notes(memoryview(notes))) <= len(notes)


@given(gfns=st.sets(st.integers(0, 50)).map(sorted))
def test_runs_hold_every_frame_once(gfns):
    runs = frame_runs(gfns)
    assert [gfn + i for gfn, _, count in runs for i in range(count)] == gfns
    assert all(a + count < b for (a, _, count), (b, _, _) in zip(runs, runs[1:]))
