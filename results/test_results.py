"""The scripts that make the tables: what they run, what they keep, what they print."""
import math
import pathlib
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import fedavg
import options
from test_fedavg import data        # noqa: F401

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import reproduce                    # noqa: E402
import speed                        # noqa: E402
import unequal                      # noqa: E402
import wire                         # noqa: E402

def test_the_tables_cells_are_what_the_paper_has_and_the_program_takes():
    cells = reproduce.cells()
    assert len(cells) == 2 * 5 * 4 + 2 * 9 * 2 + 6 * 2 and cells[4, 'E=10,B=50,iid=0'][1] == 881
    assert cells[1, '2nn,C=0.0,B=inf,iid=0'][1] == 4278
    args = options.args_parser(cells[2, 'paper_cnn,E=20,B=inf,iid=1'][0].split())
    assert (args.model, args.frac, args.local_ep) == ('paper_cnn', 0.1, 20)
    assert (args.local_bs, args.iid, args.target) == (math.inf, 1, 0.99)
    for words, _ in cells.values():
        options.args_parser(words.split())

@pytest.mark.parametrize('best, tried', [
    (0.1, [0.1, 0.0464, 0.2154]), (0.01, [0.1, 0.0464, 0.0215, 0.01]),
    (1, [0.1, 0.0464, 0.2154, 0.4642, 1]), (None, None)])
def test_eta_is_searched_where_rounds_become_fewer(monkeypatch, capsys, best, tried):
    asked, known = [], {}
    def run(words, lr, *_):
        asked.append(lr)
        return (f'{abs(math.log(lr / best)) + 1}' if best else ''), 0, []
    monkeypatch.setattr(reproduce, 'run', run)
    monkeypatch.setattr(reproduce, 'tried', lambda *_: dict(known))
    monkeypatch.setattr(reproduce, 'write', lambda *_: None)
    def search(E, iid):
        asked.clear()
        words = f'--local_ep {E} --local_bs 10 --iid {iid}'
        return reproduce.search(4, 'cell', words, 92, '')
    assert search(1, 1) == best
    assert asked == tried if tried else sorted(asked) == reproduce.GRID
    assert search(5, 0) == best and asked[0] == 0.0464
    assert 'trying eta 0.0464 on seed 7' in capsys.readouterr().err
    if best == 0.1:         # it goes on from the best one tried
        known.update({0.0464: math.inf, 0.1: 1.0})
        assert search(5, 0) == 0.1 and asked == [0.2154]

@pytest.mark.parametrize('stop', [KeyboardInterrupt(), fedavg.Stop('a process has died', 3)])
def test_a_cells_run_goes_on_where_it_was_stopped(monkeypatch, tmp_path, data, stop):   # noqa: F811
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    words, done = '--gpu -1 --num_users 10 --frac 0.3 --target 0.999', []
    whole = reproduce.run(words, 0.1, 0, 4, data)
    describe = fedavg.Server.describe
    def watched(self, row):
        done.append(row['round'])
        if len(done) == 2:
            raise stop
        return describe(self, row)
    monkeypatch.setattr(fedavg.Server, 'describe', watched)
    with pytest.raises(SystemExit):
        reproduce.run(words, 0.1, 0, 4, data)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert reproduce.run(words, 0.1, 0, 4, data)[::2] == whole[::2] and done == [1, 2, 3, 4]
    assert reproduce.run(words, 1000, 0, 4, data)[0] == ''      # diverged
    assert not list(tmp_path.iterdir())

