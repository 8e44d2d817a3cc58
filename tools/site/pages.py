"""Notebooks as pages: what a reader sees of each cell, and the tree of contents."""
import html
import json
import re
from pathlib import Path


def contents(config: dict, part=None):
    "(part, page, text) for every entry of the sidebar."
    def entries(items, part):
        for item in items:
            if isinstance(item, str): yield part, item, None
            elif 'section' in item: yield from entries(item['contents'], item['section'])
            else: yield part, item['href'], item.get('text')
    return list(entries(config['website']['sidebar']['contents'], part))


def directives(source: str) -> dict:
    "The `#|` lines at the head of a cell."
    found = {}
    for line in source.splitlines():
        match = re.fullmatch(r'#\| *([\w-]+) *:? *(.*)', line)
        if not match: break
        found[match[1]] = match[2]
    return found


def body(source: str) -> str:
    return re.sub(r'\A(#\|.*\n?)+', '', source).strip('\n')


def markdown(text: str) -> dict:
    return {'cell_type': 'markdown', 'metadata': {}, 'source': text, 'id': 'x'}


def cells_of(cell: dict):
    "What one cell becomes on the page: nothing, itself, or a caption and itself."
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        yield markdown(body(source) if source.startswith('#|') else source)
        return
    said = directives(source)
    if cell['cell_type'] != 'code' or 'hide' in said or 'default_exp' in said: return
    if 'claim' in said: yield markdown(f'<p class="claim">{html.escape(said["claim"])}</p>')
    tags = [tag for key, tag in (('claim', 'claim'), ('export', 'exported'), ('setup', 'setup')) if key in said]
    if said.get('echo') == 'false': tags.append('remove-input')
    code = body(source)
    if not code and not cell['outputs']: return
    outputs = [{**out, 'execution_count': 1} if out['output_type'] == 'execute_result' else out for out in cell['outputs']]
    yield {**cell, 'source': code, 'outputs': outputs, 'execution_count': 1, 'metadata': {'tags': tags}}


def page(path: Path) -> dict:
    "One notebook as MyST-NB reads it."
    nb = json.loads(path.read_text())
    cells = [new for cell in nb['cells'] for new in cells_of(cell)]
    for i, cell in enumerate(cells): cell['id'] = f'cell-{i}'
    return {**nb, 'cells': cells}


def toctree(entries: list) -> str:
    "The hidden tree of contents, part by part."
    blocks, parts = [], dict.fromkeys(part for part, _, _ in entries)
    for part in parts:
        lines = [f'{text} </{name[:-6]}>' if text else f'/{name[:-6]}' for p, name, text in entries if p == part]
        blocks.append('```{toctree}\n:hidden:\n' + (f':caption: "{part}"\n' if part else '') + '\n' + '\n'.join(lines) + '\n```')
    return '\n\n'.join(blocks)


def write(config: dict, notebooks: Path, target: Path):
    "All pages of the site; the first is its front door."
    entries = contents(config)
    for number, (_, name, _) in enumerate(entries):
        nb = page(notebooks / name)
        if number == 0: nb['cells'].append({**markdown(toctree(entries[1:])), 'id': 'contents'})
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(json.dumps(nb))
