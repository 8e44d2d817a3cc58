"""Notebooks as pages: what a reader sees of each cell, and the tree of contents."""
import html
import json
import re
from pathlib import Path


def contents(config: dict) -> list:
    "(part, page, text) for every entry of the sidebar."
    def entries(items, part):
        for item in items:
            if isinstance(item, str): yield part, item, None
            elif 'section' in item: yield from entries(item['contents'], item['section'])
            else: yield part, item['href'], item.get('text')
    return list(entries(config['website']['sidebar']['contents'], None))


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
    return {'cell_type': 'markdown', 'metadata': {}, 'source': text}


def picture(output: dict) -> dict:
    """An output with its drawing in the page itself, where the page's style reaches it; a live figure is one already.

    Links to chapters lead to pages."""
    data = output.get('data', {})
    drawing = ''.join(data.get('text/html') or data.get('image/svg+xml') or '')
    if '<svg' not in drawing:
        linked = re.sub(r'(href="[^":]+)\.ipynb"', r'\1.html"', drawing)
        return {**output, 'data': {'text/html': linked}} if linked != drawing else output
    drawing = drawing if 'class="live"' in drawing else drawing[drawing.index('<svg'):]
    return {**output, 'data': {'text/html': f'<div class="picture">{drawing}</div>'}}


def sentence(text: str) -> str:
    "A claim as its caption: code in backquotes, nothing else special."
    return re.sub(r'`([^`]+)`', r'<code class="literal">\1</code>',
                  html.escape(text[:1].upper() + text[1:], quote=False))


def cells_of(cell: dict):
    "What one cell becomes on the page: nothing, itself, or a caption and itself."
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        yield markdown(body(source))
        return
    said = directives(source)
    if cell['cell_type'] != 'code' or 'hide' in said or 'default_exp' in said or said.get('include') == 'false': return
    code = body(source)
    if not code and not cell['outputs']: return
    if 'claim' in said: yield markdown(f'<p class="claim" id="claim-{cell["id"]}">{sentence(said["claim"])}</p>')
    tags = [tag for key, tag in (('claim', 'claim'), ('export', 'exported'), ('setup', 'setup')) if key in said]
    if said.get('echo') == 'false': tags.append('remove-input')
    outputs = [{**picture(out), **({'execution_count': 1} if out['output_type'] == 'execute_result' else {})}
               for out in cell['outputs']]
    yield {**cell, 'source': code, 'outputs': outputs, 'execution_count': 1, 'metadata': {'tags': tags}}


def module_of(nb: dict) -> str:
    "The module a notebook exports to, '' for none."
    for cell in nb['cells']:
        said = directives(''.join(cell['source'])) if cell['cell_type'] == 'code' else {}
        if 'default_exp' in said: return f'kvm_mmu_lit.{said["default_exp"]}'
    return ''


def title_and_question(nb: dict) -> tuple:
    "A chapter's first heading and the question under it."
    text = next(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown'
                and ''.join(c['source']).startswith('# '))
    question = re.search(r'^> (.+)$', text, re.M)
    return text.splitlines()[0][2:].strip(), question[1] if question else ''


def page(nb: dict) -> dict:
    "One notebook as MyST-NB reads it, with a line that names its module under the question."
    cells = [new for cell in nb['cells'] for new in cells_of(cell)]
    module = module_of(nb)
    if module:
        first = next(i for i, cell in enumerate(cells) if cell['cell_type'] == 'markdown')
        cells.insert(first + 1, markdown(f'{{.module}}\nThis chapter is the module {{ref}}`{module} <{module}>`.'))
    return {**nb, 'cells': [{**cell, 'id': f'cell-{i}'} for i, cell in enumerate(cells)]}


def toctree(caption, lines: list) -> str:
    return ('```{toctree}\n:hidden:\n' + (f':caption: "{caption}"\n' if caption else '') + '\n' + '\n'.join(lines)
            + '\n```')


def overview(parts: dict, nbs: dict) -> str:
    "Every chapter with the question it opens, for the front page."
    blocks = ['## The chapters']
    for part, names in parts.items():
        titles = [(name, *title_and_question(nbs[name])) for name in names]
        blocks += [f'### {part}', '\n'.join(f'- [{title}]({name}). {question}' for name, title, question in titles)]
    return '\n\n'.join(blocks)


def write(config: dict, notebooks: Path, target: Path, reference) -> None:
    "All pages of the site; the first is its front door. `reference` writes the reference pages and names them."
    entries = contents(config)
    nbs = {name: json.loads((notebooks / name).read_text()) for _, name, _ in entries}
    front, parts = entries[0][1], {}
    for part, name, _ in entries[1:]: parts.setdefault(part, []).append(name)
    chapters = {module_of(nb): name for name, nb in nbs.items() if module_of(nb)}
    kept = reference(chapters, target / 'reference')
    trees = [toctree(part, [f'{text} </{name[:-6]}>' if text else f'/{name[:-6]}' for p, name, text in entries[1:]
                            if p == part]) for part in parts]
    trees.append(toctree('Reference', [f'/reference/{name}' for name in kept]))
    for name, nb in nbs.items():
        made = page(nb)
        if name == front:
            made['cells'] += [{**markdown(overview(parts, nbs)), 'id': 'overview'},
                              {**markdown('\n\n'.join(trees)), 'id': 'contents'}]
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(json.dumps(made))
