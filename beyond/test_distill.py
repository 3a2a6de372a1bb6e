"""Distillation: the loss is Hinton's, the teacher reaches the clients, and is the right one.

    python -m pytest -q beyond/test_distill.py
"""
import math

import pytest
import torch
import torch.nn.functional as F

import fedavg
import sampling
from beyond.distill import DistilledClient, taught
from test_fedavg import (client_args, data, final, image_toy, refused, run, same,   # noqa: F401
                         weights)

def soft(z, T):
    """The softmax of z / T."""
    terms = [math.exp(v / T) for v in z]
    return [term / sum(terms) for term in terms]

def hintons(student, teacher, a, T):
    """The loss for a student's logits, if the label is 0."""
    p, q = soft(teacher, T), soft(student, T)
    kl = sum(p_i * math.log(p_i / q_i) for p_i, q_i in zip(p, q))
    return (1 - a) * -math.log(soft(student, 1)[0]) + a * T**2 * kl

def client(a, T):
    """A client with the loss that a and T give."""
    made = type('Client', (DistilledClient, fedavg.LocalUpdate), {})
    return made(client_args(distill=a, temperature=T), image_toy('mlp', 4)[0], range(4))

def test_distillation_is_hintons_loss():
    student, teacher = [1.0, 3.0], [2.0, -1.0]
    z, y = torch.tensor([student, teacher]), torch.tensor([[0.0, *teacher]] * 2)
    losses = client(0.3, 2.0).loss(z, y, reduction='none')
    expected = [hintons(v, teacher, 0.3, 2.0) for v in (student, teacher)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert client(0.3, 2.0).loss(z, y).item() == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert client(1.0, 2.0).loss(z[1:], y[1:]).item() == pytest.approx(0, abs=1e-7)
    hard = F.cross_entropy(z, torch.tensor([0, 0])).item()
    assert client(0.0, 2.0).loss(z, y).item() == pytest.approx(hard)

def test_the_teacher_labels_in_eval_mode_whatever_the_batch():
    dataset, net = image_toy('cnn', 7)
    x, y = dataset.tensors
    labels = taught(net.train(), x, y, bs=3)
    assert labels.shape == (7, 11) and torch.equal(labels[:, 0], y.float())
    torch.testing.assert_close(labels[:, 1:], net.eval()(x).detach())

def test_a_teacher_teaches_a_smaller_net(run, tmp_path, capsys):        # noqa: F811
    teacher, words = tmp_path / 'teacher', '--lr 0.05 --epochs 2'
    run(f'--model mlp --local_ep 3 --frac 1 --checkpoint {teacher}')
    alone, untaught, taught_, loop, warm = (
        final(run, f'{words} {more}'.replace('TEACHER', str(teacher)))['fc3.weight'] for more in (
            '', '--teacher TEACHER --distill 0', '--teacher TEACHER --distill 1',
            '--teacher TEACHER --distill 1 --engine loop',
            '--teacher TEACHER --distill 1 --temperature 8'))
    torch.testing.assert_close(alone, untaught, rtol=0, atol=1e-6)      # a = 0 is plain training
    torch.testing.assert_close(taught_, loop, rtol=0, atol=1e-6)
    assert (taught_ - alone).abs().max() > 1e-3 and (taught_ - warm).abs().max() > 1e-3
    out = capsys.readouterr().out
    assert 'student 2nn: 199,210 parameters, 0.797 MB' in out
    assert 'teacher mlp: 159,010 parameters, 0.636 MB' in out
    accuracy = torch.load(teacher, weights_only=True)['history'][-1]['test_acc']
    assert accuracy > 0.3
    assert f'0.636 MB, {100 * accuracy:.2f} %' in out

def test_a_loss_that_does_not_know_the_teacher_is_refused(run, tmp_path, capsys):       # noqa: F811
    class Plain:
        def loss(self, logits, y, reduction='mean'):
            return F.cross_entropy(logits, y, reduction=reduction)
    class Half:
        def loss(self, logits, y, reduction='mean'):
            return super().loss(logits, y, reduction) / 2
    words = f'--epochs 1 --teacher {tmp_path}/teacher'
    run(f'--epochs 1 --checkpoint {tmp_path}/teacher')
    run(words, Half)
    with pytest.raises(SystemExit):
        run(words, Plain)
    assert 'the loss of Plain does not take labels' in capsys.readouterr().err

def test_only_the_student_travels(run, tmp_path):       # noqa: F811
    run(f'--epochs 1 --model mlp --checkpoint {tmp_path}/teacher')
    history = run(f'--epochs 1 --model cnn --teacher {tmp_path}/teacher')
    assert history[0]['up_bytes'] == history[0]['down_bytes'] == 3 * (26 + 4 * 21840)

def test_a_teacher_of_something_else_is_refused(run, refused, tmp_path, monkeypatch):   # noqa: F811
    run(f'--epochs 1 --checkpoint {tmp_path}/teacher')
    saved = torch.load(tmp_path / 'teacher', weights_only=True)
    (tmp_path / 'junk').write_bytes(b'junk')
    monkeypatch.setattr(sampling, 'load', lambda *_: pytest.fail('data were read'))
    assert 'not a checkpoint' in refused(['--teacher', f'{tmp_path}/junk'])
    for name, value, said in (('dataset', 'fmnist', 'take one of mnist'),
                              ('personal_layers', ('fc2',), 'fc2'),
                              ('model', 'cnn', 'not those of cnn')):
        other = saved | {'options': saved['options'] | {name: value}}
        torch.save(other, tmp_path / 'other')
        assert said in refused(['--teacher', f'{tmp_path}/other'])
    for words, said in (
            ('--teacher nowhere.pt', 'no such file'), ('--distill 0.5', '--teacher'),
            ('--temperature 2', '--teacher'),
            (f'--teacher {__file__} --dp user --clip 1 --noise 1', 'epsilon'),
            (f'--teacher {__file__} --checkpoint {__file__}', 'twice')):
        assert said in refused(words.split())
