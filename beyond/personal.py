"""Personal models: one for each client, tested on the labels that it holds.

    python fedavg.py --iid 0 --personal finetune

After Algorithm 1, each client trains w on (finetune), and may mix the result with w (mix, after
Mansour et al. 2020, arXiv 2002.10619); or some layers stay with their clients throughout (layers,
FedPer: Arivazhagan et al. 2019, arXiv 1912.00818).
"""
import numpy as np
import torch

from beyond import Room
from beyond.flat import checked, flat, shaped, unflat
from options import fail, number, requires, several, typed

def flags(add):
    """--personal, --personal_ep, --personal_layers, --mix."""
    add('personal', None, str, 'a model for each client: finetune, trained on from w in the end; '
        'layers, some of its own; mix, finetuned and mixed with w',
        choices=('finetune', 'layers', 'mix'))
    add('personal_ep', None, number(int, 1),
        'with --personal finetune or mix: epochs from w; 1 if not given')
    add('personal_layers', None, several(str),
        'with --personal layers: their names, as fc3 or fc2,fc3')
    add('mix', None, number(float, 0, 1), 'lambda, with --personal mix: each client ends with '
        'lambda w + (1 - lambda) its own; 0.5 if not given')

FREE = {'personal', 'personal_ep', 'mix'}

CLASHES = (('prune', 'personal layers', 'which the server could not prune'),
           ('personal', 'dataset shakespeare', 'whose lines have no single label'))

def check(args):
    """Layers have names. Fills in the defaults."""
    requires(args, '--personal layers', ['personal_layers'], args.personal == 'layers')
    trains = args.personal in ('finetune', 'mix')
    requires(args, '--personal finetune or mix', ['personal_ep'], trains)
    requires(args, '--personal mix', ['mix'], args.personal == 'mix')
    if args.personal == 'layers' and not args.personal_layers:
        fail('--personal layers: which? name them with --personal_layers, as fc3')
    if args.personal == 'mix' and args.mix is None:
        args.mix = 0.5
    if trains:
        args.mix, args.personal_ep = args.mix or 0.0, args.personal_ep or 1

class Personal(Room):
    """Reports the accuracy of each client's own model, and of w, when all rounds are done."""
    accuracies = None       # (2, K): of the own models, of w

    def prepare(self):
        super().prepare()
        self.whole_test = self.test_set         # before processes share it

    def finish(self, code):
        code = super().finish(code)
        if code or not self.history:
            return code
        print(f'--personal {self.args.personal}: testing {self.K} clients', flush=True)
        try:
            self.accuracies = self.tested()
            self.report()
        except KeyboardInterrupt:
            hint = ', which --resume makes' if self.args.checkpoint else ''
            print(f'\ninterrupted: no report of --personal{hint}')
            return 130
        return code

    def notes(self):
        accuracies = self.accuracies
        return super().notes() | (
            {} if accuracies is None else {'accuracies': accuracies.T.tolist()})

    def models(self, w):
        """Yields (k, weights) for each client that this process trains."""
        r = self.Round(len(self.history) + 1)
        S_t = self.share(dict.fromkeys(range(self.K), self.args.personal_ep))
        if self.args.personal == 'layers':
            yield from ((k, self.start(k, w, r)) for k in S_t)
        else:
            mix, v = self.args.mix, flat(w)
            for u in super().train(w, S_t, r):      # as the rooms inside this one train
                yield u.k, unflat(mix * v + (1 - mix) * flat(u.w), w)

    def tested(self):
        """(2, K): each client's accuracy with its own model and with w, the test set's labels
        weighted as the client holds them."""
        device, C = self.args.device, self.args.num_classes
        w = self.from_rank_0({name: v.cpu() for name, v in self.w.items()})
        w = {name: v.to(device) for name, v in w.items()}
        accuracies = torch.zeros(2, self.K, dtype=torch.float64, device=device)
        of_w = self.by_label(w, range(C))
        tested = torch.bincount(self.whole_test.tensors[1], minlength=C).cpu() > 0
        for k, w_k in self.models(w):
            held = torch.bincount(self.labels_of(k), minlength=C).double() * tested
            personal = self.by_label(w_k, held.nonzero().flatten().tolist())
            for i, accuracy in enumerate((personal, of_w)):
                accuracies[i, k] = held @ accuracy / held.sum()
        self.all_sum([accuracies])
        return accuracies.cpu().numpy()

    def labels_of(self, k):
        """The labels of client k's own examples, (n_k,)."""
        y = self.train_set.tensors[1][self.parts[k][:int(self.n_k[k])]]
        return (y if y.dim() == 1 else y[:, 0].long()).cpu()        # a teacher's stand beside them

    def by_label(self, w, labels):
        """The accuracy of w on the test set's examples of each of these labels, (classes,)."""
        self.net.load_state_dict(w)
        accuracy = torch.zeros(self.args.num_classes, dtype=torch.float64)
        for c in labels:
            at = self.whole_test.tensors[1] == c
            if at.any():
                x, y = (v[at] for v in self.whole_test.tensors)
                accuracy[c] = self.evaluate(self.net, x, y, self.args.bs)[1]
        return accuracy

    def report(self):
        """Prints how the accuracies are spread over the clients."""
        args = self.args
        ever = {k for row in self.history for k in self.select(self.Round(row['round']))}
        print(f'accuracy on the labels that a client holds, of {self.K} clients, {len(ever)} of '
              'which were ever sampled:')
        w = 'the global model'
        if args.personal == 'layers':
            w = f'w, {typed(args.personal_layers)} as at first'
        for name, values in zip((f'--personal {args.personal}', w), self.accuracies):
            values = values[np.isfinite(values)]    # a silo's test set may have none of its labels
            low, high = np.percentile(values, (10, 90))
            print(f'  {name:22s} mean {100 * values.mean():.2f} %   10th percentile '
                  f'{100 * low:.2f} %   90th {100 * high:.2f} %')

