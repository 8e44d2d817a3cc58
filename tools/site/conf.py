"""Sphinx's settings; what varies comes from `site.json`, which the builder writes."""
import json
from pathlib import Path

_site = json.loads((Path(__file__).parent / 'site.json').read_text())
project = html_title = _site['website']['title']
author = copyright = ''
extensions = ['myst_nb']
root_doc = 'index'
exclude_patterns = ['_static']
html_theme = 'furo'
html_static_path = ['_static']
html_favicon = '_static/favicon.svg'
html_css_files = ['book.css', 'dark.css']
html_js_files = [('live.mjs', {'type': 'module'})] if _site['live'] else []
html_show_sourcelink = html_show_copyright = html_show_sphinx = html_copy_source = False
html_use_index = False
html_theme_options = {
    'light_css_variables': {'color-brand-primary': '#1b4f8f', 'color-brand-content': '#1b4f8f',
                            'color-brand-visited': '#4a3f86'},
    'dark_css_variables': {'color-brand-primary': '#8ab8f0', 'color-brand-content': '#8ab8f0',
                           'color-brand-visited': '#b3a6ec'},
}
pygments_style, pygments_dark_style = 'friendly', 'github-dark'
nb_execution_mode = 'off'
nb_mime_priority_overrides = [('html', 'text/html', 5)]
nb_ipywidgets_js = {}
myst_enable_extensions = ['colon_fence', 'attrs_inline', 'attrs_block']
myst_heading_anchors = 4
suppress_warnings = ['myst.header', 'misc.highlighting_failure']
