"""Records: the log and the checkpoint are whole whatever happens, and a run goes on bit for bit.

    python -m pytest -q beyond/test_records.py
"""
import contextlib
import importlib.util
import math
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch

import fedavg
import sampling
from beyond.files import opened
from beyond.test_processes import forkserver
from test_fedavg import data, read_log, refused, run, same, shell, weights      # noqa: F401

########################################## The log ##########################################
def test_log_holds_the_options_and_one_row_a_round(run, tmp_path):      # noqa: F811
    history = run(f'--local_bs inf --csv {tmp_path}/l.csv')
    options, rows = read_log(tmp_path / 'l.csv')
    assert options['local_bs'] == 'inf' and options['num_users'] == 10 and options['lr'] == 0.1
    assert ','.join(rows[0]) == (
        'round,train_loss,test_loss,test_acc,clients,rejected,lost,late,up_bytes,down_bytes,'
        'round_time,epsilon,seconds')
    assert [row['round'] for row in rows] == ['1', '2', '3']
    for row, logged in zip(history, rows, strict=True):
        assert {name: str(v) for name, v in row.items()} == logged

def test_a_loss_beyond_fp32_is_logged_as_it_is(run, tmp_path):      # noqa: F811
    class Infinite:
        """Clients whose loss is infinite."""
        def train(self, w, S_t, r):
            return (u._replace(loss=math.inf) for u in super().train(w, S_t, r))
    history = run(f'--epochs 1 --csv {tmp_path}/l.csv', Infinite)
    assert [row['train_loss'] for row in history] == [math.inf]
    assert read_log(tmp_path / 'l.csv')[1][0]['train_loss'] == 'inf'

def test_the_first_lines_name_the_classes_in_use_and_each_round_its_progress(
        run, tmp_path, capsys):     # noqa: F811
    class Mine:
        """A class of one's own that changes nothing."""
    run('--drop 0.1 --topk 0.5 --mu 0.1 --epochs 2', Mine)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ('mnist: 300 training examples; 10 clients with 30 to 30 each; 2nn with '
                        '199,210 parameters on 1 x cpu')
    assert lines[1] == ('in use, outermost first: Records, Mine, Lossy, Timed, Feedback, Wire, '
                        'Stacked, Server; clients: Proximal, LocalUpdate')
    assert 'round    2/2' in lines[3] and '   best ' in lines[3] and '0 s left' in lines[3]
    assert lines[4].startswith('2 rounds in ') and 'last test accuracy' in lines[4]

def test_a_new_run_sets_the_files_of_an_earlier_one_aside(run, tmp_path):       # noqa: F811
    (tmp_path / 'l.csv').write_text('precious')
    run(f'--epochs 1 --log {tmp_path}/l.csv --save_every 5 --checkpoint {tmp_path}/c.pt')
    assert (tmp_path / 'l.csv.old').read_text() == 'precious'
    assert len(read_log(tmp_path / 'l.csv')[1]) == 1
    run(f'--epochs 1 --csv {tmp_path}/l.csv')
    assert (tmp_path / 'l.csv.old').read_text() == 'precious'
    assert (tmp_path / 'l.csv.old1').exists()
    (tmp_path / 'other.csv').write_text('precious')
    # The last round was saved, whatever --save_every says.
    run(f'--epochs 2 --csv {tmp_path}/other.csv --checkpoint {tmp_path}/c.pt --resume')
    assert (tmp_path / 'other.csv.old').read_text() == 'precious'
    assert len(read_log(tmp_path / 'other.csv')[1]) == 2
    assert not (tmp_path / 'c.pt.old').exists()

###################################### The checkpoint ######################################
def without_seconds(history):
    return [{name: v for name, v in row.items() if name != 'seconds'} for row in history]

@pytest.mark.parametrize('words', [
    '--unequal 1 --momentum 0.5 --speeds lognormal:1 --deadline 1 --corrupt 0.3',
    '--model mlp --optimizer adamw --lr 0.001 --lr_decay 0.9'])
