"""Pruning: the mask, its schedule, and what it saves in both directions."""
import pytest
import torch
from torch import nn

import compress
import fedavg
from beyond.prune import Pruned, PrunedClient, matrices, unpruned
from beyond.test_wire import sent, server
from beyond.wire import Wire
from test_fedavg import client_args, data, final, image_toy, run      # noqa: F401

def masked(net, s, **more):
    """A client of 70 random images whose net is pruned by s: (client, net, {name: mask})."""
    from beyond.flat import flat, shaped, unflat
    dataset, _ = image_toy('2nn')
    w = net.state_dict()
    mask = unpruned(w, matrices(net), s)
    net.load_state_dict(unflat(flat(w) * mask, w))
    Client = type('Client', (PrunedClient, fedavg.LocalUpdate), {})
    client = Client(client_args(local_bs=4, **more), dataset, range(70))
    client.mask = shaped(mask.float(), w)
    return client, net, shaped(mask, w)

def test_pruning_takes_the_smallest_weights_of_all_matrices_and_no_bias():
    w = {'a.weight': torch.tensor([[1.0, -5], [2, 6]]), 'a.bias': torch.tensor([0.1, 0]),
         'b.weight': torch.tensor([[-3.0, 0.2]]), 'n': torch.tensor(7)}
    made = server(w, Pruned, Wire, prune=0.5, prune_begin=0, prune_end=1)
    r = fedavg.Round(1)
    r.S_t = {0: 1}
    v = made.send(w, r.S_t, r)
    assert v['a.weight'].tolist() == [[0, -5], [0, 6]] and v['b.weight'].tolist() == [[-3, 0]]
    assert torch.equal(v['a.bias'], w['a.bias']) and v['n'] == 7
    assert r.mask.tolist() == [False, True, False, True, True, True, True, False]
    assert len(made.crosses(0, r)) == 8 and made.crosses(0, r).sum() == 5

def test_buffers_are_not_pruned():
    net = nn.BatchNorm2d(3)
    net.register_buffer('grid', torch.ones(4, 4))
    net.layer = nn.Linear(2, 2)
    assert matrices(net) == {'layer.weight'}

def test_the_mask_is_counted_once_for_each_client_when_it_changes():
    w, down = {'v': torch.arange(1.0, 17).view(4, 4)}, []
    made = server(w, Pruned, Wire, prune=0.75, prune_begin=0, prune_end=1)
    plan = ((0, [1, 2]), (0.5, [1, 2]), (0.5, [2, 3]), (0.5, [1, 3]), (0.75, [1]), (0.75, [1]))
    for s, S_t in plan:
        made.args.prune = s
        r = fedavg.Round(1)
        w = made.send(w, dict.fromkeys(S_t, 1), r)
        made.end(w, {}, r)
        down.append(r.tally['down_bytes'])
        if len(down) == 5:
            w = {'v': w['v'].flip(0)}           # as many are pruned, but others
    def values(n):
        return 26 + 4 * n
    assert down == [2 * values(16), 2 * (values(8) + 28), 2 * values(8) + 28, 2 * values(8),
                    values(4) + 28, values(4) + 28]             # a mask: 26 bytes and 16 bits

def test_a_round_that_is_broken_off_leaves_the_mask_as_it_was():
    w = {'v': torch.arange(1.0, 17).view(4, 4)}
    made = server(w, Pruned, Wire, prune=0.5, prune_begin=0, prune_end=1)
    _, r = sent(made, {2: ({'v': torch.ones(4, 4)}, 0.0)})
    assert made.mask.all() and made.holders == set()
    made.end(w, {}, r)
    assert made.mask.sum() == 8 and made.holders == {2}

@pytest.mark.parametrize('more', [{}, {'momentum': 0.9, 'lr': 0.02}])
def test_pruned_weights_stay_zero(more):
    client, net, mask = masked(image_toy('2nn')[1], 0.7, **more)
    w, _ = client.train(net)
    for name, stay in mask.items():
        assert (w[name][~stay] == 0).all() and (w[name] != net.state_dict()[name])[stay].any()

@pytest.mark.parametrize('words', [
    '--engine loop', '--engine stacked --optimizer adamw --lr 0.001',
    '--model cnn --separable 1 --lr 0.02', '--quantize 8 --topk 0.5 --momentum 0.5 --lr 0.02'])
def test_the_final_model_has_exactly_the_sparsity_asked_for(run, words):        # noqa: F811
    rows = []
    class Watched:
        def end(self, w, row, r):
            super().end(w, row, r)
            rows.append(row)
            self.last[:] = [w]
        last = []
    run(f'--epochs 4 --prune 0.9 --prune_begin 1 --prune_end 3 {words}', Watched)
    matrices = [v for v in Watched.last[0].values() if v.dim() > 1]
    zeros = sum((v == 0).sum().item() for v in matrices)
    assert zeros == round(0.9 * sum(v.numel() for v in matrices))
    for name in ('down_bytes', 'up_bytes'):
        assert rows[0][name] > 3 * rows[3][name]

def test_the_schedule_stays_when_the_run_goes_on(run, tmp_path):        # noqa: F811
    seen = []
    class Watched:
        def end(self, w, row, r):
            super().end(w, row, r)
            seen.append(float(self.mask.float().mean()))
    run(f'--epochs 2 --prune 0.9 --checkpoint {tmp_path}/c.pt', Watched)
    run(f'--epochs 4 --prune 0.9 --checkpoint {tmp_path}/c.pt --resume', Watched)
    assert seen[0] > 0.2 and seen[1:] == [pytest.approx(0.1, abs=0.01)] * 3

def test_a_target_counts_for_the_pruned_model_only(run, capsys):        # noqa: F811
    history = run('--epochs 5 --prune 0.9 --prune_end 4 --target 0.01')
    assert len(history) == 4 and 'rounds to 1.00 %: 4.0' in capsys.readouterr().out

def test_fedprox_and_the_mask_meet_in_both_engines(run):        # noqa: F811
    words = '--prune 0.5 --prune_end 2 --mu 0.5 --momentum 0.5 --engine'
    loop, stacked = (final(run, f'{words} {engine}') for engine in ('loop', 'stacked'))
    assert all((loop[name] - v).norm() <= 1e-5 * v.norm() for name, v in stacked.items())

def test_sparsity_is_zhu_and_guptas_cubic():
    s = [compress.sparsity(t, 0.8, 2, 6) for t in (0, 2, 4, 6, 9)]
    assert s == pytest.approx([0, 0, 0.8 * 7 / 8, 0.8, 0.8])
    with pytest.raises(ValueError):
        compress.sparsity(3, 0.9, 5, 5)
    with pytest.raises(ValueError):
        compress.prune(torch.ones(3), 2)
    stay = compress.prune(torch.tensor([3.0, -1, 0.5, -4, 1]), 0.6)
    assert stay.tolist() == [True, False, False, True, False]
    stay = compress.prune(torch.tensor([0.0, 1, -1, 0, 1, 1]), 0.5)     # of ties the first go
    assert stay.tolist() == [False, False, True, False, True, True]
