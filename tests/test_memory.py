"""Guest memory against a dictionary of bytes."""
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvm_mmu_lit.guest.addresses import PAGE_SIZE
from kvm_mmu_lit.guest.memory import GuestMemory, add_ram, cmpxchg_entry, copy_memory, read_entry, read_gpa, write_gpa

PAGES = 8
ADDRESS = st.integers(0, PAGES * PAGE_SIZE - 1)
NEAR_AN_EDGE = st.builds(lambda page, offset: max(0, page * PAGE_SIZE + offset), st.integers(0, PAGES),
                         st.integers(-9, 9))


class Memory(RuleBasedStateMachine):
    "Every operation is done twice: on the memory and on plain dictionaries."

    def __init__(self):
        super().__init__()
        self.memory, self.bytes, self.rom = GuestMemory(), {}, set()

    def pages(self, gpa, size): return range(gpa // PAGE_SIZE, (gpa + size - 1) // PAGE_SIZE + 1)

    @rule(page=st.integers(0, PAGES - 1), count=st.integers(1, 3), rom=st.booleans())
    def add(self, page, count, rom):
        taken = any((page + n) * PAGE_SIZE in self.bytes for n in range(count))
        before = repr(self.memory)
        try: add_ram(self.memory, page * PAGE_SIZE, count * PAGE_SIZE, rom)
        except ValueError: assert taken and repr(self.memory) == before
        else:
            assert not taken
            self.bytes.update(dict.fromkeys(range(page * PAGE_SIZE, (page + count) * PAGE_SIZE), 0))
            if rom: self.rom |= set(range(page, page + count))

    @rule(gpa=ADDRESS | NEAR_AN_EDGE, data=st.binary(min_size=1, max_size=20))
    def write(self, gpa, data):
        ok = all(page * PAGE_SIZE in self.bytes and page not in self.rom for page in self.pages(gpa, len(data)))
        try: write_gpa(self.memory, gpa, data)
        except ValueError: assert not ok
        else:
            assert ok
            self.bytes.update(zip(range(gpa, gpa + len(data)), data))

    @rule(gpa=ADDRESS | NEAR_AN_EDGE, size=st.integers(1, 20))
    def read(self, gpa, size):
        wanted = [self.bytes.get(gpa + i) for i in range(size)]
        assert read_gpa(self.memory, gpa, size) == (None if None in wanted else bytes(wanted))

    @rule(slot=st.integers(0, PAGES * PAGE_SIZE // 8 - 1), size=st.sampled_from((4, 8)), new=st.integers(0, 2**32 - 1),
          lose=st.booleans())
    def exchange(self, slot, size, new, lose):
        gpa = slot * 8
        held = read_entry(self.memory, gpa, size)
        if held is None or gpa // PAGE_SIZE in self.rom: return
        assert cmpxchg_entry(self.memory, gpa, size, held ^ lose, new) == (not lose)
        if not lose: self.bytes.update(zip(range(gpa, gpa + size), new.to_bytes(size, 'little')))

    @invariant()
    def a_copy_is_equal_and_apart(self):
        copy = copy_memory(self.memory)
        assert repr(copy) == repr(self.memory)
        for gpa in list(self.bytes)[:1]:
            before = read_gpa(self.memory, gpa, 1)
            if gpa // PAGE_SIZE not in self.rom: write_gpa(copy, gpa, bytes([before[0] ^ 1]))
            assert read_gpa(self.memory, gpa, 1) == before


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
