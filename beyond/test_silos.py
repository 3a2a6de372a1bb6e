"""Silos: each process is a client with its own files, and sends payloads alone.

    python -m pytest -q beyond/test_silos.py
"""
import gzip
import os
import pathlib
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fedavg
import models
import options
import sampling
from beyond import silos
from beyond.flat import flat
from beyond.test_processes import Ranks, elastic, ended
from test_fedavg import client_args, data, near, read_log, refused, write_mnist     # noqa: F401

def by_hand(w, train, k):
    """What client k makes of w on its own files in the first round, w_k."""
    net = models.TwoNN(784, 200, 10)
    net.load_state_dict(w)
    sampling.seed_torch(1, 'train', 1, k)
    return fedavg.LocalUpdate(client_args(), train, range(len(train))).train(net)[0]

def accuracy_by_hand(w, train, test):
    """The mean over the labels of test's accuracy on each, weighted as train holds them."""
    net = models.TwoNN(784, 200, 10)
    net.load_state_dict(w)
    (_, held), (x, y) = train.tensors, test.tensors
    right = net(x).argmax(1) == y
    held = held[torch.isin(held, y)]
    return np.mean([right[y == label].float().mean().item() for label in held])

def test_packed_files_are_unpacked_without_a_network(tmp_path):
    write_mnist(tmp_path)
    first, *others = sorted((tmp_path / 'MNIST/raw').iterdir())
    whole = sampling.load('mnist', tmp_path, download=False)
    for path in (first, *others):
        with gzip.open(f'{path}.gz', 'wb') as f:
            f.write(path.read_bytes())
        path.unlink()
    again = sampling.load('mnist', tmp_path, download=False)
    assert all(torch.equal(*pair) for a, b in zip(whole, again) for pair in zip(a[:], b[:]))
    first.unlink()
    packed = pathlib.Path(f'{first}.gz')
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(OSError, match='gz is truncated or corrupt'):
        sampling.load('mnist', tmp_path, download=False)
    assert not first.exists()

def test_silos_train_on_their_own_files_and_keep_their_own_layers(tmp_path):
    for rank, n in enumerate((100, 50)):
        write_mnist(tmp_path / f'silo{rank}', train=n, test=30)
    out = ended(Ranks(
        f'--silo 1 --frac 1 --epochs 1 --engine loop --personal layers --personal_layers fc2 '
        f'--checkpoint {tmp_path}/c.pt --csv {tmp_path}/l.csv', f'{tmp_path}/silo{{rank}}'))
    assert '2 clients with 50 to 100' in out and 'of 2 clients' in out
    sampling.seed_torch(1, 'init')
    w = models.TwoNN(784, 200, 10).state_dict()
    sets = [sampling.load('mnist', tmp_path / f'silo{k}') for k in (0, 1)]
    w_1 = [by_hand(w, train, k) for k, (train, _) in enumerate(sets)]
    average = fedavg.FedAvg(w_1, [100, 50])
    stay = {name: v for name, v in w.items() if name.startswith('fc2')}
    saved, other = (torch.load(tmp_path / name, weights_only=True) for name in ('c.pt', 'c.pt.1'))
    assert near(average | stay, saved['w'])
    kept = saved['PersonalLayers'], other['kept'][1]['PersonalLayers']
    accuracies = read_log(tmp_path / 'l.csv')[0]['accuracies']
    for k, (train, test) in enumerate(sets):
        own = {name: v for name, v in w_1[k].items() if name in stay}
        assert list(kept[k]) == [k]
        torch.testing.assert_close(kept[k][k], flat(own))
        # Both silos test the last average, with layers of their own.
        assert accuracies[k][0] == pytest.approx(accuracy_by_hand(average | own, train, test))

def test_silos_send_bytes_and_know_what_they_kept_when_they_start_again(tmp_path):
    for rank, n in enumerate((60, 30)):
        write_mnist(tmp_path / f'silo{rank}', train=n, test=30)
    words = ('--silo 1 --frac 0.5 --epochs 4 --quantize 8 --topk 0.1 --prune 0.5 --prune_end 2 '
             f'--personal finetune --checkpoint {tmp_path}/c --csv {tmp_path}/l.csv --resume')
    first = ended(Ranks(words, f'{tmp_path}/silo{{rank}}'))
    saved, other = (torch.load(tmp_path / name, weights_only=True) for name in ('c', 'c.1'))
    assert list(saved['Feedback']) == [0] and list(other['kept']) == [3, 4]
    assert list(other['kept'][4]['Feedback']) == [1]
    zeros = sum((v == 0).sum().item() for v in saved['w'].values() if v.dim() > 1)
    assert zeros == 198800 / 2
    up = [int(row['up_bytes']) for row in read_log(tmp_path / 'l.csv')[1]]
    assert 0 < up[-1] < 2 * 4 * 199210 / 15
    os.remove(tmp_path / 'c.1')
    again = Ranks(words, f'{tmp_path}/silo{{rank}}')
    out, err = again.communicate(timeout=100)
    assert again.returncode == 0 and 'after round 4; --epochs is 4' in out
    assert err.count('silo 1: no checkpoint of round 4 here') == 1
    # The last report needs the mask, which the first silo has sent.
    reports = [text.partition('accuracy on')[2] for text in (first, out)]
    assert reports[0] == reports[1] != ''

