"""Records: log, checkpoint, plot, progress.

    python fedavg.py --csv run.csv --checkpoint run.pt --save_every 5 --plot run.png
    python fedavg.py --csv run.csv --checkpoint run.pt --resume

Nothing in Algorithm 1 changes. Each round adds a row to the log and, every --save_every rounds,
replaces the checkpoint, which --resume goes on from, bit for bit, under the same flags, device and
number of processes. Both survive a kill at any moment.
"""
import contextlib
import csv
import importlib.util
import itertools
import json
import math
import os
import signal
import sys
import threading

import torch

from beyond import Room, rooms
from options import FREE, args_parser, fail, number, shown, writable

COLUMNS = ('round', 'train_loss', 'test_loss', 'test_acc', 'clients', 'rejected', 'lost', 'late',
           'up_bytes', 'down_bytes', 'round_time', 'epsilon', 'seconds')

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
        # What silos keep is saved by each of them; all else by the first process.
        self.file = args.checkpoint if self.rank == 0 else None
        if args.checkpoint and self.rank and self.silo and self.keeps:
            self.file = f'{args.checkpoint}.{self.rank}'
        self.log = args.csv if self.rank == 0 else None
        self.before = {}            # a silo's state() after the round before

    def prepare(self):
        saved = self.resumed()
        self.load(saved)
        super().prepare()
        if self.args.gpu != -1 and self.args.device.type == 'cpu':
            print('no CUDA here, so this runs on the CPU')
        print(f'{self.args.dataset}: {self.n_k.sum()} training examples; {self.K} clients with '
              f'{self.n_k.min()} to {self.n_k.max()} each; {self.args.model} with '
              f'{sum(p.numel() for p in self.net.parameters()):,} parameters on {self.size} x '
              f'{self.args.device}')
        print(f'in use, outermost first: {names(type(self))}; clients: {names(self.Client)}')
        if saved:
            print(f'resumed from {self.file} after round {len(self.history)}; --epochs is '
                  f'{self.args.epochs}')
        else:
            set_aside(self.file)
        if not saved or saved['options']['csv'] != self.args.csv:
            set_aside(self.log)
        self.rewrite_log()

    def resumed(self):
        """The state of the run that goes on, {} for a new one."""
        saved = {}
        if self.rank == 0 and self.file and self.args.resume and os.path.exists(self.file):
            saved = opened('checkpoint', self.file)
            self.compare(saved['options'])
        saved = self.from_rank_0(saved)
        return saved | self.of_this_silo(saved) if saved and self.silo and self.rank else saved

    def compare(self, was):
        """Exits with an error if the options differ from the checkpoint's."""
        free = FREE | {'csv', 'checkpoint', 'save_every', 'resume', 'plot'}
        free |= {name for room in rooms() for name in getattr(room, 'FREE', ())}
        other = [name for name, v in self.options.items() if name not in free and was[name] != v]
        if other:
            given = (f'--{name} {shown(was[name])} (given: {shown(self.options[name])})'
                     for name in other)
            fail(f'--resume 1: the checkpoint was made with {", ".join(given)}; give the same, or '
                 'another --checkpoint', everyone=True)

    def of_this_silo(self, saved):
        """What this silo kept after the round of saved, the first one's: its own file has that of
        the last two rounds."""
        t = len(saved['history'])
        if not self.keeps:
            return {}
        kept = opened('checkpoint', self.file)['kept'] if os.path.exists(self.file) else {}
        if t not in kept:
            print(f'silo {self.rank}: no checkpoint of round {t} here; what it had kept is lost',
                  file=sys.stderr)
        own = kept.get(t, {name: {} for name in saved if name in ('Feedback', 'PersonalLayers')})
        self.before = {t: own}
        return own

    def measure(self, w, r):
        row = {'epsilon': '', 'lost': 0} | super().measure(w, r)
        if not r.tally['m_t']:
            row['train_loss'] = ''
        return {name: row[name] for name in COLUMNS} | row

    def end(self, w, row, r):
        with uninterrupted():
            super().end(w, row, r)
            if self.log:
                with open(self.log, 'a', newline='') as f:
                    rows(f).writerow(row)
            if r.t % self.args.save_every == 0:
                self.save()

    def save(self):
        """Writes the checkpoint: of silos that keep something, the first one's last, so that the
        others have what belongs to its round."""
        wait = self.silo and self.keeps and self.args.checkpoint
        if wait and self.rank == 0:
            self.all_sum([])
        if self.file:
            write(self.file, self.content())
        if wait and self.rank:
            self.all_sum([])

    def content(self):
        """What the checkpoint holds."""
        if not self.rank:
            return {'options': self.options} | self.state()
        t = len(self.history)
        if t not in self.before:
            own = {name: v for name, v in self.state().items() if name not in ('w', 'history')}
            self.before = dict(list(self.before.items())[-1:]) | {t: own}
        return {'options': self.options, 'kept': self.before}

    def rewrite_log(self):
        """The log with the options, as JSON, and the rows so far."""
        if not self.log:
            return
        with open(self.log + '.tmp', 'w', newline='') as f:
            options = {name: 'inf' if v == math.inf else v for name, v in self.options.items()}
            f.write(f'# {json.dumps(options | self.notes())}\n')
            rows(f).writeheader()
            rows(f).writerows(self.history)
        os.replace(self.log + '.tmp', self.log)

    def describe(self, row):
        best = max(past['test_acc'] for past in self.history)
        remaining = row['seconds'] * (self.args.epochs - row['round'])
        row = row | {'train_loss': math.nan if row['train_loss'] == '' else row['train_loss']}
        return (f'{super().describe(row)}   best {100 * best:.2f} %   '
                f'{row["seconds"]:.2f} s   {remaining:.0f} s left')

    def summary(self):
        seconds = sum(row['seconds'] for row in self.history)
        last = self.history[-1]['test_acc']
        n = len(self.history)
        return [f'{n} round{"s"[:n != 1]} in {seconds:.0f} s: last test accuracy '
                f'{100 * last:.2f} %', *super().summary()]

    def finish(self, code):
        if code == 130:         # torchrun sends a second one, which would cut saving short
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.file:
            write(self.file, self.content())
            print(f'checkpoint: {self.file}, after round {len(self.history)}')
        code = super().finish(code)
        if self.history and self.args.plot and self.rank == 0:
            plot(self.args.plot, self.history)
        if 'accuracies' in self.notes():
            self.rewrite_log()
        return code

