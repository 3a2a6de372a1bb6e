"""The cells of Tables 1, 2 and 4 of McMahan et al. 2017, one run of fedavg.py each, into
results/reproduce.csv; goes on where it was stopped. Curves of seed 0 go into results/curves.csv.

    python results/reproduce.py --data_dir DIR --table 4            # all of it, the cheapest first
    python results/reproduce.py --data_dir DIR --table 4 --cell E=10,B=inf,iid=0 --seeds 1
    python results/reproduce.py --data_dir DIR --cell lstm,E=5,B=10,iid=0 --lr 1.4678
    python results/reproduce.py --show                              # what has been run, as Markdown
    python results/reproduce.py --data_dir DIR --table 4 --cell E=1,B=10 --check_eta
    python results/reproduce.py --figure                            # results/rounds.png

A cell's eta is the one of a grid with resolution 10^(1/3) (lstm: 10^(1/6)) that took the fewest
rounds on seed 7, in results/eta.csv; where that has none it is searched for first. --lr takes
another one, without a search, for the seeds that have no row yet. A run that takes more than 1.5
times the paper's rounds (the larger number, if a cell stands in two tables; 1500 where the paper
has a dash) is a miss; its rounds are blank, as those of a run that diverges and, in eta.csv, of one
that is no better than the best before it. The seconds are those since the run was last started.
--check_eta runs a cell's eta and both its neighbours in the grid on two more seeds, for at most
twice its eta's rounds.
"""
import argparse
import csv
import itertools
import math
import os
import pathlib
import platform
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

GRID = [round(10 ** (i / 3), 4) for i in range(-6, 1)]      # 0.01, 0.0215, 0.0464, 0.1, ..., 1
FINE = [round(10 ** (i / 6), 4) for i in range(-2, 7)]      # lstm: 0.4642, 0.6813, 1, ..., 10
START = {'10': 0.1, '50': 0.2154, 'inf': 0.4642}            # where the search enters the grid
FINE_START = 1.4678
UNKNOWN = 1000                                              # rounds, where the paper has a dash
SEED = 7                                                    # of the grid; in no cell's mean
# Of the figure: {net: (name, target and lowest accuracy shown, in percent)}.
PANELS = {'2nn': ('2NN', 97, 80), 'paper_cnn': ('CNN', 99, 90), 'lstm': ('char-LSTM', 54, 20)}
ROWS = ('table', 'cell', 'flags', 'lr', 'seed', 'rounds', 'seconds', 'machine', 'paper')
CURVE = ('table', 'cell', 'lr', 'accuracies')               # of seed 0, in hundredths of a percent

# Table 1: {C: rounds for IID B=inf, IID B=10, non-IID B=inf, non-IID B=10}.
CNN1 = {0.0: (387, 50, 1181, 956), 0.1: (339, 18, 1100, 206), 0.2: (337, 18, 978, 200),
        0.5: (164, 18, 1067, 261), 1.0: (246, 16, None, 97)}
NN1 = {0.0: (1455, 316, 4278, 3275), 0.1: (1474, 87, 1796, 664), 0.2: (1658, 77, 1528, 619),
       0.5: (None, 75, None, 443), 1.0: (None, 70, None, 380)}
# Tables 2 and 4: {(E, B): IID, non-IID}.
CNN2 = {(1, 'inf'): (626, 483), (5, 'inf'): (179, 1000), (1, 50): (65, 600),
        (20, 'inf'): (234, 672), (1, 10): (34, 350), (5, 50): (29, 334), (20, 50): (32, 426),
        (5, 10): (20, 229), (20, 10): (18, 173)}
LSTM2 = {(1, 'inf'): (2488, 3906), (1, 50): (1635, 549), (5, 'inf'): (613, 597),
         (1, 10): (460, 164), (5, 50): (401, 152), (5, 10): (192, 41)}
NN4 = {(1, 'inf'): (1468, 1817), (10, 'inf'): (156, 1100), (1, 50): (144, 1183),
       (20, 'inf'): (92, 957), (1, 10): (92, 831), (10, 50): (45, 881), (20, 50): (39, 835),
       (10, 10): (34, 497), (20, 10): (32, 738)}

##################################### The cells #####################################