def test_a_resumed_run_equals_the_uninterrupted_one(run, words, tmp_path):      # noqa: F811
    full = run(f'{words} --epochs 4 --checkpoint {tmp_path}/full')
    run(f'{words} --epochs 2 --checkpoint {tmp_path}/part --csv {tmp_path}/l.csv')
    with open(tmp_path / 'l.csv', 'a') as f:
        f.write('3,0.1,a row cut sho')
    # These may change: no weights depend on them.
    free = '--save_every 2 --verbose --target 1 --personal finetune --personal_ep 2'
    part = run(f'{words} --epochs 4 --checkpoint {tmp_path}/part --csv {tmp_path}/l.csv --resume '
               f'{free}')
    assert same(weights(tmp_path / 'full'), weights(tmp_path / 'part'))
    for row, other in zip(without_seconds(full), without_seconds(part), strict=True):
        assert row == other
    assert [row['round'] for row in read_log(tmp_path / 'l.csv')[1]] == ['1', '2', '3', '4']

class ServerMomentum:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335): w = w + v, v = 0.9 v + change, with a state."""
    def __init__(self, args):
        super().__init__(args)
        self.velocity = {}

    def average(self, updates, w, r):
        mean = super().average(updates, w, r)
        r.velocity = {name: mean[name] - v + 0.9 * self.velocity.get(name, 0 * v).to(v.device)
                      for name, v in w.items()}
        return {name: v + r.velocity[name] for name, v in w.items()}

    def end(self, w, row, r):
        super().end(w, row, r)
        self.velocity = r.velocity

    def state(self):
        return super().state() | {'ServerMomentum': self.velocity}

    def load(self, state):
        super().load(state)
        self.velocity = state.get('ServerMomentum', {})

def test_the_state_of_a_server_of_ones_own_is_in_the_checkpoint(run, tmp_path):     # noqa: F811
    full = run(f'--epochs 4 --checkpoint {tmp_path}/full', ServerMomentum)
    run(f'--epochs 2 --checkpoint {tmp_path}/part', ServerMomentum)
    part = run(f'--epochs 4 --checkpoint {tmp_path}/part --resume', ServerMomentum)
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ('full', 'part'))
    assert same(one['w'], other['w']) and without_seconds(full) == without_seconds(part)
    assert same(one['ServerMomentum'], other['ServerMomentum'])
    assert all(v.any() for v in one['ServerMomentum'].values())
    run(f'--epochs 4 --checkpoint {tmp_path}/plain')
    assert not same(one['w'], weights(tmp_path / 'plain'))

@contextlib.contextmanager
def small_files():
    """A disk on which no file can be larger than 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

class BrokenOff:
    """Ctrl-C while w is evaluated."""
    def measure(self, w, r):
        raise KeyboardInterrupt

def test_a_checkpoint_is_never_half_written_nor_of_half_a_round(
        run, tmp_path, capsys):     # noqa: F811
    words = f'--topk 0.1 --checkpoint {tmp_path}/c.pt'
    run(f'{words} --epochs 2')
    good = torch.load(tmp_path / 'c.pt', weights_only=True)
    def unchanged():
        saved = torch.load(tmp_path / 'c.pt', weights_only=True)
        return same(saved['w'], good['w']) and same(saved['Feedback'], good['Feedback']) and (
            saved['history'] == good['history'])
    with small_files(), pytest.raises(SystemExit) as e:
        run(f'{words} --epochs 3 --resume')
    assert e.value.code == 2 and unchanged() and 'File too large' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['c.pt']       # and no .tmp
    with pytest.raises(SystemExit) as e:
        run(f'{words} --epochs 3 --resume', BrokenOff)
    assert e.value.code == 130 and unchanged()
    assert 'interrupted after round 2' in capsys.readouterr().out

