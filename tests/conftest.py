"""What every test shares: a failed claim names its notebook, its cell and its sentence; a measured number is printed at
the end."""
import os

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says more about the machine than about the book. The same examples every time, unless EXAMPLES=fresh asks for others.
settings.register_profile('same', deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile('fresh', deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile(os.environ.get('EXAMPLES', 'same'))


def pytest_configure(config):
    config.addinivalue_line('markers', 'claim(notebook, cell, sentence): a test extracted from a notebook')


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    claim = item.get_closest_marker('claim')
    if claim and report.failed:
        notebook, cell, sentence = claim.args
        report.sections.insert(0, ('Claim', f'{sentence}\n{notebook}, cell {cell}'))


@pytest.fixture
def measured(record_property):
    "Say a number at the end of the run, whichever worker found it."
    return lambda sentence: record_property('measured', sentence)


def pytest_terminal_summary(terminalreporter):
    said = [value for report in terminalreporter.getreports('passed') for key, value in report.user_properties
            if key == 'measured']
    if not said: return
    terminalreporter.section('measured')
    for sentence in said: terminalreporter.write_line(sentence)
