"""The reference: a page a part, every exported name of its modules with nbdev's parameter comments as a table."""
import enum
import importlib
import inspect
from pathlib import Path

from fastcore.docments import docments

EMPTY = inspect.Parameter.empty


def code(value) -> str:
    "A value as code that may stand in a table."
    text = getattr(value, '__name__', None) if isinstance(value, type) else str(value)
    return '`' + text.replace('|', '\\|') + '`' if text else ''


def rows(header: tuple, lines: list) -> str:
    "A Markdown table."
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in (header, ('---',) * len(header), *lines))


def parameters(thing) -> str:
    "The parameters of a function or of a dataclass, with their comments; '' where none says more than its name."
    try: found = docments(thing, full=True)
    except (TypeError, ValueError): return ''
    kept = {name: about for name, about in found.items() if name not in ('self', 'return') or name == 'return'
            and about.docment}
    lines = [('*returns*' if name == 'return' else f'`{name}`', '' if about.anno in (EMPTY, None) else code(about.anno),
              '' if about.default is EMPTY else code(repr(about.default)),
              (about.docment or '').replace('|', '\\|').replace('\n', ' '))
             for name, about in kept.items()]
    if not any(line[1] or line[3] for line in lines): return ''
    header = ('name', 'type', 'default', 'what it is')
    used = [n for n in range(4) if n in (0, 3) or any(line[n] for line in lines)]
    return rows(tuple(header[n] for n in used), [tuple(line[n] for n in used) for line in lines])


def members(kind) -> str:
    "An enum's members, from the enum itself."
    def shown(value): return f'{value:#x}' if type(value) is int and value > 9 else repr(value)
    return rows(('member', 'value'),
                [(f'`{name}`', f'`{shown(member.value)}`') for name, member in kind.__members__.items()])


def signature(name: str, thing) -> str:
    try: names = [str(p).split(':')[0].split('=')[0].strip() for p in inspect.signature(thing).parameters.values()]
    except (TypeError, ValueError): names = ['…']
    return f'{name}({", ".join(names)})'


def symbol(name: str, thing) -> str:
    "One exported function or class."
    is_enum = inspect.isclass(thing) and issubclass(thing, enum.Enum)
    doc = inspect.getdoc(thing) or ''
    if doc.startswith(f'{name}('): doc = ''   # what dataclasses make up
    head = f'### {name}\n\n`{name if is_enum else signature(name, thing)}`'
    methods = [] if is_enum or not inspect.isclass(thing) else [
        f'- `{signature(key, value).replace("(self, ", "(").replace("(self)", "()")}`: '
        f'{" ".join(inspect.getdoc(value).partition(chr(10) * 2)[0].split())}'
        for key, value in vars(thing).items() if not key.startswith('_') and inspect.isfunction(value)
        and inspect.getdoc(value)]
    return '\n\n'.join(filter(None, (head, doc, members(thing) if is_enum else parameters(thing), '\n'.join(methods))))


def module_section(name: str, chapter: str) -> str:
    "One module: its docstring, its names, its constants."
    module = importlib.import_module(name)
    things = [(key, getattr(module, key)) for key in getattr(module, '__all__', [])]
    own = [(key, thing) for key, thing in things if inspect.isfunction(thing) or inspect.isclass(thing)
           and thing.__module__ == name]
    constants = [f'`{key}`' for key, thing in things if (key, thing) not in own]
    return '\n\n'.join([f'({name})=\n## {name}', inspect.getdoc(module) or '',
                        f'Written and explained in [its chapter](/{chapter}).',
                        *(['Constants and aliases: ' + ', '.join(constants) + '.'] if constants else []),
                        *(symbol(key, thing) for key, thing in own)])


def write(modules: dict, target: Path) -> list:
    "Pages for `modules`, {module: chapter page}; returns their names, in order."
    parts = {}
    for module in modules: parts.setdefault(module.split('.')[1], []).append(module)
    target.mkdir(parents=True, exist_ok=True)
    for part, names in parts.items():
        text = (f'# {part}\n\nWhat `kvm_mmu_lit.{part}` exports.\n\n'
                + '\n\n'.join(module_section(name, modules[name]) for name in names) + '\n')
        (target / f'{part}.md').write_text(text)
    return list(parts)