@pytest.mark.parametrize('before', [True, False])
def test_ctrl_c_at_the_end_of_a_round_waits_for_row_and_checkpoint(
        run, tmp_path, capsys, before):     # noqa: F811
    class Pressed:
        """Ctrl-C in the second round, as its end begins or is nearly done."""
        def end(self, w, row, r):
            if r.t == 2 and before:
                os.kill(os.getpid(), signal.SIGINT)
            super().end(w, row, r)
            if r.t == 2 and not before:
                os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit) as e:
        run(f'--checkpoint {tmp_path}/c.pt --csv {tmp_path}/l.csv', Pressed)
    assert e.value.code == 130 and 'interrupted after round 2' in capsys.readouterr().out
    assert [row['round'] for row in read_log(tmp_path / 'l.csv')[1]] == ['1', '2']
    saved = torch.load(tmp_path / 'c.pt', weights_only=True)
    assert [row['round'] for row in saved['history']] == [1, 2]

def test_a_round_without_survivors_ends_the_run_and_keeps_w(run, tmp_path, capsys):     # noqa: F811
    run(f'--checkpoint {tmp_path}/c.pt --epochs 1 --lr 1e-30')
    good = weights(tmp_path / 'c.pt')
    with pytest.raises(SystemExit) as e:
        run(f'--checkpoint {tmp_path}/d.pt --lr 1e9 --local_ep 5')
    assert e.value.code == 1 and 'lower --lr' in capsys.readouterr().err
    # It is w_0: a step of 1e-30 changes no bit of it.
    assert same(weights(tmp_path / 'd.pt'), good)

def test_resuming_under_other_options_names_them(run, refused, tmp_path):       # noqa: F811
    run(f'--epochs 1 --widths 1,0.5 --checkpoint {tmp_path}/c.pt')
    line = refused(f'--num_users 10 --frac 0.3 --widths 1 --lr 0.2 --iid 0 --bs 9 --resume '
                   f'--checkpoint {tmp_path}/c.pt'.split())
    assert '--lr 0.1 (given: 0.2)' in line and '--iid 1 (given: 0)' in line
    assert '--widths 1,0.5 (given: 1)' in line
    assert not any(name in line for name in ('--frac', '--bs', '--epochs', '--resume 0'))

def test_what_is_no_checkpoint_or_an_old_one_is_refused_in_a_line(run, refused, tmp_path):  # noqa
    run(f'--epochs 1 --checkpoint {tmp_path}/c.pt')
    saved = torch.load(tmp_path / 'c.pt', weights_only=True)
    was = {name: v for name, v in saved['options'].items() if name not in ('csv', 'save_every')}
    was |= dict(log=None, bandwidth=None, all_clients=0)
    rows = [row | {'upload_seconds': 0.0} for row in saved['history']]
    old = dict(options=was, w=saved['w'], history=rows, wire={'mask': None, 'kept': {1: {}}})
    fewer = [{name: v for name, v in row.items() if name != 'epsilon'} for row in rows]
    for content in (old, {'w': {}}, saved | {'w': {}}, saved | {'history': fewer},
                    [1, 2], {name: v for name, v in saved.items() if name != 'options'}):
        torch.save(content, tmp_path / 'other.pt')
        line = refused(['--resume', '--checkpoint', f'{tmp_path}/other.pt'])
        assert 'damaged, or not a checkpoint of this version' in line
    (tmp_path / 'junk.pt').write_bytes(b'no checkpoint')
    assert 'not a checkpoint' in refused(['--resume', '--checkpoint', f'{tmp_path}/junk.pt'])
    assert (tmp_path / 'junk.pt').read_bytes() == b'no checkpoint'

def changed(w, name, value):
    return {'w': w | {name: value(w[name])}}

