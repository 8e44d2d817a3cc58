"""The documentation site from `_quarto.yml` and the executed notebooks: what `quarto render` does, with what PyPI
holds."""
