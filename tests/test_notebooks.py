"""Every notebook, run from top to bottom in a process of its own: nothing fails, and no byte that git sees changes."""
import json

import pytest

from tools.notebooks import NBS, all_notebooks, run_apart


@pytest.mark.parametrize('path', all_notebooks(), ids=lambda path: path.relative_to(NBS).with_suffix('').as_posix())
def test_running_it_changes_nothing(path):
    text, error, _ = run_apart(path)
    if text is None: pytest.fail(error)
    before = path.read_text()
    changed = [old['id'] for old, new in zip(json.loads(before)['cells'], json.loads(text)['cells']) if old != new]
    if changed or text != before: pytest.fail(f'running it changes cells {changed}; see `make execute` and git diff')
