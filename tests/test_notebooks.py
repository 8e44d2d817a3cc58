"""Every notebook, run from top to bottom in a process of its own: nothing fails, and no byte that git sees changes."""
import difflib

import pytest

from tools.notebooks import NBS, ROOT, all_notebooks, run_apart


@pytest.mark.parametrize('path', all_notebooks(), ids=lambda path: path.relative_to(NBS).with_suffix('').as_posix())
def test_running_it_changes_nothing(path):
    text, error, seconds = run_apart(path)
    assert text is not None, error
    before = path.read_text()
    changes = difflib.unified_diff(before.splitlines(), text.splitlines(), str(path.relative_to(ROOT)), 'run again', lineterm='', n=8)
    assert text == before, 'run `make execute`\n' + '\n'.join(list(changes)[:60])
    assert seconds < 60, f'{seconds:.0f} s: a chapter takes a few seconds'