def names(cls):
    """The classes that cls is made of, as text."""
    return ', '.join(base.__name__ for base in cls.__mro__[1:] if base not in (object, Room))

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
        raise KeyboardInterrupt

def rows(f):
    """A writer of rows, each a dict by COLUMNS, to the open file f."""
    return csv.DictWriter(f, COLUMNS, lineterminator='\n', extrasaction='ignore')

def set_aside(path):
    """Renames what an earlier run wrote at path to path.old (.old1, ...)."""
    if path and os.path.exists(path) and os.path.getsize(path):
        candidates = (f'{path}.old{i or ""}' for i in itertools.count())
        old = next(name for name in candidates if not os.path.exists(name))
        os.replace(path, old)
        print(f'{path} existed already: it is {old} now')

def write(path, content):
    """The checkpoint, never half of it: written beside it and renamed."""
    try:
        torch.save(content, path + '.tmp')
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as e:        # torch.save raises the latter on a full disk
        fail(f'--checkpoint {path}: could not be written ({str(e).splitlines()[0]}); the one '
             'before is as it was', everyone=True)

def opened(flag, path):
    """The content of the checkpoint at path, which --flag names, {'options', 'w', 'history' and a
    name for each class with a state}. Exits with one line if it is none."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        if 'kept' not in saved and not (saved['w'] and 'csv' in saved['options']):
            raise ValueError('half empty')
        saved['options'] = vars(args_parser([], rooms())) | saved['options']
        for row in saved.get('history', ()):
            if not set(COLUMNS) <= set(row):
                raise ValueError('half empty')
    except Exception as e:      # what torch.load raises for foreign bytes is not documented
        leave = '--resume' if flag == 'checkpoint' else f'--{flag}'
        fail(f'--{flag} {path}: not a checkpoint of this program, or of another version of it '
             f'({type(e).__name__}); name one, or leave {leave} out', everyone=True)
    return saved

def plot(path, history):
    """Accuracy and loss against rounds, as a picture at path."""
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
    figure.savefig(path, dpi=150)
