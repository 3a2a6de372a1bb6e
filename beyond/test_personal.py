"""Personal models: tested on the labels that their clients hold, from finetuning to own layers.

    python -m pytest -q beyond/test_personal.py
"""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import beyond
import fedavg
import sampling
from beyond.personal import Personal, PersonalLayers
from test_fedavg import data, final, read_log, refused, run     # noqa: F401

class Says(nn.Module):
    """Logits (n, 3), whatever it sees."""
    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.v.expand(len(x), 3)

def says(label):
    """The weights that make Says say it."""
    return {'v': torch.eye(3)[label]}

class Trained:
    """A server with two clients whose models are there."""
    evaluate, all_sum = staticmethod(fedavg.evaluate), staticmethod(lambda tensors: None)
    K, net, w = 2, Says(), says(0)
    args = SimpleNamespace(device='cpu', num_classes=3, bs=4)
    whole_test = TensorDataset(torch.zeros(10, 1), torch.tensor([0] * 5 + [1] * 4 + [2]))
    # Client 0 holds the labels 0, 1, 1, 1, and copies that do not count; client 1 holds 2, 2.
    train_set = TensorDataset(torch.zeros(8, 1), torch.tensor([0, 1, 1, 1, 2, 2, 0, 0]))
    parts, n_k = {0: np.array([0, 1, 2, 3, 6, 7]), 1: np.array([4, 5])}, np.array([4, 2])

def test_a_clients_accuracy_is_that_on_the_labels_it_holds():
    made = type('Server', (Personal, beyond.Room, Trained), {
        'models': lambda self, w: [(0, says(0)), (1, says(2))]})()
    # A quarter of client 0's labels are 0; client 1's own model says 2.
    assert made.tested().tolist() == [[0.25, 1.0], [0.25, 0.0]]
    # With a teacher, its logits stand beside the labels.
    x, y = made.train_set.tensors
    made.train_set = TensorDataset(x, torch.cat([y[:, None].float(), torch.ones(8, 3)], 1))
    assert made.tested().tolist() == [[0.25, 1.0], [0.25, 0.0]]

def test_labels_that_the_test_set_lacks_do_not_count():
    made = type('Server', (Personal, beyond.Room, Trained), {
        'models': lambda self, w: [(0, says(0)), (1, says(2))]})()
    made.whole_test = TensorDataset(torch.zeros(3, 1), torch.tensor([0, 0, 0]))
    own, of_w = made.tested().tolist()
    assert own[0] == of_w[0] == 1 and np.isnan(own[1]) and np.isnan(of_w[1])

def percents(out):
    """The percentages in the last two lines: mean, 10th and 90th percentile."""
    lines = out.splitlines()[-2:]
    return [[float(v) for v in re.findall(r'([\d.]+) %', line)] for line in lines]

def test_mix_goes_from_finetune_to_the_global_model(run, tmp_path, capsys):     # noqa: F811
    reports = {}
    for words in ('finetune', 'mix --mix 0', 'mix --mix 1', 'mix --mix 0.5 --engine loop',
                  'finetune --personal_ep 3'):
        run(f'--iid 0 --epochs 2 --csv {tmp_path}/l.csv --personal {words}')
        reports[words] = percents(capsys.readouterr().out)
        if words == 'finetune':
            logged = np.array(read_log(tmp_path / 'l.csv')[0]['accuracies'])
    own, w = reports['finetune']
    assert logged.shape == (10, 2) and own[0] == round(100 * logged[:, 0].mean(), 2)
    assert w[1] == round(100 * np.percentile(logged[:, 1], 10), 2)
    assert reports['mix --mix 0'] == [own, w] and reports['mix --mix 1'] == [w, w]
    assert own[0] > w[0] + 20 and reports['mix --mix 0.5 --engine loop'][0] not in (own, w)
    assert reports['finetune --personal_ep 3'][0] != own

