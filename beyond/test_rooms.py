"""What holds of all rooms: the eight files work without them, and any two of them go together, or
are refused in one line.

    python -m pytest -q beyond/test_rooms.py
"""
import ast
import importlib
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import beyond
import fedavg
import options
from beyond.test_processes import elastic, forkserver, free_port
from test_fedavg import data, write_mnist, write_plays     # noqa: F401, data is a fixture

HERE = pathlib.Path(__file__).parent
FILES = ('fedavg.py', 'models.py', 'sampling.py', 'compress.py', 'options.py', 'test_fedavg.py',
         'requirements.txt', 'README.md')

# {setting: (room, flags)}: a setting for each flag of a room, and for each of its values that
# other rooms see.
SETTINGS = {
    'mu': ('local', '--mu 0.1'),
    'adamw': ('local', '--optimizer adamw --lr 0.001'),
    'bf16': ('local', '--bf16 1'),
    'loop': ('engines', '--engine loop'),
    'stacked': ('engines', '--engine stacked'),
    'compile': ('engines', '--compile 1'),
    'quantize': ('wire', '--quantize 12'),
    'topk': ('wire', '--topk 0.3'),
    'no feedback': ('wire', '--topk 0.3 --error_feedback 0'),
    'prune': ('prune', '--prune 0.5 --prune_end 2'),
    'dp user': ('privacy', '--dp user --clip 1 --noise 0.1 --delta 0.01'),
    'epsilon': ('privacy', '--dp user --clip 1 --epsilon 8'),
    'dp example': ('privacy', '--dp example --clip 1 --noise 0.1'),
    'secagg': ('secure', '--secagg 1'),
    'drop': ('stragglers', '--drop 0.2'),
    'corrupt': ('stragglers', '--corrupt 0.3'),
    'deadline': ('stragglers', '--speeds lognormal:1 --deadline 0.9 --local_ep 2'),
    'overselect': ('stragglers', '--overselect 0.3'),
    'widths': ('widths', '--widths 1,0.5'),
    'separable': ('widths', '--model cnn --separable 1'),
    'cut': ('cut', '--cut 1'),
    'teacher': ('distill', '--teacher TEACHER'),
    'finetune': ('personal', '--personal finetune'),
    'mix': ('personal', '--personal mix'),
    'layers': ('personal', '--personal layers --personal_layers fc2'),
    'augment': ('augment', '--augment 1'),
    'balance': ('augment', '--balance 1'),
    'plays': ('the paper', '--dataset shakespeare --model lstm'),
    'silo': ('silos', '--silo 1')}

# Runs in which every allowed pair of settings of different rooms occurs. Of those with --compile
# or --silo, which take long, every pair of flags.
RUNS = (
    'mu, adamw, loop, quantize, topk, prune, drop, corrupt, deadline, overselect, separable, cut, '
    'teacher, finetune, augment, balance',
    'mu, adamw, bf16, stacked, quantize, no feedback, prune, dp user, drop, corrupt, separable, '
    'mix, augment',
    'mu, adamw, bf16, stacked, quantize, epsilon, secagg, separable, layers, augment',
    'mu, adamw, bf16, compile, quantize, no feedback, prune, drop, corrupt, deadline, overselect, '
    'widths, teacher, augment, balance',
    'mu, adamw, bf16, loop, quantize, no feedback, dp example, drop, corrupt, deadline, '
    'overselect, separable, layers, augment',
    'stacked, no feedback, prune, epsilon, drop, corrupt, finetune',
    'loop, prune, dp example, secagg, drop, deadline, mix',
    'bf16, stacked, topk, deadline, overselect, widths, teacher, balance',
    'bf16, loop, topk, epsilon, mix',
    'bf16, loop, dp user, secagg, finetune',
    'compile, topk, dp user, layers',
    'no feedback, overselect, cut, teacher, mix, balance',
    'stacked, secagg, teacher, layers, balance',
    'loop, topk, dp example, widths',
    'dp example, finetune',
    'plays, mu, adamw, loop, quantize, topk, prune, drop, corrupt, deadline, overselect',
    'plays, no feedback, epsilon',
    'plays, loop, dp user, secagg')
SILOS = (
    'silo, mu, adamw, bf16, compile, quantize, prune, secagg, drop, deadline, separable, finetune, '
    'augment, balance',
    'silo, stacked, dp user, mix',
    'silo, loop, no feedback, corrupt',
    'silo, stacked, topk, widths, teacher')