def cells():
    """{(table, cell): (flags, the paper's rounds or None)}, every cell of the three tables."""
    found = {}
    columns = (1, 'inf'), (1, 10), (0, 'inf'), (0, 10)
    for model, E, target, of in (('2nn', 1, 0.97, NN1), ('paper_cnn', 5, 0.99, CNN1)):
        for C, rounds in of.items():
            for (iid, B), paper in zip(columns, rounds):
                words = f'{flags(model, C, E, B)} --iid {iid} --target {target}'
                found[1, f'{model},C={C},B={B},iid={iid}'] = words, paper
    for table, model, target, of in ((2, 'paper_cnn', 0.99, CNN2), (2, 'lstm', 0.54, LSTM2),
                                     (4, '2nn', 0.97, NN4)):
        for (E, B), rounds in of.items():
            for iid, paper in zip((1, 0), rounds):
                words = f'{flags(model, 0.1, E, B)} --iid {iid} --target {target}'
                name = f'{model},' * (table == 2) + f'E={E},B={B},iid={iid}'
                found[table, name] = words, paper
    return found

def flags(model, C, E, B):
    """The flags of a cell, but for its partition and target."""
    data = '--dataset shakespeare ' * (model == 'lstm')
    return f'{data}--model {model} --frac {C} --local_ep {E} --local_bs {B}'

def cost(words):
    """A guess at the milliseconds of a round: the local steps of m clients, which, of images, cost
    more the larger B is, and the evaluation."""
    model, C, E, B, *_ = setting(words).split()[::2]
    if model == 'lstm':
        return 10_000 + 12_000 * float(E)
    B, m = min(float(B), 600), max(round(float(C) * 100), 1)
    step = 0.25 + 0.0125 * B if model == '2nn' else 2 + 0.85 * B
    return m * float(E) * 600 / B * step + (100 if model == '2nn' else 3000)

def setting(words):
    """The flags that make a cell, which may stand in two tables; --more's stand before them."""
    return words.partition('--model ')[2]

################################### Runs and the search ###################################

def run(words, lr, seed, rounds, data_dir):
    """(rounds to the target or '', seconds since it was last started, test accuracies): one run of
    the program, at most so many rounds. One that was stopped goes on from results/*.pt; delete
    these after a change of the program."""
    import fedavg
    import torch
    torch._dynamo.reset()       # or --compile gives up after some runs in one process
    words = f'{words} --lr {lr} --seed {seed}'
    checkpoint = HERE / (words.replace('--', '').replace(' ', '_') + '.pt')
    began = time.time()
    text = '--model lstm' in words
    pace = '--bs 50' if text else '--save_every 10'
    pace += f' --processes {2 if text and not torch.cuda.is_available() else 1}'
    argv = f'{pace} {words} --epochs {rounds}'.split() + ['--data_dir', data_dir]
    argv += ['--checkpoint', str(checkpoint)] + ['--resume'] * checkpoint.exists()
    try:
        history = fedavg.main(argv)
    except SystemExit as e:
        if e.code != 1:         # 1: it diverged
            raise
        history = []
    checkpoint.unlink(missing_ok=True)      # another process may run the cell of another table
    accuracies = [row['test_acc'] for row in history]
    target = float(words.split('--target ')[1].split()[0])
    reached = fedavg.rounds_to(target, accuracies)
    return f'{reached:.1f}' if reached else '', f'{time.time() - began:.0f}', accuracies

def read(name):
    """The rows of a CSV file of this folder, none if there is none."""
    path = HERE / name
    if not path.exists():
        return []
    with open(path) as f:
        return list(csv.DictReader(f))

def write(name, row, columns=ROWS):
    """Adds a row to a CSV file of this folder."""
    with open(HERE / name, 'a', newline='') as f:
        writer = csv.writer(f, lineterminator='\n')
        if not f.tell():
            writer.writerow(columns)
        writer.writerow(row)

