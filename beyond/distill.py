"""Distillation: a large net that was trained before teaches a small one.

    python fedavg.py --model paper_cnn --epochs 15 --local_bs 20 --seed 7 --checkpoint teacher.pt
    python fedavg.py --teacher teacher.pt --distill 0.5 --temperature 2

Hinton et al. 2015 (arXiv 1503.02531): in ClientUpdate, the loss is (1 - a) cross-entropy +
a T^2 KL(teacher || student), with the outputs of both softened by T. Only the small net travels;
the teacher labels the clients' examples once, before the first round.
"""
import argparse
import os

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from beyond import Room
from beyond.augment import shown_to
from beyond.files import misfit, opened
from beyond.flat import flat
from compress import encode
from models import build
from options import fail, number, requires, typed

def flags(add):
    """--teacher, --distill, --temperature."""
    add('teacher', None, str, 'checkpoint of this program whose net teaches --model')
    add('distill', None, number(float, 0, 1),
        'a, with --teacher: the loss is (1 - a) cross-entropy + a T^2 KL; 0.5 if not given')
    add('temperature', None, number(float, 0, 1e3, above=True),
        "T, with --teacher: both nets' logits are divided by it; 2 if not given")

CLASHES = (('teacher', 'dp', 'whose epsilon does not know what the teacher has seen'),
           ('teacher', 'dataset shakespeare', 'whose examples have a label for each character'))

def check(args):
    """The teacher is a file. Fills in the defaults."""
    requires(args, '--teacher F', ('distill', 'temperature'), args.teacher)
    if args.teacher is not None and not os.path.isfile(args.teacher):
        fail(f'--teacher {args.teacher}: there is no such file; name a checkpoint')
    if args.teacher:
        args.distill = 0.5 if args.distill is None else args.distill
        args.temperature = args.temperature or 2.0

class Distilled(Room):
    """Puts the teacher's logits beside the labels of the training set."""
    def __init__(self, args):
        super().__init__(args)
        flag = f'--teacher {args.teacher}'
        saved = opened('teacher', args.teacher)
        was = argparse.Namespace(**saved['options'])
        if was.dataset != args.dataset:
            fail(f'{flag}: was trained on {was.dataset}; take one of {args.dataset}', everyone=True)
        if was.personal_layers:
            fail(f"{flag}: lacks {typed(was.personal_layers)}, which stayed with its clients; take "
                 'one without --personal layers', everyone=True)
        was.shape = args.shape
        if was.num_classes != args.num_classes:
            fail(f'{flag}: has {was.num_classes} classes, and {args.dataset} {args.num_classes}; '
                 'take another', everyone=True)
        try:
            self.teacher, self.was = build(was).to(args.device), was
        except Exception as e:      # whatever the options of a file make of it
            fail(f'{flag}: its net cannot be built ({e}); take another', everyone=True)
        reason = misfit(saved['w'], self.teacher)
        if reason:
            fail(f'{flag}: its weights are not those of {was.model}: {reason}; take another',
                 everyone=True)
        self.teacher.load_state_dict(saved['w'])

    def prepare(self):
        super().prepare()
        print(f'--teacher {self.args.teacher}: labels the training set', flush=True)
        bs, show = self.args.bs, shown_to(self.was)
        x, y = self.test_set.tensors
        self.accuracy = self.evaluate(self.teacher, show(x), y, bs)[1]
        x, y = self.train_set.tensors
        self.train_set = TensorDataset(x, taught(self.teacher, show(x), y, bs))
        client, y = self.client(next(iter(self.parts)), self.Round(0)), self.train_set.tensors[1]
        try:
            client.loss(y[:2, 1:], y[:2])
        except Exception as e:      # whatever a loss of the user's makes of such labels
            fail(f'--teacher {self.args.teacher}: the loss of {type(client).__mro__[1].__name__} '
                 f"does not take labels with the teacher's logits beside them ({e}); let it call "
                 'super().loss, or leave the flag out', everyone=True)

    def summary(self):
        last = self.history[-1]['test_acc']
        return [*super().summary(),
                f'student {self.args.model}: {size_of(self.net)}, {100 * last:.2f} %; teacher '
                f'{self.was.model}: {size_of(self.teacher)}, {100 * self.accuracy:.2f} %']

class DistilledClient:
    """args: also distill (a) and temperature (T). Labels are those that `taught` makes."""
    stacks = True

    def loss(self, logits, y, reduction='mean'):
        a, T = self.args.distill, self.args.temperature
        label, teacher = y[:, 0].long(), y[:, 1:]                       # (B,), (B, classes)
        student, teacher = F.log_softmax(logits / T, 1), F.log_softmax(teacher / T, 1)
        kl = F.kl_div(student, teacher, reduction='none', log_target=True).sum(1)
        hard = super().loss(logits, label, reduction='none')
        losses = (1 - a) * hard + a * T**2 * kl                         # (B,)
        return losses.mean() if reduction == 'mean' else losses

@torch.no_grad()
def taught(net, x, y, bs):
    """Labels (n, 1 + classes): y (n,), and the logits of net, the teacher, for x."""
    net.eval()
    return torch.cat([y[:, None].float(), torch.cat([net(xb) for xb in x.split(bs)])], 1)

def size_of(net):
    """A net's parameters, and its bytes on the wire, as text."""
    payload = encode(flat(net.state_dict()))
    return f'{sum(p.numel() for p in net.parameters()):,} parameters, {len(payload) / 1e6:.3g} MB'
