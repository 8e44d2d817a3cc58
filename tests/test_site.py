"""The site as a reader meets it, in a real browser: every page, by day, by night and on a telephone; its links, its
search, its live figures."""
import functools
import http.server
import json
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
import yaml
from filelock import FileLock
from playwright.sync_api import expect, sync_playwright

from browser import launch, needs_chromium, watch
from tools.notebooks import ROOT
from tools.site import pages

pytestmark = needs_chromium
CONFIG = yaml.safe_load((ROOT / '_quarto.yml').read_text())
CHAPTERS = [page.replace('.ipynb', '.html') for _, page, _ in pages.contents(CONFIG)]
STARTING_PYTHON = 120_000   # ms, on a machine with other things to do


class Page(HTMLParser):
    "What a page links to, what can be linked to in it, and its live figures."
    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.live = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[key] for key in ('id', 'name') if given.get(key)}
        self.links += [given[key] for key in ('href', 'src') if given.get(key)]
        if 'live' in given.get('class', '').split() and 'data-fn' in given:
            self.live.append((given['data-fn'], json.loads(given['data-args'])))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope='module')
def site() -> Path:
    "The folder of the site, built if something changed."
    (ROOT / '.cache').mkdir(exist_ok=True)
    with FileLock(ROOT / '.cache' / 'site.lock'):
        done = subprocess.run([sys.executable, '-m', 'tools.site'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / CONFIG['project']['output-dir']


@pytest.fixture(scope='module')
def origin(site):
    "The site on loopback."
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as playwright:
        found = launch(playwright)
        yield found
        found.close()


@pytest.fixture
def tab(browser, origin):
    "A new tab in a window a book is read in; whatever goes wrong in it fails the test."
    context = browser.new_context(viewport={'width': 1400, 'height': 1000}, color_scheme='light')
    faults = watch(context, origin)
    yield context.new_page()
    context.close()
    assert faults == []


@pytest.fixture(scope='module')
def parsed(site) -> dict:
    "Every page of the site, read."
    return {path.relative_to(site).as_posix(): Page(path.read_text()) for path in sorted(site.rglob('*.html'))}


@pytest.fixture(scope='module')
def live(site, parsed) -> list:
    "(page, function, controls) of every live figure."
    if not list(site.glob('_static/live/pyodide')):
        pytest.skip("the site was built without live figures: npm's packages could not be had")
    return [(name, *figure) for name, page in parsed.items() for figure in page.live]


def overflow(tab) -> list:
    "What is wider than the window, outside of boxes that scroll by themselves."
    return tab.evaluate('''() => document.documentElement.scrollWidth <= innerWidth ? [] :
        [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
            .slice(0, 5).map(e => e.tagName + '.' + e.className + ': ' + e.textContent.trim().slice(0, 60))
            .concat([`${document.documentElement.scrollWidth} > ${innerWidth}`])''')


def contrast(tab, selector: str) -> list:
    "Texts of `selector` that stand out from what is behind them by less than 4.5 to 1 (the WCAG's formula)."
    return tab.evaluate('''selector => {
        const numbers = colour => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return {rgb: [r, g, b], a}; };
        const light = rgb => { const [r, g, b] = rgb.map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
                               return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const behind = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor); if (c.a > 0.9) return c.rgb; } return [255, 255, 255]; };
        return [...document.querySelectorAll(selector)].filter(e => e.textContent.trim()).flatMap(e => {
            const [a, b] = [light(numbers(getComputedStyle(e).color).rgb), light(behind(e))];
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            return ratio < 4.5 ? [`${e.textContent.trim().slice(0, 40)}: ${ratio.toFixed(1)}`] : [];
        }).slice(0, 5); }''', selector)


# Every page

@pytest.mark.parametrize('name', CHAPTERS)
def test_a_page_opens_with_its_pictures_by_day_by_night_and_on_a_telephone(tab, origin, name):
    tab.goto(origin + name)
    assert tab.locator('article h1').first.inner_text().strip()
    assert tab.evaluate("""[...document.querySelectorAll('article .picture svg, article .live svg')].filter(e => {
        const box = e.getBoundingClientRect(); return box.width > 30 && box.height > 10; }).length"""), 'no picture'
    assert tab.evaluate("[...document.querySelectorAll('div.cell_input pre')].filter(e => "
                        "e.textContent.startsWith('#|')).length") == 0
    assert overflow(tab) == []
    tab.emulate_media(color_scheme='dark')
    assert contrast(tab, 'article p, article td, article th, article li, article code') == []
    tab.set_viewport_size({'width': 390, 'height': 844})
    assert overflow(tab) == []


def test_every_other_page_opens_and_fits(tab, origin, parsed):
    assert set(CHAPTERS) <= set(parsed)
    for name in sorted(set(parsed) - set(CHAPTERS)):
        tab.set_viewport_size({'width': 1400, 'height': 1000})
        tab.goto(origin + name)
        assert overflow(tab) == [], name
        tab.set_viewport_size({'width': 390, 'height': 844})
        assert overflow(tab) == [], name


def test_code_of_a_full_line_needs_no_scrolling_on_a_desk(tab, origin):
    tab.goto(origin + 'draw/08_explore.html')
    narrow = tab.evaluate('''() => { const pre = document.querySelector('div.cell_input pre'), probe = document.createElement('span');
        probe.textContent = 'x'.repeat(120); pre.append(probe);
        const [room, needed] = [pre.clientWidth, probe.getBoundingClientRect().width]; probe.remove(); return [room, needed]; }''')
    assert narrow[1] <= narrow[0], f'120 characters take {narrow[1]:.0f} px of {narrow[0]}'


def test_every_link_leads_somewhere(site, parsed):
    broken = []
    for name, page in parsed.items():
        for link in page.links:
            if urlsplit(link).scheme or link.startswith('//'): continue
            target, anchor = urldefrag(urljoin('/' + name, link))
            file = unquote(urlsplit(target).path).lstrip('/') or 'index.html'
            if not (site / file).is_file(): broken.append(f'{name}: {link}')
            elif anchor and file in parsed and unquote(anchor) not in parsed[file].anchors:
                broken.append(f'{name}: {link}')
    assert broken == []
    assert sum(len(page.links) for page in parsed.values()) > 100


def test_search_finds_pdptr(tab, origin):
    tab.goto(origin + 'index.html')
    tab.locator('input.sidebar-search').fill('PDPTR')
    tab.keyboard.press('Enter')
    # results come in one by one
    found = tab.locator('#search-results ul.search li a[href*="guest/"], #search-results ul.search li a[href*="mmu/"]').first
    expect(found).to_be_visible(timeout=30_000)
    with tab.expect_navigation(): found.click()
    assert tab.locator('article').get_by_text('PDPTR').count()


# Live figures

def move(tab, figure, backwards=False):
    "Move the first control of a figure a step."
    slider, box, choice = (figure.locator('input[type=range]'), figure.locator('input[type=checkbox]'),
                           figure.locator('select'))
    if slider.count():
        slider.first.focus()
        tab.keyboard.press('ArrowLeft' if backwards else 'ArrowRight')
    elif box.count(): box.first.click()
    elif choice.count(): choice.first.select_option(index=0 if backwards else 1)
    else: raise AssertionError('a live figure without a control that can be moved')


def answered(tab, figure) -> str:
    "What a figure says once it has an answer: nothing beside its picture, or a message."
    tab.wait_for_function('figure => { const said = figure.querySelector(".live-status").textContent; return said ? '
                          '!said.startsWith("starting") : figure.dataset.shown; }',
                          arg=figure.element_handle(), timeout=STARTING_PYTHON)
    return figure.locator('.live-status').inner_text()


def is_graph(site, figure) -> bool:
    return 'data-dot=' in ''.join(part for part in (site / figure[0]).read_text().split('class="live"')
                                  if f'data-fn="{figure[1]}"' in part)


def test_a_touched_control_draws_another_picture(tab, origin, site, live, measured):
    graphs = [figure for figure in live if is_graph(site, figure)]
    chosen = {figure[0]: figure
              for figure in (*graphs[:1], next(figure for figure in live
                                               if any(type(control) is list for control in figure[2].values())))}
    for name, function, _ in chosen.values():
        asked = []
        tab.on('request', lambda request: asked.append(request.url))
        tab.goto(origin + name)
        figure = tab.locator(f'.live[data-fn="{function}"]').first
        before = figure.locator('.live-picture').inner_html()
        assert not any('pyodide' in url for url in asked), 'Python is fetched before anybody asked for it'
        move(tab, figure)
        out = bool(answered(tab, figure))   # the step led out of what the function knows, and it said so
        if out: move(tab, figure, backwards=True)
        if out: move(tab, figure, backwards=True)
        assert answered(tab, figure) == ''
        tab.wait_for_function('([picture, before]) => picture.innerHTML !== before',
                              arg=[figure.locator('.live-picture').element_handle(), before])
        after = figure.locator('.live-picture').inner_html()
        assert '<svg' in after or '<table' in after
        assert not is_graph(site, (name, function)) or 'data-dot=' in after and '<svg' in after
        shown, start = figure.get_attribute('data-shown'), time.perf_counter()
        move(tab, figure, backwards=not out)
        tab.wait_for_function('([figure, shown]) => figure.dataset.shown !== shown',
                              arg=[figure.element_handle(), shown])
        measured(f'site: the figure of {name} follows its control in {(time.perf_counter() - start) * 1000:.0f} ms')


def test_every_live_figure_draws_in_the_browser_what_stands_on_the_page(tab, origin, live):
    differing = []
    tab.goto(origin + 'index.html')
    tab.evaluate('''() => { const waiting = new Map(); let calls = 0;
        const worker = new Worker('_static/live-worker.mjs', { type: 'module' });
        worker.onmessage = ({ data }) => { waiting.get(data.id)(data); waiting.delete(data.id); };
        window.ask = (fn, args) => new Promise(resolve => { waiting.set(++calls, resolve); worker.postMessage({ id: calls, fn, args }); });
        window.words = html => new DOMParser().parseFromString(html, 'text/html').body.textContent.replace(/\\s+/g, ' ').trim(); }''')
    tab.set_default_timeout(STARTING_PYTHON)
    for name, function, controls in live:
        start = {argument: control[2] if isinstance(control, list) else control.get('value', control.get('text'))
                 for argument, control in controls.items()}
        answer = tab.evaluate('([fn, args]) => ask(fn, args)', [function, start])
        if 'error' in answer: differing.append(f'{name} {function}: {answer["error"]}'); continue
        still = tab.evaluate('''async ([page, fn]) => { const text = await (await fetch(page)).text();
            return [...new DOMParser().parseFromString(text, 'text/html').querySelectorAll('.live')].filter(e => e.dataset.fn === fn).map(e => words(e.innerHTML)); }''',
            [origin + name, function])
        if tab.evaluate('html => words(html)', answer['answer']) not in still:
            differing.append(f'{name} {function}: another picture')
    assert live and differing == []
