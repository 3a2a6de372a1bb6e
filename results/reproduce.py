"""The cells of Tables 1, 2 and 4 of McMahan et al. 2017, one run of fedavg.py each, into results/reproduce.csv; goes on
where it was stopped. The curves of seed 0 go into results/curves.csv.

    python results/reproduce.py --data_dir DIR --table 4                                      # every cell of it, the cheapest first
    python results/reproduce.py --data_dir DIR --table 4 --cell E=10,B=inf,iid=0 --seeds 1
    python results/reproduce.py --show                                                        # what has been run, as Markdown
    python results/reproduce.py --figure                                                      # results/rounds.png, like the paper's Figure 2

A cell's eta is the one of a grid with resolution 10^(1/3) that took the fewest rounds on seed 7, in results/eta.csv; where that has none
it is looked for first. A run that has not reached the target after 1.5 times the paper's rounds is a miss
(after 1500 where the paper has a dash); its rounds are blank, as those of a run that diverges and, in eta.csv, of one
that is no better than the best before it. The seconds are those since it was last started.
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

GRID = [round(10 ** (i / 3), 4) for i in range(-6, 1)]      # 0.01, 0.0215, 0.0464, 0.1, 0.2154, 0.4642, 1
START = {'10': 0.1, '50': 0.2154, 'inf': 0.4642}            # where the grid is entered: larger batches bear larger steps
UNKNOWN = 1000                                              # rounds, where the paper has a dash
SEED = 7                                                    # of the grid; never one of those reported
ROWS = ('table', 'cell', 'flags', 'lr', 'seed', 'rounds', 'seconds', 'machine', 'paper')
CURVE = ('table', 'cell', 'lr', 'accuracies')               # of seed 0, in hundredths of a percent, a number for each round

# Table 1: {C: rounds for IID B=inf, IID B=10, non-IID B=inf, non-IID B=10}; Tables 2 and 4: {(E, B): IID, non-IID}.
CNN1 = {0.0: (387, 50, 1181, 956), 0.1: (339, 18, 1100, 206), 0.2: (337, 18, 978, 200), 0.5: (164, 18, 1067, 261), 1.0: (246, 16, None, 97)}
NN1 = {0.0: (1455, 316, 4278, 3275), 0.1: (1474, 87, 1796, 664), 0.2: (1658, 77, 1528, 619), 0.5: (None, 75, None, 443), 1.0: (None, 70, None, 380)}
CNN2 = {(1, 'inf'): (626, 483), (5, 'inf'): (179, 1000), (1, 50): (65, 600), (20, 'inf'): (234, 672), (1, 10): (34, 350), (5, 50): (29, 334),
        (20, 50): (32, 426), (5, 10): (20, 229), (20, 10): (18, 173)}
NN4 = {(1, 'inf'): (1468, 1817), (10, 'inf'): (156, 1100), (1, 50): (144, 1183), (20, 'inf'): (92, 957), (1, 10): (92, 831), (10, 50): (45, 881),
       (20, 50): (39, 835), (10, 10): (34, 497), (20, 10): (32, 738)}

def cells():
    """{(table, cell): (flags, the paper's rounds or None)}, every cell of the three tables."""
    found = {}
    for model, E, target, of in (('2nn', 1, 0.97, NN1), ('paper_cnn', 5, 0.99, CNN1)):
        for C, rounds in of.items():
            for (iid, B), paper in zip(((1, 'inf'), (1, 10), (0, 'inf'), (0, 10)), rounds):
                found[1, f'{model},C={C},B={B},iid={iid}'] = flags(model, C, E, B, iid, target), paper
    for table, model, target, of in ((2, 'paper_cnn', 0.99, CNN2), (4, '2nn', 0.97, NN4)):
        for (E, B), rounds in of.items():
            for iid, paper in zip((1, 0), rounds): found[table, f'E={E},B={B},iid={iid}'] = flags(model, 0.1, E, B, iid, target), paper
    return found

def flags(model, C, E, B, iid, target):
    return f'--model {model} --frac {C} --local_ep {E} --local_bs {B} --iid {iid} --target {target}'

def cost(words):
    """A guess at the milliseconds of a round: the local steps of m clients, which cost more the larger B is, and the evaluation."""
    model, C, E, B, *_ = words.split()[1::2]
    B, m = min(float(B), 600), max(round(float(C) * 100), 1)
    return m * float(E) * 600 / B * ((0.25 + 0.0125 * B) if model == '2nn' else (2 + 0.85 * B)) + (100 if model == '2nn' else 3000)

def run(words, lr, seed, rounds, data_dir):
    """(rounds to the target or '', seconds since it was last started, test accuracies): one run of the program, at most so many rounds.
    One that was stopped goes on from results/*.pt; delete these after a change of the program."""
    import fedavg
    import torch
    torch._dynamo.reset()       # or --compile gives up after some runs in one process
    words = f'{words} --lr {lr} --seed {seed}'
    checkpoint = HERE / (words.replace('--', '').replace(' ', '_') + '.pt')
    began = time.time()
    argv = f'{words} --epochs {rounds} --save_every 10 --checkpoint'.split() + [str(checkpoint), '--data_dir', data_dir]
    try: history = fedavg.main(argv + ['--resume'] * checkpoint.exists())
    except SystemExit as e:         # 1: it diverged
        if e.code != 1: raise
        history = []
    checkpoint.unlink(missing_ok=True)      # another process may run the cell under the other table's name
    accuracies = [row['test_acc'] for row in history]
    reached = fedavg.rounds_to(float(words.split('--target ')[1].split()[0]), accuracies)
    return f'{reached:.1f}' if reached else '', f'{time.time() - began:.0f}', accuracies

def read(name):
    path = HERE / name
    if not path.exists(): return []
    with open(path) as f: return list(csv.DictReader(f))

def write(name, row, columns=ROWS):
    with open(HERE / name, 'a', newline='') as f:
        if not f.tell(): csv.writer(f, lineterminator='\n').writerow(columns)
        csv.writer(f, lineterminator='\n').writerow(row)

def machine():
    import torch
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    with open('/proc/cpuinfo') as f: name = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), platform.processor())
    return f'{name}, {torch.get_num_threads()} threads'

