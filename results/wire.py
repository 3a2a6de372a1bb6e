"""Rounds and uploaded megabytes to 97 % under each setting of the wire, into results/wire.csv; goes on where it was stopped.

    python results/wire.py --data_dir DIR [--seeds 0 1 2] [--iid 1 0] [--only "--quantize 8"] [--show]

The 2NN on MNIST, C = 0.1, E = 5, B = 10. The learning rate is one for each partition, the best for fp32 of a grid on seed 7.
"""
import argparse
import csv
import itertools
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
SETTINGS = ['', '--quantize 8', '--quantize 4', '--quantize 2', '--quantize 1', '--topk 0.1', '--topk 0.1 --error_feedback 0', '--topk 0.01',
            '--topk 0.01 --error_feedback 0', '--topk 0.01 --quantize 4', '--topk 0.01 --quantize 4 --error_feedback 0',
            '--prune 0.5 --prune_end 10', '--prune 0.9 --prune_end 10', '--prune 0.95 --prune_end 10 --topk 0.1 --quantize 4']
LR, ROUNDS, TARGET = {1: 0.1, 0: 0.1}, {1: 100, 0: 300}, 0.97

def measure(words, data_dir, iid, seed):
    """One run's row: rounds and MB to the target as the program reports them, '' for a miss, and the seconds it took."""
    flags = f'--compile 1 --iid {iid} --local_ep 5 --lr {LR[iid]} --target {TARGET} --epochs {ROUNDS[iid]} --seed {seed} {words}'
    out = subprocess.run([sys.executable, str(HERE.parent / 'fedavg.py'), '--data_dir', data_dir, '--gpu', '-1', *flags.split()],
                         capture_output=True, text=True)
    lines = out.stdout.splitlines()
    if not lines or not lines[-1].startswith('rounds to'): sys.exit(f'{flags} failed:\n{out.stdout[-500:]}{out.stderr[-2000:]}')
    missed, last = 'not reached' in lines[-1], lines[-1].replace(',', '').split()
    seconds = next(line for line in lines if ' rounds in ' in line).split()[3]
    return dict(setting=words, iid=iid, seed=seed, rounds='' if missed else last[4], megabytes='' if missed else last[6], seconds=seconds)

def read(path):
    with open(path) as f: return list(csv.DictReader(f))

def table(path):
    """Mean rounds and MB of each setting, and how many times less than fp32's, as Markdown."""
    rows = read(path)
    print('| setting | IID: rounds | MB | less than fp32 | non-IID: rounds | MB | less than fp32 |\n|---|---|---|---|---|---|---|')
    def cell(words, iid):
        ran = [r for r in rows if r['setting'] == words and r['iid'] == str(iid)]
        reached = [r for r in ran if r['rounds']]
        if len(reached) < max(len(ran), 1): return None, f'{len(ran) - len(reached)} of {len(ran)} missed' if ran else 'not run'
        rounds, megabytes = ([float(r[name]) for r in reached] for name in ('rounds', 'megabytes'))
        return statistics.mean(megabytes), f'{statistics.mean(rounds):.1f} ({min(rounds):.1f} to {max(rounds):.1f})'
    for words in SETTINGS + sorted({r['setting'] for r in rows} - set(SETTINGS)):
        line = [f'`{words}`' if words else 'fp32']
        for iid in (1, 0):
            megabytes, rounds = cell(words, iid)
            fp32 = cell('', iid)[0]
            line += [rounds, f'{megabytes:.2f}' if megabytes else '', f'{fp32 / megabytes:.1f}' if megabytes and fp32 else '']
        print('| ' + ' | '.join(line) + ' |')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='./data')
    parser.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2])
    parser.add_argument('--iid', nargs='*', type=int, default=[1, 0])
    parser.add_argument('--only', nargs='*', default=SETTINGS)
    parser.add_argument('--show', action='store_true', help='the table of what has been run')
    args = parser.parse_args()
    path = HERE / 'wire.csv'
    if args.show: return table(path)
    done = {(r['setting'], r['iid'], r['seed']) for r in read(path)} if path.exists() else ()
    for iid, words, seed in itertools.product(args.iid, args.only, args.seeds):
        if (words, str(iid), str(seed)) in done: continue
        row = measure(words, os.path.abspath(args.data_dir), iid, seed)
        with open(path, 'a', newline='') as f:
            writer = csv.DictWriter(f, list(row), lineterminator='\n')
            if not f.tell(): writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)

if __name__ == '__main__':
    main()
