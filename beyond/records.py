"""Records: log, checkpoint, plot, progress.

    python fedavg.py --csv run.csv --checkpoint run.pt --save_every 5 --plot run.png
    python fedavg.py --csv run.csv --checkpoint run.pt --resume

Nothing in Algorithm 1 changes. Each round adds a row to the log and, every --save_every rounds,
replaces the checkpoint, which --resume goes on from, bit for bit, under the same flags, device and
number of processes. Both survive a kill at any moment. No state of a random generator is in the
checkpoint, as none depends on what ran before (sampling.rng).
"""
import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import sys
import threading

import torch

from beyond import Room, names, of_the_user, rooms
from beyond.files import COLUMNS, append, misfit, opened, replace, rows, set_aside
from options import FREE, fail, number, typed, writable

def flags(add):
    """--csv, --checkpoint, --save_every, --resume, --plot."""
    add('csv', None, writable, 'CSV file, one row a round; --log is another spelling', '--log')
    add('checkpoint', None, writable, 'file that the run can be resumed from')
    add('save_every', 1, number(int, 1), 'rounds between checkpoints; the last is always saved')
    add('resume', 0, bool, 'go on from --checkpoint')
    add('plot', None, writable,
        'accuracy and loss against rounds, drawn by matplotlib; .png, .pdf or .svg')

def check(args):
    """The files are there, different, and of a kind that can be drawn."""
    if args.resume and not args.checkpoint:
        fail('--resume 1: nothing to go on from; name the file with --checkpoint')
    if args.save_every > 1 and not args.checkpoint:
        fail(f'--save_every {args.save_every}: nothing is saved; name the file with --checkpoint')
    # torchrun starts the same command line the first time and after a failure.
    torchrun = 'TORCHELASTIC_RUN_ID' in os.environ
    if args.resume and not os.path.isfile(args.checkpoint) and not torchrun:
        fail(f'--resume 1: there is no file {args.checkpoint}; leave --resume out for a first run')
    if args.plot and not args.plot.lower().endswith(('.png', '.pdf', '.svg')):
        fail(f'--plot {args.plot}: not a kind of picture; the name ends in .png, .pdf or .svg')
    if args.plot and not importlib.util.find_spec('matplotlib'):
        fail(f'--plot {args.plot}: needs matplotlib, which is not installed; pip install '
             'matplotlib, or leave --plot out')
    teacher = args.teacher and os.path.realpath(args.teacher)
    files = [f for f in (args.csv, args.checkpoint, args.plot, teacher) if f]
    for f in files:
        if files.count(f) > 1:
            fail(f'--csv, --checkpoint, --plot and --teacher: {f} is named twice; name a file for '
                 'each')

