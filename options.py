"""The paper's symbols as command line flags (McMahan et al. 2017, Section 2), and their checks.

Nothing else in the project knows argparse. An invalid value ends the program with exit code 2 and
one line that names the flag, the value and what would be accepted, before any data are read; what
only the data can tell, before the first round.
This file needs the standard library only (device() needs torch).

    python fedavg.py --help
"""
import argparse
import contextlib
import difflib
import json
import math
import os
import signal
import sys
import time

# Training examples, channels and classes, which --num_users and the like are checked against.
DATASETS = {'mnist': (60000, 1, 10), 'fmnist': (60000, 1, 10), 'cifar': (50000, 3, 10),
            'synthetic': (60000, 1, 10), 'shakespeare': (85538, None, 75)}
ROLES = 1242        # of Shakespeare's plays: the clients
MODELS = '2nn', 'paper_cnn', 'mlp', 'cnn', 'lstm'
# What other projects call a flag of this one.
ELSEWHERE = {'rounds': 'epochs', 'num_rounds': 'epochs', 'comm_rounds': 'epochs', 'T': 'epochs',
             'num_clients': 'num_users', 'clients': 'num_users', 'K': 'num_users',
             'client_fraction': 'frac', 'fraction': 'frac', 'fraction_fit': 'frac', 'C': 'frac',
             'local_epochs': 'local_ep', 'E': 'local_ep', 'batch_size': 'local_bs',
             'local_batch_size': 'local_bs', 'B': 'local_bs', 'learning_rate': 'lr', 'eta': 'lr',
             'data': 'data_dir', 'data_path': 'data_dir', 'device': 'gpu', 'cuda': 'gpu',
             'non_iid': 'iid 0', 'dirichlet': 'alpha', 'log_dir': 'csv', 'secure': 'secagg'}
# These may differ between a run and its resumption: no weights depend on them.
FREE = {'epochs', 'data_dir', 'gpu', 'bs', 'target', 'verbose'}

################################ Values: text in, number out ################################

def fail(message, everyone=False):
    """Ends the program as every bad input does: one line on stderr, exit code 2. Of the processes
    that torchrun starts, the first one prints it, or everyone; torchrun's report ends with it.
    A BrokenPipeError is raised again: nobody reads the output any more."""
    if isinstance(message, BrokenPipeError):
        raise message
    line = f'fedavg.py: error: {message}'
    if everyone or os.environ.get('RANK', '0') == '0':
        print(line, file=sys.stderr)
    if os.environ.get('TORCHELASTIC_ERROR_FILE'):
        with open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w') as f:
            extra = {'py_callstack': line, 'timestamp': str(int(time.time()))}
            json.dump({'message': {'message': line, 'extraInfo': extra}}, f)
    sys.exit(2)

def attempt(step, *words):
    """step(*words). Data or a net that cannot be loaded (OSError, ValueError) end the program as
    bad input does."""
    try:
        return step(*words)
    except (OSError, ValueError) as e:
        fail(e, everyone=True)

def run(main):
    """Runs main as a script; Ctrl-C before round 1, and `head` that has read enough, end it
    quietly."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError) as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130 if isinstance(e, KeyboardInterrupt) else 141)

class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and a suggestion for a flag that does not exist."""
    def error(self, message):
        fail(message.removeprefix('argument '))

    def parse(self, argv):
        """The Namespace of argv; unknown flags end the program."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            what = 'there is no such flag' if unknown[0][0] == '-' else 'this is not a flag'
            fail(f'{unknown[0]}: {what}{self.suggestion(unknown[0])}')
        return args

    def suggestion(self, word):
        """What the user may have meant by word, as text."""
        name = word.lstrip('-').split('=')[0]
        known = [flag.lstrip('-') for flag in self._option_string_actions]
        plain = name.replace('-', '_')
        close = difflib.get_close_matches(plain, known, 1)
        meant = ELSEWHERE.get(plain) or ELSEWHERE.get(plain.lower()) or (close or [''])[0]
        is_known = meant.split(' ')[0] in known
        return f'; did you mean --{meant}?' if is_known else '; --help lists them all'

def number(kind, low, high=math.inf, hint='', above=False):
    """A flag's type: a finite `kind` in [low, high], or in (low, high] if `above`."""
    what = 'a whole number' if kind is int else 'a number'
    span = f'{what} {"above" if above else "of at least"} {low}'
    span += f' and at most {high}' if high < math.inf else ''
    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and low <= value <= high and not (above and value == low):
                return value
        hinted = f' ({hint})' if hint else ''
        raise argparse.ArgumentTypeError(f'{text!r} is invalid; expected {span}{hinted}')
    return parse

def batch_size(text):
    """--local_bs' type: a whole number, or inf."""
    return math.inf if text.lower() == 'inf' else number(int, 1, hint='or inf')(text)

