"""Packaging: every field comes from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']


def words(key):
    "A list in settings.ini: separated by blanks, so a requirement has none inside."
    return cfg.get(key, '').split()


extras = {name: words(f'{name}_requirements') for name in ('lab', 'test', 'site', 'bench')}
extras['dev'] = [*words('dev_requirements'), *dict.fromkeys(r for rs in extras.values() for r in rs)]
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', license_files=['LICENSE'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['kvm_mmu_lit', 'kvm_mmu_lit.*']), include_package_data=True, zip_safe=False,
    python_requires='>=' + cfg['min_python'], install_requires=words('requirements'), extras_require=extras,
    entry_points={'console_scripts': words('console_scripts'),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=['Intended Audience :: Developers', 'Programming Language :: Python :: 3',
                 'Topic :: System :: Operating System Kernels'],
)
