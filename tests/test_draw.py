"""Properties of every picture: whatever the rows say, the drawing is well-formed, complete and the same every time."""
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings, strategies as st

from kvm_mmu_lit.draw import ink
from kvm_mmu_lit.draw.bits import BitStrip, Field
from kvm_mmu_lit.draw.chain import STATES, Box, Chain, Slot
from kvm_mmu_lit.draw.explore import control, explore, number, show_byte, start_value
from kvm_mmu_lit.draw.graph import Edge, Graph, Node
from kvm_mmu_lit.draw.ranges import Range, RangeMap
from kvm_mmu_lit.draw.table import Grid, Table
from kvm_mmu_lit.draw.timeline import Event, Timeline

words = st.text(max_size=12) | st.text('ab <>&"\'\\\n\x1b\ud800', max_size=300)
kinds = st.sampled_from(sorted(ink.INKS))
plain_cells = words | st.integers() | st.booleans() | st.none() | st.integers(0, 1 << 64).map(ink.Hex)


@st.composite
def strips(draw):
    width = draw(st.integers(1, 128))
    cuts = sorted(draw(st.sets(st.integers(0, width), max_size=12)))
    fields = []
    for low, high in zip(cuts, cuts[1:]):
        if draw(st.booleans()):
            value = draw(st.none() | st.integers(0, (1 << (high - low)) - 1))
            fields.append(Field(high - 1, low, draw(words), value, draw(kinds), draw(words)))
    return BitStrip(draw(words), width, draw(st.permutations(fields)))


@st.composite
def tables(draw):
    n = draw(st.integers(0, 30))
    row = st.lists(plain_cells, min_size=n, max_size=n)
    return Table(draw(st.lists(words, min_size=n, max_size=n)), draw(st.lists(row, max_size=4)), draw(words))


@st.composite
def grids(draw):
    rows, columns = draw(st.lists(words, max_size=8)), draw(st.lists(words, max_size=16))
    row = st.lists(st.booleans() | st.none() | st.integers(0, 1 << 64), min_size=len(columns), max_size=len(columns))
    return Grid(rows, columns, draw(st.lists(row, min_size=len(rows), max_size=len(rows))), draw(words), draw(kinds))


slots = st.builds(Slot, st.integers(0, 1023) | words, words, st.sampled_from(sorted(STATES)))
boxes = st.builds(Box, words, st.lists(slots, max_size=5), kinds, words, st.integers(0, 2),
                  entries=st.sampled_from((0, 4, 512)))


@st.composite
def chains(draw):
    some = draw(st.lists(boxes, max_size=6))
    ends = st.integers(0, len(some) - 1)
    links = draw(st.lists(st.tuples(ends, ends, words), max_size=3)) if some else ()
    return Chain(some, draw(words), draw(st.lists(words, max_size=3)), links)


@st.composite
def graphs(draw):
    names = draw(st.lists(words, max_size=6, unique=True))
    nodes = [Node(name, draw(words), draw(kinds)) for name in names]
    ends = st.sampled_from(names) if names else st.nothing()
    edges = draw(st.lists(st.builds(Edge, ends, ends, words, kinds), max_size=8)) if names else ()
    return Graph(nodes, edges, draw(st.sampled_from(('LR', 'TB', 'RL', 'BT'))), draw(words))


@st.composite
def timelines(draw):
    n = draw(st.integers(0, 5))
    states = st.lists(plain_cells, min_size=n, max_size=n)
    events = st.builds(Event, st.integers(0, 99), st.sampled_from(('guest', 'KVM', '<&>')), words, states)
    return Timeline(draw(st.lists(words, min_size=n, max_size=n)), draw(st.lists(events, max_size=6)), draw(words))


@st.composite
def maps(draw):
    edges = sorted(draw(st.sets(st.integers(0, 1 << 64), max_size=12)))
    ranges = [Range(low, high, draw(words), draw(kinds)) for low, high in zip(edges, edges[1:]) if draw(st.booleans())]
    return RangeMap(draw(st.permutations(ranges)), draw(words))


own_drawings = strips() | tables() | grids() | chains() | timelines() | maps()


@given(own_drawings | graphs())
def test_the_text_form_fits_a_hundred_columns_and_is_printable(picture):
    text = str(picture)
    assert all(len(line) <= 100 and (line == '' or line.isprintable()) for line in text.split('\n'))
    text.encode()


@given(own_drawings)
def test_the_drawing_is_well_formed_and_nothing_sticks_out_of_its_panel(picture):
    root = ElementTree.fromstring(picture.svg())
    _, _, width, height = map(float, root.get('viewBox').split())
    for shape in root.iter('{http://www.w3.org/2000/svg}rect'):
        x, y, w, h = (float(shape.get(name)) for name in ('x', 'y', 'width', 'height'))
        assert 0 <= x and 0 <= y and x + w <= width and y + h <= height
    for words_ in root.iter('{http://www.w3.org/2000/svg}text'):
        assert 0 <= float(words_.get('x')) <= width and 0 <= float(words_.get('y')) <= height


@given(own_drawings)
def test_only_shapes_we_draw_are_in_the_drawing(picture):
    tags = {element.tag for element in ElementTree.fromstring(picture.svg()).iter()}
    assert tags <= {'{http://www.w3.org/2000/svg}' + tag for tag in ('svg', 'rect', 'text', 'path')}


@given(tables())
def test_a_table_for_a_page_is_well_formed_and_keeps_every_cell(table):
    root = ElementTree.fromstring(table.html())
    cells = [''.join(cell.itertext()) for cell in root.iter('td')]
    assert cells == [ink.plain(cell) for row in table.rows for cell in row]


def squeezed(text):
    return re.sub(r'\s', '', text)