def machine():
    """What the runs run on."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = []
    if os.path.exists('/proc/cpuinfo'):         # on Linux
        with open('/proc/cpuinfo') as f:
            names = [line.split(':')[1].strip() for line in f if line.startswith('model name')]
    return f'{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads'

def tried(words):
    """{lr: rounds, inf for a miss} of the grid so far, of the cell with these flags."""
    return {float(row['lr']): float(row['rounds'] or 'inf') for row in read('eta.csv')
            if setting(row['flags']) == setting(words) and row['seed'] == str(SEED)}

def grid_of(words):
    """The grid of the cell with these flags."""
    return FINE if '--model lstm' in words else GRID

def check_eta(table, cell, words, paper, data_dir):
    """Runs a cell's eta, and then its neighbours, on seeds 8 and 9, into eta.csv."""
    done, grid = tried(words), grid_of(words)
    if not done:
        print(f'--check_eta: {cell} has no eta in results/eta.csv; run it first, without --lr',
              file=sys.stderr)
        return
    at = grid.index(min(done, key=done.get))
    ran = {(row['lr'], row['seed']): row['rounds'] for row in read('eta.csv')
           if setting(row['flags']) == setting(words)}
    for seed in (SEED + 1, SEED + 2):
        most = math.ceil(1.5 * (paper or UNKNOWN))
        for i in (at, at - 1, at + 1):
            if not 0 <= i < len(grid):
                continue
            reached = ran.get((str(grid[i]), str(seed)))
            if reached is None:
                reached, seconds, _ = run(words, grid[i], seed, most, data_dir)
                row = table, cell, words, grid[i], seed, reached, seconds, machine(), paper
                write('eta.csv', row)
            if i == at and reached:
                most = math.ceil(2 * float(reached))

def search(table, cell, words, paper, data_dir):
    """The best eta: goes from START, or the best one tried, along the grid in both directions, as
    long as the rounds become fewer. None if no eta reaches the target."""
    names = 'local_ep', 'local_bs', 'iid'
    E, B, iid = (words.split(f'--{name} ')[1].split()[0] for name in names)
    done, grid = tried(words), grid_of(words)
    # Clients that drift apart mostly need smaller steps.
    start = grid.index(FINE_START) if grid is FINE else (
        GRID.index(START[B]) - (E != '1' and iid == '0'))
    at = grid.index(min(done, key=done.get)) if done else start
    def rounds(i):
        if grid[i] not in done:
            print(f'--- {table}, {cell}: trying eta {grid[i]} on seed {SEED}', file=sys.stderr)
            limits = [math.ceil(v) for v in done.values() if v < math.inf]
            most = min([math.ceil(1.5 * (paper or UNKNOWN)), *limits])
            reached, seconds, _ = run(words, grid[i], SEED, most, data_dir)
            row = table, cell, words, grid[i], SEED, reached, seconds, machine(), paper
            write('eta.csv', row)
            done[grid[i]] = float(reached or 'inf')
        return done[grid[i]]
    best = at
    rounds(at)
    for step in (-1, 1):
        i = at + step
        while 0 <= i < len(grid) and (rounds(i) < rounds(best) or rounds(best) == math.inf):
            best, i = i, i + step
        if rounds(best) < rounds(at):
            break
    return grid[best] if rounds(best) < math.inf else None

################################## Tables and the figure ##################################

def as_text(rows):
    """A cell's rounds: the mean over the seeds that ran, and their range; its eta."""
    reached = [float(row['rounds']) for row in rows if row['rounds']]
    if not rows:
        return 'not run'
    ends = sorted(reached)[::max(len(reached) - 1, 1)]      # the fewest and the most
    spread = ' to '.join(f'{v:.1f}' for v in ends)
    if len(reached) < len(rows):
        most = max(math.ceil(1.5 * int(row['paper'] or UNKNOWN)) for row in rows)
        some = f'{len(rows) - len(reached)} of {len(rows)} ' * (len(rows) > 1)
        said = f'{some}not in {most} rounds' + f' (the others: {spread})' * bool(reached)
    else:
        said = f'**{statistics.mean(reached):.1f}** ({spread if reached[1:] else "one seed"})'
    etas = sorted({float(row['lr']) for row in rows if row['lr']})
    return ', '.join([said, *(f'η {eta:g}' for eta in etas)])

def columns(table):
    """The columns of a table, each a dict of what its cells have in common."""
    if table == 1:
        return [dict(B=B, iid=iid) for iid in (1, 0) for B in ('inf', 10)]
    return [dict(iid=1), dict(iid=0)]

def head(table, model):
    """A table's first two lines."""
    net = {'lstm': 'char-LSTM'}.get(model, '2NN' if model == '2nn' or table == 4 else 'CNN')
    fixed = ('E=1' if model == '2nn' else 'E=5') if table == 1 else 'C=0.1'
    heads = [('IID' if at['iid'] else 'non-IID') + (f', B={at["B"]}'.replace('inf', '∞')
             if 'B' in at else '') for at in columns(table)]
    line = ' | '.join(f'{name}: paper | here' for name in heads)
    return f'\n| Table {table}: {net}, {fixed} | {line} |\n|' + '---|' * (1 + 2 * len(heads))