class PersonalLayers(Room):
    """The layers that --personal_layers names stay with their clients. In w they keep their
    initialization."""
    keeps = gathers = True

    def __init__(self, args):
        super().__init__(args)
        self.layers = {}                        # {k: values of the layers, one after the other}
        names, stages = args.personal_layers, list(getattr(self.net, 'stages', ()))
        if not stages:
            fail(f'--personal_layers {typed(names)}: {args.model} names no stages (models.Net)',
                 everyone=True)
        if set(names) - set(stages) or set(names) == set(stages):
            fail(f'--personal_layers {typed(names)}: {args.model} has {", ".join(stages)}; take '
                 'some of them, not all', everyone=True)
        stay = {name: torch.full_like(v, name.split('.')[0] in names, dtype=torch.bool)
                for name, v in self.net.state_dict().items()}
        self.stay = torch.cat([v.flatten() for name, v in stay.items()
                               if self.net.state_dict()[name].is_floating_point()])     # (d,)

    def crosses(self, k, r):
        return super().crosses(k, r) & ~self.stay

    def start(self, k, w, r):
        w = super().start(k, w, r)
        if k not in self.layers:
            return w
        v = flat(w)
        v[self.stay] = self.layers[k]
        stay = shaped(self.stay, w)
        return w | {name: part for name, part in shaped(v, w).items() if stay[name].any()}

    def keep(self, u, x, payload, r):
        v, kept = flat(u.w), super().keep(u, x, payload, r)
        return kept | {'layers': v[self.stay]} if v.isfinite().all() else kept

    def lent(self, k):
        layers = {'layers': self.layers[k]} if k in self.layers else {}
        return super().lent(k) | layers

    def borrow(self, lent):
        super().borrow(lent)
        self.layers = {k: kept['layers'] for k, kept in lent.items() if 'layers' in kept}

    def end(self, w, row, r):
        super().end(w, row, r)
        self.layers = self.layers | {
            k: kept['layers'] for k, kept in r.kept.items() if 'layers' in kept}

    def state(self):
        return super().state() | {'PersonalLayers': self.layers}

    def load(self, state):
        super().load(state)
        self.layers = checked(state.get('PersonalLayers', {}), int(self.stay.sum()))