def setting(words):
    """What of a run's flags makes its cell, which may stand in two tables; --more's, which stand before it, do not."""
    return words.partition('--model ')[2]

def tried(words):
    """{lr: rounds, inf for a miss} of the grid so far, of the cell with these flags."""
    return {float(r['lr']): float(r['rounds'] or 'inf') for r in read('eta.csv') if setting(r['flags']) == setting(words)}

def search(table, cell, words, paper, data_dir):
    """The best eta: goes from START, or the best one tried, along the grid in both directions, as long as the rounds become fewer.
    None: no eta gets there."""
    E, B, iid = (words.split(f'--{name} ')[1].split()[0] for name in ('local_ep', 'local_bs', 'iid'))
    done, at = tried(words), GRID.index(START[B]) - (E != '1' and iid == '0')       # clients that drift apart mostly bear smaller ones
    if done: at = GRID.index(min(done, key=done.get))
    def rounds(i):
        if GRID[i] not in done:
            most = min([math.ceil(1.5 * (paper or UNKNOWN)), *(math.ceil(v) for v in done.values() if v < math.inf)])     # worse than the best is enough
            got, seconds, _ = run(words, GRID[i], SEED, most, data_dir)
            write('eta.csv', (table, cell, words, GRID[i], SEED, got, seconds, machine(), paper))
            done[GRID[i]] = float(got or 'inf')
        return done[GRID[i]]
    best = at
    rounds(at)
    for step in (-1, 1):
        i = at + step
        while 0 <= i < len(GRID) and (rounds(i) < rounds(best) or rounds(best) == math.inf): best, i = i, i + step
        if rounds(best) < rounds(at): break
    return GRID[best] if rounds(best) < math.inf else None

def shown(rows):
    """A cell's rounds: the mean over the seeds that ran, and their range; its eta."""
    reached = [float(r['rounds']) for r in rows if r['rounds']]
    if not rows: return 'not run'
    spread = f'{min(reached):.1f} to {max(reached):.1f}' if len(reached) > 1 else 'one seed'
    if len(reached) < len(rows): said = f'{len(rows) - len(reached)} of {len(rows)} missed' + (f' ({spread} of the others)' if len(reached) > 1 else '')
    else: said = f'**{statistics.mean(reached):.1f}** ({spread})'
    return f'{said}, η {float(rows[0]["lr"]):g}' if rows[0]['lr'] else said

def tables():
    """What has been run, as Markdown: a table for each of the paper's and each net, the paper's rounds beside ours."""
    ran, found = read('reproduce.csv'), cells()
    columns = lambda table: [dict(B=B, iid=iid) for iid in (1, 0) for B in ('inf', 10)] if table == 1 else [dict(iid=1), dict(iid=0)]
    for table, model in ((1, '2nn'), (1, 'paper_cnn'), (2, ''), (4, '')):
        names = [cell for t, cell in found if t == table and cell.startswith(model)]
        groups = list(dict.fromkeys(name.rsplit(',', 2 if table == 1 else 1)[0] for name in names))
        heads = [('IID' if at['iid'] else 'non-IID') + (f', B={at["B"]}'.replace('inf', '∞') if 'B' in at else '') for at in columns(table)]
        what = '2NN, E=1' if model == '2nn' else 'CNN, E=5' if table == 1 else f'{"CNN" if table == 2 else "2NN"}, C=0.1'
        print(f'\n| Table {table}: {what} | ' + ' | '.join(f'{head}: paper | here' for head in heads) + ' |\n|' + '---|' * (1 + 2 * len(heads)))
        for group in groups:
            line = [group.removeprefix(f'{model},').replace(',', ', ')]
            for at in columns(table):
                cell = ','.join([group, *(f'{name}={v}' for name, v in at.items())])
                words, paper = found[table, cell]
                rows = {r['seed']: r for r in ran if setting(r['flags']) == setting(words)}
                line += [str(paper or '-'), shown(list(rows.values()))]
            print('| ' + ' | '.join(line).replace('inf', '∞') + ' |')