def tables():
    """What has been run, as Markdown: a table for each of the paper's and each net, the paper's
    rounds beside ours."""
    ran, found = read('reproduce.csv'), cells()
    for table, model in ((1, '2nn'), (1, 'paper_cnn'), (2, 'paper_cnn'), (2, 'lstm'), (4, '')):
        names = [cell for t, cell in found if t == table and cell.startswith(model)]
        groups = dict.fromkeys(name.rsplit(',', 2 if table == 1 else 1)[0] for name in names)
        print(head(table, model))
        for group in groups:
            line = [group.removeprefix(f'{model},').replace(',', ', ')]
            for at in columns(table):
                cell = ','.join([group, *(f'{name}={v}' for name, v in at.items())])
                words, paper = found[table, cell]
                rows = {row['seed']: row for row in ran if setting(row['flags']) == setting(words)}
                line += [str(paper or '-'), as_text(list(rows.values()))]
            print('| ' + ' | '.join(line).replace('inf', '∞') + ' |')

def curves():
    """{net: [(E, B, iid, the best accuracy so far in percent after each round)]} of seed 0, for
    the cells of Tables 2 and 4; the latest curve of a cell that was run again."""
    latest = {(row['table'], row['cell']): row for row in read('curves.csv')
              if row['table'] != '1' and row['accuracies']}
    found = {}
    for (table, cell), row in latest.items():
        *net, E, B, iid = [part.split('=')[-1] for part in cell.split(',')]
        accuracies = (int(v) / 100 for v in row['accuracies'].split())
        found.setdefault('2nn' if table == '4' else net[0], []).append(
            (E, B, iid, list(itertools.accumulate(accuracies, max))))
    return found