def several(kind):
    """A flag's type: values of the type `kind`, separated by commas, as a tuple."""
    def parse(text):
        try:
            return tuple(kind(part) for part in text.split(','))
        except argparse.ArgumentTypeError as e:
            raise argparse.ArgumentTypeError(f'{e}; separate several by commas, as 1,0.5') from e
    return parse

def choice(*names):
    """A flag's type: one of the names, or module:name."""
    def parse(text):
        if text in names or all(part for part in text.partition(':')):
            return text
        raise argparse.ArgumentTypeError(
            f'{text!r} is invalid; expected {", ".join(names)}, or your own as module:name')
    return parse

def devices(text):
    """--gpu's type: a device's number, or two of different GPUs as a tuple."""
    if ',' not in text:
        return number(int, -1, hint='-1 is the CPU')(text)
    numbers = several(number(int, -1))(text)
    if len(numbers) > 2 or -1 in numbers or numbers[0] == numbers[1]:
        raise argparse.ArgumentTypeError(
            f'{text!r} is invalid; expected one device, or two different GPUs, as 0,1')
    return numbers

def writable(text):
    """A flag's type: the real path of a file that can be written, by way of one named .tmp. If its
    folder alone is missing, the run will make it."""
    path = os.path.realpath(text)
    folder = os.path.dirname(path)
    if not text or os.path.exists(path) and not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f'{text!r} is not a file; name one')
    parent = os.path.dirname(folder)
    if not os.path.exists(folder) and os.path.isdir(parent) and os.access(parent, os.W_OK):
        return path
    try:
        there = os.path.exists(path + '.tmp')
        with open(path + '.tmp', 'ab'):
            pass
        with contextlib.suppress(FileNotFoundError):    # another process was faster
            if not there:
                os.remove(path + '.tmp')
    except OSError as e:
        raise argparse.ArgumentTypeError(f'{text!r} cannot be written ({e.strerror}); name a file '
                                         'in a folder that you may write to') from e
    return path

def typed(value):
    """A flag's value as it is written on the command line."""
    if not isinstance(value, tuple):
        return value
    return ','.join(f'{v:g}' if isinstance(v, float) else str(v) for v in value)

######################################### The flags ##########################################

def args_parser(argv=None, rooms=()):
    """The command line as a Namespace. argv: a list of words, None for sys.argv.

    rooms: modules with flags(add), which defines more flags by add(name, default, kind, text), and
    check(args), both optional. Exits with code 2 on a senseless value.
    """
    parser = Parser(prog='fedavg.py', allow_abbrev=False,
                    description='Federated averaging: Algorithm 1 of McMahan et al. 2017.')
    flags(adder(parser.add_argument_group('the paper')))
    for room in rooms:
        if hasattr(room, 'flags'):
            about = room.__doc__.splitlines()[0].removesuffix('.')
            room.flags(adder(parser.add_argument_group(f'{room.__name__}: {about}')))
    args = parser.parse(argv)
    check(args)
    for room in rooms:
        for name, other, why in getattr(room, 'CLASHES', ()):
            clash(args, name, other, why)
        if hasattr(room, 'check'):
            room.check(args)
    return args

def adder(group):
    """add(name, default, kind, text, *aliases, **more), which defines a flag in the group; a kind
    of bool is a switch: 0, 1, or the flag alone."""
    def add(name, default, kind, text, *aliases, **more):
        if default is not None:
            text = f'{text} (default {default})'
        if kind is bool:
            kind, more = number(int, 0, 1), dict(nargs='?', const=1)
        group.add_argument(f'--{name}', *aliases, default=default, type=kind, help=text, **more)
    return add

