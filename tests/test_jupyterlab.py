"""JupyterLab as `make lab` opens it: a chapter runs from top to bottom in a real browser, and its picture follows a
slider."""
import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from browser import free_port, launch, needs_chromium, watch
from kvm_mmu_lit.lab.root_cache import show_history
from tools.notebooks import NBS, ROOT, all_notebooks, source

pytestmark = needs_chromium
SETTINGS = {
    '@jupyterlab/apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False,
                                                    'doNotDisturbMode': True},
    '@jupyterlab/notebook-extension/tracker': {'autoStartDefaultKernel': True, 'windowingMode': 'none'},
}
SLIDER = re.compile(r'\bexplore\(\w+,(?:.|\n)*=\(')


def with_sliders() -> list:
    "The chapter that tells of sliders, and the first of Part I that has one."
    def slides(path):
        return any(SLIDER.search(source(cell)) for cell in json.loads(path.read_text())['cells']
                   if cell['cell_type'] == 'code' and cell['outputs'])
    return [path.relative_to(NBS).as_posix()
            for path in (NBS / 'draw' / '08_explore.ipynb',
                         *[p for p in all_notebooks() if p.parent.name == 'guest' and slides(p)][:1])]


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on loopback over a copy of the notebooks, with settings of its own: (its address, its log)."
    home, port = tmp_path_factory.mktemp('lab'), free_port()
    shutil.copytree(NBS, home / 'nbs', ignore=shutil.ignore_patterns('.*', '_*'))
    for name, values in SETTINGS.items():
        file = home / 'settings' / f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    folders = {'JUPYTER_CONFIG_DIR': 'config', 'JUPYTER_DATA_DIR': 'data', 'JUPYTER_RUNTIME_DIR': 'runtime',
               'JUPYTERLAB_SETTINGS_DIR': 'settings',
               'JUPYTERLAB_WORKSPACES_DIR': 'workspaces', 'IPYTHONDIR': 'ipython'}
    env = {**{key: value for key, value in os.environ.items() if key != 'IN_TEST'},
           **{key: str(home / folder) for key, folder in folders.items()}, 'PYTHONPATH': str(ROOT)}
    log = home / 'lab.log'
    recipe = subprocess.run(['make', '-n', '--no-print-directory', 'lab'], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.splitlines()[-1]
    arguments = recipe.split()[1:-1]   # without the program and the folder
    assert arguments[0] == 'lab'
    server = subprocess.Popen(
        [sys.executable, '-m', 'jupyter', *arguments, '--no-browser', '--ip=127.0.0.1', f'--port={port}',
         '--ServerApp.port_retries=0', '--IdentityProvider.token=',
         '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
         str(home / 'nbs')],
        cwd=ROOT, env=env, stdout=log.open('w'), stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try: socket.create_connection(('127.0.0.1', port), 0.2).close()
            except OSError: time.sleep(0.1)
            else: break
        yield f'http://127.0.0.1:{port}/', home
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def opened(browser, address: str, notebook: str):
    "A tab on a notebook whose kernel is ready, and the faults it meets."
    context = browser.new_context(viewport={'width': 1400, 'height': 1000})
    context.set_default_timeout(90_000)
    faults = watch(context, address)
    tab = context.new_page()
    tab.goto(f'{address}lab/workspaces/{Path(notebook).stem}/tree/{notebook}')
    tab.wait_for_selector('.jp-Notebook .jp-Cell')
    tab.wait_for_function("document.body.innerText.includes('(ipykernel) | Idle')")
    return tab, faults


def run_all(tab):
    "Run every cell, and wait for the last."
    tab.click('.lm-MenuBar-itemLabel:text-is("Run")')
    tab.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
    tab.wait_for_function('''() => { const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].filter(e => e.querySelector('.cm-content').innerText.trim());
        return cells.length && cells.every(e => /\\[\\d+\\]/.test(e.querySelector('.jp-InputPrompt').innerText)); }''')
    tab.wait_for_function("document.body.innerText.includes('(ipykernel) | Idle')")


def save(tab, file: Path):
    "Save the notebook, and wait until it is on the disk."
    before = file.stat().st_mtime_ns
    tab.click('.lm-MenuBar-itemLabel:text-is("File")')
    tab.click('.lm-Menu-itemLabel:text-is("Save Notebook")')
    for _ in range(300):
        if file.stat().st_mtime_ns != before: return
        tab.wait_for_timeout(100)
    raise AssertionError(f'{file.name} is not saved')


def move_a_slider(tab, figure) -> float:
    """Move sliders of a figure a step until another picture stands there (a step may also lead to a message); the
    milliseconds it took."""
    shown = figure.locator('.widget-output')
    expect(shown.locator('svg, img').first).to_be_visible()
    shown = shown.element_handle()
    first = shown.inner_html()
    for handle in figure.locator('.noUi-handle').all():
        for key in ('ArrowRight', 'ArrowLeft'):
            before, start = shown.inner_html(), time.perf_counter()
            handle.scroll_into_view_if_needed()
            handle.focus()
            tab.keyboard.press(key)
            tab.wait_for_function('([output, before]) => output.innerHTML !== before', arg=[shown, before],
                                  timeout=10_000)
            if shown.query_selector('svg, img') and shown.inner_html() != first:
                return (time.perf_counter() - start) * 1000
    raise AssertionError('no slider leads to another picture')


@pytest.mark.parametrize('notebook', with_sliders())
def test_a_chapter_runs_and_its_picture_follows_a_slider(lab, notebook, measured):
    address, home = lab
    with sync_playwright() as playwright:
        browser = launch(playwright)
        tab, faults = opened(browser, address, notebook)
        run_all(tab)
        wrong = tab.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"], '
                            '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
        assert wrong.all_inner_texts() == []
        assert tab.locator('.jp-Notebook .jp-OutputArea-output svg, .jp-Notebook .jp-RenderedSVG img').count(), 'no picture'
        figure = tab.locator('.jp-OutputArea-output', has=tab.locator('.noUi-handle')).first
        measured(f'JupyterLab: the picture of {notebook} follows its slider in {move_a_slider(tab, figure):.0f} ms')
        assert [fault for fault in faults if fault.startswith('foreign')] == []
        saved = home / 'nbs' / notebook
        assert saved.read_bytes() == (NBS / notebook).read_bytes(), 'looking at a chapter changes it'
        save(tab, saved)
        browser.close()
    cells, committed = (json.loads(path.read_text())['cells'] for path in (saved, NBS / notebook))
    assert [(cell['id'], source(cell)) for cell in cells] == [(cell['id'], source(cell)) for cell in committed]
    assert all(cell.get('execution_count') is None and cell['metadata'] == {}
               for cell in cells), 'a notebook is saved clean'


def test_the_stepper_of_the_root_cache_is_played_with_its_buttons(lab, measured):
    address, _ = lab
    where, events = 'shadow paging, 4-level VMX host', []
    with sync_playwright() as playwright:
        browser = launch(playwright)
        tab, faults = opened(browser, address, 'lab/02_root_cache.ipynb')
        run_all(tab)
        stepper = tab.locator('.jp-OutputArea-output', has=tab.locator('button:text-is("undo")')).first
        picture, choices = stepper.locator('.widget-html-content'), stepper.locator('select')
        def press(name): stepper.get_by_role('button', name=name, exact=True).click()
        def shows(policy):
            "Wait until the picture is the one of the model, word by word, and so are the buttons."
            wanted = show_history(where, policy, ', '.join(events))
            expect(picture.locator('text')).to_have_text([html.unescape(text)
                                                          for text in re.findall(r'<text[^>]*>([^<]*)</text>',
                                                                                 wanted.svg())])
            offered = wanted.caption.rpartition('next: ')[2].split(', ') if 'next: ' in wanted.caption else []
            expect(stepper.locator('button')).to_have_text(['undo', 'reset', *offered])
        shows('reviewer')
        start = time.perf_counter()
        for event in ('vmrun PAE X', 'vmexit', 'vmrun PAE X'):
            press(event)
            events.append(event)
            shows('reviewer')
        measured(f'JupyterLab: a button of the stepper takes {(time.perf_counter() - start) / 3 * 1000:.0f} ms')
        expect(picture).to_contain_text('!!')
        choices.nth(1).select_option('6.1')
        shows('6.1')
        press('undo')
        events.pop()
        shows('6.1')
        press('reset')
        events.clear()
        shows('6.1')
        assert [fault for fault in faults if fault.startswith('foreign')] == []
        browser.close()