def words(names, folder):
    """The command line of a run with these settings, but for --data_dir."""
    flags = ' '.join(SETTINGS[name][1] for name in names)
    alone = '' if 'silo' in names else '--num_users 10 --processes 1 '
    return ('--frac 0.7 --gpu -1 --seed 2 ' + alone
            + flags.replace('TEACHER', f'{folder}/teacher.pt')).split()

def pairs(names):
    """The pairs of settings of different rooms, in the order of SETTINGS."""
    names = sorted(names, key=list(SETTINGS).index)
    return [(a, b) for a, b in itertools.combinations(names, 2)
            if SETTINGS[a][0] != SETTINGS[b][0]]

def flag(name):
    """A setting's first flag."""
    return SETTINGS[name][1].split()[0]

def refusal(names, folder, monkeypatch, capsys):
    """The line with which the settings are refused, or ''."""
    silo = 'silo' in names
    for name, value in elastic(0, 2, 0).items():
        monkeypatch.setenv(name, value) if silo else monkeypatch.delenv(name, raising=False)
    argv = words(names, folder) + ['--epochs', '2', '--data_dir', 'x{rank}' if silo else 'x']
    try:
        options.args_parser(argv, beyond.rooms())
    except SystemExit:
        return capsys.readouterr().err
    return ''

def test_every_pair_of_settings_is_covered_or_refused_in_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / 'teacher.pt').touch()
    monkeypatch.setattr(options, 'ROLES', 10)
    together = [set(run.split(', ')) for run in RUNS + SILOS]
    flags = [{flag(name) for name in run} for run in together]
    refused = 0
    for pair in pairs(SETTINGS):
        line = refusal(pair, tmp_path, monkeypatch, capsys)
        if line:
            refused += 1
            assert line.count('\n') == 1 and line.startswith('fedavg.py: error: --'), pair
            assert any(flag(name) in line for name in pair), (pair, line)
        elif {'compile', 'silo'} & set(pair):
            assert any({flag(name) for name in pair} <= run for run in flags), pair
        else:
            assert any(set(pair) <= run for run in together), pair
    assert refused == 48
    for run in together:
        assert not refusal(run, tmp_path, monkeypatch, capsys), run

class Copied:
    """Copies the checkpoint of the first round."""
    def done(self, r):
        if r.t == 2 and self.file:
            shutil.copy(self.file, self.file.replace('whole', 'part'))
        return super().done(r)

def uncompiled():
    """A compiled stack without torch.compile, which takes long; test_engines.py has it."""
    torch.compile = lambda step, mode: step

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(torch, 'compile', torch.compile)        # set back when the test is done
    uncompiled()

def two_rounds(argv, root):
    """Two rounds in one go, into root/whole, and the second one again, into root/part."""
    argv = argv + ['--epochs', '2', '--checkpoint']
    fedavg.main(argv + [f'{root}/whole'], Copied)
    fedavg.main(argv + [f'{root}/part', '--resume'])

def equal(a, b):
    """Whether two checkpoints are equal bit for bit, but for the seconds and their own names."""
    if isinstance(a, dict):
        names = a.keys() - {'seconds', 'checkpoint', 'resume'}
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in names)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b

def assert_equal(root, suffix=''):
    whole, part = (torch.load(f'{root}/{name}{suffix}', weights_only=True)
                   for name in ('whole', 'part'))
    assert all(v.isfinite().all() for v in whole.get('w', {}).values())
    assert equal(whole, part)

@pytest.fixture(scope='module')
def folder(tmp_path_factory, data):     # noqa: F811
    """A folder with a teacher, and with the data of three silos."""
    folder = tmp_path_factory.mktemp('rooms')
    fedavg.main(f'--num_users 10 --epochs 1 --model mlp --gpu -1 --data_dir {data} '
                f'--checkpoint {folder}/teacher.pt'.split())
    for rank in range(3):
        write_mnist(folder / f'silo{rank}', train=60, test=30)
    return folder

@pytest.fixture(scope='module', autouse=True)
def copy(tmp_path_factory):
    """The tests of a copy of the eight files, which run beside those of this file."""
    folder = tmp_path_factory.mktemp('copy')
    for name in FILES:
        shutil.copy(HERE.parent / name, folder)
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider']
    with subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE,
                          env=os.environ | {'OMP_NUM_THREADS': '1'}) as process:
        yield process
        process.kill()

@pytest.mark.parametrize('run', RUNS)
def test_a_run_of_many_rooms_resumes_bit_for_bit(
        run, data, folder, tmp_path, monkeypatch):      # noqa: F811
    if 'plays' in run:
        data = write_plays(tmp_path, monkeypatch)
    two_rounds(words(run.split(', '), folder) + ['--data_dir', data], tmp_path)
    assert_equal(tmp_path)

