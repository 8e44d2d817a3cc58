"""A browser for the tests: Debian's chromium, driven by playwright; nothing may be asked of any other machine."""
import shutil
import socket

import pytest

ARGUMENTS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
             '--disable-background-networking',
             '--disable-component-update', '--disable-sync']
CHROMIUM = shutil.which('chromium')
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason='chromium is not installed: sudo apt-get install chromium')


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def launch(playwright):
    return playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


def watch(context, origin: str) -> list:
    "The faults a context's pages meet from now on: console errors, failed or foreign requests, HTTP errors."
    faults = []
    context.on('console', lambda message: message.type == 'error' and faults.append(f'console: {message.text}'))
    context.on('weberror', lambda error: faults.append(f'script: {error.error}'))
    context.on('request', lambda request: request.url.startswith((origin, 'data:', 'blob:'))
               or faults.append(f'foreign: {request.url}'))
    # A page that is left gives up what it is still loading; only what could not be had is a fault.
    context.on('requestfailed', lambda request: 'ERR_ABORTED' in str(request.failure)
               or faults.append(f'failed: {request.url} ({request.failure})'))
    context.on('response',
               lambda response: response.status >= 400 and faults.append(f'{response.status}: {response.url}'))
    return faults