def figure():
    """The best test accuracy so far against rounds for Table 4's cells, seed 0, into results/rounds.png: a colour for each B, a dash for each E."""
    try: from matplotlib.figure import Figure
    except ImportError: sys.exit('--figure: needs matplotlib, which is not installed; pip install matplotlib')
    picture = Figure((10, 4), layout='constrained')
    colours, dashes = {'10': 'C3', '50': 'C1', 'inf': 'C0'}, {'1': ':', '5': '-.', '10': '--', '20': '-'}
    for iid, axes in zip((1, 0), picture.subplots(1, 2, sharey=True)):
        latest = {(row['table'], row['cell']): row for row in read('curves.csv')}       # of a cell that was run anew
        for row in sorted(latest.values(), key=lambda row: [float(v.split('=')[1]) for v in row['cell'].split(',')[-3:]]):
            E, B, at = (v.split('=')[1] for v in row['cell'].split(',')[-3:])
            if (row['table'], at) != ('4', str(iid)): continue
            y = list(itertools.accumulate((int(v) / 100 for v in row['accuracies'].split()), max))
            axes.plot(range(1, len(y) + 1), y, colours[B] + dashes[E], linewidth=1, label=f'B = {B.replace("inf", "∞")}, E = {E}')
        axes.axhline(97, color='gray', linewidth=0.5)
        axes.set(title='IID' if iid else 'non-IID', xlabel='rounds', ylabel='test accuracy, %' if iid else '', xscale='log', ylim=(80, 98))
        if axes.lines[1:]: axes.legend(fontsize='small')
    picture.savefig(HERE / 'rounds.png', dpi=100)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='./data')
    parser.add_argument('--table', type=int, choices=(1, 2, 4))
    parser.add_argument('--cell', help='as E=10,B=inf,iid=0: those that have all of these parts')
    parser.add_argument('--seeds', type=int, choices=range(1, SEED + 1), help='how many; 3 if not given, but for C=0 and B=inf 1')
    parser.add_argument('--more', default='', help='flags for every run, as "--compile 1"; nothing that a result depends on')
    parser.add_argument('--show', action='store_true', help='the table of what has been run')
    parser.add_argument('--figure', action='store_true', help='Table 4\'s curves, which needs matplotlib')
    args = parser.parse_args()
    if args.show: return tables()
    if args.figure: return figure()
    parts, data_dir = set((args.cell or '').split(',')) - {''}, os.path.abspath(args.data_dir)
    found = cells()
    names = {words: key for key, (words, _) in found.items()}       # of a cell in two tables, the later one's
    chosen = {names[words]: (words, found[names[words]][1]) for (table, cell), (words, _) in found.items()
              if args.table in (None, table) and parts <= set(cell.split(','))}
    if not chosen: sys.exit(f'--cell {args.cell}: no such cell; there are ' + '; '.join(cell for table, cell in found if args.table in (None, table)))
    done = {(setting(r['flags']), r['seed']) for r in read('reproduce.csv')}
    todo = {}           # {(table, cell): (seeds, a guess at what they cost)}
    for key, (words, paper) in chosen.items():
        n = args.seeds or (1 if 'C=0.0' in key[1] or 'B=inf' in key[1] else 3)
        seeds = [seed for seed in range(n) if (setting(words), str(seed)) not in done]
        if seeds: todo[key] = seeds, cost(words) * (paper or UNKNOWN) * (len(seeds) + 4 * (not tried(words)))       # 4 runs look for eta
    if not todo: print('all of it is in results/reproduce.csv already; --show prints it, and rows deleted there are run anew', file=sys.stderr)
    left, speed = sum(guess for _, guess in todo.values()), []
    for (table, cell), (seeds, guess) in sorted(todo.items(), key=lambda item: item[1][1]):
        (words, paper), began = chosen[table, cell], time.time()
        words = f'{args.more} {words}'.strip()
        lr = search(table, cell, words, paper, data_dir)
        for seed in seeds:
            got, seconds, accuracies = run(words, lr, seed, math.ceil(1.5 * (paper or UNKNOWN)), data_dir) if lr else ('', 0, [])
            if seed == 0: write('curves.csv', (table, cell, lr, ' '.join(f'{10000 * v:.0f}' for v in accuracies)), CURVE)
            write('reproduce.csv', (table, cell, words, lr or '', seed, got, seconds, machine(), paper))
            print(f'--- {table}, {cell}, eta {lr}, seed {seed}: {got or "missed"} (the paper: {paper})', file=sys.stderr)
        left -= guess
        speed.append((time.time() - began) / guess)
        print(f'--- about {statistics.median(speed) * left / 3600:.1f} hours left', file=sys.stderr, flush=True)

if __name__ == '__main__':
    main()
