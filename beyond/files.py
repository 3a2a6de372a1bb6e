"""Files: the log and the checkpoint, written whole and checked when they are read.

    saved = opened('checkpoint', 'run.pt')      # or one line, and exit code 2
"""
import contextlib
import csv
import itertools
import os
import zipfile

import torch

from beyond import rooms
from options import args_parser, fail

COLUMNS = ('round', 'train_loss', 'test_loss', 'test_acc', 'clients', 'rejected', 'lost', 'late',
           'up_bytes', 'down_bytes', 'round_time', 'epsilon', 'seconds')

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

@contextlib.contextmanager
def written(flag, path):
    """Exits with one line if the block cannot write the file at path, which --flag names."""
    try:
        yield
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        fail(f'--{flag} {path}: could not be written ({e.strerror}); what was there before is as '
             'it was', everyone=True)

def append(flag, path, text):
    """Adds a line to the file at path, or, if it cannot, leaves the file as it was."""
    with written(flag, path):
        size = os.path.getsize(path)
        try:
            with open(path, 'a', newline='') as f:
                f.write(text)
        except OSError:
            os.truncate(path, size)
            raise

def replace(flag, path, content):
    """Replaces the file at path by these bytes, never by half of them: they are written beside
    it, and renamed."""
    with written(flag, path):
        with open(path + '.tmp', 'wb') as f:
            f.write(content)
        os.replace(path + '.tmp', path)

def check_history(history, n):
    """Raises ValueError unless history is that of rounds 1 to n."""
    for t, row in enumerate(history, 1):
        empty = {name for name in COLUMNS if row[name] == '' and name in ('train_loss', 'epsilon')}
        values = [row[name] for name in COLUMNS if name not in empty]
        if not all(type(v) in (int, float) for v in values) or row['round'] != t:
            raise ValueError('its history is not one')
    if len(history) != n:
        raise ValueError(f'its history is of {len(history)} rounds, and its weights of {n}')

def opened(flag, path, of_silo=False):
    """The content of the checkpoint at path, which --flag names, {'options', 'w', 'history' and a
    name for each class with a state}; of_silo: that of a silo that is not the first, {'options',
    'kept'}. Exits with one line if the file is no such checkpoint."""
    try:
        damaged = zipfile.ZipFile(path).testzip()       # torch.load does not check their CRCs
        if damaged:
            raise ValueError(f'{damaged} in it is damaged')
        saved = torch.load(path, map_location='cpu', weights_only=True)
        if of_silo:
            return saved if set(saved) == {'options', 'kept'} else saved['kept']
        defaults = vars(args_parser([], rooms()))
        if not saved['w'] or set(saved['options']) - {*defaults} or type(saved['round']) is not int:
            raise ValueError('half empty, or of a silo that is not the first')
        saved['options'] = defaults | saved['options']
        if any(isinstance(v, (torch.Tensor, list, dict)) for v in saved['options'].values()):
            raise ValueError('its options are not flags')
        check_history(saved['history'], saved['round'])
    except Exception as e:      # what torch.load raises for foreign bytes is not documented
        leave = '--resume' if flag == 'checkpoint' else f'--{flag}'
        reason = f': {e}' if type(e) is ValueError else ''
        fail(f'--{flag} {path}: damaged, or not a checkpoint of this version of the program '
             f'({type(e).__name__}{reason}); name one, or leave {leave} out', everyone=True)
    return saved

def misfit(w, net):
    """Why w cannot be the state_dict of net, as text; None if it can."""
    like = net.state_dict()
    if not isinstance(w, dict) or w.keys() != like.keys():
        return 'its weights have other names'
    for name, v in like.items():
        if not isinstance(w[name], torch.Tensor) or w[name].dtype != v.dtype:
            return f'{name} is not of type {v.dtype}'
        if w[name].layout != torch.strided or w[name].is_meta:
            return f'{name} is not a dense tensor'
        if w[name].shape != v.shape:
            return f'{name} has shape {tuple(w[name].shape)}, not {tuple(v.shape)}'
        if not w[name].isfinite().all():
            return f'{name} holds NaN or infinity'
    return None
