"""README.md from nbs/index.ipynb: `python tools/readme.py [--check]`.

Text as it stands, code without directives, text outputs as blocks, pictures as files beside the README (GitHub shows
no inline SVG).
"""
import argparse
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from notebooks import NBS, ROOT, source  # noqa: E402

PICTURES = 'nbs/pictures'


def hidden(cell) -> bool:
    return bool(re.search(r'^#\| *(hide|default_exp|export)', source(cell), re.M))


def links(text: str) -> str:
    "Links between notebooks, as seen from the README."
    return re.sub(r'\]\((?!https?:|#|/|\.\./)([\w/.-]+\.ipynb)', r'](nbs/\1', text)


class Rows(HTMLParser):
    "The cells of an HTML table."
    def __init__(self, html):
        super().__init__()
        self.rows, self.inside = [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == 'tr': self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append('')
            self.inside = True

    def handle_endtag(self, tag): self.inside = self.inside and tag not in ('td', 'th')
    def handle_data(self, data):
        if self.inside: self.rows[-1][-1] += data.replace('|', '\\|')


def table(html: str) -> str:
    "An HTML table as Markdown."
    head, *rows = Rows(html).rows
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, ['---'] * len(head), *rows])


def output(out, pictures) -> str:
    "One output as Markdown; a picture goes to `pictures`."
    data = out.get('data', {})
    if 'image/svg+xml' in data:
        name = f'{PICTURES}/readme-{len(pictures) + 1}.svg'
        pictures[name] = ''.join(data['image/svg+xml'])
        return f'![{alt(data)}]({name})'
    if '<table' in ''.join(data.get('text/html', '')): return table(''.join(data['text/html']))
    if 'text/markdown' in data: return links(''.join(data['text/markdown']))
    text = ''.join(out.get('text', data.get('text/plain', '')))
    return '\n'.join('    ' + line for line in text.rstrip('\n').split('\n')) if text.strip() else ''


def alt(data) -> str:
    "The picture's first text line."
    return ''.join(data.get('text/plain', 'picture')).split('\n')[0].strip().replace(']', ')').replace('[', '(')


def render() -> dict:
    "File name -> text of README.md and of its pictures."
    parts, pictures = [], {}
    for cell in json.loads((NBS / 'index.ipynb').read_text())['cells']:
        if cell['cell_type'] == 'markdown': parts.append(links(re.sub(r'^#\|.*\n', '', source(cell), flags=re.M)))
        elif cell['cell_type'] == 'code' and not hidden(cell):
            code = '\n'.join(line for line in source(cell).splitlines() if not line.startswith('#|')).strip()
            if not re.search(r'^#\| *echo: *false', source(cell), re.M): parts.append(f'```python\n{code}\n```')
            parts += filter(None, (output(out, pictures) for out in cell['outputs']))
    return {'README.md': '\n\n'.join(part.strip('\n') for part in parts) + '\n', **pictures}


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--check', action='store_true')
    files = render()
    stale = [name for name, text in files.items() if not (ROOT / name).exists() or (ROOT / name).read_text() != text]
    if ap.parse_args().check and stale:
        sys.exit(f"{', '.join(stale)}: out of step with nbs/index.ipynb; run `make readme`")
    for name in stale:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_text(files[name])
    print(f"README.md {'written' if stale else 'in step'}")


if __name__ == '__main__': main()