def test_a_cell_of_two_tables_is_run_once(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    ran = []
    def run(words, lr, seed, *_):
        ran.append((lr, seed))
        return f'{5 + abs(math.log(lr / 0.1)):.1f}', 9, [0.5, 0.99]
    monkeypatch.setattr(reproduce, 'run', run)
    for words in ('--table 1 --seeds 1', '--table 2 --seeds 2 --more=--verbose=1', '--seeds 2',
                  '--table 1 --seeds 2'):
        cell = 'paper_cnn,' + ('C=0.1' if words.startswith('--table 1') else 'E=5')
        argv = ['reproduce.py', '--cell', f'B=10,iid=0,{cell}', *words.split()]
        monkeypatch.setattr('sys.argv', argv)
        reproduce.main()
    assert ran == [(0.0464, 7), (0.0215, 7), (0.1, 7), (0.2154, 7), (0.1, 0), (0.1, 1)]
    assert [row['table'] for row in reproduce.read('reproduce.csv')] == ['2', '2']
    assert len(reproduce.read('curves.csv')) == 1

def test_an_eta_can_be_given_and_is_shown(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    ran = []
    def run(words, lr, seed, *_):
        ran.append((lr, seed))
        return '30.0', 9, [0.5, 0.99]
    monkeypatch.setattr(reproduce, 'run', run)
    words, paper = reproduce.cells()[2, 'lstm,E=5,B=10,iid=0']
    reproduce.write('eta.csv', (2, 'lstm,E=5,B=10,iid=0', words, 1.0, 7, '40.0', 9, '', paper))
    for more in '--seeds 1 --lr 1.4678', '--seeds 2 --lr 2':
        argv = f'reproduce.py --cell lstm,E=5,B=10,iid=0 {more}'
        monkeypatch.setattr('sys.argv', argv.split())
        reproduce.main()
    assert ran == [(1.4678, 0), (2, 1)]
    reproduce.tables()
    assert '| 41 | **30.0** (30.0 to 30.0), η 1.4678, η 2 |' in capsys.readouterr().out
    for said, wrong in (('goes with --cell', '--lr 0 --cell E=1'), ('goes with --cell', '--lr 1'),
                        ('goes with --cell', '--lr 1 --cell E=1 --check_eta'),
                        ('leave out --table', '--show --table 4'),
                        ('leave out --table', '--figure --cell E=1')):
        monkeypatch.setattr('sys.argv', ['reproduce.py', *wrong.split()])
        with pytest.raises(SystemExit):
            reproduce.main()
        assert said in capsys.readouterr().err
    monkeypatch.setattr('sys.argv', 'reproduce.py --table 4 --cell E=5,lstm'.split())
    with pytest.raises(SystemExit, match='no cell has all of these parts; there are B=10, B=50, B'):
        reproduce.main()

def test_eta_and_its_neighbours_are_checked_on_two_more_seeds(
        monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    ran = []
    def run(words, lr, seed, most, *_):
        ran.append((lr, seed, most))
        return ('31.5' if lr == 0.1 else ''), 9, []
    monkeypatch.setattr(reproduce, 'run', run)
    argv = 'reproduce.py --table 4 --cell E=1,B=10,iid=1 --check_eta'.split()
    monkeypatch.setattr('sys.argv', argv)
    reproduce.main()
    assert 'has no eta' in capsys.readouterr().err and not ran
    words, paper = reproduce.cells()[4, 'E=1,B=10,iid=1']
    for lr, rounds in ((0.0464, ''), (0.1, '29.8'), (0.2154, '')):
        row = 4, 'E=1,B=10,iid=1', words, lr, 7, rounds, 9, '', paper
        reproduce.write('eta.csv', row)
    for _ in range(2):          # the second time there is nothing to do
        reproduce.main()
    limit = math.ceil(1.5 * 92)
    assert ran == [(lr, seed, most) for seed in (8, 9)
                   for lr, most in ((0.1, limit), (0.0464, 63), (0.2154, 63))]
    assert len(reproduce.read('eta.csv')) == 3 + 6
    assert reproduce.tried(words) == {0.0464: math.inf, 0.1: 29.8, 0.2154: math.inf}     # seed 7's

def test_a_cell_of_two_tables_has_the_larger_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    ran = []
    monkeypatch.setattr(reproduce, 'run', lambda words, lr, seed, most, *_: ran.append(most)
                        or ('', 9, [0.5]))
    argv = 'reproduce.py --table 2 --cell paper_cnn,E=5,B=inf --lr 0.1'
    monkeypatch.setattr('sys.argv', argv.split())
    reproduce.main()
    assert ran == [math.ceil(1.5 * 339), math.ceil(1.5 * 1100)]

def test_the_paper_and_here_stand_side_by_side(monkeypatch, capsys, tmp_path):
    def shown(*rounds, lr='0.0464'):
        return reproduce.as_text([{'rounds': r, 'lr': lr, 'paper': '29'} for r in rounds])
    assert shown() == 'not run' and shown('29.4') == '**29.4** (one seed), η 0.0464'
    assert shown('29.0', '30.0', '34.0') == '**31.0** (29.0 to 34.0), η 0.0464'
    assert shown('29.0', '', '34.0') == (
        '1 of 3 not in 44 rounds (the others: 29.0 to 34.0), η 0.0464')
    assert shown('', '29.0') == '1 of 2 not in 44 rounds (the others: 29.0), η 0.0464'
    assert shown('', lr='') == 'not in 44 rounds'
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    words, paper = reproduce.cells()[2, 'paper_cnn,E=5,B=10,iid=1']
    for seed, rounds in ((0, '16.0'), (1, '24.0')):
        row = 2, 'paper_cnn,E=5,B=10,iid=1', f'--gpu -1 {words}', 0.1, seed, rounds, 9, '', paper
        reproduce.write('reproduce.csv', row)
    reproduce.tables()
    lines = capsys.readouterr().out.splitlines()
    assert '| E=5, B=10 | 20 | **20.0** (16.0 to 24.0), η 0.1 | 229 | not run |' in lines
    assert ('| C=0.1 | 339 | not run | 18 | **20.0** (16.0 to 24.0), η 0.1 | 1100 | not run | 206 '
            '| not run |') in lines             # the same cell
    assert sum(line.startswith(('| C=', '| E=')) for line in lines) == 34
    assert ('| C=1.0 | - | not run | 70 | not run | - | not run | 380 | not run |') in lines

@pytest.fixture
def here(monkeypatch, capsys):
    """The scripts' runs of fedavg.py in this process, without the seconds of importing torch."""
    def run(command, **_):
        fedavg.main(command[2:])
        return SimpleNamespace(stdout=capsys.readouterr().out, stderr='', returncode=0)
    monkeypatch.setattr(subprocess, 'run', run)

def test_rounds_and_megabytes_are_those_of_the_log(here, data):     # noqa: F811
    small = '--compile 0 --num_users 10 --epochs 3 --quantize 8 --target'
    row, log = wire.measure(f'{small} 0.3', data, 1, 0)
    rounds = fedavg.rounds_to(0.3, [float(r['test_acc']) for r in log])
    assert rounds > 1 and row['rounds'] == f'{rounds:.1f}'
    assert row['megabytes'] == f'{rounds * int(log[0]["up_bytes"]) / 1e6:.2f}'
    missed, log = wire.measure(f'{small} 1', data, 1, 0)
    assert missed['rounds'] == missed['megabytes'] == '' and len(log) == 3

def test_unequal_clients_are_measured(here, data):      # noqa: F811
    words = '--compile 0 --num_users 10 --epochs 2 --personal finetune --speeds lognormal:1'
    row = unequal.measure(words, data, '', 0)
    assert float(row['own']) > 0 and float(row['time']) > 0 and float(row['global90']) > 0
    assert float(row['megabytes']) == pytest.approx(2 * 0.796866, abs=0.01)

def test_the_clocks_of_speed_measure_training_and_evaluation(data, capsys):     # noqa: F811
    from beyond.wire import Wire
    evaluate, receive = fedavg.Server.evaluate, Wire.receive
    try:
        speed.inner(f'--data_dir {data} --num_users 10 --epochs 3 --gpu -1'.split())
    finally:
        fedavg.Server.evaluate, Wire.receive = staticmethod(evaluate), receive
    out = capsys.readouterr().out
    assert 's/round; with evaluation' in out
    assert 0 < float(out.partition('local training ')[2].partition(' %')[0]) < 100

def test_settings_are_measured_once(monkeypatch, capsys, tmp_path):
    ran = []
    def measure(words, data_dir, iid, seed):
        ran.append((words, seed))
        row = dict(setting=words, iid=iid, seed=seed, rounds=f'{20 + 2 * seed}',
                   megabytes='20' if words else '80')
        if (words, seed) == ('--quantize 1', 0):
            row['rounds'] = row['megabytes'] = ''
        log = [{'up_bytes': '5', 'test_acc': '0.5'}, {'up_bytes': '6', 'test_acc': '0.971'}]
        return row, log
    monkeypatch.setattr(wire, 'measure', measure)
    monkeypatch.setattr(wire, 'HERE', tmp_path)
    settings = ['', '--quantize 8', '--quantize 1']
    for seeds in ('0', '01'):       # the second goes on
        monkeypatch.setattr('sys.argv', ['wire.py', '--iid', '1', '--seeds', *seeds, '--only',
                                         *settings])
        wire.main()
    assert ran == [(words, seed) for seed in (0, 1) for words in settings]
    curves = 'setting,iid,up_bytes,accuracies\n,1,5 6,5000 9710\n--quantize 8,1,5 6,5000 9710\n'
    assert (tmp_path / 'wire_curves.csv').read_text() == curves
    capsys.readouterr()
    wire.table(tmp_path / 'wire.csv')
    lines = capsys.readouterr().out.splitlines()
    assert '| `--quantize 8` | 21.0 (20.0 to 22.0) | 20.00 | 4.0 | not run |  |  |' in lines
    assert '| `--quantize 1` | 1 of 2 missed |  |  | not run |  |  |' in lines

def test_the_figures_have_one_curve_of_what_was_run_twice(monkeypatch, tmp_path):
    Figure, drawn, said = pytest.importorskip('matplotlib.figure').Figure, [], []
    def savefig(self, *_, **__):
        said.append([text.get_text() for axes in self.axes for text in axes.texts])
        drawn.append([[line.get_ydata()[-1] for line in axes.lines] for axes in self.axes])
    monkeypatch.setattr(Figure, 'savefig', savefig)
    for module in (reproduce, wire):
        monkeypatch.setattr(module, 'HERE', tmp_path)
    for best in ('9000', '9500'):
        accuracies = f'8000 {best} 8500'
        reproduce.write('curves.csv', (4, 'E=1,B=10,iid=1', 0.1, accuracies), reproduce.CURVE)
        reproduce.write('curves.csv', (2, 'lstm,E=1,B=10,iid=0', 1, accuracies), reproduce.CURVE)
        reproduce.write('curves.csv', (1, 'lstm,E=1,B=10,iid=0', 1, '9900'), reproduce.CURVE)
        row = dict(setting='', iid=1, up_bytes='5 5 5', accuracies=accuracies)
        wire.write(tmp_path / 'wire_curves.csv', row)
    reproduce.figure()
    wire.figure()
    rounds, megabytes = drawn           # each panel's last line is the target
    assert rounds == [[95, 97], [97], [54], [95, 54]] and megabytes[0] == [95, 97]
    assert said[0] == ['not run', 'not run']
