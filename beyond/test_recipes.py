"""Extending the program: a data set and a net of one's own, classes of one's own, and the recipes
and commands of the READMEs."""
import importlib.util
import re
import runpy
import shutil
import sys

import pytest
from torch import nn

import fedavg
from test_fedavg import HERE, data, refused, run, write_plays     # noqa: F401

MINE = '''
import torch
from torch import nn

def points(data_dir):
    draw = torch.Generator().manual_seed(0)
    def made(n):
        x = torch.randn(n, 2, 3, 4, generator=draw)
        return [(image, int(image.sum() > 0) * 4) for image in x]
    return made(200), made(50)

def broken(data_dir):
    return [(torch.ones(2), -1)], [(torch.ones(2), 0)]

class Linear(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.layer = nn.Linear(24, args.num_classes)

    def forward(self, x):
        return self.layer(x.flatten(1))

class Norm(Linear):
    def __init__(self, args):
        super().__init__(args)
        self.layer = nn.Sequential(self.layer, nn.BatchNorm1d(args.num_classes))
'''

def test_a_data_set_and_a_net_of_ones_own(tmp_path, monkeypatch, refused):
    (tmp_path / 'mine.py').write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    words = '--dataset mine:points --num_users 5 --frac 1 --epochs 8 --local_ep 2 --gpu -1'.split()
    for model in ('2nn', 'mine:Linear'):
        assert fedavg.main(words + ['--model', model])[-1]['test_acc'] > 0.8
    for model, said in (('cnn', 'these are 2x3x4'), ('mine:Nothing', 'Nothing'),
                        ('mine:points', 'gives a tuple')):
        assert said in refused([*words, '--model', model])
    fedavg.main(words + ['--num_classes', '7'])         # two more than these data have
    for more, said in (('--num_classes 4', 'has 5'),
                       ('--model mine:Norm --dp example --clip 1 --noise 1', 'batch norm')):
        assert said in refused([*words, *more.split()])
    for name, said in (('mine:nothing', 'nothing'), ('nowhere:points', 'nowhere'),
                       ('mine:broken', 'whole numbers')):
        assert said in refused(['--dataset', name, '--num_users', '5'])

def test_classes_of_ones_own_override_steps_and_hooks(run):
    class Frozen:
        def average(self, updates, w, r):
            list(updates)
            return w
    class Backwards:
        stacks = True
        def adjust(self, parameters, start):
            super().adjust(parameters, start)
            for p in parameters:
                p.grad = -p.grad
    class Inherits(Backwards):
        pass
    assert len({row['test_loss'] for row in run('', Frozen)}) == 1
    for cls in (Backwards, Inherits):
        losses = [row['test_loss'] for row in run('--epochs 2 --lr 0.01', cls)]
        assert losses[0] < losses[1]

def recipes():
    """The Python blocks of beyond/README.md, {title: code}."""
    text = (HERE / 'beyond/README.md').read_text().partition('## Three recipes')[2]
    return dict(re.findall(r'^### (.*?)\n.*?```python\n(.*?)```', text, re.M | re.S))

def test_there_are_three_recipes_of_at_most_fifteen_lines():
    found = recipes()
    assert len(found) == 3
    assert all(len(code.strip().splitlines()) <= 15 for code in found.values())

class Deep(nn.Module):
    """A net with a convolution in three dimensions."""
    def __init__(self, args):
        super().__init__()
        self.filter, self.last = nn.Conv3d(1, 2, 3, padding=1), nn.Linear(2 * 784, 10)

    def forward(self, x):
        return self.last(self.filter(x[:, None]).flatten(1))

def test_a_net_may_have_convolutions_in_three_dimensions(run):
    history = run('--model beyond.test_recipes:Deep --lr 0.02')
    assert history[-1]['train_loss'] < history[0]['train_loss']

class Counted(nn.Module):
    """A net with batch norm, which counts its batches in an int."""
    def __init__(self, args):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.BatchNorm1d(9),
                                    nn.Linear(9, 10))

    def forward(self, x):
        return self.layers(x)

def test_server_momentum_leaves_what_is_counted_alone(run):
    found = {}
    code = recipes()['Server momentum (FedAvgM)'].partition('history')[0]
    exec(code, found)
    run('--model beyond.test_recipes:Counted', found['Momentum'])

@pytest.mark.parametrize('number', range(3))
def test_a_recipe_runs(number, tmp_path, monkeypatch, data):        # noqa: F811
    code = list(recipes().values())[number]
    (tmp_path / 'recipe.py').write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ['--data_dir', data, '--num_users', '5', '--frac', '1', '--epochs', '3', '--gpu', '-1']
    monkeypatch.setattr(sys, 'argv', ['recipe.py', *words])
    sys.modules.pop('recipe', None)
    if 'fedavg.main(' in code:
        history = runpy.run_path('recipe.py')['history']
    else:
        name = re.search(r'^def (\w+)', code, re.M)[1]
        history = fedavg.main(words + ['--dataset', f'recipe:{name}'])
    assert len(history) == 3 and history[-1]['train_loss'] < history[0]['train_loss']

def test_the_readmes_commands_run(tmp_path, run, monkeypatch):      # noqa: F811
    monkeypatch.chdir(tmp_path)
    text = (HERE / 'README.md').read_text() + (HERE / 'beyond/README.md').read_text()
    commands = re.findall(r'^ +python fedavg\.py (--[^#`\n]*)', text.replace('\\\n', ' '), re.M)
    assert len(commands) > 20
    plays = write_plays(tmp_path, monkeypatch)
    for name in ('teacher.pt', 'run.pt'):
        run(f'--epochs 1 --checkpoint {name}')
    for words in commands:
        if not {'--help', '--resume', 'synthetic'} & set(words.split()):
            epochs = 10 if '--prune' in words else 1
            small = '--frac 0.9' if '--dp user' in words and '--secagg' in words else ''
            small += f' --data_dir {plays}' * ('shakespeare' in words)
            if not importlib.util.find_spec('matplotlib'):
                words = re.sub('--plot [^ ]+', '', words)
            if not shutil.which('g++'):
                words = words.replace('--compile 1', '')
            done = run(f'{words} --num_users 10 --epochs {epochs} --local_ep 1 --lr 0.01 {small}')
            assert len(done) == epochs, words