BROKEN = {
    'other names': lambda saved: {'w': {f'x{name}': v for name, v in saved['w'].items()}},
    'has shape (1, 10)': lambda saved: changed(saved['w'], 'fc3.bias', lambda v: v[None]),
    'not of type torch.float32': lambda saved: changed(saved['w'], 'fc3.bias', torch.Tensor.double),
    'fc3.bias is not': lambda saved: changed(saved['w'], 'fc3.bias', torch.Tensor.tolist),
    'NaN': lambda saved: changed(saved['w'], 'fc3.bias', lambda v: v * math.nan),
    'its history is not one': lambda saved: {'history': saved['history'][1:]},
    'of 1 rounds': lambda saved: {'history': saved['history'][:1]},
    'history is not': lambda saved: {'history': [row | {'up_bytes': None}
                                                 for row in saved['history']]},
    'dense': lambda saved: changed(saved['w'], 'fc3.weight', torch.Tensor.to_sparse),
    'of a silo': lambda saved: {'w': {}},
    'not flags': lambda saved: {'options': saved['options'] | {'lr': torch.ones(2)}},
    'AttributeError': lambda saved: {'Feedback': [1, 2]},
    'another length': lambda saved: {'Feedback': {3: torch.zeros(7)}},
    'no vector': lambda saved: {'Feedback': {3: 'x' * 199210}},
    'not finite': lambda saved: {'Feedback': {3: torch.full((199210,), math.nan)}}}

class Loud:
    __module__ = 'mine'

    def describe(self, row):
        return super().describe(row).upper()

def test_a_run_goes_on_with_the_classes_that_it_was_made_with(run, refused, tmp_path):  # noqa: F811
    words = f'--num_users 10 --frac 0.3 --epochs 1 --checkpoint {tmp_path}/c.pt'
    run(words, Loud)
    line = refused([*words.split(), '--resume'])
    assert 'it was made with Loud of your own, and this run has none' in line
    run(f'{words} --epochs 2 --resume', Loud)

def test_a_class_that_overrides_nothing_is_refused(run, capsys):        # noqa: F811
    for method in ('los', 'avrage'):
        with pytest.raises(SystemExit):
            run('--epochs 1', type('Mine', (), {method: print, '__module__': 'mine'}))
        assert f'Mine: it has {method}, and no step of' in capsys.readouterr().err

def test_a_class_may_have_bases_that_override_nothing(run):     # noqa: F811
    class Helper:
        __module__ = 'mine'
    class Mine(fedavg.LocalUpdate, Helper):
        __module__ = 'mine'
    class Loss:
        __module__ = 'mine'
        def loss(self, logits, y, reduction='mean'):
            return super().loss(logits, y, reduction)
    run('--epochs 1', Loss, Mine, Loud)

def test_a_fault_in_a_class_of_ones_own_is_not_the_checkpoints(run):    # noqa: F811
    class Careless:
        def load(self, state):
            super().load(state)
            self.v = state['Careless']
    with pytest.raises(KeyError, match='Careless'):
        run('--epochs 1', Careless)

@pytest.mark.parametrize('said', BROKEN)
def test_a_checkpoint_that_does_not_fit_is_refused_in_a_line(run, refused, tmp_path, said):  # noqa
    words = ('--topk 0.1 --num_users 10 --frac 0.3 --epochs 2 --processes 1 --checkpoint '
             f'{tmp_path}/c.pt')
    run(words)
    saved = torch.load(tmp_path / 'c.pt', weights_only=True)
    torch.save(saved | BROKEN[said](saved), tmp_path / 'c.pt')
    line = refused([*words.split(), '--resume'])
    assert said in line and '--lr' not in line
    if 'w' in BROKEN[said](saved) and said != 'of a silo':
        assert 'its weights are not those of 2nn' in refused(['--teacher', f'{tmp_path}/c.pt'])

@pytest.mark.parametrize('words, junk', [
    ('', {'processes': 'many'}), ('', {'processes': 0}),
    ('--dp user --clip 1 --epsilon 50', {'Accounted': {'noise': -1.0}}),
    ('--dp user --clip 1 --epsilon 50', {'Accounted': {'noise': 'x'}})])