def one_silo(argv, rank, ports, root):
    """two_rounds in one of several processes, as torchrun would start it three times."""
    torch.set_num_threads(1)
    uncompiled()
    main = fedavg.main
    def started(*more):
        os.environ.update(elastic(rank, 3, ports.pop(0)))
        return main(*more)
    fedavg.main = started
    two_rounds(argv, root)

@pytest.mark.parametrize('run', SILOS)
def test_silos_with_many_rooms_resume_bit_for_bit(run, folder, tmp_path):
    argv = words(run.split(', '), folder) + ['--frac', '1', '--data_dir', f'{folder}/silo{{rank}}']
    ports = [free_port() for _ in range(3)]
    silos = [forkserver().Process(target=one_silo, args=(argv, rank, list(ports), tmp_path))
             for rank in range(3)]
    for silo in silos:
        silo.start()
    for silo in silos:
        silo.join(100)
    assert [silo.exitcode for silo in silos] == [0, 0, 0]
    for rank in range(3 if 'topk' in run else 1):
        assert_equal(tmp_path, f'.{rank}' if rank else '')

def test_no_room_imports_fedavg_and_few_import_one_another():
    allowed = {'models', 'sampling', 'compress', 'options', 'beyond', 'beyond.flat'}
    others = {'silos': {'beyond.processes'}, 'forked': {'beyond.processes'},
              'distill': {'beyond.augment', 'beyond.files'},
              'secure': {'beyond.crypto', 'beyond.protocol'}, 'protocol': {'beyond.crypto'},
              'privacy': {'beyond.accountant'}, 'records': {'beyond.files'},
              'engines': {'beyond.stacks'}}
    for path in HERE.glob('*.py'):
        if path.name.startswith('test_') or path.stem == '__init__':
            continue
        tree = ast.parse(path.read_text())
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                  for alias in node.names}
        local = {name for name in names if (HERE.parent / f'{name.split(".")[0]}.py').exists()
                 or name.split('.')[0] == 'beyond'}
        assert local <= allowed | others.get(path.stem, set()), path.name

def attributes():
    """{name: the rooms' server classes that assign self.name, and which Server does not have}."""
    known = {'args', 'net', 'K', 'w', 'history', 'train_set', 'test_set', 'parts', 'n_k', 'rank',
             'size'}
    found = {}
    for path in HERE.glob('*.py'):
        for cls in ast.parse(path.read_text()).body:
            room = isinstance(cls, ast.ClassDef) and hasattr(
                getattr(importlib.import_module(f'beyond.{path.stem}'), cls.name), 'crosses')
            for node in ast.walk(cls) if room and not path.name.startswith('test_') else ():
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and (
                        getattr(node.value, 'id', '') == 'self' and node.attr not in known):
                    found.setdefault(node.attr, set()).add(cls.name)
    return found

def test_rooms_share_the_names_of_steps_and_questions_alone():
    """A method of two rooms is one that Server or Room has, unless one room refines the other's."""
    refined = {'pack', 'change', 'cost_of', 'who', 'serve', 'dismiss', 'ask', 'test_share',
               'failed'}
    owners = {}
    for room in beyond.rooms():
        for cls in vars(room).values():
            if getattr(cls, '__module__', '') == room.__name__ and hasattr(cls, 'crosses'):
                for name in vars(cls):
                    owners.setdefault(name, set()).add(cls.__name__)
    shared = {name for name, classes in owners.items()
              if len(classes) > 1 and not name.startswith('__')}
    known = set(dir(fedavg.Server)) | set(dir(beyond.Room))
    assert shared - known == refined
    assert not {name for name, classes in attributes().items() if len(classes) > 1}
    assert not {name for name in vars(beyond.Room) if not name.startswith('__')
                and hasattr(fedavg.Server, name)}

def test_every_flag_belongs_to_a_group_of_its_room(capsys):
    with pytest.raises(SystemExit):
        options.args_parser(['--help'], beyond.rooms())
    out = capsys.readouterr().out
    titles = re.findall(r'^(the paper|beyond\.\w+): ?.*$', out, re.M)
    assert titles[0] == 'the paper' and 'beyond.wire' in titles and len(titles) > 10
    assert '.:\n' not in out
    out = out[out.index('the paper:'):]        # after the usage
    assert out.index('--num_users') < out.index('beyond.wire') < out.index('--quantize')

def test_the_eight_files_work_without_the_rooms(copy):
    out, _ = copy.communicate(timeout=100)
    assert copy.returncode == 0, out[-3000:]
