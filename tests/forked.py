"""The command nntrain_fit in processes of its own that need not load torch.

They are forked from one process that has loaded it: this saves seconds of processor
time each. A test that needs a process to send signals to starts a real one."""
import multiprocessing
import os
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

# no import of pytest and the like: every child imports this file
config = ConfigParser(delimiters=['='])
config.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
SCRIPTS = dict(line.split('=') for line in config['DEFAULT']['console_scripts'].split())
PRELOAD = [
    'torch', 'torch._dynamo', 'torchmetrics', 'matplotlib.pyplot', 'nntrain.command']
CAN_FORK = 'forkserver' in multiprocessing.get_all_start_methods()


def command(script='nntrain_fit'):
    "The command as a list, for `subprocess`: as pip installs it, but for this checkout"
    module, function = SCRIPTS[script].split(':')
    return [
        sys.executable, '-c',
        f'import sys; from {module} import {function}; sys.exit({function}())']


def run(*words, env=os.environ, cwd=None, timeout=300, script='nntrain_fit'):
    """Like `subprocess.run([…], capture_output=True, text=True)` -> returncode, stdout,
    stderr"""
    words = list(map(str, words))
    if not CAN_FORK:
        return subprocess.run(
            [*command(script), *words], env=env, cwd=cwd, timeout=timeout,
            capture_output=True, text=True)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder)/name for name in ('stdout', 'stderr')]
        args = script, words, dict(env), str(cwd or os.getcwd()), *map(str, files)
        process = context.Process(target=_child, args=args)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill(), process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        out, err = (path.read_text(encoding='utf-8') for path in files)
    return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)


def _child(script, words, env, cwd, out, err):
    for fd, path in enumerate([os.devnull, out, err]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), fd)
    sys.stdin = open(0, encoding='utf-8')
    os.environ.clear(), os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [script, *words]
    module, function = SCRIPTS[script].split(':')
    sys.exit(getattr(import_module(module), function)())
