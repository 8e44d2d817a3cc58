"""What every test shares: a failed claim names its notebook, its cell and its sentence."""
import pytest


def pytest_configure(config):
    config.addinivalue_line('markers', 'claim(notebook, cell, sentence): a test extracted from a notebook')


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    claim = item.get_closest_marker('claim')
    if claim and report.failed:
        notebook, cell, sentence = claim.args
        report.sections.insert(0, ('Claim', f'{sentence}\n{notebook}, cell {cell}'))
