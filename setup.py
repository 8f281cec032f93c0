"Package metadata, read from settings.ini: the one place for names, versions and requirements."
import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']


class BuildPyWithResults(build_py):
    "Carry results/**/*.json inside the package, so that `in_band` works from an installed wheel"
    def run(self):
        super().run()
        if self.editable_mode: return  # an editable install reads the folder results/ itself
        to = Path(self.build_lib)/cfg['lib_name']/'results'
        shutil.rmtree(to, ignore_errors=True)  # an older build in the same folder may hold rows that are gone
        to.mkdir(parents=True)
        for path in sorted((root/'results').rglob('*.json')):
            place = to/path.relative_to(root/'results')
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    project_urls={
        'Documentation': f"{cfg['doc_host']}{cfg['doc_baseurl']}",
        'Issues': f"{cfg['git_url']}/issues",
        'Changelog': f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
    },
    license_expression='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'],
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Education',
        'Intended Audience :: Developers',
        'Natural Language :: English',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ] + [f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)],
    packages=find_packages(include=[f"{cfg['lib_name']}*"]),
    # what a figure carries to the browser
    package_data={cfg['lib_name']: ['web/*.js', 'web/*.css']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={name.removesuffix('_requirements'): cfg[name].split() for name in cfg if name.endswith('_requirements')},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],  # nbdev links `names` in prose to their pages
    },
    cmdclass={'build_py': BuildPyWithResults},
    zip_safe=False,
)