def test_silos_keep_nothing_of_a_secure_sum_that_is_given_up(tmp_path):
    for rank in range(3):
        write_mnist(tmp_path / f'silo{rank}', train=30, test=20)
    out = ended(Ranks(      # silo 2 is lost, and two terms are too few
        '--silo 1 --frac 1 --epochs 1 --seed 4 --secagg 1 --drop 0.5 --personal layers '
        f'--personal_layers fc2 --checkpoint {tmp_path}/c.pt', f'{tmp_path}/silo{{rank}}', 3))
    assert 'given up' in out
    other = torch.load(tmp_path / 'c.pt.1', weights_only=True)
    assert torch.load(tmp_path / 'c.pt', weights_only=True)['PersonalLayers'] == {}
    assert other['kept'][1]['PersonalLayers'] == {}

def test_a_silo_that_dies_is_named(tmp_path):
    for rank in range(2):
        write_mnist(tmp_path / f'silo{rank}', train=60, test=20)
    log = tmp_path / 'l.csv'
    pair = Ranks(f'--silo 1 --frac 1 --epochs 1000000 --csv {log}', f'{tmp_path}/silo{{rank}}')
    while not (log.exists() and len(read_log(log)[1]) > 1) and pair.ranks[0].is_alive():
        time.sleep(0.05)
    pair.ranks[1].kill()
    _, err = pair.communicate(timeout=100)
    assert [process.exitcode for process in pair.ranks] == [1, -signal.SIGKILL]
    assert 'process 0: another process has gone, or is later' in err and 'ank 1' in err
    assert 'Traceback' not in err

def test_silos_with_other_flags_are_refused_and_those_that_may_differ_are_not(monkeypatch, capsys):
    first = dict(lr=0.1, quantize=None, data_dir='a', bs=250, csv='l.csv', checkpoint=None)
    class Second(silos.Silos):
        """The second of two silos."""
        size, from_rank_0 = 2, staticmethod(lambda options: first)
    monkeypatch.setattr(silos.Torchrun, '__init__', lambda self, args: setattr(self, 'args', args))
    allowed = first | dict(data_dir='b', bs=10, csv=None, device='cpu')
    assert Second(SimpleNamespace(**allowed)).K == 2
    with pytest.raises(SystemExit) as e:
        Second(SimpleNamespace(**first | dict(lr=0.2, quantize=8, checkpoint='c.pt')))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1
    assert '--lr 0.1, --quantize None, --checkpoint None; give the same' in err

def test_what_a_silo_cannot_be_is_refused(refused, monkeypatch):        # noqa: F811
    assert 'torchrun' in refused(['--silo', '1'])
    assert '--silo' in refused(['--data_dir', 'x{rank}'])
    for name, value in elastic(1, 2, 0).items():
        monkeypatch.setenv(name, value)
    for words, said in ((['--iid', '0'], 'the files it has'), (['--unequal'], 'the files it has'),
                        (['--num_users', '50'], 'the clients are the 2 silos')):
        monkeypatch.setenv('RANK', '0')
        assert said in refused(['--silo', '1', '--data_dir', 'x{rank}', *words])
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert 'put {rank} into it' in refused(['--silo', '1'])
    monkeypatch.setenv('RANK', '1')
    args = options.args_parser(['--silo', '1', '--data_dir', 'x{rank}'], [silos])
    assert args.data_dir == 'x1'

def test_a_message_that_is_no_update_ends_the_run_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(silos, 'receive', lambda rank: b'short')
    monkeypatch.setattr(silos, 'all_sum', lambda tensors: None)
    monkeypatch.setattr(os, '_exit', lambda code: pytest.exit(code) if code != 1 else 1 / 0)
    server = SimpleNamespace(rank=0, size=2)
    with pytest.raises(ZeroDivisionError):
        list(silos.Silos.collect(server, [], fedavg.Round(1)))
    assert capsys.readouterr().err.startswith('silo 1 has sent something other')