def test_personal_layers_stay_with_their_clients(run, tmp_path):        # noqa: F811
    words = '--personal layers --personal_layers fc1,fc3 --frac 1 --iid 0'
    for engine in ('loop', 'stacked'):
        history = run(f'{words} --engine {engine} --checkpoint {tmp_path}/{engine}')
    first = final(run, '--lr 1e-30 --epochs 1')
    loop, stacked = (torch.load(tmp_path / name, weights_only=True)
                     for name in ('loop', 'stacked'))
    for name, v in loop['w'].items():
        assert torch.equal(first[name], v) != name.startswith('fc2')
    crossing = 10 * (26 + 4 * (200 * 200 + 200))
    assert history[0]['up_bytes'] == history[0]['down_bytes'] == crossing
    start = torch.cat([v.flatten() for name, v in first.items() if not name.startswith('fc2')])
    own, others = loop['PersonalLayers'], stacked['PersonalLayers']
    for k in range(10):
        assert (own[k] - others[k]).norm() <= 1e-4 * own[k].norm()
        assert (own[k] != start).float().mean() > 0.5
    assert len(own[0]) == 199210 - 40200 and not torch.equal(own[0], own[1])

class Started:
    """A server with layers of its clients."""
    def __init__(self, args):
        self.args, self.net = args, fedavg.Server(args).net
        self.w = self.net.state_dict()

    def start(self, k, w, r):
        return w

    def keep(self, u, x, payload, r):
        return {}

def test_a_client_starts_from_its_own_layers_and_the_servers_others():
    args = SimpleNamespace(model='2nn', num_channels=1, num_classes=10, num_users=2, seed=1,
                           personal_layers=('fc3',))
    made = type('Server', (PersonalLayers, beyond.Room, Started), {})(args)
    made.layers = {0: torch.arange(2010.0)}
    own = made.start(0, made.w, fedavg.Round(1))
    assert own['fc3.weight'].flatten().tolist() == list(range(2000))
    assert own['fc3.bias'].tolist() == list(range(2000, 2010))
    assert all(torch.equal(own[name], v) for name, v in made.w.items() if 'fc3' not in name)
    assert made.start(1, made.w, fedavg.Round(1)) is made.w
    assert made.crosses(0, fedavg.Round(1)).sum() == 199210 - 2010
    diverged = {name: v / 0 for name, v in made.w.items()}
    kept = [made.keep(fedavg.Update(0, w, 1, 0.0), None, None, None) for w in (own, diverged)]
    assert kept[0]['layers'].tolist() == list(range(2010)) and kept[1] == {}

class Broken:
    """Ctrl-C while the clients' models are tested."""
    def models(self, w):
        raise KeyboardInterrupt

def test_the_report_can_be_had_later(run, tmp_path, capsys):        # noqa: F811
    words = f'--epochs 1 --checkpoint {tmp_path}/c.pt'
    with pytest.raises(SystemExit) as e:
        run(f'{words} --personal mix', Broken)
    assert e.value.code == 130 and 'which --resume makes' in capsys.readouterr().out
    run(f'{words} --personal finetune --resume')
    assert len(percents(capsys.readouterr().out)[0]) == 3

def test_what_cannot_be_personal_is_refused(refused, monkeypatch):      # noqa: F811
    monkeypatch.setattr(sampling, 'load', lambda *_: pytest.fail('data were read'))
    for words, said in (
            ('--personal layers', '--personal_layers'), ('--mix 0.5', '--personal mix'),
            ('--personal_ep 2', '--personal'), ('--personal finetune --mix 1', '--personal mix'),
            ('--personal_layers fc2,fc3', 'fc2,fc3: only goes with --personal layers'),
            ('--personal layers --personal_layers fc9', 'fc1, fc2, fc3'),
            ('--personal layers --personal_layers fc1,fc2,fc3', 'not all'),
            ('--personal layers --personal_layers fc3 --prune 0.5', '--prune'),
            ('--personal layers --personal_layers fc3 --cut 1', '--cut'),
            ('--personal mix --widths 1,0.5', '--widths')):
        assert said in refused(words.split())
