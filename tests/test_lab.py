"""The lab's live figures, moved at random: whatever a reader can choose, there is a picture or a sentence that says why
not."""
import html
import importlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NBS = Path(__file__).parents[1] / 'nbs'
LIVE = re.compile(r'<div class="live" data-fn="([^"]*)" data-args="([^"]*)">')


def figures() -> list:
    "(notebook, function, controls) of every live figure of the lab, as the committed outputs have it."
    found = []
    for path in sorted((NBS / 'lab').glob('*.ipynb')):
        for cell in json.loads(path.read_text())['cells']:
            for output in cell.get('outputs', ()):
                text = ''.join(output.get('data', {}).get('text/html', ''))
                found += [(path.stem, function, json.loads(html.unescape(controls)))
                          for function, controls in LIVE.findall(text)]
    return found


def choices(control):
    "What a reader can choose with a control."
    if isinstance(control, list):
        low, high, _, step = (*control, 1)[:4]
        return st.integers(0, (high - low) // step).map(lambda n: low + n * step)
    return st.sampled_from(control['options']) if 'options' in control else st.just(control['text'])


def test_every_chapter_of_the_lab_has_a_live_figure():
    assert {name for name, *_ in figures()} == {path.stem for path in (NBS / 'lab').glob('*.ipynb')}


@pytest.mark.parametrize('name, function, controls', figures(),
                         ids=lambda part: part if isinstance(part, str) and ':' in part else '')
def test_whatever_is_chosen_there_is_a_picture_or_a_reason(name, function, controls):
    module, called = function.split(':')
    show = getattr(importlib.import_module(module), called)

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries({argument: choices(control) for argument, control in controls.items()}))
    def moved(chosen):
        try: picture = show(**chosen)
        except ValueError as why:
            assert len(str(why)) > 10, chosen
            return
        assert str(picture) and str(show(**chosen)) == str(picture), chosen
        assert ElementTree.fromstring(picture.svg()).get('aria-label') or not getattr(picture, 'caption', ''), chosen

    moved()
