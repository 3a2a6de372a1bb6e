"""Cut: the two halves of a net train as the whole one does, and what crosses is counted.

    python -m pytest -q beyond/test_cut.py
"""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import beyond
import fedavg
import models
import options
import sampling
from beyond.cut import Cut, CutClient, split
from test_fedavg import client_args, data, final, image_toy, refused, run, same, weights   # noqa

@pytest.mark.parametrize('model, channels, layers', [
    ('2nn', 1, 3), ('mlp', 1, 2), ('cnn', 1, 4), ('cnn', 3, 5), ('paper_cnn', 1, 4),
    ('paper_cnn', 3, 5)])
def test_a_net_that_is_cut_is_the_net(model, channels, layers):
    args = SimpleNamespace(model=model, num_channels=channels, num_classes=10)
    net = models.build(args).eval()
    x = torch.randn(2, channels, *((28, 28) if channels == 1 else (32, 32)))
    def ids(module):
        return [id(p) for p in module.parameters()]
    for L in range(1, layers):
        front, back = split(net, L)
        assert torch.equal(back(front(x)), net(x))
        assert {**front.state_dict(), **back.state_dict()}.keys() == net.state_dict().keys()
        assert sorted(ids(front) + ids(back)) == sorted(ids(net)) and ids(front) and ids(back)
    for L in (0, layers):
        with pytest.raises(ValueError, match=f'1 to {layers - 1}'):
            split(net, L)

def test_a_layer_inside_a_stage_is_no_place_to_cut():
    net = models.MLP(784, 8, 10)
    net.inside = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match='inside begins no stage'):
        split(net, 1)

def test_a_frozen_half_and_a_weight_in_no_layer_are_no_place_to_cut():
    net = models.TwoNN(4, 3, 2)
    net.fc1.requires_grad_(False)
    split(net, 2)
    with pytest.raises(ValueError, match='one half is frozen'):
        split(net, 1)
    net.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match='scale is in no layer'):
        split(net, 2)

def test_a_cut_run_is_the_uncut_one_and_counts_what_crosses(run, capsys):       # noqa: F811
    a, b = (final(run, f'--momentum 0.5 {words}') for words in ('--cut 2', '--engine loop'))
    assert all((a[name] - b[name]).abs().max() <= 1e-6 for name in a)
    row = run('--momentum 0.5 --cut 2 --epochs 1')[0]
    front = 26 + 4 * (784 * 200 + 200 + 200 * 200 + 200)
    # 3 batches of 10: activations and labels go up, the activations' gradients come down.
    assert row['up_bytes'] == 3 * (front + 3 * (26 + 4 * 10 * (200 + 1)))
    assert row['down_bytes'] == 3 * (front + 3 * (26 + 4 * 10 * 200))
    # What is not finite crosses, and is refused in the end.
    with pytest.raises(SystemExit) as e:
        run('--cut 1 --lr 1e9 --local_ep 5')
    assert e.value.code == 1 and 'lower --lr' in capsys.readouterr().err

def test_a_cut_net_keeps_back_what_topk_does_not_send_of_its_front(run, tmp_path):      # noqa: F811
    """The residual of the back, which does not cross, is zero."""
    words = '--cut 1 --topk 0.01 --frac 1'
    run(f'{words} --checkpoint {tmp_path}/kept')
    residuals = torch.load(tmp_path / 'kept', weights_only=True)['Feedback']
    front = 784 * 200 + 200
    assert len(residuals) == 10
    assert all(v[:front].norm() > 0 and not v[front:].any() for v in residuals.values())
    lost = final(run, f'{words} --error_feedback 0')
    assert not same(weights(tmp_path / 'kept'), lost)
    # Nothing is left to train, but the clients' own models.
    assert run(f'{words} --checkpoint {tmp_path}/kept --resume --personal finetune')

def test_the_halves_of_a_net_may_lie_on_two_devices():
    dataset, net = image_toy('mlp', 4)
    args = client_args(cut=1)
    client = type('Client', (CutClient, fedavg.LocalUpdate), {})(args, dataset, range(4))
    client.back_device, crossed = 'meta', []
    def cross(v, up):
        crossed.append((up, v.device.type, tuple(v.shape)))
        return v
    client.cross = cross
    # meta has no data, so the gradient is stuck there: but it was made there.
    with pytest.raises(NotImplementedError, match='meta'):
        client.train(net)
    assert crossed == [(True, 'cpu', (4, 201)), (False, 'meta', (4, 200))]
    assert next(net.layer_hidden.parameters()).device.type == 'cpu'     # a copy has moved

class Fixed:
    """A server with a net that makes no clients of its own."""
    def __init__(self, args):
        self.args, self.net = args, models.MLP(784, 200, 10)

    def client(self, k, r):
        return SimpleNamespace()

def test_the_first_gpu_named_is_the_clients_and_the_second_the_servers(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    made = type('Server', (Cut, beyond.Room, Fixed), {})
    for gpu, front, back in (((0, 1), 'cuda:0', 'cuda:1'), ((1, 0), 'cuda:1', 'cuda:0'),
                             (1, 'cuda:1', 'cuda:1'), (-1, 'cpu', 'cpu')):
        args = SimpleNamespace(cut=1, gpu=gpu, device=options.device(gpu))
        client = made(args).client(0, fedavg.Round(1))
        assert (str(args.device), str(client.back_device)) == (front, back)

@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='two GPUs are needed')
def test_the_halves_train_on_two_gpus(run):     # noqa: F811
    a, b = (final(run, words) for words in ('--gpu 0,1 --cut 2', '--gpu 0 --engine loop'))
    assert all((a[name] - b[name]).abs().max() <= 1e-5 for name in a)

def test_what_cannot_be_cut_is_refused(refused, monkeypatch):       # noqa: F811
    monkeypatch.setattr(sampling, 'load', lambda *_: pytest.fail('data were read'))
    for words, said in (
            ('--cut 0', '--cut'), ('--cut 3', 'after layer 1 to 2'), ('--gpu 0,1', '--cut'),
            ('--gpu 1,1 --cut 1', 'different'), ('--cut 1 --engine stacked', '--engine stacked'),
            ('--cut 1 --dp user --clip 1 --noise 1', '--dp user'),
            ('--cut 1 --dp example --clip 1 --noise 1', '--dp example'),
            ('--cut 1 --secagg 1', '--secagg')):
        assert said in refused(words.split())
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'by hand')
    assert 'one device' in refused(['--gpu', '0,1', '--cut', '1'])