def flags(add):
    """The paper's flags."""
    add('epochs', 60, number(int, 1), 'rounds t of training')
    add('num_users', None, number(int, 1), 'K, clients in all; the paper has 100 (default 100; '
        f"shakespeare's {ROLES} roles are the clients)")
    add('frac', 0.1, number(float, 0, 1),
        'C, fraction of clients in a round, m = max(round(C K), 1); the paper has 0 to 1')
    add('local_ep', 1, number(int, 1), 'E, local epochs; the paper has 1 to 20')
    add('local_bs', 10, batch_size,
        "B, local batch size, 'inf' for all of a client's data; the paper has 10, 50 and inf")
    add('lr', None, number(float, 0, 1e9, above=True),
        'eta, local learning rate; the paper picks it per cell of a table; for images, 0.1 was '
        'good here with B = 10 and 0.5 with B = inf (default 0.1; 1.47 for shakespeare, as in '
        'its Figure 3)')
    add('lr_decay', 1.0, number(float, 0, 1, above=True),
        'eta is multiplied by this each round; the paper has 0.99 on CIFAR')
    add('momentum', 0.0, number(float, 0, 0.9999), 'momentum of the local SGD; the paper has none')
    add('model', '2nn', choice(*MODELS),
        "2nn and paper_cnn are the paper's nets for images and lstm that for shakespeare, mlp and "
        'cnn those of the layout that this project mirrors; or module:Class, which is called with '
        'the flags')
    add('dataset', 'mnist', choice(*DATASETS),
        'mnist, fmnist, cifar, shakespeare, or synthetic, which needs no download; or '
        'module:function, which is called with --data_dir and returns training and test set')
    add('data_dir', './data', str, "torchvision's root folder, and that of shakespeare/; missing "
        'files are downloaded')
    add('num_channels', None, number(int, 1), "the images' channels; known from the data")
    add('num_classes', None, number(int, 1), 'classes; known from the data, unless yours lack some')
    add('iid', 1, bool, '1: shuffled; 0: sorted by label, two shards for each client, or the lines '
        'of a role of shakespeare')
    add('alpha', None, number(float, 0, above=True),
        'with --iid 0: a Dirichlet(alpha) split over the labels instead of shards')
    add('unequal', 0, bool, "1: the clients' sizes n_k differ by a log-normal factor")
    add('gpu', 0, devices, 'CUDA device, used when CUDA is present; -1 is the CPU')
    add('seed', 1, number(int, 0),
        'the one seed of partition, selection, initialization and shuffling')
    add('bs', 250, number(int, 1), 'batch size of the evaluation')
    add('target', None, number(float, 0, 1, above=True, hint='0.97 is 97 %'),
        'stop at this test accuracy and report the rounds that it took')
    add('verbose', 0, bool, '1: lines about each update too')

def check(args):
    """What no single flag can see: values that contradict each other or the data. Fills in the
    clients, eta, channels and classes of the data sets that it knows."""
    args.lr = args.lr or (1.47 if args.dataset == 'shakespeare' else 0.1)    # --lr is above 0
    check_text(args)
    n, channels, classes = DATASETS.get(args.dataset, (math.inf, None, None))
    for name, known in (('num_channels', channels), ('num_classes', classes)):
        given = getattr(args, name)
        if known and given not in (None, known):
            fail(f'--{name} {given}: {args.dataset} has {known}; leave the flag out')
        setattr(args, name, known or given)
    if args.num_users > n:
        fail(f'--num_users {args.num_users}: {args.dataset} has {n} training examples; take at '
             'most that many')
    if args.alpha and args.iid:
        fail(f'--alpha {args.alpha}: splits by label, which --iid 1 does not; add --iid 0')

def check_text(args):
    """Lines of text have their own net and, unless they are dealt out anew, their own clients."""
    text = args.dataset == 'shakespeare'
    if text != (args.model == 'lstm') and ':' not in args.model:
        fits = 'lstm' if text else '2nn or another net for images'
        fail(f'--model {args.model}: does not take the examples of {args.dataset}; take {fits}')
    if not text:
        args.num_users = args.num_users or 100
        return
    for name, there in (('num_users', args.num_users not in (None, ROLES)), ('alpha', args.alpha),
                        ('unequal', args.unequal)):
        if there:
            fail(f'--{name} {typed(getattr(args, name))}: the clients of shakespeare are the '
                 f'{ROLES} roles of its plays; leave the flag out')
    if args.num_channels:
        fail(f'--num_channels {args.num_channels}: lines of text have none; leave the flag out')
    args.num_users = ROLES

def device(gpu):
    """torch's CUDA device `gpu`, an int or the first of a tuple, under torchrun the LOCAL_RANK-th
    after it; the CPU for -1, or if there is no CUDA."""
    import torch
    first, *other = gpu if isinstance(gpu, tuple) else (gpu,)
    index, there = first + int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
    if first == -1 or not there:
        return torch.device('cpu')
    if max([index, *other]) >= there:
        fail(f'--gpu {typed(gpu)}: this machine has {there} GPU{"s"[:there != 1]}; take 0 to '
             f'{there - 1}, one for each process, or -1 for the CPU', everyone=True)
    return torch.device('cuda', index)

def clash(args, name, other, why):
    """Ends the program if the flag `name` is given beside another one that excludes it. Each may be
    a flag with one of its values, as 'dp user'. why: a relative clause."""
    given = []
    for words in (name, other):
        flag, _, only = words.partition(' ')
        value = getattr(args, flag)
        if not value or only and str(value) != only:
            return
        given.append(f'--{flag} {typed(value)}')
    fail(f'{given[0]}: does not go with {given[1]}, {why}; leave one of them out')

def requires(args, owner, names, there):
    """Ends the program if a flag of names is given without its owner, a flag such as '--dp user',
    which is there or not."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not there:
            fail(f'--{name} {typed(value)}: only goes with {owner}; add that, or leave this out')