@given(st.integers(1, 40).flatmap(lambda n: st.lists(st.lists(words, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_folding_columns_loses_no_letter(rows):
    kept = sorted(squeezed(ink.columns(rows)))
    for letter in set(kept) | set(squeezed(''.join(ink.plain(cell) for row in rows for cell in row))):
        assert kept.count(letter) >= sum(squeezed(ink.plain(cell)).count(letter) for row in rows for cell in row)


@given(chains())
def test_every_slot_of_a_chain_is_in_its_text_with_its_mark(chain):
    text = str(chain).split('\n')
    for state, mark in STATES.items():
        if not mark.strip(): continue
        marked = sum(line.startswith(f'    {mark} ') for line in text)
        assert marked >= sum(slot.state == state for box in chain.boxes for slot in box.rows)


@given(chains())
def test_arrows_stay_in_their_lane_and_go_right(chain):
    columns = chain.columns()
    for start, row, end in chain.arrows():
        assert chain.boxes[start].lane == chain.boxes[end].lane and columns[start] < columns[end]
        assert chain.boxes[start].lines()[row].state in ('taken', 'refused')


@given(maps())
def test_a_map_accounts_for_every_byte_between_its_ends(picture):
    if picture.ranges:
        span = picture.ranges[-1].end - picture.ranges[0].start
        assert sum(r.size for r in picture.ranges) + sum(picture.gaps()) == span


@given(graphs(), st.randoms())
def test_equal_graphs_have_equal_dot(graph, chance):
    edges = list(graph.edges)
    chance.shuffle(edges)
    again = Graph(graph.nodes, edges, graph.rankdir, graph.caption)
    assert again == graph and again.dot() == graph.dot()


@settings(max_examples=15, deadline=None)
@given(graphs())
def test_graphviz_accepts_every_graph_and_draws_all_of_it(graph):
    if not shutil.which('dot'): pytest.skip('there is no dot on PATH to ask')
    told = subprocess.run(['dot', '-Tplain'], input=graph.dot(), capture_output=True, text=True, check=True).stdout
    assert sum(line.startswith('node ') for line in told.split('\n')) == len(graph.nodes)
    assert sum(line.startswith('edge ') for line in told.split('\n')) == len(graph.edges)
    ElementTree.fromstring(graph.svg())


@given(own_drawings)
def test_rows_make_a_picture_equal_and_hashable(picture):
    fields = {name: getattr(picture, name) for name in picture.__dataclass_fields__}
    again = type(picture)(**fields)
    assert again == picture and hash(again) == hash(picture) and again.svg() == picture.svg()


GALLERY = '''
from kvm_mmu_lit.draw.bits import BitStrip
from kvm_mmu_lit.draw.chain import Chain, Box
from kvm_mmu_lit.draw.graph import Graph
from kvm_mmu_lit.draw.timeline import Timeline
strip = BitStrip('word', 8, [(n, n, f'b{n}', n % 2, kind) for n, kind in enumerate(('right', 'status', 'frame', 'ignored'))])
chain = Chain((Box('a', ((1, 'x', 'taken'), (2, 'y', 'changed'))), Box('b', kind='frame')))
graph = Graph([('a',), ('b',), ('c',)], [('a', 'b'), ('c', 'a'), ('b', 'c')])
line = Timeline(('x',), [(0, 'a', 'l', (1,)), (1, 'b', 'm', (2,)), (2, 'c', 'n', (2,))])
print(strip.svg(), chain.svg(), graph.dot(), line.svg(), strip, chain, graph, line)
'''


def test_drawings_are_the_same_in_every_process():
    def run(seed):
        return subprocess.run([sys.executable, '-c', GALLERY], env={**os.environ, 'PYTHONHASHSEED': seed},
                              capture_output=True, text=True, check=True).stdout
    assert run('1') == run('2') != ''


def test_importing_the_pictures_loads_the_standard_library_alone():
    modules = ('bits', 'chain', 'exercise', 'explore', 'graph', 'ink', 'ranges', 'table', 'timeline')
    code = (f"import sys; [__import__('kvm_mmu_lit.draw.' + m) for m in {modules}]; "
            "print([m for m in ('graphviz', 'pygraphviz', 'ipywidgets', 'IPython', 'numpy') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'


@given(st.integers(-1000, 1000), st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 50))
def test_a_slider_starts_where_it_can_stand(low, above, start, step):
    given_, can = (low, low + above, low + start, step), start <= above and start % step == 0
    if can: assert start_value(control('x', given_)) == low + start
    else:
        with pytest.raises(ValueError, match='slider'): control('x', given_)


@given(st.integers(0, 1 << 64))
def test_a_typed_number_is_read_in_every_base(n):
    assert number(str(n)) == number(hex(n)) == number(f'{n:#_x}') == number(bin(n)) == n


def test_a_widget_moves_the_drawing_and_shows_a_refusal_as_its_message(capsys, monkeypatch):
    pytest.importorskip('ipywidgets', reason='ipywidgets is not installed')
    from kvm_mmu_lit.draw.explore import _widget
    monkeypatch.delenv('IN_TEST', raising=False)
    shown = explore(show_byte, value=(0, 300, 5), names=False)
    widget = _widget(shown)
    assert [type(child).__name__ for child in widget.children] == ['IntSlider', 'Checkbox', 'Output']
    assert 'application/vnd.jupyter.widget-view+json' in shown._repr_mimebundle_()
    assert widget.f(value=7, names=True) == show_byte(7, names=True)
    assert widget.f(value=7, names=False) == show_byte(7)
    capsys.readouterr()
    assert widget.f(value=300, names=False) is None
    assert capsys.readouterr().out == '300 is not a byte: a byte is 0..255\n'