def test_a_checkpoint_with_an_impossible_number_is_refused_in_a_line(     # noqa: F811
        run, refused, tmp_path, words, junk):
    run(f'{words} --epochs 1 --checkpoint {tmp_path}/c.pt')
    torch.save(torch.load(tmp_path / 'c.pt', weights_only=True) | junk, tmp_path / 'c.pt')
    words = f'{words} --num_users 10 --frac 0.3 --resume --checkpoint {tmp_path}/c.pt'
    line = refused(words.split())
    assert 'does not hold what these flags need' in line and ' is not a ' in line

def test_flipped_bits_in_a_checkpoint_are_found(run, tmp_path, capsys):     # noqa: F811
    run(f'--epochs 1 --checkpoint {tmp_path}/c.pt')
    good, content = weights(tmp_path / 'c.pt'), (tmp_path / 'c.pt').read_bytes()
    draw, found = random.Random(0), 0
    for _ in range(40):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / 'd.pt').write_bytes(damaged)
        try:
            assert same(opened('checkpoint', f'{tmp_path}/d.pt')['w'], good)
        except SystemExit:
            found += 1
    assert found > 35 and capsys.readouterr().err.count('\n') == found

def test_a_folder_that_alone_is_missing_is_made(run, refused, tmp_path):        # noqa: F811
    words = f'--csv {tmp_path}/a/l.csv --checkpoint {tmp_path}/b/c.pt'
    refused(f'{words} --lr -1'.split())
    assert not list(tmp_path.iterdir())         # nothing is made for a run that does not start
    run(f'{words} --epochs 1')
    assert (tmp_path / 'a/l.csv').exists() and (tmp_path / 'b/c.pt').exists()
    assert '--csv' in refused(f'--csv {tmp_path}/no/such/l.csv'.split())

def test_a_run_of_more_than_ten_minutes_says_so_after_its_first_round(run, capsys):    # noqa: F811
    class Slow:
        """A round takes a minute."""
        def measure(self, w, r):
            return super().measure(w, r) | {'seconds': 60.0}
        def done(self, r):
            return r.t > 2
    run('--epochs 13', Slow)
    out = capsys.readouterr().out
    assert out.count('the 12 rounds to come will take about 12 minutes') == 1

def rounds(log):
    """The rows of a log that may not be there yet."""
    return len(read_log(log)[1]) if log.exists() and log.stat().st_size else 0

def test_a_run_that_is_interrupted_and_killed_goes_on_where_it_was(
        data, tmp_path, capsys):        # noqa: F811
    words = (f'--data_dir {data} --num_users 10 --frac 0.2 --local_ep 5 --local_bs 2 --epochs 12 '
             f'--engine loop --gpu -1 --checkpoint {tmp_path}/c.pt --csv {tmp_path}/l.csv')
    log, first = tmp_path / 'l.csv', shell(words)
    while rounds(log) < 2 and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=100)
    assert first.returncode == 130 and 'interrupted' in out and 'Traceback' not in err
    assert f'checkpoint: {tmp_path}/c.pt' in out
    second = forkserver().Process(target=fedavg.main, args=(f'{words} --resume'.split(),))
    second.start()
    seen = rounds(log)
    while rounds(log) < seen + 2 and second.is_alive():
        time.sleep(0.01)
    second.kill()
    second.join(100)
    assert second.exitcode == -signal.SIGKILL and weights(tmp_path / 'c.pt')
    fedavg.main(f'{words} --resume'.split())
    assert capsys.readouterr().out.count('resumed from') == 1
    assert [row['round'] for row in read_log(log)[1]] == [str(t) for t in range(1, 13)]
    fedavg.main(words.replace('c.pt', 'full.pt').replace('--csv', '--save_every 3 --csv').split())
    assert same(weights(tmp_path / 'c.pt'), weights(tmp_path / 'full.pt'))

