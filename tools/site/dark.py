"""Pictures at night: the inks of `draw` with their lightness turned over, as a style sheet.

A picture's own colours stay what they are."""
import colorsys

from kvm_mmu_lit.draw import ink


def shade(colour: str, lightness) -> str:
    "A colour with another lightness, and a little less of itself."
    red, green, blue = (int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))
    hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
    return '#' + ''.join(f'{round(part * 255):02x}'
                         for part in colorsys.hls_to_rgb(hue, lightness(light), saturation * 0.85))


def rules() -> str:
    "CSS rules for everything inside `.picture`."
    papers = {ink.PAPER: '#1b1d22', ink.EDGE: '#3a3e46', ink.PALE: '#332a45'}
    letters = {ink.BLACK: '#dfe3ea', ink.FAINT: '#9aa3b0'}
    fills, lines = dict(papers), {**papers, **letters}
    for one in ink.INKS.values():
        if one.text == '#ffffff':   # an accent: white on a strong colour, at night as by day
            lines.setdefault(one.line, shade(one.line, lambda light: 0.68))
            continue
        fills.setdefault(one.fill, shade(one.fill, lambda light: 0.20 + (1 - light) * 0.25))
        lines.setdefault(one.line, shade(one.line, lambda light: 0.55))
        letters.setdefault(one.text, shade(one.text, lambda light: 0.84))
    accents = {one.line: lines[one.line] for one in ink.INKS.values() if one.text == '#ffffff'}
    letters.update({old: shade(old, lambda light: 0.8) for old in accents})
    out = [f'text[fill="{old}"] {{ fill: {new}; }}' for old, new in letters.items()]
    out += [f':not(text)[fill="{old}"] {{ fill: {new}; }}' for old, new in {**letters, **accents, **fills}.items()]
    out += [f'[stroke="{old}"] {{ stroke: {new}; }}' for old, new in lines.items()]
    return '\n'.join(out)


def sheet() -> str:
    "The rules under both of Furo's ways of being dark."
    def under(prefix): return '\n'.join(f'{prefix} .picture {rule}' for rule in rules().splitlines())
    automatic = under('body:not([data-theme="light"])')
    return ('/* Made by tools/site/dark.py from the inks of kvm_mmu_lit.draw. */\n@media screen {\n'
            + under('body[data-theme="dark"]')
            + '\n}\n@media screen and (prefers-color-scheme: dark) {\n' + automatic + '\n}\n')