def figure():
    """The curves against rounds, into results/rounds.png: a row of panels for each net, a colour
    for each B, a dash for each E."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit('--figure: needs matplotlib, which is not installed; pip install matplotlib')
    found = curves()
    nets = [net for net in PANELS if net in found]
    if not nets:
        sys.exit('--figure: results/curves.csv has no curve of Table 2 or 4 yet; run a cell first')
    picture = Figure((10, 4 * len(nets)), layout='constrained')
    colours = {'10': 'C3', '50': 'C1', 'inf': 'C0'}
    dashes = {'1': ':', '5': '-.', '10': '--', '20': '-'}
    for net, row in zip(nets, picture.subplots(len(nets), 2, sharey='row', squeeze=False)):
        name, target, lowest = PANELS[net]
        for iid, axes in zip('10', row):
            for E, B, at, y in sorted(found[net], key=lambda c: (float(c[0]), float(c[1]))):
                if at == iid:
                    axes.plot(range(1, len(y) + 1), y, colours[B] + dashes[E], linewidth=1,
                              label=f'B = {B.replace("inf", "∞")}, E = {E}')
            axes.axhline(target, color='gray', linewidth=0.5)
            axes.set(title=f'{name}, {"IID" if iid == "1" else "non-IID"}', xlabel='rounds',
                     ylabel='test accuracy, %' if iid == '1' else '', xscale='log',
                     ylim=(lowest, target + (target - lowest) / 17))
            if axes.lines[1:]:
                axes.legend(fontsize='small')
            else:
                axes.text(0.5, 0.5, 'not run', transform=axes.transAxes, ha='center')
    picture.savefig(HERE / 'rounds.png', dpi=100)
    print('written: results/rounds.png')

#################################### The command line ####################################

def parsed():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='./data')
    parser.add_argument('--table', type=int, choices=(1, 2, 4))
    parser.add_argument('--cell', help='as E=10,B=inf,iid=0: those that have all of these parts')
    parser.add_argument('--seeds', type=int, choices=range(1, SEED + 1),
                        help='how many; 3 if not given, but for C=0 and B=inf 1')
    parser.add_argument('--lr', type=float, help='an eta for the cells, instead of a search')
    parser.add_argument('--more', default='', help='flags for every run, as "--compile 1"; nothing '
                        'that a result depends on')
    parser.add_argument('--check_eta', action='store_true',
                        help='eta and its neighbours on two more seeds, instead of the cells')
    parser.add_argument('--show', action='store_true', help='the table of what has been run')
    parser.add_argument('--figure', action='store_true',
                        help='the curves of seed 0, which needs matplotlib')
    args = parser.parse_args()
    if args.lr is not None and (args.lr <= 0 or not args.cell or args.check_eta):
        parser.error(f'--lr {args.lr}: has to be above 0 and goes with --cell, without --check_eta')
    if (args.show or args.figure) and (args.table or args.cell):
        parser.error('--show and --figure take all cells; leave out --table and --cell')
    args.data_dir = os.path.abspath(args.data_dir)
    return args

def chosen(args):
    """{(table, cell): (flags, with --more, the paper's rounds)} that the command line asks for; a
    cell that stands in two tables once, under the later one's name, with the larger number."""
    found, parts = cells(), set((args.cell or '').split(',')) - {''}
    of_table = [key for key in found if args.table in (None, key[0])]
    names = {words: key for key, (words, _) in found.items()}
    papers = {}
    for words, paper in found.values():
        papers.setdefault(words, []).append(paper or 0)
    keys = [names[found[key][0]] for key in of_table if parts <= set(key[1].split(','))]
    if not keys:
        known = {part for _, cell in of_table for part in cell.split(',')}
        sys.exit(f'--cell {args.cell}: no cell has all of these parts; there are '
                 + ', '.join(sorted(known)))
    return {key: (f'{args.more} {words}'.strip(), max(papers[words]) or None)
            for key, (words, _) in found.items() if key in keys}

def missing(args, found):
    """{(table, cell): (seeds not run yet, a guess at what they cost)}, the cheapest first."""
    done = {(setting(row['flags']), row['seed']) for row in read('reproduce.csv')}
    todo = {}
    for key, (words, paper) in found.items():
        n = args.seeds or (1 if 'C=0.0' in key[1] or 'B=inf' in key[1] else 3)
        seeds = [seed for seed in range(n) if (setting(words), str(seed)) not in done]
        runs = len(seeds) + 4 * (not tried(words) and not args.lr)      # 4 runs search for eta
        if seeds:
            todo[key] = seeds, cost(words) * (paper or UNKNOWN) * runs
    return dict(sorted(todo.items(), key=lambda item: item[1][1]))

def reproduce(key, flags_and_paper, seeds, data_dir, lr):
    """Runs a cell for the seeds, with the eta given or, if it is None, the best one."""
    (table, cell), (words, paper) = key, flags_and_paper
    lr = lr or search(table, cell, words, paper, data_dir)
    for seed in seeds:
        reached, seconds, accuracies = '', 0, []
        if lr:
            most = math.ceil(1.5 * (paper or UNKNOWN))
            reached, seconds, accuracies = run(words, lr, seed, most, data_dir)
        if seed == 0:
            curve = ' '.join(f'{10000 * v:.0f}' for v in accuracies)
            write('curves.csv', (table, cell, lr, curve), CURVE)
        row = table, cell, words, lr or '', seed, reached, seconds, machine(), paper
        write('reproduce.csv', row)
        print(f'--- {table}, {cell}, eta {lr}, seed {seed}: {reached or "missed"} (the paper: '
              f'{paper})', file=sys.stderr)

def main():
    """Runs the cells that the command line asks for and that have not been run."""
    args = parsed()
    if args.show:
        return tables()
    if args.figure:
        return figure()
    found = chosen(args)
    if args.check_eta:
        for (table, cell), (words, paper) in found.items():
            check_eta(table, cell, words, paper, args.data_dir)
        return
    todo = missing(args, found)
    if not todo:
        print('all of it is in results/reproduce.csv already; --show prints it, and rows deleted '
              'there are run again', file=sys.stderr)
    remaining, speed = sum(guess for _, guess in todo.values()), []
    for key, (seeds, guess) in todo.items():
        began = time.time()
        reproduce(key, found[key], seeds, args.data_dir, args.lr)
        remaining -= guess
        speed.append((time.time() - began) / guess)
        hours = statistics.median(speed) * remaining / 3600
        print(f'--- about {hours:.1f} hours left', file=sys.stderr, flush=True)

if __name__ == '__main__':
    from options import run as quietly
    quietly(main)