class Records(Room):
    """Keeps what happens: outermost, so that it writes when all rooms have changed their state."""
    def __init__(self, args):
        super().__init__(args)
        self.options = vars(args) | {'num_users': self.K}
        del self.options['device'], self.options['shape']
        self.classes = of_the_user(self)
        self.before = {}            # a silo's state() after the round before
        self.first = 1              # round of this start

    @property
    def file(self):
        """The checkpoint of the first process; each silo that keeps something has its own."""
        if self.rank == 0 or not self.args.checkpoint:
            return self.args.checkpoint
        return f'{self.args.checkpoint}.{self.rank}' if self.silo and self.keeps else None

    @property
    def log(self):
        """The log, of the first process."""
        return self.args.csv if self.rank == 0 else None

    def prepare(self):
        saved = {}
        try:
            saved = self.resumed()
            self.load(saved)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            if not self.args.resume:
                raise       # by a class of the user's own
            reason = f'{type(e).__name__}: {e}'.partition('\n')[0]
            fail(f'--resume 1: {self.file} does not hold what these flags need ({reason}); name '
                 'another --checkpoint', everyone=True)
        super().prepare()
        for path in (self.file, self.log, self.args.plot):
            if path:
                os.makedirs(os.path.dirname(path), exist_ok=True)
        if self.args.gpu != -1 and self.args.device.type == 'cpu':
            print('no CUDA here, so this runs on the CPU')
        print(f'{self.args.dataset}: {self.n_k.sum()} training examples; {self.K} clients with '
              f'{self.n_k.min()} to {self.n_k.max()} each; {self.args.model} with '
              f'{sum(p.numel() for p in self.net.parameters()):,} parameters on {self.size} x '
              f'{self.args.device}')
        print(f'in use, outermost first: {names(type(self), self.idle())}; clients: '
              f'{names(self.Client)}')
        if saved:
            over = '; nothing is left to do' * (len(self.history) >= self.args.epochs)
            print(f'resumed from {self.file} after round {len(self.history)}; --epochs is '
                  f'{self.args.epochs}{over}')
        else:
            set_aside(self.file)
        if not saved or saved['options']['csv'] != self.args.csv or not self.goes_on():
            set_aside(self.log)
        self.first = len(self.history) + 1
        self.rewrite_log()

    def goes_on(self):
        """Whether the log is that of the checkpoint's run, and not of a later one."""
        if not self.log or not os.path.exists(self.log):
            return True
        with open(self.log, errors='replace') as f:
            return f'"checkpoint": {json.dumps(self.args.checkpoint)},' in f.readline()

    def resumed(self):
        """The state of the run that goes on, {} for a new one."""
        saved = {}
        if self.rank == 0 and self.file and self.args.resume and os.path.exists(self.file):
            saved = opened('checkpoint', self.file)
            self.compare(saved['options'])
            self.fit(saved)
        saved = self.from_rank_0(saved)
        return saved | self.of_this_silo(saved) if saved and self.silo and self.rank else saved

    def compare(self, was):
        """Exits with an error if the options differ from the checkpoint's."""
        free = FREE | {'csv', 'checkpoint', 'save_every', 'resume', 'plot'}
        free |= {name for room in rooms() for name in getattr(room, 'FREE', ())}
        other = [name for name, v in self.options.items() if name not in free and was[name] != v]
        if other:
            given = (f'--{name} {typed(was[name])} (given: {typed(self.options[name])})'
                     for name in other)
            fail(f'--resume 1: the checkpoint was made with {", ".join(given)}; give the same, or '
                 'another --checkpoint', everyone=True)

    def fit(self, saved):
        """Exits with an error if the checkpoint is not of this net and number of processes."""
        reason, self.w = misfit(saved['w'], self.net), saved['w']
        kept, keeps = (set(state) - {'options', 'processes', 'classes', 'round', 'w', 'history'}
                       for state in (saved, self.state()))
        classes = saved.get('classes', [])
        if classes != self.classes:
            reason = (f'it was made with {", ".join(classes) or "no class"} of your own, and this '
                      f'run has {", ".join(self.classes) or "none"}')
        if kept != keeps:
            reason = (f'it holds the state of {", ".join(sorted(kept)) or "no class"}, and this '
                      f'run has that of {", ".join(sorted(keeps)) or "none"}')
        processes = saved.get('processes')
        if processes != self.size and 'TORCHELASTIC_RUN_ID' in os.environ:
            reason = f'it was made by --nproc_per_node={processes}, and these are {self.size}'
        if reason:
            fail(f'--resume 1: {self.file} does not fit: {reason}; name another --checkpoint, or '
                 'start the run as it was started before', everyone=True)

    def of_this_silo(self, saved):
        """What this silo kept after the round of saved, the first one's: its own file has that of
        the last two rounds."""
        t = len(saved['history'])
        if not self.keeps:
            return {}
        there = os.path.exists(self.file)
        kept = opened('checkpoint', self.file, of_silo=True)['kept'] if there else {}
        if t not in kept:
            print(f'silo {self.rank}: no checkpoint of round {t} here; what it had kept is lost',
                  file=sys.stderr)
        state = kept.get(t, {name: {} for name in saved if name in ('Feedback', 'PersonalLayers')})
        self.before = {t: state}
        return state

    def measure(self, w, r):
        row = {'epsilon': '', 'lost': 0} | super().measure(w, r)
        if not r.tally['m_t']:
            row['train_loss'] = ''
        return {name: row[name] for name in COLUMNS} | row

    def end(self, w, row, r):
        with uninterrupted():
            super().end(w, row, r)
            if self.log:
                line = io.StringIO()
                rows(line).writerow(row)
                try:
                    append('csv', self.log, line.getvalue())
                except SystemExit:      # it could not: the rounds since the last save are kept
                    if self.file:
                        self.write()
                    raise
            if r.t % self.args.save_every == 0:
                self.save()

    def save(self):
        """Writes the checkpoint: of silos that keep something, the first one's last, so that the
        others have what belongs to its round."""
        wait = self.silo and self.keeps and self.args.checkpoint
        if wait and self.rank == 0:
            self.all_sum([])
        if self.file:
            self.write()
        if wait and self.rank:
            self.all_sum([])

    def write(self):
        """Replaces the checkpoint."""
        content = io.BytesIO()
        torch.save(self.content(), content)
        replace('checkpoint', self.file, content.getvalue())

    def content(self):
        """What the checkpoint holds."""
        if not self.rank:
            return {'options': self.options, 'processes': self.size, 'classes': self.classes,
                    'round': len(self.history)} | self.state()
        t = len(self.history)
        if t not in self.before:
            kept = {name: v for name, v in self.state().items() if name not in ('w', 'history')}
            self.before = dict(list(self.before.items())[-1:]) | {t: kept}
        return {'options': self.options, 'kept': self.before}

    def rewrite_log(self):
        """The log with the options, as JSON, and the rows so far."""
        if not self.log:
            return
        options = {name: 'inf' if v == math.inf else v for name, v in self.options.items()}
        text = io.StringIO()
        text.write(f'# {json.dumps(options | self.notes())}\n')
        rows(text).writeheader()
        rows(text).writerows(self.history)
        replace('csv', self.log, text.getvalue().encode())

    def describe(self, row):
        best = max(past['test_acc'] for past in self.history)
        remaining = row['seconds'] * (self.args.epochs - row['round'])
        row = row | {'train_loss': math.nan if row['train_loss'] == '' else row['train_loss']}
        line = (f'{super().describe(row)}   best {100 * best:.2f} %   '
                f'{row["seconds"]:.2f} s   {remaining:.0f} s left')
        if row['round'] == self.first and remaining > 600:
            line += (f'\nthe {self.args.epochs - row["round"]} rounds to come will take about '
                     f'{remaining / 60:.0f} minutes')
        return line

    def summary(self):
        seconds = sum(row['seconds'] for row in self.history)
        last = self.history[-1]['test_acc']
        n = len(self.history)
        return [f'{n} round{"s"[:n != 1]} in {seconds:.0f} s: last test accuracy '
                f'{100 * last:.2f} %', *super().summary()]

    def finish(self, code):
        before = signal.getsignal(signal.SIGINT)
        if code == 130:         # torchrun sends a second one, which would cut saving short
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.file:
            self.write()
            print(f'checkpoint: {self.file}, after round {len(self.history)}')
        code = super().finish(code)
        if self.history and self.args.plot and self.rank == 0:
            picture, kind = io.BytesIO(), self.args.plot.rpartition('.')[2].lower()
            plot(picture, kind, self.history)
            replace('plot', self.args.plot, picture.getvalue())
        if 'accuracies' in self.notes():
            self.rewrite_log()
        if signal.getsignal(signal.SIGINT) != before and 'LOCAL_RANK' not in os.environ:
            signal.signal(signal.SIGINT, before)        # of a notebook, say
        return code

@contextlib.contextmanager
def uninterrupted():
    """Holds Ctrl-C back until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)

def plot(file, kind, history):
    """Accuracy and loss against rounds, as a picture of that kind in the open file."""
    from matplotlib.figure import Figure
    figure = Figure((9, 3.5), layout='constrained')
    left, right = figure.subplots(1, 2)
    t = [row['round'] for row in history]
    left.plot(t, [row['test_acc'] for row in history])
    left.set(xlabel='round', ylabel='test accuracy')
    for name in ('train_loss', 'test_loss'):
        values = [math.nan if row[name] == '' else row[name] for row in history]
        right.plot(t, values, label=name.replace('_', ' '))
    right.set(xlabel='round', ylabel='loss')
    right.legend()
    figure.savefig(file, format=kind, dpi=150)