#################################### The plot, the flags ####################################
def test_plots_missing_library_is_said_before_training(refused, tmp_path, monkeypatch):     # noqa
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name: None if name == 'matplotlib' else found(name))
    monkeypatch.setattr(sampling, 'load', lambda *_: pytest.fail('data were read'))
    assert 'pip install matplotlib' in refused(['--plot', f'{tmp_path}/p.png'])

def test_plot_is_drawn(run, tmp_path, monkeypatch):     # noqa: F811
    pytest.importorskip('matplotlib')
    from matplotlib.axes import Axes
    drawn, draw = [], Axes.plot
    def noted(self, x, y, **more):
        drawn.append((x, y))
        return draw(self, x, y, **more)
    monkeypatch.setattr(Axes, 'plot', noted)
    history = run(f'--plot {tmp_path}/p.png --drop 1')      # no training loss in any round
    (t, accuracy), (_, train), (_, test) = drawn
    assert t == [1, 2, 3] and accuracy == [row['test_acc'] for row in history]
    assert all(map(math.isnan, train)) and test == [row['test_loss'] for row in history]
    assert (tmp_path / 'p.png').read_bytes()[1:4] == b'PNG'

def test_a_log_that_has_gone_is_a_line(run, tmp_path, capsys):        # noqa: F811
    class Gone:
        def measure(self, w, r):
            if r.t == 2:
                (tmp_path / 'l.csv').unlink()
            return super().measure(w, r)
    with pytest.raises(SystemExit) as e:
        run(f'--csv {tmp_path}/l.csv', Gone)
    assert e.value.code == 2 and '--csv' in capsys.readouterr().err

def test_after_ctrl_c_a_notebook_can_be_interrupted_again(run, tmp_path):       # noqa: F811
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as e:
        run(f'--checkpoint {tmp_path}/c.pt', BrokenOff)
    assert e.value.code == 130 and signal.getsignal(signal.SIGINT) is before

def test_a_log_that_cannot_be_written_costs_no_round(run, tmp_path, capsys):      # noqa: F811
    class Gone:
        def select(self, r):
            if r.t == 3:
                shutil.rmtree(tmp_path / 'logs')
            return super().select(r)
    with pytest.raises(SystemExit) as e:
        run(f'--epochs 4 --csv {tmp_path}/logs/l.csv --checkpoint {tmp_path}/c.pt --save_every 9',
            Gone)
    assert e.value.code == 2 and 'could not be written' in capsys.readouterr().err
    assert opened('checkpoint', f'{tmp_path}/c.pt')['round'] == 3

def test_a_log_of_a_later_run_is_set_aside(run, tmp_path):      # noqa: F811
    words = f'--csv {tmp_path}/l.csv --checkpoint {tmp_path}'
    run(f'{words}/a.pt --epochs 1')
    run(f'{words}/b.pt --epochs 3')
    run(f'{words}/a.pt --epochs 2 --resume')
    assert [len(read_log(tmp_path / name)[1]) for name in ('l.csv.old', 'l.csv.old1', 'l.csv')] == (
        [1, 3, 2])

def test_files_that_cannot_be_are_refused(refused, tmp_path, monkeypatch):      # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, 'load', lambda *_: pytest.fail('data were read'))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name: name == 'matplotlib' or found(name))
    for words, said in (
            ('--csv /dev/null', 'not a file'), ('--csv /no/such/folder/l.csv', '--csv'),
            ('--checkpoint /', '--checkpoint'), ('--save_every 0', '--save_every'),
            ('--save_every 5', 'nothing is saved'),
            ('--resume', '--checkpoint'), ('--resume --checkpoint no_such_file', 'no_such_file'),
            ('--plot p.txt', '.png'), ('--log a --checkpoint a', 'twice'),
            ('--plot a.png --csv ./a.png', 'twice')):
        assert said in refused(words.split())
    assert not list(tmp_path.iterdir())
